"""The command-line options that all benchmarks share."""

from __future__ import annotations

import argparse

from parity_tests import output

OUT = "outputs/benchmarks"


# A rate of 0 or 1 draws no mask.
rate = output.number("in (0, 1)", lambda value: 0 < value < 1)
whole = output.integer(1)


def parser(name: str, about: str | None, *, rounds: int) -> argparse.ArgumentParser:
    """Return a parser with the shared options.

    Args:
        name: The name of the module in `benchmarks`.
        about: The docstring of the module.
        rounds: The default number of runs of each candidate.
    """
    made = output.Parser(f"python -m benchmarks.{name}", about)
    made.add_argument(
        "--rounds",
        type=whole,
        default=rounds,
        metavar="N",
        help="runs of each candidate (default: %(default)s)",
    )
    made.add_quick("a short run with small sizes, to test")
    made.add_out(OUT, "table, times and picture")
    return made


def add_rates(made: argparse.ArgumentParser) -> None:
    """Add the option `--rates`."""
    made.add_argument(
        "--rates",
        type=rate,
        nargs="+",
        default=[0.1, 0.5],
        metavar="RATE",
        help="dropout rates (default: 0.1 and 0.5)",
    )
