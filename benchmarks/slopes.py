"""Exponents of growth: the slope of a curve whose axes are both logarithmic."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# The largest factor between a point and the line that is fitted to it.
TOLERANCE = 1.25


@dataclass(frozen=True)
class Slope:
    """A fitted power law: y grows as x ** exponent.

    Attributes:
        exponent: The slope of the line.
        start: The smallest x of the points on the line.
        end: The largest x.
        points: The number of points on the line.
    """

    exponent: float
    start: float
    end: float
    points: int

    def name(self, axis: str) -> str:
        """Return the law in words.

        Example:
            >>> Slope(0.996, 1e6, 1e9, 4).name("elements")
            'elements^1.00 from 1e6'
            >>> Slope(-0.001, 1, 500, 9).name("sites")
            'sites^0.00 from 1'
        """
        exponent = f"{self.exponent + 0.0:.2f}".replace("-0.00", "0.00")
        return f"{axis}^{exponent} from {short(self.start)}"


def fit(curve: Mapping[int, float]) -> Slope | None:
    """Fit a line to the longest tail of a curve that is straight up to `TOLERANCE`.

    Two points are always on a line, so a tail of two means that no part is known to be straight.

    Args:
        curve: Positive y for each positive x; points with y = 0 are left out.

    Returns:
        None for fewer than two points.

    Example:
        >>> fit({x: 10 + 2 * x for x in (1, 10, 100, 1000, 10000)})
        Slope(exponent=0.94..., start=10, end=10000, points=4)
    """
    xs = sorted(x for x, y in curve.items() if y > 0)
    for first in range(len(xs) - 1):
        tail = xs[first:]
        logs = [math.log(x) for x in tail]
        heights = [math.log(curve[x]) for x in tail]
        exponent, deviation = _line(logs, heights)
        if deviation <= math.log(TOLERANCE) or len(tail) == 2:
            return Slope(exponent, tail[0], tail[-1], len(tail))
    return None


def _line(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float]:
    """Return the slope of the least-squares line, and the largest distance from it."""
    x0, y0 = sum(xs) / len(xs), sum(ys) / len(ys)
    moments = [(x - x0) * (y - y0) for x, y in zip(xs, ys, strict=True)]
    slope = sum(moments) / sum((x - x0) ** 2 for x in xs)
    return slope, max(abs(y - y0 - slope * (x - x0)) for x, y in zip(xs, ys, strict=True))


def short(number: float) -> str:
    """Return a number in few characters.

    Example:
        >>> [short(x) for x in (1, 500, 8192, 10_000, 2**20, 10**9)]
        ['1', '500', '8,192', '1e4', '1.0e6', '1e9']
    """
    if number < 10_000:
        return f"{number:,.0f}"
    digits, power = f"{number:.1e}".split("e+")
    exact = number == 10 ** int(power)
    return f"{1 if exact else digits}e{int(power)}"
