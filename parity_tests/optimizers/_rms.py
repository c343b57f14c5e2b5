"""Adagrad, Adadelta and RMSprop: their recursions in NumPy, and cases."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from parity_tests.optimizers.case import Case, Gradient, Leaves, Rate, at, decays, no_bias


def adagrad(
    params: Leaves,
    gradient: Gradient,
    *,
    lr: Rate = 1e-2,
    lr_decay: float = 0.0,
    weight_decay: float = 0.0,
    initial_accumulator_value: float = 0.0,
    eps: float = 1e-10,
    maximize: bool = False,
    mask: Callable[[str], bool] | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Compute the steps of `torch.optim.Adagrad`.

    Args:
        params: Initial parameters.
        gradient: Maps parameters and step (from 0) to gradients.
        lr: Learning rate, or a function of the step.
        lr_decay: Increment of the divisor of the learning rate at each step.
        weight_decay: Coupled decay.
        initial_accumulator_value: Initial value of the sums of squares.
        eps: Added to the root.
        maximize: Whether to maximize.
        mask: Returns whether a parameter of a given name decays; None for all.

    Yields:
        The parameters after each step, indefinitely.

    Example:
        >>> walk = adagrad({"w": np.array([1.0])}, lambda params, step: params, lr=0.5, eps=0.0)
        >>> next(walk)["w"].item()
        0.5
    """
    params, step = dict(params), 0
    sums = {name: np.full_like(w, initial_accumulator_value) for name, w in params.items()}
    while True:
        for name, raw in gradient(params, step).items():
            w = params[name]
            g = (-raw if maximize else raw) + weight_decay * decays(mask, name) * w
            sums[name] = sums[name] + g * g
            eta = at(lr, step) / (1 + step * lr_decay)
            params[name] = w - eta * (g / (np.sqrt(sums[name]) + eps))
        step += 1
        yield dict(params)


