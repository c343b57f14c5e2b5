"""Programs, tables and pictures that the estimates of dropout on accelerators share.

A compiler records its cost estimates in a program, for chips that need not be present. Nothing is
timed. `tpu_model` and `gpu_model` set up a compiler and read its estimates.

JAX is imported inside functions only, since compilers read their settings on import.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import bars, race
from benchmarks.race import WORK
from parity_tests import pictures
from parity_tests.output import write_atomically

if TYPE_CHECKING:
    import jax
    from matplotlib.figure import Figure

    Apply = Callable[[Any, Any], Any]
    Devices = Sequence[Any]

# Global shapes, and the axis that is sharded over the chips; None: every chip has a copy.
LAYOUTS = (
    ((8192, 8192), None),
    ((8, 512, 4096), 0),
    ((8, 512, 4096), 1),
    ((8, 512, 4096), 2),
    ((1, 2048, 2048), None),
)
RATES = (0.5, 0.1)
DTYPE = "bfloat16"
# A training step in float32 with activations of 64 MiB per layer, which do not fit a TPU's fast
# memory: its use would distort the figures.
LAYERS, BATCH, WIDTH = 8, 8192, 2048
STEP_RATE = 0.1
COLLECTIVE = r"\b(?:all-reduce|all-gather|all-to-all|collective-permute)(?:-start)?\("


@dataclass(frozen=True)
class Program:
    """The estimates for one program.

    Attributes:
        cost: The cost, in the compiler's unit.
        collectives: The number of collective operations.
        temporary: The bytes of memory beyond arguments and result, on each chip.
    """

    cost: float
    collectives: int
    temporary: int


@dataclass(frozen=True)
class Row:
    """One program, compiled for one kind of chip.

    Attributes:
        chips: The kind of chip, and the grid.
        shape: The global shape of the array.
        axis: The sharded axis, or None.
        rate: The dropout rate.
        name: The library of the dropout.
        over_copy: The cost over that of the copy.
        collectives: The number of collective operations.
        temporary: The bytes of memory beyond arguments and result, on each chip.
        backward: Whether the program includes the gradient, and its copy that of the copy.
    """

    chips: str
    shape: tuple[int, ...]
    axis: int | None
    rate: float
    name: str
    over_copy: float
    collectives: int
    temporary: int
    backward: bool = False

    @property
    def place(self) -> tuple[str, tuple[int, ...], int | None, bool, float]:
        """Return the attributes that compared candidates have in common."""
        return self.chips, self.shape, self.axis, self.backward, self.rate

    @property
    def layout(self) -> str:
        """Return the shape and its sharding, in words."""
        return " ".join(self.layout_lines)

    @property
    def layout_lines(self) -> tuple[str, str]:
        """Return the shape, and its sharding in words."""
        sharding = "on each chip" if self.axis is None else f"sharded on axis {self.axis}"
        return str(self.shape), sharding


@dataclass(frozen=True)
class Step:
    """One training step of `perceptron`, compiled for one chip.

    Attributes:
        chips: The kind of chip, and the grid.
        form: "unrolled" or "scanned" layers.
        name: The library of the dropout.
        temporary: The bytes of memory beyond arguments and result.
        without: The same without dropout.
    """

    chips: str
    form: str
    name: str
    temporary: int
    without: int


@dataclass(frozen=True)
class Record:
    """The content of a JSON file.

    Attributes:
        programs: The compiled programs.
        steps: The compiled training steps.
        environment: The versions; empty if they were not recorded.
        date: The day in UTC, in ISO format; empty if it was not recorded.
    """

    programs: Sequence[Row]
    steps: Sequence[Step] = ()
    environment: Mapping[str, Any] = field(default_factory=dict)
    date: str = ""


def measure(
    kinds: Iterable[str],
    devices_of: Callable[[str], Devices],
    cost_of: Callable[[str], float],
    layouts: Sequence[tuple[tuple[int, ...], int | None]] = LAYOUTS,
) -> list[Row]:
    """Compile every candidate in every layout for every kind of chip; gradients in the first only.

    Args:
        kinds: Names of chips, with their grid.
        devices_of: Returns the devices of a name.
        cost_of: Returns the cost that the compiler recorded in the text of a program.
        layouts: Global shapes, each with the sharded axis or None.
    """
    from rich.progress import track

    passes = [(layout, False) for layout in layouts] + [(layouts[0], True)]
    work = [(kind, *layout, backward) for kind in kinds for layout, backward in passes]
    rows: list[Row] = []
    for kind, shape, axis, backward in track(work, "compiling"):
        devices = devices_of(kind)
        # An axis of 8 rows cannot be sharded over 256 chips.
        if axis is None or shape[axis] % len(devices) == 0:
            estimate = functools.partial(program, devices, shape, axis, cost_of=cost_of)
            rows += _rows(functools.partial(Row, kind, shape, axis), estimate, backward=backward)
    return rows


def _rows(
    row: Callable[..., Row], estimate: Callable[..., Program], *, backward: bool
) -> Iterator[Row]:
    """Yield a row for each rate and candidate."""
    from benchmarks.candidates import with_backward

    def program_of(apply: Apply, impl: str = "threefry2x32") -> Program:
        return estimate(with_backward(apply) if backward else apply, impl)

    copy = program_of(lambda x, key: x * 1.5)
    for rate in RATES:
        for name, (apply, impl) in candidates(rate).items():
            one = program_of(apply, impl)
            costs = one.cost / copy.cost, one.collectives, one.temporary
            yield row(rate, name, *costs, backward)


def measure_steps(kinds: Iterable[str], devices_of: Callable[[str], Devices]) -> list[Step]:
    """Compile a training step with every candidate that draws from threefry.

    Args:
        kinds: Names of chips, with their grid.
        devices_of: Returns the devices of a name.
    """
    from rich.progress import track

    from benchmarks import perceptron

    dropouts = {
        name: apply
        for name, (apply, impl) in candidates(STEP_RATE).items()
        if impl == "threefry2x32"
    }
    steps = []
    work = [(kind, form) for kind in kinds for form in perceptron.LOSSES]
    for kind, form in track(work, "compiling steps"):
        devices = devices_of(kind)
        without = step_bytes(devices, form, perceptron.none)
        for name, dropout in dropouts.items():
            steps.append(Step(kind, form, name, step_bytes(devices, form, dropout), without))
    return steps


def step_bytes(devices: Devices, form: str, dropout: Apply, layers: int = LAYERS) -> int:
    """Return the temporary memory of a training step of `perceptron` on the first device."""
    from jax.sharding import SingleDeviceSharding

    from benchmarks import perceptron

    return perceptron.temporary_bytes(
        perceptron.LOSSES[form],
        dropout,
        layers=layers,
        batch=BATCH,
        width=WIDTH,
        sharding=SingleDeviceSharding(devices[0]),
    )


def candidates(rate: float) -> dict[str, tuple[Apply, str]]:
    """Return each dropout with the implementation of its key."""
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


def program(
    devices: Devices,
    shape: tuple[int, ...],
    axis: int | None,
    apply: Apply,
    impl: str = "threefry2x32",
    *,
    cost_of: Callable[[str], float],
) -> Program:
    """Compile `apply(x, key)` with `x` sharded along `axis`, and return the estimates."""
    compiled = compile_shared(devices, shape, axis, apply, impl)
    text = compiled.as_text() or ""
    memory = compiled.memory_analysis()
    assert memory is not None
    return Program(cost_of(text), len(re.findall(COLLECTIVE, text)), memory.temp_size_in_bytes)


def compile_shared(
    devices: Devices, shape: tuple[int, ...], axis: int | None, apply: Apply, impl: str
) -> jax.stages.Compiled:
    """Compile `apply(x, key)` for devices that need not be present."""
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    mesh = Mesh(np.array(devices), ("chips",))
    whole = NamedSharding(mesh, PartitionSpec())
    shared = whole if axis is None else NamedSharding(mesh, PartitionSpec(*[None] * axis, "chips"))
    key = jax.eval_shape(lambda: jax.random.key(0, impl=impl))
    run = jax.jit(apply, in_shardings=(shared, whole), out_shardings=shared)
    return run.lower(jax.ShapeDtypeStruct(shape, DTYPE), key).compile()


def save(
    stem: Path,
    rows: Sequence[Row],
    compiler: Iterable[str],
    draw: Callable[[Record], Figure],
    unit: str,
    note: str = "",
    steps: Sequence[Step] = (),
) -> str:
    """Write JSON, Markdown and a picture, and return the Markdown.

    Args:
        stem: The path without a suffix.
        rows: The compiled programs.
        compiler: The packages of the compiler.
        draw: A function that draws the content of the JSON.
        unit: The unit of the cost.
        note: A note below the table.
        steps: Training steps, for a second table.
    """
    environment = race.environment(("regjax", "jax", "jaxlib", "flax", *compiler))
    record = Record(rows, steps, environment, race.today())
    parts = [markdown(rows, unit), steps and markdown_of_steps(steps), note and f"{note}\n"]
    found = f"{bars.dates('Compiled', [record.date])} {bars.versions(environment)}\n"
    text = "\n".join(part for part in (*parts, found) if part)
    write_atomically(stem.with_suffix(".json"), json.dumps(asdict(record), indent=1) + "\n")
    write_atomically(stem.with_suffix(".md"), text)
    pictures.save(draw(load(stem.with_suffix(".json"))), stem.with_suffix(".png"))
    return text


def load(path: Path) -> Record:
    """Return the content of a JSON file that `save` wrote."""
    content = json.loads(path.read_text(encoding="utf-8"))
    rows = [Row(**{**row, "shape": tuple(row["shape"])}) for row in content.pop("programs")]
    return Record(rows, [Step(**step) for step in content.pop("steps")], **content)


def markdown(rows: Sequence[Row], unit: str) -> str:
    """Return a table of cost over that of a copy, with a column for each library."""
    names = list(dict.fromkeys(row.name for row in rows))
    lines = [
        f"| {unit} over a copy (compiler model, not timed) | rate | " + " | ".join(names) + " |",
        "| --- | ---: |" + " ---: |" * len(names),
    ]
    for first, cells in _grouped(rows):
        written = " | ".join(_cell(cells[name]) if name in cells else "" for name in names)
        what = f"{first.chips}, {first.layout}, {WORK[first.backward]}"
        lines.append(f"| {what} | {first.rate} | {written} |")
    return "\n".join(lines) + "\n"


def markdown_of_steps(steps: Sequence[Step]) -> str:
    """Return a table of memory of training steps, with a column for each library."""
    names = list(dict.fromkeys(step.name for step in steps))
    lines = [
        f"| temporary MB of a training step, {LAYERS} layers of ({BATCH}, {WIDTH}) (compiled, not "
        "run) | without dropout | " + " | ".join(names) + " |",
        "| --- | ---: |" + " ---: |" * len(names),
    ]
    for chips, form in dict.fromkeys((step.chips, step.form) for step in steps):
        here = [step for step in steps if (step.chips, step.form) == (chips, form)]
        without = here[0].without
        cells = [f"{step.temporary / 1e6:.0f} ({step.temporary / without:.3f})" for step in here]
        lines.append(f"| {chips}, {form} | {without / 1e6:.0f} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(row: Row) -> str:
    talk = f", {row.collectives} collectives" if row.collectives else ""
    return f"{row.over_copy:.2f}{talk}"


def _grouped(rows: Sequence[Row]) -> Iterator[tuple[Row, dict[str, Row]]]:
    """Yield for each place its first row, and all its rows by candidate."""
    for place in dict.fromkeys(row.place for row in rows):
        here = {row.name: row for row in rows if row.place == place}
        yield next(iter(here.values())), here


def draw(record: Record, unit: str) -> Figure:
    """Draw a panel for each kind of chip and each rate: the cost over that of a copy, by layout."""
    panels = []
    forward = [row for row in record.programs if not row.backward]
    for chips, rate in dict.fromkeys((row.chips, row.rate) for row in forward):
        rows = [row for row in forward if (row.chips, row.rate) == (chips, rate)]
        groups = {
            "\n".join(first.layout_lines): {
                name: race.quartiles([row.over_copy]) for name, row in here.items()
            }
            for first, here in _grouped(rows)
        }
        panels.append(bars.Panel(f"{chips}, rate {rate}", groups))
    return bars.draw(
        panels,
        unit=f"estimated {unit} / {unit} of a copy",
        reference="a copy of the array",
        caption=[
            "Estimates by the cost model of the compiler for chips that were not present. Nothing "
            f"was timed. Array of {DTYPE}, forward.",
            bars.versions(record.environment),
            bars.dates("Compiled", [record.date]),
        ],
    )
