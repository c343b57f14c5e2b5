"""What every benchmark that runs on this machine asks on its command line."""

from __future__ import annotations

import argparse

from parity_tests import output

OUT = "outputs/benchmarks"


def parser(name: str, about: str | None, *, rounds: int) -> argparse.ArgumentParser:
    """A parser with the options that the benchmarks share.

    Args:
        name: of the module in `benchmarks`.
        about: its docstring.
        rounds: how many times each candidate runs unless told otherwise.
    """
    made = output.Parser(f"python -m benchmarks.{name}", about)
    made.add_argument(
        "--rounds",
        type=whole,
        default=rounds,
        metavar="N",
        help="runs of each (default: %(default)s)",
    )
    made.add_argument("--quick", action="store_true", help="small and few, to see that it runs")
    made.add_out(OUT, "table, times and picture")
    return made


def whole(text: str) -> int:
    """A whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1; got {text}")
    return value


def rate(text: str) -> float:
    """A rate strictly between 0 and 1: at the ends dropout does nothing that takes time."""
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"must lie strictly between 0 and 1; got {text}")
    return value
