"""Compare time and memory of regjax.optim with those of optax, for a large model.

    python -m benchmarks.optimizers             # 100 M parameters in 1,000 leaves; half an hour
    python -m benchmarks.optimizers --only sgd  # measure one row again; a minute or two
    python -m benchmarks.optimizers --quick     # 1 M in 10 leaves, to test

A step updates and applies, in one jitted call with donated parameters and state. The reference is
optax's chain with the same decay, where optax has the optimizer. The L2 term of the loss is
compared with the decay of the optimizer.

Each row is written as soon as it is measured. `--only` keeps the other rows of an earlier run in
the same folder if machine, versions and number of leaves are the same. After a change of code,
measure all affected rows again.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import optax
from rich.console import Console
from rich.progress import Progress

import regjax
from benchmarks import bars, cli
from benchmarks.race import Record, Result, environment, load, race, save
from benchmarks.report import show
from parity_tests import output
from regjax import optim

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = "optimizers"
REGJAX, OPTAX = "regjax", "optax"
DECAY = 0.01
LEAF = (250, 400)
SIZE = LEAF[0] * LEAF[1]
# Muon takes about thirty times as long as the others, so its row has fewer leaves.
MOST_MATRICES = 100

Make = Callable[[], optax.GradientTransformation]


def _coupled(make: Callable[[], optax.GradientTransformation]) -> Make:
    return lambda: optax.chain(optax.add_decayed_weights(DECAY), make())


# The optimizer of regjax and its counterpart in optax, which has no ASGD.
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
    """The measurements of one optimizer.

    Attributes:
        name: The name of the optimizer.
        update: The times of a step.
        build: The times of tracing and compilation.
        temporary: The bytes that each candidate allocates beyond arguments and results.
    """

    name: str
    update: Result
    build: Result
    temporary: dict[str, int]

    @property
    def leaves(self) -> int:
        """Return the number of leaves of the parameters."""
        return self.update.elements // SIZE


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and write the table as Markdown, JSON and a picture."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.redraw:
        return cli.redraw(parser, options.out / NAME, load, draw)
    console = Console()
    leaves = 10 if options.quick else options.leaves
    rounds = 2 if options.quick else options.rounds
    names = options.only or NAMES
    stem = options.out / NAME
    rows = _earlier(stem.with_suffix(".json"), leaves) if options.only else {}
    with Progress(console=console) as progress:
        task = progress.add_task("measuring", total=len(names) * 2 * rounds)
        for name in names:
            progress.update(task, description=name)
            few = min(leaves, MOST_MATRICES) if name == "muon" else leaves
            rows[name] = _row(name, few, rounds, functools.partial(progress.advance, task))
            _save(stem.with_suffix(".json"), rows, leaves)
            progress.console.print(_line(rows[name], leaves), markup=False, soft_wrap=True)
    found = [rows[name] for name in NAMES if name in rows]
    # Without a counterpart in optax there is nothing to draw.
    show(stem, markdown(found, leaves), draw if any(map(_compared, found)) else None, console)
    return 0


def _save(path: Path, rows: Mapping[str, Row], leaves: int) -> None:
    save(
        path,
        [result for row in rows.values() for result in (row.update, row.build)],
        temporary={name: row.temporary for name, row in rows.items()},
        leaves=leaves,
    )


def _earlier(path: Path, leaves: int) -> dict[str, Row]:
    """Return the rows of an earlier run if it had the same environment and settings."""
    if not path.exists():
        return {}
    record = load(path)
    if (record.environment, record.extra["leaves"]) != (environment(), leaves):
        return {}
    return _rows(record)


def _rows(record: Record) -> dict[str, Row]:
    results = {result.title: result for result in record.results}
    return {
        name: Row(name, results[f"{name}, update"], results[f"{name}, build"], temporary)
        for name, temporary in record.extra["temporary"].items()
    }


def _parser() -> cli.Parser:
    parser = cli.parser(NAME, __doc__, rounds=5)
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
        type=output.one_of(NAMES)["type"],
        metavar="NAME",
        help="rows to measure; keeps the other rows of an earlier run "
        f"(default: all of {', '.join(NAMES)})",
    )
    return parser


Step = Callable[[Any, Any, Any], Any]


def _steps(name: str) -> dict[str, tuple[optax.GradientTransformation, Step]]:
    """Return the optimizer and the step of each candidate."""
    if name == LOSS_TERM:
        plain, decayed = optim.sgd(1e-3, 0.9), optim.sgd(1e-3, 0.9, weight_decay=2 * DECAY)
        # The loss is the term alone, without a model.
        return {
            REGJAX: (plain, functools.partial(_step, plain, penalty=DECAY)),
            OPTAX: (decayed, functools.partial(_step, decayed)),
        }
    made = dict(zip((REGJAX, OPTAX), PAIRS[name], strict=True))
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
    """A training run that each call continues by one step; arguments are donated."""

    def __init__(self, step: Any, params: Any, state: Any, gradient: Any) -> None:
        self.step, self.params, self.state, self.gradient = step, params, state, gradient

    def __call__(self) -> None:
        self.params, self.state = self.step(self.params, self.state, self.gradient)
        jax.block_until_ready(self.params)


def _build(step: Step, params: Any, state: Any, gradient: Any) -> None:
    jax.clear_caches()  # each candidate compiles everything
    jax.jit(step, donate_argnums=(0, 1)).lower(params, state, gradient).compile()


def _tree(leaves: int, size: float) -> dict[str, jax.Array]:
    keys = jax.random.split(jax.random.key(0), leaves)
    draw = jax.jit(lambda key: size * jax.random.normal(key, LEAF))
    return {f"{i:04}": draw(key) for i, key in enumerate(keys)}


def _compared(row: Row) -> bool:
    return OPTAX in row.update.seconds


def _ratio(result: Result) -> float:
    return result.ratio(REGJAX, OPTAX)


def markdown(rows: Sequence[Row], leaves: int) -> str:
    """Return a table with a line for each optimizer."""
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
        for side in (REGJAX, OPTAX)
    ]
    seconds = row.build.nanoseconds(REGJAX) / 1e9
    title = "L2 in the loss / in `sgd`" if row.name == LOSS_TERM else f"`{row.name}`"
    if row.leaves != leaves:
        title += f", {row.leaves:,} leaves"
    return (
        f"| {title} | {row.update.nanoseconds(REGJAX):.2f} | {ratios[0]} | {seconds:.1f}"
        f" | {ratios[1]} | {memory[0]} | {memory[1]} |"
    )


def draw(record: Record) -> Figure:
    """Draw the times of an update and of compilation over those of optax."""
    rows = _rows(record)
    compared = [rows[name] for name in NAMES if name in rows and _compared(rows[name])]
    # The loss term is compared with the decay of sgd.
    labels = {
        row.name: "L2 in the loss / sgd" if row.name == LOSS_TERM else row.name for row in compared
    }
    panels = [
        bars.Panel(
            title,
            {labels[row.name]: {REGJAX: get(row).ratios(REGJAX, OPTAX)} for row in compared},
        )
        for title, get in (("update", lambda r: r.update), ("compilation", lambda r: r.build))
    ]
    return bars.draw(
        panels,
        unit="time / time of optax",
        reference="the same optimizer in optax",
        caption=bars.origin(record),
    )


if __name__ == "__main__":
    output.run(main)
