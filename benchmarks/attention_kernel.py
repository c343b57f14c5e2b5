"""Compile attention with dropout in Pallas kernels for TPUs, and count their instructions.

    pip install libtpu                     # the compiler; about 140 MB
    python -m benchmarks.attention_kernel  # bundles over those of the kernels without dropout

XLA:TPU compiles for chips that need not be present. A bundle is the instructions that one core
issues in one cycle. The table has the scheduled bundles of each kernel, the number in the program
and not a time, and the temporary bytes of two programs: the forward pass of training, which returns
all that the backward pass reads, and the backward pass. XLA chooses the layout of the arrays, as it
does inside a model. Nothing is run or timed.
"""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import importlib.util
import json
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.cli import OUT
from benchmarks.tpu_model import LIBTPU, devices
from parity_tests import output
from parity_tests.output import write_atomically

NAME = "attention_kernel"
CHIPS = ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
SHAPE = (1, 4096, 8, 128)
KERNELS = ("regjax_attention", "regjax_attention_dot_query", "regjax_attention_dot_key")
# The label, the rate, and the bits of the packed sampler; None for the exact one.
MASKS = (
    ("none", 0.0, None),
    ("packed, rate 0.5", 0.5, 16),
    ("packed, rate 0.1, 8 bits", 0.1, 8),
    ("packed, rate 0.1, 16 bits", 0.1, 16),
    ("exact, rate 0.1", 0.1, None),
)
# Derivatives are named after the function that JAX derived them from.
_FILE = re.compile(
    r"(regjax_attention(?:_dot_key|_dot_query)?)_*[.\d]*-\d+-schedule-analysis_final"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Compile, print the table, and write it as JSON and Markdown."""
    parser = output.Parser(f"python -m benchmarks.{NAME}", __doc__)
    parser.add_out(OUT, "table and JSON")
    parser.add_argument(
        "--chips",
        nargs="+",
        type=output.one_of(CHIPS)["type"],
        default=CHIPS,
        metavar="KIND:GRID",
        help=f"kinds of chips, with their grids (default: {' '.join(CHIPS)})",
    )
    options = parser.parse_args(argv)
    if importlib.util.find_spec("libtpu") is None:
        print("skipped: libtpu, the compiler for TPUs, is not installed. pip install libtpu")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        rows = []
        for chip in options.chips:
            for label, rate, bits in MASKS:
                rows.append({"chip": chip, "mask": label} | measure(Path(folder), chip, rate, bits))
                print(rows[-1], flush=True)
    import jax

    record = {
        "unit": "scheduled bundles, compiler output, not a time",
        "shape": SHAPE,
        "dtype": "bfloat16",
        "is_causal": True,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": {"jax": jax.__version__, "libtpu": importlib.metadata.version("libtpu")},
        "rows": rows,
    }
    stem = options.out / NAME
    write_atomically(stem.with_suffix(".json"), json.dumps(record, indent=1) + "\n")
    write_atomically(stem.with_suffix(".md"), table(record))
    print(table(record))
    print(f"Table and JSON: {options.out}")
    return 0


def prepare(folder: Path) -> None:
    """Set what libtpu reads once, when jax is imported: the folder of its logs and programs."""
    os.environ.update(LIBTPU)
    os.environ.setdefault("TPU_LOG_DIR", str(folder))
    dump = f"--xla_jf_dump_to={folder}/dump --xla_jf_dump_llo_text=true"
    os.environ["LIBTPU_INIT_ARGS"] = dump


def measure(folder: Path, chip: str, rate: float, bits: int | None) -> dict[str, Any]:
    """Return the bundles of each kernel, and the temporary bytes of both programs."""
    found, temporary = {}, {}
    for name, backward in (("forward", False), ("backward", True)):
        program = compiled(chip, rate, bits, backward=backward)
        temporary[f"{name}_bytes"] = program.memory_analysis().temp_size_in_bytes
        found = read_bundles(folder / "dump") | found
    return {"bundles": found} | temporary


def read_bundles(dump: Path) -> dict[str, int]:
    """Return the scheduled bundles of each kernel of a program, and empty the folder."""
    found = {}
    for path in dump.iterdir():
        if name := _FILE.search(path.name):
            count = re.search(r"total scheduled bundles\D*(\d+)", path.read_text())
            found |= {name[1]: int(count[1])} if count else {}
        path.unlink()
    return found


def compiled(
    chip: str,
    rate: float,
    bits: int | None,
    *,
    backward: bool,
    shape: tuple[int, ...] = SHAPE,
    dtype: str = "bfloat16",
    is_causal: bool = True,
) -> Any:
    """Compile the forward or the backward pass of attention in training for a chip."""
    import jax
    from jax.experimental.layout import Format, Layout
    from jax.sharding import SingleDeviceSharding

    import regjax

    packed = functools.partial(regjax.packed_bernoulli, bits=bits or 16)
    sampler = packed if bits else regjax.bernoulli

    def forward(query: Any, key: Any, value: Any, rng: Any) -> Any:
        return regjax.dot_product_attention(
            query,
            key,
            value,
            dropout_rng=rng,
            dropout_rate=rate,
            is_causal=is_causal,
            sampler=sampler,
            implementation="pallas",
        )

    def train(query: Any, key: Any, value: Any, rng: Any) -> Any:
        return jax.vjp(lambda q, k, v: forward(q, k, v, rng), query, key, value)

    one = SingleDeviceSharding(devices(chip)[0])
    array = jax.ShapeDtypeStruct(shape, dtype)
    arguments: tuple[Any, ...] = (array, array, array, jax.ShapeDtypeStruct((2,), "uint32"))
    function: Any = train
    if backward:
        out, pull_back = jax.eval_shape(train, *arguments)
        function, arguments = (lambda pull_back, dot: pull_back(dot)), (pull_back, out)

    def layout(x: Any) -> Any:
        return Format(Layout.AUTO, one) if x.ndim > 2 else one

    jitted = jax.jit(
        function,
        in_shardings=jax.tree.map(layout, arguments),
        out_shardings=jax.tree.map(layout, jax.eval_shape(function, *arguments)),
    )
    return jitted.lower(*arguments).compile()


def table(record: dict[str, Any]) -> str:
    """Return the table in Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    lines = [
        f"Scheduled bundles of each kernel, compiler output ({versions}; {record['date']}), not a",
        "time; in parentheses over those without dropout. Temporary bytes of each program. Causal",
        f"attention, bfloat16, shape {tuple(record['shape'])}. Not run on a TPU.",
        "",
        "| chip | mask | forward | dq | dk and dv | bytes forward | bytes backward |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        none = next(x for x in record["rows"] if x["chip"] == row["chip"] and x["mask"] == "none")
        cells = [
            f"{row['bundles'][k]:,} ({row['bundles'][k] / none['bundles'][k]:.2f})" for k in KERNELS
        ]
        numbers = f"{row['forward_bytes']:,} | {row['backward_bytes']:,}"
        lines.append(f"| {row['chip']} | {row['mask']} | {' | '.join(cells)} | {numbers} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    output.run(main)
