"""What dropout costs on TPUs, by XLA's compiler model: no TPU is needed, and none was timed.

    pip install libtpu                  # the compiler; about 140 MB
    python -m benchmarks.tpu_model      # cycles over those of a copy, bfloat16

XLA:TPU compiles for chips that are not there and notes in the program how many cycles it expects of
each fusion. The sum over a program's fusions is compared with that of `x * 1.5`. The model is the
compiler's own; random bits of the hardware generator ("rbg") are not in it, so rows with that key
are too low.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

LIBTPU = {
    "JAX_PLATFORMS": "cpu",  # the host computes on its CPU; libtpu only compiles
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
CHIPS = ("v5e:2x2", "v6e:2x2", "tpu7x:2x2x1", "v5e:16x16")
# Global shapes, and the axis over which the chips share the array; None: every chip has all of it.
LAYOUTS = (
    ((8192, 8192), None),
    ((8, 512, 4096), 0),
    ((8, 512, 4096), 1),
    ((8, 512, 4096), 2),
    ((1, 2048, 2048), None),
)
RATES = (0.5, 0.1)
COLLECTIVE = r"\b(?:all-reduce|all-gather|all-to-all|collective-permute)(?:-start)?\("


@dataclass(frozen=True)
class Row:
    """One program, compiled for one kind of chip.

    Attributes:
        chips: kind and grid.
        shape: global shape of the array.
        axis: the axis that the chips share, or None.
        rate: the dropout rate.
        name: whose dropout.
        over_copy: cycles over those of the copy.
        collectives: how many operations talk to other chips.
        temporary: bytes of memory beyond arguments and result, on each chip.
    """

    chips: str
    shape: tuple[int, ...]
    axis: int | None
    rate: float
    name: str
    over_copy: float
    collectives: int
    temporary: int


def main(argv: Sequence[str] | None = None) -> int:
    """Compiles, prints the table, and writes it as JSON and Markdown."""
    options = _parser().parse_args(argv)
    if importlib.util.find_spec("libtpu") is None:
        print("skipped: libtpu, the compiler for TPUs, is not installed: pip install libtpu")
        return 0
    # Before jax is imported, for libtpu reads these once.
    os.environ.update(LIBTPU)
    os.environ.setdefault("TPU_LOG_DIR", tempfile.mkdtemp())
    rows = measure(options.chips)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "tpu_model.json").write_text(
        json.dumps([asdict(row) for row in rows], indent=1) + "\n"
    )
    (options.out / "tpu_model.md").write_text(markdown(rows))
    print(markdown(rows))
    print(f"Table and JSON: {options.out}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tpu_model", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--chips", nargs="+", default=CHIPS, metavar="KIND:GRID", help=f"default: {' '.join(CHIPS)}"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("outputs/benchmarks"), help="folder (default: %(default)s)"
    )
    return parser


def measure(kinds: Sequence[str]) -> list[Row]:
    """Compiles every program for every kind of chip."""
    from rich.progress import track

    work = [
        (chips, shape, axis)
        for chips in kinds
        for shape, axis in LAYOUTS
        # 256 chips cannot share 8 rows; there the question is what they say to each other.
        if axis is None or "16x16" not in chips or shape[axis] % 256 == 0
    ]
    rows = []
    for chips, shape, axis in track(work, "compiling"):
        copy = _compile(chips, shape, axis, lambda x, key: x * 1.5)
        for rate in RATES:
            for name, (apply, impl) in candidates(rate).items():
                cycles, collectives, temporary = _compile(chips, shape, axis, apply, impl)
                ratio = cycles / copy[0]
                rows.append(Row(chips, shape, axis, rate, name, ratio, collectives, temporary))
    return rows


def candidates(rate: float) -> dict[str, tuple[Callable[[Any, Any], Any], str]]:
    """Each dropout, and the kind of key it is given."""
    from flax import linen

    import regjax

    flax = linen.Dropout(rate, deterministic=False)

    def in_flax(x: Any, key: Any) -> Any:
        return flax.apply({}, x, rngs={"dropout": key})

    def packed(x: Any, key: Any) -> Any:
        return regjax.dropout(x, rate, key=key, sampler=regjax.packed_bernoulli)

    return {
        "regjax": (lambda x, key: regjax.dropout(x, rate, key=key), "threefry2x32"),
        "regjax, packed": (packed, "threefry2x32"),
        "Flax": (in_flax, "threefry2x32"),
        "Flax, rbg": (in_flax, "rbg"),
    }


def _compile(
    chips: str,
    shape: tuple[int, ...],
    axis: int | None,
    apply: Callable[[Any, Any], Any],
    impl: str = "threefry2x32",
) -> tuple[int, int, int]:
    """Cycles, collectives and temporary bytes of one program."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    topology = topologies.get_topology_desc(platform="tpu", topology_name=chips)
    mesh = Mesh(np.array(topology.devices), ("chips",))
    whole = NamedSharding(mesh, PartitionSpec())
    shared = whole if axis is None else NamedSharding(mesh, PartitionSpec(*[None] * axis, "chips"))
    key = jax.eval_shape(lambda: jax.random.key(0, impl=impl))
    compiled = (
        jax.jit(apply, in_shardings=(shared, whole), out_shardings=shared)
        .lower(jax.ShapeDtypeStruct(shape, jnp.bfloat16), key)
        .compile()
    )
    text = compiled.as_text() or ""
    cycles = sum(int(count) for count in re.findall(r'"estimated_cycles":"(\d+)"', text))
    memory = compiled.memory_analysis()
    assert memory is not None
    return cycles, len(re.findall(COLLECTIVE, text)), memory.temp_size_in_bytes


def markdown(rows: Sequence[Row]) -> str:
    """A table: layouts down, whose dropout across; cycles over those of a copy."""
    names = list(dict.fromkeys(row.name for row in rows))
    lines = [
        "| cycles over a copy (compiler model) | rate | " + " | ".join(names) + " |",
        "| --- | ---: |" + " ---: |" * len(names),
    ]
    places = dict.fromkeys((row.chips, row.shape, row.axis, row.rate) for row in rows)
    for chips, shape, axis, rate in places:
        cells = []
        for name in names:
            row = next(
                r
                for r in rows
                if (r.chips, r.shape, r.axis, r.rate, r.name) == (chips, shape, axis, rate, name)
            )
            talk = f", {row.collectives} collectives" if row.collectives else ""
            cells.append(f"{row.over_copy:.2f}{talk}")
        layout = "on each chip" if axis is None else f"shared on axis {axis}"
        lines.append(f"| {chips}, {shape} {layout} | {rate} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
