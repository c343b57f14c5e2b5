"""The family of Adam: recursions in NumPy, and cases."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from parity_tests.optimizers.case import Case, Gradient, Leaves, Rate, at, decays, no_bias


def adam(
    params: Leaves,
    gradient: Gradient,
    *,
    lr: Rate = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    amsgrad: bool = False,
    maximize: bool = False,
    decoupled_weight_decay: bool = False,
    mask: Callable[[str], bool] | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Compute the steps of `torch.optim.Adam`.

    Args:
        params: Initial parameters.
        gradient: Maps parameters and step (from 0) to gradients.
        lr: Learning rate, or a function of the step.
        betas: Decay rates of the two moments.
        eps: Added to the root.
        weight_decay: Coupled decay, or decoupled with `decoupled_weight_decay`.
        amsgrad: Whether to divide by the largest second moment so far, before bias correction.
        maximize: Whether to maximize.
        decoupled_weight_decay: Whether the decay bypasses the moments.
        mask: Returns whether a parameter of a given name decays; None for all.

    Yields:
        The parameters after each step, indefinitely.

    Example:
        >>> walk = adam({"w": np.array([1.0])}, lambda params, step: params, lr=0.5, eps=0.0)
        >>> next(walk)["w"].item()
        0.5
    """
    b1, b2 = betas
    params, step = dict(params), 0
    m = {name: np.zeros_like(w) for name, w in params.items()}
    v = {name: np.zeros_like(w) for name, w in params.items()}
    largest = {name: np.zeros_like(w) for name, w in params.items()}
    while True:
        for name, raw in gradient(params, step).items():
            w, g, eta = params[name], -raw if maximize else raw, at(lr, step)
            decay = weight_decay * decays(mask, name)
            if decoupled_weight_decay:
                w = w - eta * decay * w
            else:
                g = g + decay * w
            m[name] = b1 * m[name] + (1 - b1) * g
            v[name] = b2 * v[name] + (1 - b2) * g * g
            largest[name] = np.maximum(largest[name], v[name])
            second = largest[name] if amsgrad else v[name]
            corrected = m[name] / (1 - b1 ** (step + 1)), second / (1 - b2 ** (step + 1))
            params[name] = w - eta * corrected[0] / (np.sqrt(corrected[1]) + eps)
        step += 1
        yield dict(params)


def adamw(
    params: Leaves, gradient: Gradient, *, weight_decay: float = 1e-2, **options
) -> Iterator[dict[str, np.ndarray]]:
    """Compute the steps of `torch.optim.AdamW`: `adam` with decoupled decay of another default.

    Args:
        params: Initial parameters.
        gradient: Maps parameters and step (from 0) to gradients.
        weight_decay: Decoupled decay.
        **options: The other options of `adam`.

    Returns:
        An indefinite iterator over the parameters after each step.

    Example:
        >>> walk = adamw({"w": np.array([1.0])}, lambda params, step: {"w": np.zeros(1)}, lr=0.5)
        >>> next(walk)["w"].item()
        0.995
    """
    return adam(params, gradient, weight_decay=weight_decay, decoupled_weight_decay=True, **options)


