"""SGD, ASGD and Rprop: their recursions in NumPy, and cases."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from parity_tests.optimizers.case import Case, Gradient, Leaves, Rate, at, decays, no_bias


def sgd(
    params: Leaves,
    gradient: Gradient,
    *,
    lr: Rate = 1e-3,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    mask: Callable[[str], bool] | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Compute the steps of `torch.optim.SGD`.

    Args:
        params: Initial parameters.
        gradient: Maps parameters and step (from 0) to gradients.
        lr: Learning rate, or a function of the step.
        momentum: Factor of the buffer.
        dampening: Fraction of each gradient after the first that is not added to the buffer.
        weight_decay: Coupled decay.
        nesterov: Whether to use Nesterov momentum.
        maximize: Whether to maximize.
        mask: Returns whether a parameter of a given name decays; None for all.

    Yields:
        The parameters after each step, indefinitely.

    Example:
        >>> walk = sgd({"w": np.array([1.0])}, lambda params, step: params, lr=0.5)
        >>> next(walk)["w"].item(), next(walk)["w"].item()
        (0.5, 0.25)
    """
    params, buffers, step = dict(params), {}, 0
    while True:
        for name, raw in gradient(params, step).items():
            w = params[name]
            g = (-raw if maximize else raw) + weight_decay * decays(mask, name) * w
            if momentum:
                buffers[name] = momentum * buffers[name] + (1 - dampening) * g if step else g
                g = g + momentum * buffers[name] if nesterov else buffers[name]
            params[name] = w - at(lr, step) * g
        step += 1
        yield dict(params)


def asgd(
    params: Leaves,
    gradient: Gradient,
    *,
    lr: Rate = 1e-2,
    lambd: float = 1e-4,
    alpha: float = 0.75,
    t0: float = 1e6,
    weight_decay: float = 0.0,
    maximize: bool = False,
    mask: Callable[[str], bool] | None = None,
    averaged: bool = False,
) -> Iterator[dict[str, np.ndarray]]:
    """Compute the steps of `torch.optim.ASGD`, with step size and weight stored in float32.

    Args:
        params: Initial parameters.
        gradient: Maps parameters and step (from 0) to gradients.
        lr: Learning rate, or a function of the step, whose value affects the next step.
        lambd: Decay of parameters and of the step size.
        alpha: Exponent of the decay of the step size.
        t0: Number of steps before averaging starts.
        weight_decay: Coupled decay.
        maximize: Whether to maximize.
        mask: Returns whether a parameter of a given name decays; None for all.
        averaged: Whether to yield the averages instead of the parameters.

    Yields:
        The parameters after each step, indefinitely.

    Example:
        >>> walk = asgd({"w": np.array([1.0])}, lambda params, step: params, lr=0.5, lambd=0.0)
        >>> next(walk)["w"].item(), next(walk)["w"].item()
        (0.5, 0.25)
    """
    params, averages, step = dict(params), {}, 0
    eta, mu = float(np.float32(at(lr, 0))), 1.0
    while True:
        for name, raw in gradient(params, step).items():
            w = params[name]
            g = (-raw if maximize else raw) + weight_decay * decays(mask, name) * w
            params[name] = w * w.dtype.type(1 - lambd * eta) - eta * g
            past = averages.get(name, params[name])
            averages[name] = past + mu * (params[name] - past) if mu != 1 else params[name]
        step += 1
        rate = at(lr, step - 1)
        eta = float(np.float32(rate / (1 + lambd * rate * step) ** alpha))
        mu = float(np.float32(1 / max(1, step - t0)))
        yield dict(averages if averaged else params)


def rprop(
    params: Leaves,
    gradient: Gradient,
    *,
    lr: float = 1e-2,
    etas: tuple[float, float] = (0.5, 1.2),
    step_sizes: tuple[float, float] = (1e-6, 50.0),
    maximize: bool = False,
) -> Iterator[dict[str, np.ndarray]]:
    """Compute the steps of `torch.optim.Rprop`.

    Args:
        params: Initial parameters.
        gradient: Maps parameters and step (from 0) to gradients.
        lr: The initial step size.
        etas: Factors of a step size where the sign changes, and where it does not.
        step_sizes: The smallest and the largest step size.
        maximize: Whether to maximize.

    Yields:
        The parameters after each step, indefinitely.

    Example:
        >>> walk = rprop({"w": np.array([1.0])}, lambda params, step: params, lr=0.75)
        >>> next(walk)["w"].item(), round(next(walk)["w"].item(), 3)
        (0.25, -0.65)
    """
    params, step = dict(params), 0
    before = {name: np.zeros_like(w) for name, w in params.items()}
    sizes = {name: np.full_like(w, lr) for name, w in params.items()}
    while True:
        for name, raw in gradient(params, step).items():
            g = -raw if maximize else raw
            turn = np.sign(g) * np.sign(before[name])
            factor = np.select([turn < 0, turn > 0], etas, 1.0).astype(g.dtype)
            sizes[name] = np.clip(sizes[name] * factor, *step_sizes)
            before[name] = np.where(turn < 0, 0, g)
            params[name] = params[name] - sizes[name] * np.sign(before[name])
        step += 1
        yield dict(params)


def _equal(name: str, optimizer: str, options: dict[str, Any], **others: Any) -> Case:
    """Return a case in which JAX and torch have the same bits in float32."""
    return Case(name, optimizer, options, float32=None, **others)


CASES = (
    _equal("sgd", "SGD", {"lr": 0.1}),
    _equal("sgd-decay", "SGD", {"lr": 0.1, "weight_decay": 0.1}),
    _equal("sgd-momentum", "SGD", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
    _equal("sgd-dampening", "SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.4}),
    _equal("sgd-dampening-only", "SGD", {"lr": 0.1, "dampening": 0.4, "weight_decay": 0.1}),
    _equal(
        "sgd-nesterov",
        "SGD",
        {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    ),
    _equal("sgd-maximize", "SGD", {"lr": 0.1, "weight_decay": 0.1, "maximize": True}),
    _equal("sgd-schedule", "SGD", {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.1}, half_life=30),
    _equal("sgd-mask", "SGD", {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.1}, mask=no_bias),
    _equal(
        "sgd-all",
        "SGD",
        {"lr": 0.1, "momentum": 0.9, "dampening": 0.4, "weight_decay": 0.1, "maximize": True},
        mask=no_bias,
        half_life=300,
    ),
    _equal(
        "sgd-nesterov-maximize",
        "SGD",
        {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "maximize": True},
    ),
    Case("asgd", "ASGD", {"lr": 0.1}),
    Case("asgd-decay", "ASGD", {"lr": 0.1, "lambd": 1e-2, "alpha": 0.5, "weight_decay": 0.1}),
    Case("asgd-maximize", "ASGD", {"lr": 0.1, "weight_decay": 0.1, "maximize": True}),
    Case("asgd-schedule", "ASGD", {"lr": 0.1, "lambd": 1e-2}, half_life=300),
    Case("asgd-mask", "ASGD", {"lr": 0.1, "weight_decay": 0.1, "t0": 10}, mask=no_bias),
    # In training, the sign of a vanishing gradient is that of its rounding error.
    _equal("rprop", "Rprop", {"lr": 0.01}),
    _equal("rprop-etas", "Rprop", {"lr": 0.01, "etas": (0.7, 1.5)}),
    _equal("rprop-sizes", "Rprop", {"lr": 0.5, "step_sizes": (1e-3, 0.1)}),
    _equal("rprop-maximize", "Rprop", {"lr": 0.01, "maximize": True}),
)
