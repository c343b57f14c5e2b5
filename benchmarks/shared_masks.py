"""Measure dropout with a mask that is shared along dimensions, relative to a copy of the array.

    python -m benchmarks.shared_masks          # 16.8 M elements, as in README
    python -m benchmarks.shared_masks --quick  # 1 M elements, to test

Such a mask has few elements. Its cost depends on whether each is drawn once, or again for every
element that shares it. Three of the JAX libraries can share masks.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.progress import Progress

from benchmarks import candidates as field
from benchmarks import cli
from benchmarks.dropout_speed import draw
from benchmarks.race import WORK, Result, environment, load, race
from benchmarks.report import publish
from parity_tests import output

NAME = "shared_masks"
RATE = 0.1


def cases(batch: int) -> dict[str, tuple[tuple[int, ...], field.Dims]]:
    """Return by name the shape of an array and the dimensions that share the mask."""
    return {
        "all timesteps": ((batch, 256, 256), (1,)),
        "all pixels, channels last": ((batch, 32, 32, 64), (1, 2)),
        "all pixels, channels first": ((batch, 64, 32, 32), (2, 3)),
        "all rows": ((batch * 16, 4096), (0,)),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and write the table as Markdown, JSON and a picture."""
    parser = cli.parser(NAME, __doc__, rounds=11)
    options = parser.parse_args(argv)
    if options.redraw:
        return cli.redraw(parser, options.out / NAME, load, draw)
    batch, rounds = (16, 3) if options.quick else (256, options.rounds)
    console = Console()
    shapes = cases(batch)
    results = []
    with Progress(console=console) as progress:
        task = progress.add_task("measuring", total=len(shapes) * len(WORK) * rounds)
        for name, (shape, dims) in shapes.items():
            x, key = jnp.ones(shape), jax.random.key(0)
            applies = {field.COPY: field.copy, **field.own(RATE, dims)}
            applies |= field.peers(RATE, progress.console.print, dims)
            for backward, work in WORK.items():
                results.append(
                    race(
                        f"{name}, {work}",
                        field.in_jax(applies, x, key, backward=backward),
                        elements=x.size,
                        rounds=rounds,
                        on_round=lambda: progress.advance(task),
                    )
                )
    publish(options.out / NAME, results, markdown(results), draw, console=console)
    return 0


def markdown(results: Sequence[Result]) -> str:
    """Return a table of times over that of a copy, with a column for each candidate."""
    names = [name for name in results[0].seconds if name != field.COPY]
    size = f"{results[0].elements / 1e6:.1f} M elements on {environment()['cores']} cores"
    lines = [
        f"| mask shared by; {size} | " + " | ".join(f"{name} / copy" for name in names) + " |",
        "| --- " + "| ---: " * len(names) + "|",
    ]
    for result in results:
        ratios = " | ".join(f"{result.ratio(name, field.COPY):.2f}" for name in names)
        lines.append(f"| {result.title} | {ratios} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    output.run(main)