def nadam(
    params: Leaves,
    gradient: Gradient,
    *,
    lr: Rate = 2e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    momentum_decay: float = 4e-3,
    decoupled_weight_decay: bool = False,
    maximize: bool = False,
    mask: Callable[[str], bool] | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Compute the steps of `torch.optim.NAdam`.

    Args:
        params: Initial parameters.
        gradient: Maps parameters and step (from 0) to gradients.
        lr: Learning rate, or a function of the step.
        betas: Decay rates of the two moments.
        eps: Added to the root.
        weight_decay: Coupled decay, or decoupled with `decoupled_weight_decay`.
        momentum_decay: Rate at which the momentum warms up.
        decoupled_weight_decay: Whether the decay bypasses the moments.
        maximize: Whether to maximize.
        mask: Returns whether a parameter of a given name decays; None for all.

    Yields:
        The parameters after each step, indefinitely.

    Example:
        >>> options = {"lr": 0.5, "betas": (0.0, 0.0), "eps": 0.0}
        >>> walk = nadam({"w": np.array([1.0])}, lambda params, step: params, **options)
        >>> next(walk)["w"].item()
        0.5
    """
    b1, b2 = betas
    params, step = dict(params), 0
    m = {name: np.zeros_like(w) for name, w in params.items()}
    v = {name: np.zeros_like(w) for name, w in params.items()}
    # torch keeps this one number in float32 for parameters of any dtype.
    kept = np.float32(1)
    while True:
        mu, mu_next = (b1 * (1 - 0.5 * 0.96 ** (t * momentum_decay)) for t in (step + 1, step + 2))
        kept = kept * np.float32(mu)
        product = float(kept)
        for name, raw in gradient(params, step).items():
            w, g, eta = params[name], -raw if maximize else raw, at(lr, step)
            decay = weight_decay * decays(mask, name)
            if decoupled_weight_decay:
                w = w - eta * decay * w
            else:
                g = g + decay * w
            m[name] = b1 * m[name] + (1 - b1) * g
            v[name] = b2 * v[name] + (1 - b2) * g * g
            ahead = mu_next * m[name] / (1 - product * mu_next) + (1 - mu) * g / (1 - product)
            root = np.sqrt(v[name] / (1 - b2 ** (step + 1)))
            params[name] = w - eta * ahead / (root + eps)
        step += 1
        yield dict(params)


def radam(
    params: Leaves,
    gradient: Gradient,
    *,
    lr: Rate = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = False,
    maximize: bool = False,
    mask: Callable[[str], bool] | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Compute the steps of `torch.optim.RAdam`.

    Args:
        params: Initial parameters.
        gradient: Maps parameters and step (from 0) to gradients.
        lr: Learning rate, or a function of the step.
        betas: Decay rates of the two moments.
        eps: Added to the root of the second moment, before bias correction.
        weight_decay: Coupled decay, or decoupled with `decoupled_weight_decay`.
        decoupled_weight_decay: Whether the decay bypasses the moments.
        maximize: Whether to maximize.
        mask: Returns whether a parameter of a given name decays; None for all.

    Yields:
        The parameters after each step, indefinitely.

    Example:
        >>> walk = radam({"w": np.array([1.0])}, lambda params, step: params, lr=0.5)
        >>> round(next(walk)["w"].item(), 12)
        0.5
    """
    b1, b2 = betas
    params, step = dict(params), 0
    m = {name: np.zeros_like(w) for name, w in params.items()}
    v = {name: np.zeros_like(w) for name, w in params.items()}
    rho_inf = 2 / (1 - b2) - 1
    while True:
        t = step + 1
        rho = rho_inf - 2 * t * b2**t / (1 - b2**t)
        for name, raw in gradient(params, step).items():
            w, g, eta = params[name], -raw if maximize else raw, at(lr, step)
            decay = weight_decay * decays(mask, name)
            if decoupled_weight_decay:
                w = w - eta * decay * w
            else:
                g = g + decay * w
            m[name] = b1 * m[name] + (1 - b1) * g
            v[name] = b2 * v[name] + (1 - b2) * g * g
            update = m[name] / (1 - b1**t)
            if rho > 5:
                rest = (rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)
                update = update * rest**0.5 * (1 - b2**t) ** 0.5 / (np.sqrt(v[name]) + eps)
            params[name] = w - eta * update
        step += 1
        yield dict(params)


def adamax(
    params: Leaves,
    gradient: Gradient,
    *,
    lr: Rate = 2e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    maximize: bool = False,
    mask: Callable[[str], bool] | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Compute the steps of `torch.optim.Adamax`.

    Args:
        params: Initial parameters.
        gradient: Maps parameters and step (from 0) to gradients.
        lr: Learning rate, or a function of the step.
        betas: Decay rates of the first moment and of the largest gradient.
        eps: Added to the size of each gradient.
        weight_decay: Coupled decay.
        maximize: Whether to maximize.
        mask: Returns whether a parameter of a given name decays; None for all.

    Yields:
        The parameters after each step, indefinitely.

    Example:
        >>> walk = adamax({"w": np.array([1.0])}, lambda params, step: params, lr=0.5, eps=0.0)
        >>> next(walk)["w"].item()
        0.5
    """
    b1, b2 = betas
    params, step = dict(params), 0
    m = {name: np.zeros_like(w) for name, w in params.items()}
    largest = {name: np.zeros_like(w) for name, w in params.items()}
    while True:
        for name, raw in gradient(params, step).items():
            w, g = params[name], -raw if maximize else raw
            g = g + weight_decay * decays(mask, name) * w
            m[name] = b1 * m[name] + (1 - b1) * g
            largest[name] = np.maximum(b2 * largest[name], np.abs(g) + eps)
            params[name] = w - at(lr, step) * m[name] / (1 - b1 ** (step + 1)) / largest[name]
        step += 1
        yield dict(params)


# Coupled decay drives a parameter without a gradient to zero, where only eps limits the step: with
# eps=1e-8, a relative change of 2e-16 of the initial value changes torch's result within 40 steps.
_DAMPED = {"lr": 0.01, "weight_decay": 0.1, "eps": 1e-3}

CASES = (
    Case("adam", "Adam", {"lr": 0.01}),
    Case("adam-decay", "Adam", {"lr": 0.01, "weight_decay": 0.1}),
    Case("adam-amsgrad", "Adam", {"lr": 0.01, "weight_decay": 0.1, "amsgrad": True}),
    Case("adam-betas", "Adam", {"lr": 0.01, "betas": (0.5, 0.99999)}),
    Case("adam-betas-zero", "Adam", {"lr": 0.01, "betas": (0.0, 0.0), "eps": 1e-3}),
    Case("adam-eps", "Adam", {"lr": 0.01, "eps": 0.1, "amsgrad": True}),
    Case("adam-maximize", "Adam", {"lr": 0.01, "weight_decay": 0.1, "maximize": True}),
    Case(
        "adam-decoupled",
        "Adam",
        {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True},
    ),
    Case("adam-schedule", "Adam", {"lr": 0.01, "weight_decay": 0.1}, half_life=30),
    Case("adam-mask", "Adam", {"lr": 0.01, "weight_decay": 0.1}, mask=no_bias),
    Case("adamw", "AdamW", {"lr": 0.01}),
    Case("adamw-amsgrad", "AdamW", {"lr": 0.01, "weight_decay": 1.0, "amsgrad": True}),
    Case("adamw-maximize", "AdamW", {"lr": 0.01, "weight_decay": 1.0, "maximize": True}),
    Case("adamw-schedule", "AdamW", {"lr": 0.01, "weight_decay": 1.0}, half_life=30),
    Case("adamw-mask", "AdamW", {"lr": 0.01, "weight_decay": 1.0}, mask=no_bias),
    Case("nadam", "NAdam", {"lr": 0.01}),
    Case("nadam-decay", "NAdam", _DAMPED),
    Case(
        "nadam-decoupled",
        "NAdam",
        {"lr": 0.01, "weight_decay": 1.0, "decoupled_weight_decay": True},
    ),
    Case("nadam-betas", "NAdam", {"lr": 0.01, "betas": (0.5, 0.99999)}),
    Case("nadam-momentum", "NAdam", {"lr": 0.01, "betas": (0.99, 0.999), "momentum_decay": 0.5}),
    Case("nadam-betas-zero", "NAdam", {"lr": 0.01, "betas": (0.0, 0.0), "eps": 1e-3}),
    Case("nadam-eps", "NAdam", {"lr": 0.01, "eps": 0.1}),
    Case("nadam-maximize", "NAdam", {**_DAMPED, "maximize": True}),
    Case("nadam-schedule", "NAdam", {"lr": 0.01, "weight_decay": 0.1}, half_life=30),
    Case("nadam-mask", "NAdam", _DAMPED, mask=no_bias),
    Case("radam", "RAdam", {"lr": 0.01}),
    Case("radam-decay", "RAdam", _DAMPED),
    Case(
        "radam-decoupled",
        "RAdam",
        {"lr": 0.01, "weight_decay": 1.0, "decoupled_weight_decay": True},
    ),
    # With such a long memory, torch's rho_t has a relative error of 7e-8 even in double.
    Case("radam-betas", "RAdam", {"lr": 0.01, "betas": (0.5, 0.99999)}, float64=1e-10),
    Case("radam-short", "RAdam", {"lr": 0.01, "betas": (0.9, 0.5)}),
    Case("radam-betas-zero", "RAdam", {"lr": 0.01, "betas": (0.0, 0.0), "eps": 1e-3}),
    Case("radam-eps", "RAdam", {"lr": 0.01, "eps": 0.1}),
    Case("radam-maximize", "RAdam", {**_DAMPED, "maximize": True}),
    Case("radam-schedule", "RAdam", {"lr": 0.01, "weight_decay": 0.1}, half_life=30),
    Case("radam-mask", "RAdam", _DAMPED, mask=no_bias),
    Case("adamax", "Adamax", {"lr": 0.01}),
    Case("adamax-decay", "Adamax", {"lr": 0.01, "weight_decay": 0.1}),
    Case("adamax-betas", "Adamax", {"lr": 0.01, "betas": (0.5, 0.99999)}),
    Case("adamax-betas-zero", "Adamax", {"lr": 0.01, "betas": (0.0, 0.0), "eps": 1e-3}),
    Case("adamax-eps", "Adamax", {"lr": 0.01, "eps": 0.1}),
    Case("adamax-maximize", "Adamax", {"lr": 0.01, "weight_decay": 0.1, "maximize": True}),
    Case("adamax-schedule", "Adamax", {"lr": 0.01, "weight_decay": 0.1}, half_life=30),
    Case("adamax-mask", "Adamax", {"lr": 0.01, "weight_decay": 0.1}, mask=no_bias),
)
