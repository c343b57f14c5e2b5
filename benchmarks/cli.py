"""The command-line options that all benchmarks share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parity_tests import output, pictures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OUT = "outputs/benchmarks"


# A rate of 0 or 1 draws no mask.
rate = output.number("in (0, 1)", lambda value: 0 < value < 1)
whole = output.integer(1)


class Parser(output.Parser):
    """A parser with the options of every benchmark."""

    def __init__(self, name: str, about: str | None) -> None:
        super().__init__(f"python -m benchmarks.{name}", about)
        self.add_out(OUT, "table, JSON and picture")
        self.add_argument(
            "--redraw",
            action="store_true",
            help="measure nothing, and draw the picture again from the JSON in the folder of --out",
        )


def parser(name: str, about: str | None, *, rounds: int) -> Parser:
    """Return a parser with the options of the benchmarks that measure time.

    Args:
        name: The name of the module in `benchmarks`.
        about: The docstring of the module.
        rounds: The default number of runs of each candidate.
    """
    made = Parser(name, about)
    made.add_argument(
        "--rounds",
        type=whole,
        default=rounds,
        metavar="N",
        help="runs of each candidate (default: %(default)s)",
    )
    made.add_quick("a short run with small sizes, to test")
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


def redraw(
    made: Parser, stem: Path, load: Callable[[Path], Any], draw: Callable[[Any], Figure]
) -> int:
    """Draw STEM.png again from STEM.json, and return the exit code.

    Raises:
        SystemExit: There is no such file.
    """
    path = stem.with_suffix(".json")
    if not path.is_file():
        made.error(
            f"argument --redraw: --out must contain {path.name}; got {str(stem.parent)!r}. "
            "Measure first, without --redraw."
        )
    pictures.save(draw(load(path)), stem.with_suffix(".png"))
    print(f"Picture: {stem.with_suffix('.png')}")
    return 0
