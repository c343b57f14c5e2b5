"""Penalties and their gradients in NumPy, one parameter at a time."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

Leaves = Mapping[str, np.ndarray]


def l2_penalty(
    params: Leaves, weight_decay: float, mask: Mapping[str, bool] | None = None
) -> float:
    """Return the L2 penalty, computed in double.

    Args:
        params: Arrays by name.
        weight_decay: The coefficient.
        mask: Whether each parameter is included; None for all.

    Returns:
        `weight_decay` times the sum of `|w|**2`.

    Example:
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
    """Return the gradient of `l2_penalty`, with PyTorch's convention for complex parameters.

    Args:
        params: Arrays by name.
        weight_decay: The coefficient.
        mask: Whether each parameter is included; None for all.

    Returns:
        `2 * weight_decay * w` where the mask is True, else zeros.

    Example:
        >>> l2_gradient({"w": np.array([3.0, 4.0])}, 0.5)
        {'w': array([3., 4.])}
    """
    return {name: 2 * weight_decay * w * (mask is None or mask[name]) for name, w in params.items()}


def l1_penalty(
    params: Leaves, weight_decay: float, mask: Mapping[str, bool] | None = None
) -> float:
    """Return the L1 penalty, computed in double.

    Args:
        params: Arrays by name.
        weight_decay: The coefficient.
        mask: Whether each parameter is included; None for all.

    Returns:
        `weight_decay` times the sum of `|w|`.

    Example:
        >>> l1_penalty({"w": np.array([3.0, -4.0])}, 0.5)
        3.5
    """
    counted = [w for name, w in params.items() if mask is None or mask[name]]
    return weight_decay * float(sum(np.sum(np.abs(w).astype(np.float64)) for w in counted))


def l1_gradient(
    params: Leaves, weight_decay: float, mask: Mapping[str, bool] | None = None
) -> dict[str, np.ndarray]:
    """Return the gradient of `l1_penalty`, with PyTorch's convention for complex parameters.

    Args:
        params: Arrays by name.
        weight_decay: The coefficient.
        mask: Whether each parameter is included; None for all.

    Returns:
        `weight_decay * w / |w|` where the mask is True and `w` is not 0, else zeros.

    Example:
        >>> l1_gradient({"w": np.array([3.0, -4.0, 0.0])}, 0.5)
        {'w': array([ 0.5, -0.5,  0. ])}
    """
    signs = {name: w / np.where(w == 0, 1, np.abs(w)) for name, w in params.items()}
    return {n: weight_decay * sign * (mask is None or mask[n]) for n, sign in signs.items()}


def distance(params: Leaves, reference: Leaves) -> dict[str, np.ndarray]:
    """Return the difference from a reference, whose L2 penalty is L2-SP.

    Args:
        params: Arrays by name.
        reference: Arrays by the same names.

    Returns:
        The differences by name.

    Example:
        >>> distance({"w": np.array([3.0])}, {"w": np.array([1.0])})
        {'w': array([2.])}
    """
    return {name: w - reference[name] for name, w in params.items()}
