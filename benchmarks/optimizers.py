"""What regjax.optim's optimizers cost beside optax's own, where a model is large.

python -m benchmarks.optimizers             # 100 M parameters in 1,000 leaves; half an hour
python -m benchmarks.optimizers --only sgd  # that row anew; a minute or two
python -m benchmarks.optimizers --quick     # 1 M in 10 leaves, to see that it runs

Each step updates and applies, in one jitted call that may write over parameters and state. Where
optax has the optimizer, its own chain with the same decay is raced beside ours; the L2 term of the
loss is raced beside the decay of the optimizer.

Rows are written as they come. `--only` keeps the others that an earlier run has left in the folder,
if machine, versions and number of leaves were the same: so the table can be had in pieces. After a
change of code, measure all that it concerns again.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import optax
from rich.console import Console
from rich.progress import Progress

import regjax
from benchmarks import cli
from benchmarks.race import Result, environment, race, save
from benchmarks.report import draw
from parity_tests.output import write_atomically
from regjax import optim

OURS, PEER = "regjax", "optax"
DECAY = 0.01
LEAF = (250, 400)
SIZE = LEAF[0] * LEAF[1]
# Muon takes some thirty times as long as the others: its row has fewer leaves, and says so.
MOST_MATRICES = 100

Make = Callable[[], optax.GradientTransformation]


def _coupled(make: Callable[[], optax.GradientTransformation]) -> Make:
    return lambda: optax.chain(optax.add_decayed_weights(DECAY), make())


# Ours, and what a user of optax would write for it. ASGD has no counterpart there.
PAIRS: dict[str, tuple[Make, Make | None]] = {
    "sgd": (
        lambda: optim.sgd(1e-3, 0.9, weight_decay=DECAY),
        _coupled(lambda: optax.sgd(1e-3, 0.9)),
    ),
    "adam": (lambda: optim.adam(1e-3, weight_decay=DECAY), _coupled(lambda: optax.adam(1e-3))),
    "adamw": (
        lambda: optim.adamw(1e-3, weight_decay=DECAY),
        lambda: optax.adamw(1e-3, weight_decay=DECAY),
    ),
    "nadam": (lambda: optim.nadam(1e-3, weight_decay=DECAY), _coupled(lambda: optax.nadam(1e-3))),
    "radam": (lambda: optim.radam(1e-3, weight_decay=DECAY), _coupled(lambda: optax.radam(1e-3))),
    "adamax": (
        lambda: optim.adamax(1e-3, weight_decay=DECAY),
        _coupled(lambda: optax.adamax(1e-3)),
    ),
    "adagrad": (
        lambda: optim.adagrad(1e-3, weight_decay=DECAY),
        _coupled(lambda: optax.adagrad(1e-3)),
    ),
    "adadelta": (
        lambda: optim.adadelta(1.0, weight_decay=DECAY),
        _coupled(lambda: optax.adadelta(1.0)),
    ),
    "rmsprop": (
        lambda: optim.rmsprop(1e-3, weight_decay=DECAY, momentum=0.9),
        _coupled(lambda: optax.rmsprop(1e-3, momentum=0.9)),
    ),
    "rprop": (lambda: optim.rprop(1e-3), lambda: optax.rprop(1e-3)),
    "asgd": (lambda: optim.asgd(1e-3, weight_decay=DECAY), None),
    "adafactor": (
        lambda: optim.adafactor(1e-3, weight_decay=DECAY),
        lambda: optax.adafactor(1e-3, weight_decay_rate=DECAY),
    ),
    "muon": (
        lambda: optim.muon(1e-3, weight_decay=DECAY),
        lambda: optax.contrib.muon(1e-3, weight_decay=DECAY),
    ),
}


LOSS_TERM = "loss term"
NAMES = (*PAIRS, LOSS_TERM)


@dataclasses.dataclass(frozen=True)
class Row:
    """One optimizer beside optax's.

    Attributes:
        name: of the optimizer.
        update: the race of one step.
        build: the race of tracing and compiling it.
        temporary: bytes beyond arguments and results, by candidate.
    """

    name: str
    update: Result
    build: Result
    temporary: dict[str, int]

    @property
    def leaves(self) -> int:
        """How many leaves the parameters had."""
        return self.update.elements // SIZE


def main(argv: Sequence[str] | None = None) -> int:
    """Races, prints the table, and writes it as Markdown, JSON and a picture."""
    options = _parser().parse_args(argv)
    console = Console()
    leaves = 10 if options.quick else options.leaves
    rounds = 2 if options.quick else options.rounds
    names = options.only or NAMES
    stem = options.out / "optimizers"
    rows = _left(stem.with_suffix(".json"), leaves) if options.only else {}
    with Progress(console=console) as progress:
        task = progress.add_task("racing", total=len(names) * 2 * rounds)
        for name in names:
            progress.update(task, description=name)
            few = min(leaves, MOST_MATRICES) if name == "muon" else leaves
            rows[name] = _row(name, few, rounds, functools.partial(progress.advance, task))
            _save(stem.with_suffix(".json"), rows, leaves)
            progress.console.print(_line(rows[name], leaves), markup=False, soft_wrap=True)
    _show(stem, [rows[name] for name in NAMES if name in rows], leaves, console)
    return 0


def _save(path: Path, rows: Mapping[str, Row], leaves: int) -> None:
    save(
        path,
        [result for row in rows.values() for result in (row.update, row.build)],
        temporary={name: row.temporary for name, row in rows.items()},
        **_settings(leaves),
    )


def _left(path: Path, leaves: int) -> dict[str, Row]:
    """The rows of an earlier run, if it measured the same under the same circumstances."""
    record = json.loads(path.read_text()) if path.exists() else {}
    now = {"environment": environment(), **_settings(leaves)}
    if {key: record.get(key) for key in now} != now:
        return {}
    results = {result["title"]: Result(**result) for result in record["results"]}
    return {
        name: Row(name, results[f"{name}, update"], results[f"{name}, build"], temporary)
        for name, temporary in record["temporary"].items()
    }


def _settings(leaves: int) -> dict[str, Any]:
    return {"leaves": leaves, "optax": optax.__version__}


def _show(stem: Path, rows: Sequence[Row], leaves: int, console: Console) -> None:
    """Writes the table as Markdown and the ratios as a picture."""
    text = markdown(rows, leaves)
    write_atomically(stem.with_suffix(".md"), text)
    raced = [row for row in rows if len(row.update.seconds) > 1]
    if raced:
        panels = [
            (f"{title}, time over optax's", {_shown(row): _ratio(get(row)) for row in raced})
            for title, get in (("update", lambda r: r.update), ("compilation", lambda r: r.build))
        ]
        own = [_shown(row) for row in raced]
        picture, unit = stem.with_suffix(".png"), "ratio (lower is better)"
        draw(picture, panels, unit=unit, own=own, digits=2)
    console.print(text, soft_wrap=True, markup=False)
    console.print(f"Table, times and picture: {stem}.{{md,json,png}}", soft_wrap=True)


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser("optimizers", __doc__, rounds=5)
    parser.add_argument(
        "--leaves",
        type=cli.whole,
        default=1000,
        metavar="N",
        help="leaves of 100,000 parameters (default: %(default)s)",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=NAMES,
        metavar="NAME",
        help="some rows, beside those that are there",
    )
    return parser


Step = Callable[[Any, Any, Any], Any]


def _steps(name: str) -> dict[str, tuple[optax.GradientTransformation, Step]]:
    """By candidate, its optimizer and the step it takes."""
    if name == LOSS_TERM:
        plain, decayed = optim.sgd(1e-3, 0.9), optim.sgd(1e-3, 0.9, weight_decay=2 * DECAY)
        # Of the loss only the term itself: what it adds to a step, not what a model costs.
        return {
            OURS: (plain, functools.partial(_step, plain, penalty=DECAY)),
            PEER: (decayed, functools.partial(_step, decayed)),
        }
    made = dict(zip((OURS, PEER), PAIRS[name], strict=True))
    optimizers = {side: make() for side, make in made.items() if make is not None}
    return {side: (o, functools.partial(_step, o)) for side, o in optimizers.items()}


def _step(
    optimizer: optax.GradientTransformation,
    params: Any,
    state: Any,
    gradient: Any,
    *,
    penalty: float = 0.0,
) -> Any:
    if penalty:
        gradient = optax.tree.add(gradient, jax.grad(regjax.l2_penalty)(params, penalty))
    updates, state = optimizer.update(gradient, state, params)
    return optax.apply_updates(params, updates), state


def _row(name: str, leaves: int, rounds: int, on_round: Callable[[], None]) -> Row:
    steps = _steps(name)
    gradient = _tree(leaves, 1e-3)
    runs, compiled = {}, {}
    for side, (optimizer, step) in steps.items():
        params = _tree(leaves, 1.0)
        state = jax.jit(optimizer.init)(params)
        jitted = jax.jit(step, donate_argnums=(0, 1))
        compiled[side] = jitted.lower(params, state, gradient).compile()
        runs[side] = _Walk(compiled[side], params, state, gradient)
        del params, state
    elements = leaves * SIZE
    update = race(f"{name}, update", runs, elements=elements, rounds=rounds, on_round=on_round)
    shapes = {
        side: jax.eval_shape(lambda walk=walk: (walk.params, walk.state))
        for side, walk in runs.items()
    }
    builds = {
        side: functools.partial(_build, step, *shapes[side], gradient)
        for side, (_, step) in steps.items()
    }
    build = race(f"{name}, build", builds, elements=1, rounds=rounds, on_round=on_round)
    analysed = {side: program.memory_analysis() for side, program in compiled.items()}
    temporary = {side: int(found.temp_size_in_bytes) for side, found in analysed.items()}
    return Row(name, update, build, temporary)


class _Walk:
    """Steps on from where the last call came to: arguments are given away."""

    def __init__(self, step: Any, params: Any, state: Any, gradient: Any) -> None:
        self.step, self.params, self.state, self.gradient = step, params, state, gradient

    def __call__(self) -> None:
        self.params, self.state = self.step(self.params, self.state, self.gradient)
        jax.block_until_ready(self.params)


def _build(step: Step, params: Any, state: Any, gradient: Any) -> None:
    jax.clear_caches()  # each candidate starts from nothing
    jax.jit(step, donate_argnums=(0, 1)).lower(params, state, gradient).compile()


def _tree(leaves: int, size: float) -> dict[str, jax.Array]:
    keys = jax.random.split(jax.random.key(0), leaves)
    draw = jax.jit(lambda key: size * jax.random.normal(key, LEAF))
    return {f"{i:04}": draw(key) for i, key in enumerate(keys)}


def _shown(row: Row) -> str:
    """The name of a row in the picture; the loss term has another base than its neighbours."""
    return "L2 in the loss\nover sgd's decay" if row.name == LOSS_TERM else row.name


def _ratio(result: Result) -> float:
    return result.ratio(OURS, PEER)


def markdown(rows: Sequence[Row], leaves: int) -> str:
    """A table: one optimizer a line."""
    elements = leaves * SIZE
    lines = [
        f"| {elements / 1e6:,.0f} M parameters in {leaves:,} leaves, {environment()['cores']} cores"
        " | ns per parameter | update / optax | compile, s | compile / optax"
        " | temporary, MB | optax's, MB |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    return "\n".join([*lines, *(_line(row, leaves) for row in rows)]) + "\n"


def _line(row: Row, leaves: int) -> str:
    both = len(row.update.seconds) > 1
    ratios = [f"{_ratio(result):.2f}" if both else "" for result in (row.update, row.build)]
    memory = [
        f"{row.temporary[side] / 1e6:,.1f}" if side in row.temporary else ""
        for side in (OURS, PEER)
    ]
    seconds = row.build.nanoseconds(OURS) / 1e9
    title = "L2 in the loss / in `sgd`" if row.name == LOSS_TERM else f"`{row.name}`"
    if row.leaves != leaves:
        title += f", {row.leaves:,} leaves"
    return (
        f"| {title} | {row.update.nanoseconds(OURS):.2f} | {ratios[0]} | {seconds:.1f}"
        f" | {ratios[1]} | {memory[0]} | {memory[1]} |"
    )


if __name__ == "__main__":
    raise SystemExit(main())