def adadelta(
    params: Leaves,
    gradient: Gradient,
    *,
    lr: Rate = 1.0,
    rho: float = 0.9,
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    maximize: bool = False,
    mask: Callable[[str], bool] | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Compute the steps of `torch.optim.Adadelta`.

    Args:
        params: Initial parameters.
        gradient: Maps parameters and step (from 0) to gradients.
        lr: Learning rate, or a function of the step.
        rho: Decay rate of the means of squared gradients and of squared steps.
        eps: Added inside both roots.
        weight_decay: Coupled decay.
        maximize: Whether to maximize.
        mask: Returns whether a parameter of a given name decays; None for all.

    Yields:
        The parameters after each step, indefinitely.

    Example:
        >>> start = {"w": np.array([1.0])}
        >>> walk = adadelta(start, lambda params, step: params, rho=0.25, eps=0.25)
        >>> next(walk)["w"].item()
        0.5
    """
    params, step = dict(params), 0
    v = {name: np.zeros_like(w) for name, w in params.items()}
    u = {name: np.zeros_like(w) for name, w in params.items()}
    while True:
        for name, raw in gradient(params, step).items():
            w = params[name]
            g = (-raw if maximize else raw) + weight_decay * decays(mask, name) * w
            v[name] = rho * v[name] + (1 - rho) * g * g
            d = np.sqrt(u[name] + eps) / np.sqrt(v[name] + eps) * g
            u[name] = rho * u[name] + (1 - rho) * d * d
            params[name] = w - at(lr, step) * d
        step += 1
        yield dict(params)


def rmsprop(
    params: Leaves,
    gradient: Gradient,
    *,
    lr: Rate = 1e-2,
    alpha: float = 0.99,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    centered: bool = False,
    maximize: bool = False,
    mask: Callable[[str], bool] | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Compute the steps of `torch.optim.RMSprop`.

    Args:
        params: Initial parameters.
        gradient: Maps parameters and step (from 0) to gradients.
        lr: Learning rate, or a function of the step.
        alpha: Decay rate of the means.
        eps: Added to the root.
        weight_decay: Coupled decay.
        momentum: Factor of the buffer, which does not include the learning rate.
        centered: Whether to divide by the standard deviation.
        maximize: Whether to maximize.
        mask: Returns whether a parameter of a given name decays; None for all.

    Yields:
        The parameters after each step, indefinitely.

    Example:
        >>> start = {"w": np.array([1.0])}
        >>> walk = rmsprop(start, lambda params, step: params, lr=0.25, alpha=0.75, eps=0.0)
        >>> next(walk)["w"].item()
        0.5
    """
    params, step = dict(params), 0
    v = {name: np.zeros_like(w) for name, w in params.items()}
    m = {name: np.zeros_like(w) for name, w in params.items()}
    buffers = {name: np.zeros_like(w) for name, w in params.items()}
    while True:
        for name, raw in gradient(params, step).items():
            w = params[name]
            g = (-raw if maximize else raw) + weight_decay * decays(mask, name) * w
            v[name] = alpha * v[name] + (1 - alpha) * g * g
            m[name] = alpha * m[name] + (1 - alpha) * g
            spread = v[name] - m[name] * m[name] if centered else v[name]
            buffers[name] = momentum * buffers[name] + g / (np.sqrt(spread) + eps)
            params[name] = w - at(lr, step) * buffers[name]
        step += 1
        yield dict(params)


CASES = (
    Case("adagrad", "Adagrad", {"lr": 0.1}),
    Case("adagrad-decay", "Adagrad", {"lr": 0.1, "weight_decay": 0.1}),
    Case("adagrad-lr-decay", "Adagrad", {"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.1}),
    Case("adagrad-start", "Adagrad", {"lr": 0.1, "initial_accumulator_value": 0.1}),
    Case("adagrad-eps", "Adagrad", {"lr": 0.1, "eps": 0.1}),
    Case("adagrad-maximize", "Adagrad", {"lr": 0.1, "weight_decay": 0.1, "maximize": True}),
    Case(
        "adagrad-schedule",
        "Adagrad",
        {"lr": 0.1, "lr_decay": 0.01, "weight_decay": 0.1},
        half_life=30,
    ),
    Case("adagrad-mask", "Adagrad", {"lr": 0.1, "weight_decay": 0.1}, mask=no_bias),
    Case("adadelta", "Adadelta", {"lr": 1.0}),
    Case("adadelta-decay", "Adadelta", {"lr": 1.0, "weight_decay": 0.1}),
    Case("adadelta-rho", "Adadelta", {"lr": 1.0, "rho": 0.5, "weight_decay": 0.1}),
    Case("adadelta-rho-zero", "Adadelta", {"lr": 0.5, "rho": 0.0, "eps": 1e-3}),
    Case("adadelta-eps", "Adadelta", {"lr": 1.0, "eps": 1e-3}),
    Case("adadelta-maximize", "Adadelta", {"lr": 1.0, "weight_decay": 0.1, "maximize": True}),
    Case("adadelta-schedule", "Adadelta", {"lr": 1.0, "weight_decay": 0.1}, half_life=30),
    Case("adadelta-mask", "Adadelta", {"lr": 1.0, "weight_decay": 0.1}, mask=no_bias),
    Case("rmsprop", "RMSprop", {"lr": 0.01}),
    Case("rmsprop-decay", "RMSprop", {"lr": 0.01, "weight_decay": 0.1}),
    Case("rmsprop-alpha", "RMSprop", {"lr": 0.01, "alpha": 0.5, "weight_decay": 0.1}),
    Case("rmsprop-alpha-zero", "RMSprop", {"lr": 0.01, "alpha": 0.0, "eps": 1e-3}),
    Case("rmsprop-eps", "RMSprop", {"lr": 0.01, "eps": 0.1}),
    Case("rmsprop-momentum", "RMSprop", {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.1}),
    Case("rmsprop-centered", "RMSprop", {"lr": 0.01, "centered": True, "weight_decay": 0.1}),
    Case(
        "rmsprop-centered-momentum",
        "RMSprop",
        {"lr": 0.01, "alpha": 0.9, "centered": True, "momentum": 0.5, "weight_decay": 0.1},
    ),
    Case("rmsprop-maximize", "RMSprop", {"lr": 0.01, "weight_decay": 0.1, "maximize": True}),
    Case(
        "rmsprop-schedule",
        "RMSprop",
        {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.1},
        half_life=30,
    ),
    Case("rmsprop-mask", "RMSprop", {"lr": 0.01, "weight_decay": 0.1}, mask=no_bias),
)
