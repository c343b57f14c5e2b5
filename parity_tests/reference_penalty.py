"""Penalties and their gradients in NumPy, one parameter at a time."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

Leaves = Mapping[str, np.ndarray]


def l2_penalty(
    params: Leaves, weight_decay: float, mask: Mapping[str, bool] | None = None
) -> float:
    """Sum squares, in double.

    Args:
        params: Arrays by name.
        weight_decay: The coefficient.
        mask: Which names count; None for all.

    Returns:
        `weight_decay` times the sum of `|w|**2`.

    Examples:
        >>> l2_penalty({"w": np.array([3.0, 4.0])}, 0.5)
        12.5
    """
    wide = [
        np.abs(w).astype(np.float64) for name, w in params.items() if (mask is None or mask[name])
    ]
    return weight_decay * float(sum(np.sum(w**2) for w in wide))


def l2_gradient(
    params: Leaves, weight_decay: float, mask: Mapping[str, bool] | None = None
) -> dict[str, np.ndarray]:
    """Differentiate `l2_penalty`, as PyTorch does where parameters are complex.

    Args:
        params: Arrays by name.
        weight_decay: The coefficient.
        mask: Which names count; None for all.

    Returns:
        `2 * weight_decay * w` where the mask allows, else zeros.

    Examples:
        >>> l2_gradient({"w": np.array([3.0, 4.0])}, 0.5)
        {'w': array([3., 4.])}
    """
    return {name: 2 * weight_decay * w * (mask is None or mask[name]) for name, w in params.items()}
