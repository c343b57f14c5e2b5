"""Measure time and memory of regtorch's dropout relative to PyTorch's.

python -m benchmarks.torch_speed          # 16.8 M elements
python -m benchmarks.torch_speed --quick  # 1 M elements, to test
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch.profiler import ProfilerActivity, profile

import regtorch
from benchmarks import bars, cli
from benchmarks.race import WORK, Record, Result, environment, load, race
from benchmarks.report import publish
from parity_tests import output

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = "torch_speed"
TORCH = "torch F.dropout"
EXACT = "regtorch"
PACKED = "regtorch, packed"

Apply = Callable[[torch.Tensor], torch.Tensor]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and write the table as Markdown, JSON and a picture."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.redraw:
        return cli.redraw(parser, options.out / NAME, load, draw)
    console = Console()
    rows, rounds = (256, 3) if options.quick else (4096, options.rounds)
    cases = [
        (dtype, backward, rate)
        for dtype in ("float32", "bfloat16")
        for backward in WORK
        for rate in options.rates
    ]
    results, extra = [], []
    with Progress(console=console) as progress:
        task = progress.add_task("measuring", total=len(cases) * rounds)
        for dtype, backward, rate in cases:
            x = torch.ones(rows, 4096, dtype=getattr(torch, dtype), requires_grad=backward)
            runs = {n: _bound(f, x, backward) for n, f in candidates(rate).items()}
            title = f"{dtype}, rate {rate}, {WORK[backward]}"
            results.append(
                race(
                    title,
                    runs,
                    elements=x.numel(),
                    rounds=rounds,
                    on_round=lambda: progress.advance(task),
                )
            )
            extra.append({name: _extra_memory(run, x) for name, run in runs.items()})
    publish(
        options.out / NAME,
        results,
        markdown(results, extra),
        draw,
        console=console,
        memory=dict(zip((result.title for result in results), extra, strict=True)),
    )
    return 0


def _parser() -> cli.Parser:
    parser = cli.parser(NAME, __doc__, rounds=7)
    cli.add_rates(parser)
    return parser


def candidates(rate: float) -> dict[str, Apply]:
    """Return PyTorch's dropout, and regtorch's with each sampler."""
    key = regtorch.key(0)
    dropout = functools.partial(regtorch.dropout, rate=rate, key=key)
    return {
        TORCH: functools.partial(torch.nn.functional.dropout, p=rate),
        EXACT: dropout,
        PACKED: functools.partial(dropout, sampler=regtorch.packed_bernoulli),
    }


def _bound(apply: Apply, x: torch.Tensor, backward: bool) -> Callable[[], object]:
    def run() -> object:
        y = apply(x)
        return torch.autograd.grad(y, x, x.detach()) if backward else y

    return run


def _extra_memory(run: Callable[[], object], x: torch.Tensor) -> float:
    """Return the memory of a run's temporary tensors at their peak, over the bytes of the input."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = run()  # keep a reference, so that the result stays allocated
    kineto: Any = profiler.profiler
    events = kineto.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    peak = max(itertools.accumulate(nbytes for _, nbytes in changes))
    results = kept if isinstance(kept, tuple) else (kept,)
    return peak / (x.numel() * x.element_size()) - len(results)


def markdown(results: Sequence[Result], extra: Sequence[dict[str, float]]) -> str:
    """Return a table of time over PyTorch's, and of temporary memory over the array's bytes."""
    names = list(results[0].seconds)
    lines = [
        f"| {results[0].elements / 1e6:.1f} M elements on {environment()['cores']} cores | "
        + " | ".join(f"{name} / torch" for name in names[1:])
        + " | "
        + " | ".join(f"memory, {name}" for name in names)
        + " |",
        "| --- |" + " ---: |" * (2 * len(names) - 1),
    ]
    for result, memory in zip(results, extra, strict=True):
        times = [f"{result.ratio(name, TORCH):.2f}" for name in names[1:]]
        bytes_ = [f"{memory[n]:.2f}" for n in names]
        lines.append(f"| {result.title} | " + " | ".join([*times, *bytes_]) + " |")
    return "\n".join(lines) + "\n"


def draw(record: Record) -> Figure:
    """Draw a panel for each race: the time of each candidate over that of PyTorch's dropout."""
    return bars.draw_race(
        record,
        base=TORCH,
        own=(EXACT, PACKED),
        unit="time / time of PyTorch's dropout",
        reference="torch.nn.functional.dropout",
    )


if __name__ == "__main__":
    output.run(main)
