"""Adafactor: its recursion in NumPy, and cases."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from parity_tests.optimizers.case import Case, Gradient, Leaves, Rate, at, decays, no_bias


def adafactor(
    params: Leaves,
    gradient: Gradient,
    *,
    lr: Rate = 1e-2,
    beta2_decay: float = -0.8,
    eps: tuple[float | None, float] = (None, 1e-3),
    d: float = 1.0,
    weight_decay: float = 0.0,
    maximize: bool = False,
    mask: Callable[[str], bool] | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Compute the steps of `torch.optim.Adafactor`.

    Args:
        params: Initial parameters.
        gradient: Maps parameters and step (from 0) to gradients.
        lr: Largest relative step, or a function of the step.
        beta2_decay: Exponent of the step, in one minus the decay rate of the second moments.
        eps: Minimal root of a second moment, and minimal RMS of a parameter in the step.
        d: Largest RMS of an update.
        weight_decay: Decoupled decay.
        maximize: Whether to maximize.
        mask: Returns whether a parameter of a given name decays; None for all.

    Yields:
        The parameters after each step, indefinitely.

    Example:
        >>> walk = adafactor({"w": np.array([2.0])}, lambda params, step: params, lr=0.25)
        >>> next(walk)["w"].item()
        1.5
    """
    eps1, eps2 = eps
    params, rows, columns, moments, step = dict(params), {}, {}, {}, 0
    while True:
        for name, raw in gradient(params, step).items():
            w, g, eta = params[name], -raw if maximize else raw, at(lr, step)
            floor = np.finfo(w.dtype).eps.item() if eps1 is None else eps1
            share = (step + 1) ** beta2_decay
            if g.ndim > 1:
                row, column = (_mean_square(g, axis) for axis in (-1, -2))
                rows[name] = share * row + (1 - share) * rows.get(name, np.zeros_like(row))
                columns[name] = share * column + (1 - share) * columns.get(name, 0 * column)
                mean = np.mean(rows[name], axis=-2, keepdims=True)
                v = rows[name] * columns[name] / np.maximum(mean, floor)
            else:
                moments[name] = share * g * g + (1 - share) * moments.get(name, np.zeros_like(g))
                v = moments[name]
            u = g / np.sqrt(np.maximum(v, floor**2))
            relative = min(eta, (step + 1) ** -0.5) * max(eps2, _rms(w))
            decay = eta * weight_decay * decays(mask, name)
            params[name] = w - decay * w - relative / max(1.0, _rms(u) / d) * u
        step += 1
        yield dict(params)


def _mean_square(g: np.ndarray, axis: int) -> np.ndarray:
    return np.mean(g * g, axis=axis, keepdims=True)


def _rms(leaf: np.ndarray) -> float:
    return float(np.sqrt(np.mean(leaf * leaf)))


CASES = (
    Case("adafactor", "Adafactor", {"lr": 0.01}),
    # A step is 5 % of a parameter, and each implementation sums in its own order.
    Case("adafactor-decay", "Adafactor", {"lr": 0.05, "weight_decay": 0.1}, float32=2e-6),
    # From step 4 on, the bound is the square root of the step.
    Case("adafactor-capped", "Adafactor", {"lr": 0.5, "weight_decay": 0.01}),
    Case("adafactor-beta2", "Adafactor", {"lr": 0.02, "beta2_decay": -0.5}),
    # Both minima are active for many elements.
    Case("adafactor-eps", "Adafactor", {"lr": 0.02, "eps": (0.3, 4.0)}),
    Case("adafactor-clip", "Adafactor", {"lr": 0.02, "d": 1.5, "beta2_decay": -0.3}),
    Case("adafactor-maximize", "Adafactor", {"lr": 0.02, "weight_decay": 0.1, "maximize": True}),
    Case("adafactor-schedule", "Adafactor", {"lr": 0.5, "weight_decay": 0.1}, half_life=30),
    Case("adafactor-mask", "Adafactor", {"lr": 0.05, "weight_decay": 0.5}, mask=no_bias),
)
