"""Adam and AdamW: their recursions in NumPy, and the cases to compare them in."""

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
    """Walk as `torch.optim.Adam` documents it.

    Args:
        params: Where to start.
        gradient: From parameters and step, counted from 0, to gradients.
        lr: Learning rate, or a function from step to it.
        betas: Decay rates of the two moments.
        eps: Added to the root.
        weight_decay: Decay, coupled unless told otherwise.
        amsgrad: Whether to divide by the largest second moment so far, uncorrected.
        maximize: Whether to ascend.
        decoupled_weight_decay: Whether the decay goes past the moments.
        mask: From a name to whether it decays; None for all.

    Yields:
        The parameters after each step, without end.

    Examples:
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
    """Walk as `torch.optim.AdamW` documents it: `adam`, decoupled, with its own default decay.

    Args:
        params: Where to start.
        gradient: From parameters and step, counted from 0, to gradients.
        weight_decay: Decoupled decay.
        **options: The other options of `adam`.

    Returns:
        An iterator over the parameters after each step, without end.

    Examples:
        >>> walk = adamw({"w": np.array([1.0])}, lambda params, step: {"w": np.zeros(1)}, lr=0.5)
        >>> next(walk)["w"].item()
        0.995
    """
    return adam(params, gradient, weight_decay=weight_decay, decoupled_weight_decay=True, **options)


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
)
