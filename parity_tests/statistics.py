"""Statistics of masks, in standard deviations from their expectations.

Every figure is a z-score, with mean 0 and standard deviation 1 for an unbiased mask. `FIVE_SIGMA`
is the bound of the tests. An unbiased mask exceeds it once in 1.7 million figures; since the seeds
are fixed, a test that passes once always passes.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

FIVE_SIGMA = 5.0

Apply = Callable[[np.ndarray, float], np.ndarray]


def keep_rate_z(mask: np.ndarray, keep_prob: float) -> float:
    """Return the z-score of the number of kept elements, which is binomial."""
    expected = mask.size * keep_prob
    return float((np.count_nonzero(mask) - expected) / math.sqrt(expected * (1 - keep_prob)))


def mean_z(x: np.ndarray, y: np.ndarray, keep_prob: float) -> float:
    """Return the z-score of the sum of `y`, whose expectation is the sum of `x`.

    Each element has Var[y] = x² (1 - q) / q, where q is the keep probability.
    """
    x, y = x.astype(np.float64), y.astype(np.float64)
    variance = np.sum(x**2) * (1 - keep_prob) / keep_prob
    return float(np.sum(y - x) / math.sqrt(variance))


def variance_z(x: np.ndarray, y: np.ndarray, keep_prob: float) -> float:
    """Return the z-score of the sum of (y - x)², whose expectation is Σ x² (1 - q) / q.

    At q = 1/2 every element contributes exactly x², so a sum that differs by more than rounding has
    an infinite z-score.
    """
    x, y = x.astype(np.float64), y.astype(np.float64)
    kept = (1 / keep_prob - 1) ** 2  # ((y - x) / x)² where kept; 1 where dropped
    expected = (1 - keep_prob) / keep_prob
    spread = keep_prob * kept**2 + (1 - keep_prob) - expected**2
    excess = float(np.sum((y - x) ** 2) - np.sum(x**2) * expected)
    if abs(excess) <= 1e-6 * float(np.sum(x**2)) * expected:
        return 0.0
    deviation = math.sqrt(max(spread, 0.0) * float(np.sum(x**4)))
    return excess / deviation if deviation else math.copysign(math.inf, excess)


def neighbor_z(mask: np.ndarray, keep_prob: float, axis: int) -> float:
    """Return the z-score of the correlation of each element with the next one along an axis."""
    centered = mask.astype(np.float64) - keep_prob
    size = mask.shape[axis]
    products = centered.take(range(size - 1), axis) * centered.take(range(1, size), axis)
    return float(products.sum() / (keep_prob * (1 - keep_prob) * math.sqrt(products.size)))


def dropout_z(apply: Apply, x: np.ndarray, rate: float) -> dict[str, float]:
    """Return all figures of a call of a dropout function `apply(x, rate)`, by name.

    `x` must have no zeros: an element counts as kept if the output is not 0.
    """
    y = apply(x, rate)
    keep_prob = 1 - rate
    figures = {
        "keep rate": keep_rate_z(y != 0, keep_prob),
        "mean": mean_z(x, y, keep_prob),
        "variance": variance_z(x, y, keep_prob),
    }
    neighbors = {
        f"neighbors along axis {axis}": neighbor_z(y != 0, keep_prob, axis)
        for axis, size in enumerate(x.shape)
        if size > 1
    }
    return figures | neighbors


def assert_fair(apply: Apply, x: np.ndarray, rate: float, sigmas: float = FIVE_SIGMA) -> None:
    """Raise an AssertionError with the figures that exceed the bound, if any."""
    figures = dropout_z(apply, x, rate)
    unfair = {name: z for name, z in figures.items() if not abs(z) <= sigmas}
    if unfair:
        listed = ", ".join(f"{name} {z:+.1f}" for name, z in unfair.items())
        raise AssertionError(f"rate {rate}, shape {x.shape}: z-scores beyond bound: {listed}")
