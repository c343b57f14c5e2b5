"""What dropout costs on TPUs, by XLA's compiler model: no TPU is needed, and none was timed.

    pip install libtpu                  # the compiler; about 140 MB
    python -m benchmarks.tpu_model      # cycles over those of a copy, bfloat16

XLA:TPU compiles for chips that are not there and notes in the program how many cycles it expects of
each fusion. The sum over a program's fusions is compared with that of `x * 1.5`. The model is the
compiler's own; random bits of the hardware generator ("rbg") are not in it, so rows with that key
are too low. A second table has the memory of training steps with and without dropout.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import tempfile
from collections.abc import Sequence
from typing import Any

from benchmarks import modelled
from parity_tests import output

LIBTPU = {
    "JAX_PLATFORMS": "cpu",  # the host computes on its CPU; libtpu only compiles
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
CHIPS = ("v5e:2x2", "v6e:2x2", "tpu7x:2x2x1", "v5e:16x16")

NOTE = """\
Bits of an rbg key come from the chip's own generator, which is not in the model: those figures are
too low. For (1, 2048, 2048) alone XLA on v5e writes the packed words out 32 times before it uses
them; for (2048, 2048), or behind a matrix product, it does not.

In the unrolled steps with packed masks XLA keeps what dropout made, in bfloat16, for the backward
pass: it does not spread words inside a matrix product. No mask is kept. On v6e and tpu7x a scan
with dropout keeps one layer's activations more at work, the same for any number of layers."""


def main(argv: Sequence[str] | None = None) -> int:
    """Compiles, prints the table, and writes it as JSON, Markdown and a picture."""
    options = _parser().parse_args(argv)
    if importlib.util.find_spec("libtpu") is None:
        print("skipped: libtpu, the compiler for TPUs, is not installed: pip install libtpu")
        return 0
    # Before jax is imported, for libtpu reads these once.
    os.environ.update(LIBTPU)
    os.environ.setdefault("TPU_LOG_DIR", tempfile.mkdtemp())
    rows = modelled.measure(options.chips, devices, cycles)
    steps = modelled.measure_steps(_one_of_each_kind(options.chips), devices)
    print(modelled.save(options.out / "tpu_model", rows, "cycles", NOTE, steps))
    print(f"Table, JSON and picture: {options.out}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = output.Parser("python -m benchmarks.tpu_model", __doc__)
    parser.add_argument(
        "--chips", nargs="+", default=CHIPS, metavar="KIND:GRID", help=f"default: {' '.join(CHIPS)}"
    )
    parser.add_out("outputs/benchmarks", "table, JSON and picture")
    return parser


def _one_of_each_kind(chips: Sequence[str]) -> list[str]:
    """The first grid of each kind: where one chip works alone, others would only repeat it."""
    first: dict[str, str] = {}
    for grid in chips:
        first.setdefault(grid.partition(":")[0], grid)
    return list(first.values())


def devices(chips: str) -> Sequence[Any]:
    """The chips of a grid such as "v5e:2x2", which need not be there."""
    from jax.experimental import topologies

    return topologies.get_topology_desc(platform="tpu", topology_name=chips).devices


def cycles(program: str) -> int:
    """How many cycles XLA expects of all fusions of a program."""
    return sum(int(count) for count in re.findall(r'"estimated_cycles":"(\d+)"', program))


if __name__ == "__main__":
    raise SystemExit(main())
