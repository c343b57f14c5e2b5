r"""Compile the kernels for NVIDIA GPUs for an H100, and count their instructions.

    pip install --no-deps jax-cuda13-plugin==0.10.2 jax-cuda13-pjrt==0.10.2 \
        nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-nvdisasm  # the compiler, of JAX's version
    python -m benchmarks.gpu_kernels

XLA and Triton compile for a described GPU that need not be present. Two tables count the machine
instructions of `implementation="triton"`: those that a thread executes for an element of dropout,
and those in the program of each kernel of attention. A third has XLA's own estimate of attention
without kernels, in microseconds; it excludes matrix products, for which the model gives from 52 to
1,854 microseconds for the same work. Nothing is run or timed.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import gpu_model, race
from benchmarks.attention_kernel import KERNELS, MASKS, SHAPE
from benchmarks.cli import OUT
from parity_tests import output
from parity_tests.output import write_atomically

NAME = "gpu_kernels"
TOOLS = {"ptxas": "nvidia-cuda-nvcc", "nvdisasm": "nvidia-cuda-nvdisasm"}
LANES = 32  # the elements of a thread of dropout
BLOCK = 512


def main(argv: Sequence[str] | None = None) -> int:
    """Compile, print the tables, and write them as JSON and Markdown."""
    parser = output.Parser(f"python -m benchmarks.{NAME}", __doc__)
    parser.add_out(OUT, "table and JSON")
    options = parser.parse_args(argv)
    if line := gpu_model.missing() or missing():
        print(line)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        dump = Path(folder)
        os.environ["JAX_PLATFORMS"] = gpu_model.PLATFORMS
        flags = f"{gpu_model.NOTE_COSTS} --xla_dump_to={dump}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
        record = {
            "dropout": list(measured_dropout(dump)),
            "attention": list(measured_attention(dump)),
            "estimates": estimates(),
        }
    packages = ("jax", "jaxlib", *gpu_model.COMPILER, TOOLS["nvdisasm"])
    record |= {"versions": race.environment(packages)["versions"], "date": race.today()}
    stem = options.out / NAME
    write_atomically(stem.with_suffix(".json"), json.dumps(record, indent=1) + "\n")
    write_atomically(stem.with_suffix(".md"), markdown(record))
    print(markdown(record))
    print(f"Table and JSON: {options.out}")
    return 0


def missing() -> str:
    """Return why the instructions of a program cannot be read, or an empty string."""
    absent = [package for tool, package in TOOLS.items() if path_of(tool) is None]
    return f"skipped: pip install --no-deps {' '.join(absent)}" if absent else ""


def path_of(tool: str) -> Path | None:
    """Return the path of a tool of the compiler, if its package is installed."""
    try:
        files = importlib.metadata.files(TOOLS[tool]) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((Path(str(f.locate())) for f in files if f.name in (tool, f"{tool}.exe")), None)


def measured_dropout(dump: Path) -> Iterator[dict[str, Any]]:
    """Yield the instructions that a thread of packed dropout executes for each element."""
    import jax

    import regjax

    for dtype in ("bfloat16", "float32"):
        for label, rate, bits in MASKS:
            if bits is None:
                continue
            sampler = functools.partial(regjax.packed_bernoulli, bits=bits)
            options = {"sampler": sampler, "implementation": "triton"}
            compiled(
                lambda x, key, r=rate, o=options: regjax.dropout(x, r, key=key, **o),
                jax.ShapeDtypeStruct((8192, 8192), dtype),
                jax.ShapeDtypeStruct((2,), "uint32"),
            )
            (lines,) = (text for _, text in disassembled(dump))
            yield {"dtype": dtype, "mask": label, "instructions": executed(lines) / LANES}


def measured_attention(dump: Path) -> Iterator[dict[str, Any]]:
    """Yield the instructions in the program of each kernel of attention."""
    import jax

    array = jax.ShapeDtypeStruct(SHAPE, "bfloat16")
    key = jax.ShapeDtypeStruct((2,), "uint32")
    for label, rate, bits in MASKS:
        attend = attention(rate, bits, is_causal=True, implementation="triton")

        def gradients(query: Any, key: Any, value: Any, rng: Any, attend: Any = attend) -> Any:
            out, pull_back = jax.vjp(lambda q, k, v: attend(q, k, v, rng), query, key, value)
            return pull_back(out)

        program = compiled(gradients, array, array, array, key)
        counts = {name: len(instructions(text)) for name, text in disassembled(dump)}
        memory = program.memory_analysis()
        yield {"mask": label, "instructions": counts, "bytes": memory.temp_size_in_bytes}


def estimates() -> dict[str, float]:
    """Return XLA's estimate of each form of attention without kernels, in microseconds."""
    import jax

    array = jax.ShapeDtypeStruct(SHAPE, "bfloat16")
    key = jax.ShapeDtypeStruct((2,), "uint32")
    forms: dict[str, Callable[..., Any]] = {
        "jax.nn, no dropout": lambda q, k, v, rng: jax.nn.dot_product_attention(q, k, v),
        "whole, exact": attention(0.1, None),
        "whole, packed": attention(0.1, 16),
        "blocks, no dropout": attention(0.0, None, block_size=BLOCK),
        "blocks, exact": attention(0.1, None, block_size=BLOCK),
        "blocks, packed": attention(0.1, 16, block_size=BLOCK),
    }
    found = {}
    for name, form in forms.items():
        found[name] = microseconds(compiled(form, array, array, array, key).as_text())
        print(f"{name}: {found[name]:.0f} us by XLA's model", flush=True)
    return found


