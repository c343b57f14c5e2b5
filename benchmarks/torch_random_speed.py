"""Measure the time of PyTorch's random stream in JAX relative to PyTorch, on one thread.

python -m benchmarks.torch_random_speed          # 1 M elements
python -m benchmarks.torch_random_speed --quick  # 65,536 elements, to test
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import torch
from rich.console import Console
from rich.progress import Progress
from torch.nn import functional as F

from benchmarks import bars, cli
from benchmarks.race import Record, Result, environment, load, race
from benchmarks.report import publish
from parity_tests import output
from regjax import torch_random

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = "torch_random_speed"
TORCH = "torch"
STORED = "torch_random"
REDRAWN = "mask drawn again"

Runs = Mapping[str, Callable[[], object]]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and write the table as Markdown, JSON and a picture."""
    parser = cli.parser(NAME, __doc__, rounds=15)
    options = parser.parse_args(argv)
    if options.redraw:
        return cli.redraw(parser, options.out / NAME, load, draw)
    _limit_to_one_thread()
    console = Console()
    size, rounds = (2**16, 3) if options.quick else (2**20, options.rounds)
    races = candidates(size)
    with Progress(console=console) as progress:
        task = progress.add_task("measuring", total=len(races) * rounds)
        results = [
            race(title, runs, elements=size, rounds=rounds, on_round=lambda: progress.advance(task))
            for title, runs in races.items()
        ]
    publish(options.out / NAME, results, markdown(results), draw, console=console)
    return 0


def _limit_to_one_thread() -> None:
    """Limit both frameworks to one thread: XLA uses as many as the process has CPUs."""
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])


def candidates(size: int) -> dict[str, Runs]:
    """Return for each race the functions to run."""
    g, ones = torch_random.generator(0), torch.ones(size)
    x, leaf = jnp.ones(size), torch.ones(size, requires_grad=True)

    def bound(function: Callable[..., Any], *args: Any) -> Callable[[], object]:
        jitted = jax.jit(function)
        return lambda: jax.block_until_ready(jitted(*args))

    def dropout(x: Any, g: Any) -> Any:
        return torch_random.dropout(x, 0.1, g)

    def gradient(dropout: Callable[..., Any], x: Any, g: Any) -> Any:
        y, pullback, g = jax.vjp(functools.partial(dropout, g=g), x, has_aux=True)
        return y, pullback(x), g

    def torch_gradient() -> object:
        y = F.dropout(leaf, 0.1)
        return y, torch.autograd.grad(y, leaf, ones)

    return {
        "dropout, forward": {
            TORCH: lambda: F.dropout(ones, 0.1),
            STORED: bound(dropout, x, g),
        },
        "dropout, forward + backward": {
            TORCH: torch_gradient,
            STORED: bound(functools.partial(gradient, dropout), x, g),
            REDRAWN: bound(functools.partial(gradient, jax.checkpoint(dropout)), x, g),
        },
        "rand": {
            TORCH: lambda: torch.rand(size),
            STORED: bound(lambda g: torch_random.uniform(g, (size,)), g),
        },
        "randn": {
            TORCH: lambda: torch.randn(size),
            STORED: bound(lambda g: torch_random.normal(g, (size,)), g),
        },
        "randperm": {
            TORCH: lambda: torch.randperm(size),
            STORED: bound(lambda g: torch_random.permutation(g, size), g),
        },
    }


def markdown(results: Sequence[Result]) -> str:
    """Return a table of times per element, and of ratios to PyTorch's."""
    found = environment()
    lines = [
        f"| {results[0].elements:,} float32 elements on one thread of {found['cpu']} "
        "| torch, ns per element | torch_random / torch | mask drawn again / torch |",
        "| --- | ---: | ---: | ---: |",
    ]
    for result in results:
        ratios = [
            f"{result.ratio(name, TORCH):.2f}" if name in result.seconds else ""
            for name in (STORED, REDRAWN)
        ]
        cells = [result.title, f"{result.nanoseconds(TORCH):.1f}", *ratios]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(record: Record) -> Figure:
    """Draw a panel for each race: the time of each candidate over that of PyTorch."""
    return bars.draw_race(
        record,
        base=TORCH,
        own=(STORED, REDRAWN),
        unit="time / time of PyTorch",
        reference="PyTorch",
    )


if __name__ == "__main__":
    output.run(main)
