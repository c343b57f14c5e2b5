"""Measure how time, memory and compilation grow, with and without dropout and decay.

    python -m benchmarks.scale                       # elements, sites, leaves and devices
    python -m benchmarks.scale --only elements sites # these, and keep the rest of an earlier run
    python -m benchmarks.scale --quick               # small sizes, to test

`elements`, `sites`, `leaves` and `devices` are measured on this machine; its CPU simulates up to 8
devices. `cpu`, `tpu` and `gpu` compile the train step of `examples.sharded_lm` for simulated
devices, for TPUs and for H100s, which need not be present: memory and collectives are those of the
compiled program, and costs are the compiler's estimates. Nothing is timed there. Each part runs in
a process of its own; without its compiler it is skipped with a line:

    pip install libtpu  # for tpu; see `python -m benchmarks.gpu_model --help` for gpu
"""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import cli, gpu_model, race, scale_tables, tpu_model
from parity_tests import pictures
from parity_tests.output import run, write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = "scale"
MEASURED = ("elements", "sites", "leaves", "devices")
_CPUS = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}


@dataclass(frozen=True)
class Part:
    """A part of the benchmark, which runs in a process of its own.

    Attributes:
        env: The settings of the compiler, which reads them on import.
        grids: The devices to compile for; empty for a part that is measured.
        missing: Returns why the part cannot run, or an empty string.
    """

    env: Mapping[str, str] = field(default_factory=dict)
    grids: tuple[str, ...] = ()
    missing: Callable[[], str] = lambda: ""


PARTS = {
    "elements": Part(),
    "sites": Part(),
    "leaves": Part(),
    "devices": Part(_CPUS),
    "cpu": Part(_CPUS, ("CPU:1", "CPU:2", "CPU:4", "CPU:8")),
    "tpu": Part(
        tpu_model.LIBTPU,
        ("v5e:2x2", "v5e:4x4", "v5e:16x16", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"),
        tpu_model.missing,
    ),
    "gpu": Part(
        {"JAX_PLATFORMS": gpu_model.PLATFORMS, "XLA_FLAGS": gpu_model.NOTE_COSTS},
        ("H100:1x1x8", "H100:1x8x8", "H100:1x64x8"),
        gpu_model.missing,
    ),
}
PACKAGES = ("regjax", "jax", "jaxlib", "optax", "flax", "numpy")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and compile, and write the tables as Markdown, JSON and a picture."""
    parser = cli.parser(NAME, __doc__, rounds=5)
    parser.add_selection("part", lambda: PARTS)
    options = parser.parse_args(argv)
    stem = options.out / NAME
    if options.list:
        print("\n".join(PARTS))
        return 0
    if options.redraw:
        return cli.redraw(parser, stem, load, draw)
    rounds = 2 if options.quick else options.rounds
    content = load(stem.with_suffix(".json")) if _continues(options, stem) else {}
    for name, part in PARTS.items():
        if options.only and not any(name.startswith(only) for only in options.only):
            continue
        if line := part.missing():
            print(line)
            continue
        try:
            content[name] = isolated(part.env, measure, name, options.quick, rounds)
        except BrokenProcessPool:
            print(f"failed: the process of {name} ended early")
            continue
        save(stem, content)
    if content:
        print(scale_tables.markdown(content))
        print(f"Tables, JSON and picture: {stem}.{{md,json,png}}")
    return 0


def _continues(options: Any, stem: Path) -> bool:
    return bool(options.only) and stem.with_suffix(".json").is_file()


def isolated(env: Mapping[str, str], function: Callable[..., Any], *args: Any) -> Any:
    """Call a function in a new process with the environment variables, and return its result.

    Raises:
        BrokenProcessPool: The process ended early; a compiler may abort it.
    """
    before = dict(os.environ)
    os.environ.update(env)
    try:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            return pool.submit(function, *args).result()
    finally:
        os.environ.clear()
        os.environ.update(before)


def measure(name: str, quick: bool, rounds: int) -> dict[str, Any]:
    """Measure or compile one part in this process.

    Returns:
        Its samples, with the date, the machine, and the load of the machine before and after.
    """
    from rich.progress import track

    part = PARTS[name]
    load = [os.getloadavg()[0]]
    if part.grids:
        os.environ.setdefault("TPU_LOG_DIR", tempfile.mkdtemp())
        from benchmarks import sharded_step

        sizes = sharded_step.SMALL if quick or name == "cpu" else sharded_step.SIZES
        grids = part.grids[:2] if quick else part.grids
        found = sharded_step.compile_all(grids, sizes)
        packages = (*PACKAGES, *tpu_model.COMPILER, *gpu_model.COMPILER)
    else:
        from benchmarks import scale_axes

        found = track(scale_axes.AXES[name](quick, rounds), name, total=None)
        packages = PACKAGES
    samples = [asdict(sample) for sample in found]
    return {
        "date": race.today(),
        "load": [*load, os.getloadavg()[0]],
        "environment": race.environment(packages),
        "samples": samples,
    }


def save(stem: Path, content: Mapping[str, Any]) -> None:
    """Write JSON, Markdown and a picture."""
    ordered = {name: content[name] for name in PARTS if name in content}
    write_atomically(stem.with_suffix(".json"), json.dumps(ordered, indent=1) + "\n")
    write_atomically(stem.with_suffix(".md"), scale_tables.markdown(ordered))
    pictures.save(draw(ordered), stem.with_suffix(".png"))


def load(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file that `save` wrote."""
    return json.loads(path.read_text(encoding="utf-8"))


def draw(content: Mapping[str, Any]) -> Figure:
    """Draw time, memory and compilation against size, and estimated cost against devices."""
    from benchmarks import scale_picture

    return scale_picture.draw(content)


if __name__ == "__main__":
    run(main)