def attention(rate: float, bits: int | None, **options: Any) -> Callable[..., Any]:
    """Return regjax's attention with a mask, as a function of query, key, value and PRNG key."""
    import regjax

    packed = functools.partial(regjax.packed_bernoulli, bits=bits or 16)
    options |= {"dropout_rate": rate, "sampler": packed if bits else regjax.bernoulli}
    return lambda q, k, v, rng: regjax.dot_product_attention(q, k, v, dropout_rng=rng, **options)


def compiled(function: Callable[..., Any], *arguments: Any) -> Any:
    """Compile a function for an H100."""
    import jax
    from jax.sharding import SingleDeviceSharding

    one = SingleDeviceSharding(gpu_model.devices("H100:1")[0])
    return jax.jit(function, in_shardings=one, out_shardings=one).lower(*arguments).compile()


def disassembled(dump: Path) -> Iterator[tuple[str, str]]:
    """Yield name and machine code of regjax's kernels in a folder, and empty it."""
    for path in sorted(dump.iterdir()):
        if path.suffix == ".ptx" and (
            entry := re.search(r"\.entry (regjax\w+?)\(", path.read_text())
        ):
            binary = path.with_suffix(".cubin")
            for command in (
                [path_of("ptxas"), "-arch=sm_90a", path, "-o", binary],
                [path_of("nvdisasm"), "-c", binary],
            ):
                done = subprocess.run(
                    list(map(str, command)), capture_output=True, text=True, check=True
                )
            yield entry[1], done.stdout
    for path in dump.iterdir():
        path.unlink()


def instructions(code: str) -> list[str]:
    """Return the instructions of machine code, without the padding at its end."""
    found = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", code)
    return [name for name in found if name != "NOP"]


def executed(code: str, trips: int = LANES // 8) -> int:
    """Return the instructions that a thread executes, if its only loop runs a number of times.

    A loop is the code between a label and a branch back to it. The last instruction of every
    program is a branch to itself, which is never reached.
    """
    count = len(instructions(code))
    for label in re.findall(r"^(\.L_\w+):", code, re.MULTILINE):
        body = re.search(
            rf"^{re.escape(label)}:(.*?)BRA[^\n]*{re.escape(label)}", code, re.M | re.S
        )
        if body and (inside := len(instructions(body[1]))):
            count += (trips - 1) * (inside + 1)
    return count


def microseconds(program: str) -> float:
    """Return XLA's estimate of all kernels but matrix products, with loops as often as they run."""
    bodies: dict[str, list[str]] = {}
    name = entry = ""
    for line in program.splitlines():
        if start := re.match(r"(ENTRY )?%([\w.-]+) .*\{$", line):
            name = start[2]
            entry = name if start[1] else entry
        bodies.setdefault(name, []).append(line)

    def total(name: str) -> float:
        return sum(map(cost, bodies[name]))

    def cost(line: str) -> float:
        if loop := re.search(r" while\(.*body=%([\w.-]+).*known_trip_count\W+n\W+(\d+)", line):
            return int(loop[2]) * total(loop[1])
        if " fusion(" not in line or '"kind":"__triton_nested_gemm_fusion"' in line:
            return 0.0
        listed = re.search(r'"reification_cost":\[(.*?)\]', line)
        costs = listed[1] if listed else ""
        pairs = re.findall(r'"exec_time_us":([\d.e+-]+).*?"name":"([^"]*)"', costs)
        known = {name: float(time) for time, name in pairs}
        # The first estimate of the Triton kernel of a softmax is nonsense.
        which = "indexing-cost-model" if '"kind":"__triton"' in line else ""
        if which not in known:
            raise ValueError(
                f"program must have an estimate for each kernel; got none for {line.split()[0]}. "
                f"Set XLA_FLAGS={gpu_model.NOTE_COSTS} before the import of jax."
            )
        return known[which]

    return total(entry)


def markdown(record: dict[str, Any]) -> str:
    """Return the tables."""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    lines = [
        f"Compiler output for an H100, never a time ({versions}; {record['date']}).",
        "",
        '| instructions of a thread per element of dropout, `implementation="triton"` '
        "| bfloat16 | float32 |",
        "|---|---:|---:|",
    ]
    labels = dict.fromkeys(row["mask"] for row in record["dropout"])
    counts = {(row["mask"], row["dtype"]): row["instructions"] for row in record["dropout"]}
    for label in labels:
        cells = [f"{counts[label, dtype]:.1f}" for dtype in ("bfloat16", "float32")]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    lines += [
        "",
        f"| instructions in the kernels of causal attention, bfloat16, {SHAPE} (over no dropout) "
        "| forward | dq | dk and dv |",
        "|---|---:|---:|---:|",
    ]
    none = record["attention"][0]["instructions"]
    for row in record["attention"]:
        counts = row["instructions"]
        cells = [f"{counts[k]:,} ({counts[k] / none[k]:.2f})" for k in KERNELS]
        lines.append(f"| {row['mask']} | {' | '.join(cells)} |")
    lines += [
        "",
        f"| attention without kernels, bfloat16, {SHAPE}, rate 0.1, forward | microseconds by "
        "XLA's model, without matrix products |",
        "|---|---:|",
        *(f"| {name} | {time:,.0f} |" for name, time in record["estimates"].items()),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    output.run(main)
