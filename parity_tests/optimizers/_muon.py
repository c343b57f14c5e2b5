"""Muon: its recursion in NumPy, and cases."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from parity_tests.optimizers.case import Case, Gradient, Leaves, Rate, at, decays, no_bias


def muon(
    params: Leaves,
    gradient: Gradient,
    *,
    lr: Rate = 1e-3,
    weight_decay: float = 0.1,
    momentum: float = 0.95,
    nesterov: bool = True,
    ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
    eps: float = 1e-7,
    ns_steps: int = 5,
    adjust_lr_fn: str | None = None,
    mask: Callable[[str], bool] | None = None,
    ns_dtype: str = "bfloat16",
) -> Iterator[dict[str, np.ndarray]]:
    """Compute the steps of `torch.optim.Muon`.

    Args:
        params: Initial parameters; matrices.
        gradient: Maps parameters and step (from 0) to gradients.
        lr: Learning rate, or a function of the step.
        weight_decay: Decoupled decay.
        momentum: Weight of the past in the average of gradients.
        nesterov: Whether to use Nesterov momentum.
        ns_coefficients: Coefficients of the polynomial in each Newton-Schulz step.
        eps: Minimal norm of the divisor.
        ns_steps: Number of Newton-Schulz steps.
        adjust_lr_fn: Dependence of the learning rate on the shape.
        mask: Returns whether a parameter of a given name decays; None for all.
        ns_dtype: Dtype of the Newton-Schulz steps; torch supports bfloat16 only.

    Yields:
        The parameters after each step, indefinitely.

    Example:
        >>> walk = muon({"w": np.eye(2)}, lambda params, step: params, lr=0.5, ns_steps=0)
        >>> next(walk)["w"].round(1)
        array([[0.6, 0. ],
               [0. , 0.6]])
    """
    params, step = dict(params), 0
    averages = {name: np.zeros_like(w) for name, w in params.items()}
    while True:
        for name, g in gradient(params, step).items():
            w, eta = params[name], at(lr, step)
            averages[name] = momentum * averages[name] + (1 - momentum) * g
            u = momentum * averages[name] + (1 - momentum) * g if nesterov else averages[name]
            orthogonal = _orthogonalize(u, ns_coefficients, eps, ns_steps, ns_dtype)
            rows, columns = w.shape
            scale = math.sqrt(max(1, rows / columns))
            if adjust_lr_fn == "match_rms_adamw":
                scale = 0.2 * math.sqrt(max(rows, columns))
            w = w - eta * weight_decay * decays(mask, name) * w
            params[name] = w - eta * scale * orthogonal
        step += 1
        yield dict(params)


def _orthogonalize(
    u: np.ndarray, coefficients: tuple[float, float, float], eps: float, steps: int, dtype: str
) -> np.ndarray:
    a, b, c = coefficients
    rounded = _to_bfloat16 if dtype == "bfloat16" else lambda x: x.astype(dtype)
    x = rounded(u.T if u.shape[0] > u.shape[1] else u)
    x = rounded(x / np.maximum(rounded(np.sqrt(np.sum(x * x))), rounded(np.array(eps))))
    for _ in range(steps):
        gram = rounded(x @ x.T)
        x = rounded(a * x + rounded(b * gram + c * gram @ gram) @ x)
    return (x.T if u.shape[0] > u.shape[1] else x).astype(u.dtype)


def _to_bfloat16(x: np.ndarray) -> np.ndarray:
    """Keep the upper 16 bits of a float32, rounded to the nearest, ties to even."""
    bits = x.astype(np.float32).view(np.uint32)
    bits = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (bits & np.uint32(0xFFFF0000)).view(np.float32)


# Wide, tall and square matrices; the mask treats one of them as a bias.
MATRICES = {
    "dense/bias": (1, 8),
    "dense/kernel": (5, 8),
    "mix/kernel": (6, 6),
    "out/kernel": (40, 12),
}

# Each implementation sums a product of bfloat16 matrices in its own order, and the iteration
# amplifies the differences in rounding. Measured after 100 steps: 2e-4 between any two, 1e-3 to
# 5e-3 between bfloat16 and float64, 0.17 with and without decay. In float64 the bound is 1e-12.
BFLOAT16 = 2e-3


def _case(name: str, options: dict[str, Any], **fields: Any) -> Case:
    return Case(name, "Muon", options, float64=BFLOAT16, float32=BFLOAT16, **fields)


CASES_2D = (
    _case("muon", {"lr": 0.02}),
    _case("muon-no-decay", {"lr": 0.02, "weight_decay": 0.0}),
    _case("muon-decay", {"lr": 0.02, "weight_decay": 1.0}),
    _case("muon-plain", {"lr": 0.02, "nesterov": False, "momentum": 0.5}),
    _case("muon-no-momentum", {"lr": 0.02, "momentum": 0.0}),
    _case("muon-original", {"lr": 0.02, "adjust_lr_fn": "original"}),
    _case("muon-match-rms", {"lr": 0.02, "adjust_lr_fn": "match_rms_adamw"}),
    _case("muon-cubic", {"lr": 0.02, "ns_coefficients": (1.5, -0.5, 0.0), "ns_steps": 9}),
    # Larger than every norm, so that the iteration depends on the size of the gradient.
    _case("muon-eps", {"lr": 0.02, "eps": 30.0, "ns_steps": 2}),
    _case("muon-schedule", {"lr": 0.05}, half_life=30),
    _case("muon-mask", {"lr": 0.02, "weight_decay": 1.0}, mask=no_bias),
)
