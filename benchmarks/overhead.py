"""Measure calls of dropout on small arrays, and the compilation of a model with many sites.

python -m benchmarks.overhead          # eager and jitted calls, then trace and compile times
python -m benchmarks.overhead --quick  # few rounds, to test
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.progress import Progress

from benchmarks import bars, cli
from benchmarks import candidates as field
from benchmarks.race import Record, Result, environment, load, race
from benchmarks.report import publish
from parity_tests import output

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = "overhead"
RATE = 0.1
SIZES = (32, 1_000, 100_000)
CALLS = ("eager", "jitted")
SITES = 24
WIDTH = 64


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and write the table as Markdown, JSON and a picture."""
    parser = cli.parser(NAME, __doc__, rounds=11)
    options = parser.parse_args(argv)
    if options.redraw:
        return cli.redraw(parser, options.out / NAME, load, draw)
    console = Console()
    rounds = 5 if options.quick else options.rounds
    applies = {**field.own(RATE), **field.peers(RATE, console.print)}
    calls = []
    with Progress(console=console) as progress:
        task = progress.add_task("measuring", total=len(SIZES) * len(CALLS) * rounds + rounds)
        step = functools.partial(progress.advance, task)
        for size in SIZES:
            for how in CALLS:
                runs = _calls(applies, size, jitted=how == "jitted")
                title = f"{how}, {size:,} elements"
                calls.append(race(title, runs, elements=1, rounds=rounds, on_round=step))
        builds = {name: functools.partial(_build, apply) for name, apply in applies.items()}
        title = f"trace and compile {SITES} sites"
        built = race(title, builds, elements=1, rounds=rounds, on_round=step)
    results = [*calls, built]
    publish(options.out / NAME, results, markdown(results), draw, console=console)
    return 0


def _calls(
    applies: dict[str, field.Apply], size: int, *, jitted: bool
) -> dict[str, Callable[[], object]]:
    x, key = jnp.ones(size), jax.random.key(0)
    # A call takes microseconds, so a run repeats it until the clock resolves it well.
    repeats = 100 if jitted else 20

    def run(apply: field.Apply) -> None:
        for _ in range(repeats):
            jax.block_until_ready(apply(x, key))

    return {
        name: functools.partial(run, jax.jit(apply) if jitted else apply)
        for name, apply in applies.items()
    }


def _build(apply: field.Apply) -> None:
    """Trace and compile the gradient of a deep network with dropout after every layer."""
    jax.clear_caches()  # each candidate compiles everything

    def loss(weights: jax.Array, x: jax.Array, key: jax.Array) -> jax.Array:
        for site in range(SITES):
            x = apply(jax.nn.relu(x @ weights[site]), jax.random.fold_in(key, site))
        return x.sum()

    weights = jnp.ones((SITES, WIDTH, WIDTH))
    jax.jit(jax.grad(loss)).lower(weights, jnp.ones((32, WIDTH)), jax.random.key(0)).compile()


def markdown(results: Sequence[Result]) -> str:
    """Return a table of times over that of regjax, with a column for each candidate."""
    names = list(results[0].seconds)
    lines = [
        f"| time over regjax's, {environment()['cores']} cores | " + " | ".join(names[1:]) + " |",
        "| --- |" + " ---: |" * len(names[1:]),
    ]
    for result in results:
        ratios = [f"{result.ratio(name, field.EXACT):.2f}" for name in names[1:]]
        lines.append(f"| {result.title} | " + " | ".join(ratios) + " |")
    return "\n".join(lines) + "\n"


def draw(record: Record) -> Figure:
    """Draw a panel for each race: the time of each candidate over that of regjax."""
    return bars.draw_race(
        record,
        base=field.EXACT,
        own=field.OWN,
        unit="time / time of regjax",
        reference="regjax",
    )


if __name__ == "__main__":
    output.run(main)
