"""Compute the tables of `normal`, and print them.

    python -m benchmarks.quantile > TABLE

The output is the text of `regshared/quantile_tables.py`. Each polynomial interpolates at the
Chebyshev nodes of its interval, so its error is within a small factor of the minimax error for its
degree; it is computed with 50 digits and rounded once. PyTorch depends on mpmath.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mpmath as mp
import numpy as np

from parity_tests import output

# Degree of the logarithm, edges between the pieces, degree of each piece. The truncation error of
# each polynomial is less than half a unit in the last place.
PLANS: dict[str, tuple[type[np.floating], int, Sequence[float], int]] = {
    "SINGLE": (np.float32, 8, (0, 7, 23), 9),
    "DOUBLE": (np.float64, 20, (0, 7, 23, 52), 22),
}

HEADER = '''"""Polynomials for the quantile function of the normal distribution.

Written by `python -m benchmarks.quantile`, which describes the method; both packages use this file.
Coefficients are in ascending order, from the constant term.
"""

from __future__ import annotations

from typing import NamedTuple


class Piece(NamedTuple):
    """A polynomial for quantile(u) / u in w - center, for w = -log2(1 - u**2) >= `edge`."""

    edge: float
    center: float
    coefficients: tuple[float, ...]


class Table(NamedTuple):
    """The pieces, and a polynomial for log2(1 + x) / x from sqrt(1/2) - 1 to sqrt(2) - 1."""

    logarithm: tuple[float, ...]
    pieces: tuple[Piece, ...]


'''


def ratio(w: Any) -> Any:
    """Return n / u for the n with 2 Phi(n) - 1 = u, where u = sqrt(1 - 2**-w)."""
    if w == 0:
        return mp.sqrt(mp.pi / 2)
    u = mp.sqrt(-mp.expm1(-w * mp.log(2)))
    tail = mp.log(mp.mpf(2) ** -w / (1 + u))  # the logarithm of 1 - u, without cancellation
    n = mp.sqrt(w) if w > 1 else u * mp.sqrt(mp.pi / 2)
    for _ in range(100):  # Newton's iteration on the logarithm of the tail, which is concave
        outside = mp.erfc(n / mp.sqrt(2))
        slope = -mp.sqrt(2 / mp.pi) * mp.exp(-n * n / 2) / outside
        change = (mp.log(outside) - tail) / slope
        n -= change
        if abs(change) < mp.mpf(10) ** -45 * n:
            return n / u
    raise ArithmeticError(f"Newton's iteration must converge; got w = {w}. Raise the precision.")


def log_ratio(x: Any) -> Any:
    """Return log2(1 + x) / x."""
    return (mp.log1p(x) / x if x else 1) / mp.log(2)


def interpolated(
    f: Callable[[Any], Any], low: Any, high: Any, center: Any, degree: int
) -> list[Any]:
    """Return the coefficients in `x - center`, from the constant term up."""
    ends = [mp.mpf(low) - center, mp.mpf(high) - center]
    return mp.chebyfit(lambda x: f(x + center), ends, degree + 1)[::-1]


def lines(dtype: type[np.floating], log_degree: int, edges: Any, degree: int) -> Iterator[str]:
    """Yield the lines of the source of a table."""

    def numbers(coefficients: Sequence[Any], indent: str) -> Iterator[str]:
        for number in coefficients:
            # The shortest decimal that rounds to the number.
            yield f"{indent}{dtype(mp.nstr(number, 40))!s},"

    root = mp.sqrt(2)
    yield "    logarithm=("
    yield from numbers(interpolated(log_ratio, 1 / root - 1, root - 1, 0, log_degree), " " * 8)
    yield "    ),"
    yield "    pieces=("
    for low, high in itertools.pairwise(edges):
        center = (low + high) / 2
        yield "        Piece("
        yield f"            edge={float(low)},"
        yield f"            center={center},"
        yield "            coefficients=("
        yield from numbers(interpolated(ratio, low, high, center, degree), " " * 16)
        yield "            ),"
        yield "        ),"
    yield "    ),"


def source() -> str:
    """Return the text of `regshared/quantile_tables.py`."""
    with mp.workdps(50):
        tables = [
            "\n".join([f"{name} = Table(", *lines(*plan), ")"]) for name, plan in PLANS.items()
        ]
    return HEADER + "\n\n".join(tables) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Print the text."""
    output.Parser("python -m benchmarks.quantile", __doc__).parse_args(argv)
    print(source(), end="")


if __name__ == "__main__":
    output.run(main)
