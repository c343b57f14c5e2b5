"""Estimate the cost of dropout on TPUs with XLA's cost model, without a TPU.

    pip install libtpu                  # the compiler; about 140 MB
    python -m benchmarks.tpu_model      # cycles over those of a copy, bfloat16

XLA:TPU compiles for chips that need not be present, and records in the program the expected cycles
of each fusion. This program compares the sum over the fusions with that of `x * 1.5`. The model
does not include the hardware random number generator ("rbg"), so figures for such keys are too low.
A second table has the memory of training steps with and without dropout. Nothing is timed.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import tempfile
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from benchmarks import cli, modelled
from parity_tests import output

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = "tpu_model"
COMPILER = ("libtpu",)
UNIT = "cycles"
LIBTPU = {
    "JAX_PLATFORMS": "cpu",  # libtpu only compiles
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
_NO_ESTIMATE = 2**63 - 1
CHIPS = ("v5e:2x2", "v6e:2x2", "tpu7x:2x2x1", "v5e:16x16")

NOTE = """\
The bits of rbg keys come from the chip's own generator, which the model does not include, so these
figures are too low. With libtpu 0.0.42, XLA stores a copy of each packed word for each of its 32
elements, unless all fit the fast memory; earlier versions did so for (1, 2048, 2048) on v5e only.
In a program of both passes, Flax's mask is drawn once, and regjax's in each pass.

In the unrolled steps with packed masks, XLA keeps the output of dropout in bfloat16 for the
backward pass, since it does not expand words inside a matrix product. No mask is kept. On v6e and
tpu7x, a scan with dropout needs one more layer of activations, for any number of layers."""


def main(argv: Sequence[str] | None = None) -> int:
    """Compile, print the table, and write it as JSON, Markdown and a picture."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.redraw:
        return cli.redraw(parser, options.out / NAME, modelled.load, draw)
    if line := missing():
        print(line)
        return 0
    # libtpu reads these once, when jax is imported.
    os.environ.update(LIBTPU)
    os.environ.setdefault("TPU_LOG_DIR", tempfile.mkdtemp())
    rows = modelled.measure(options.chips, devices, cycles)
    steps = modelled.measure_steps(_one_of_each_kind(options.chips), devices)
    print(modelled.save(options.out / NAME, rows, COMPILER, draw, UNIT, NOTE, steps))
    print(f"Table, JSON and picture: {options.out}")
    return 0


def missing() -> str:
    """Return why there is no compiler for TPUs, or an empty string."""
    if importlib.util.find_spec("libtpu"):
        return ""
    return "skipped: libtpu, the compiler for TPUs, is not installed. pip install libtpu"


def draw(record: modelled.Record) -> Figure:
    """Draw the cycles of each candidate over those of a copy."""
    return modelled.draw(record, UNIT)


def _parser() -> cli.Parser:
    parser = cli.Parser(NAME, __doc__)
    parser.add_argument(
        "--chips",
        nargs="+",
        type=_chips,
        default=CHIPS,
        metavar="KIND:GRID",
        help=f"kinds of chips, with their grids (default: {' '.join(CHIPS)})",
    )
    return parser


def _chips(text: str) -> str:
    if not re.fullmatch(r"\w+:\d+(x\d+)+", text):
        example = CHIPS[0]
        raise argparse.ArgumentTypeError(f"must be KIND:GRID, such as {example}; got {text!r}")
    return text


def _one_of_each_kind(chips: Sequence[str]) -> list[str]:
    """Return the first grid of each kind, for programs that run on a single chip."""
    first: dict[str, str] = {}
    for grid in chips:
        first.setdefault(grid.partition(":")[0], grid)
    return list(first.values())


def devices(chips: str) -> Sequence[Any]:
    """Return the chips of a grid such as "v5e:2x2"; they need not be present."""
    from jax.experimental import topologies

    return topologies.get_topology_desc(platform="tpu", topology_name=chips).devices


def cycles(program: str) -> int:
    """Return the number of cycles that XLA expects for all fusions of a program.

    Fusions for which it has no estimate are left out.

    Example:
        >>> cycles('"estimated_cycles":"40" "estimated_cycles":"9223372036854775807"')
        40
    """
    counts = map(int, re.findall(r'"estimated_cycles":"(\d+)"', program))
    return sum(count for count in counts if count != _NO_ESTIMATE)


if __name__ == "__main__":
    output.run(main)
