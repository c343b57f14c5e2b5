"""The place of a divergence in PyTorch's terms, its extent, and its likely cause, in words."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

Arrays = Mapping[str, np.ndarray]

# By quantity: the likely cause if every array of the kind differs, and if only some do.
_CAUSES = {
    "buffer": ("the momentum of a norm, or a biased variance",) * 2,
    "gradient": ("a factor of the loss", "the modules of these parameters"),
    "state": (
        "clipping, accumulation, loss scaling, coupled decay, or a beta",
        "the decay or the group of these parameters",
    ),
    "update": (
        "the learning rate, its schedule, eps, or the decay",
        "the decay, the learning rate or the group of these parameters",
    ),
    "average": ("the decay of the average, or its first update",) * 2,
}


def describe(
    quantity: str, name: str, in_jax: Arrays, in_torch: Arrays, beyond: list[str], bound: float
) -> str:
    """Describe the extent of a difference and its likely cause.

    Args:
        quantity: One of the quantities of a comparison.
        name: The array with the largest deviation.
        in_jax: The arrays of the quantity in JAX, by name.
        in_torch: Those in PyTorch.
        beyond: The names whose deviation is beyond the bound.
        bound: The bound.

    Example:
        >>> import numpy as np
        >>> one, other = {"a": np.array([1.02, 2.04])}, {"a": np.array([1.0, 2.0])}
        >>> describe("loss", "a", one, other, ["a"], 1e-5)
        'bound 1e-05; JAX has 1.02 times the value of PyTorch'
    """
    parts = [f"bound {bound:.0e}"]
    kind = name.partition(" of ")[0] if quantity == "state" else ""
    alike = [each for each in in_jax if not kind or each.startswith(f"{kind} of ")]
    if len(alike) > 1:
        parts.append(f"{len(set(alike) & set(beyond))} of {len(alike)} arrays differ")
    factor = _factor(in_jax[name], in_torch[name])
    if factor is not None:
        parts.append(f"JAX has {factor:.6g} times the value of PyTorch")
    if quantity in _CAUSES:
        in_all, in_some = _CAUSES[quantity]
        cause = in_all if set(alike) <= set(beyond) else in_some
        parts.append(f"look at {cause}")
    return "; ".join(parts)


def _factor(left: np.ndarray, right: np.ndarray) -> float | None:
    """Return the factor between two arrays, if a factor explains their difference."""
    left, right = left.astype(np.float64).ravel(), right.astype(np.float64).ravel()
    square = right @ right
    if not (np.isfinite(square) and np.isfinite(left).all() and square > 0):
        return None
    factor = float(left @ right / square)
    rest = np.linalg.norm(left - factor * right)
    return factor if rest <= 0.05 * np.linalg.norm(left - right) else None
