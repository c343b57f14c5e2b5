"""How fast regtorch's dropout is: over PyTorch's own, and how much memory it takes meanwhile.

python -m benchmarks.torch_speed          # 16.8 M elements
python -m benchmarks.torch_speed --quick  # 1 M elements, to see that it runs
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

import regtorch
from benchmarks import cli
from benchmarks.race import WORK, Result, environment, race
from benchmarks.report import publish

THEIRS = "torch F.dropout"
OURS = "regtorch"
PACKED = "regtorch, packed"
_STATUS, _FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")

Apply = Callable[[torch.Tensor], torch.Tensor]


def main(argv: Sequence[str] | None = None) -> int:
    """Races, prints the table, and writes it with times and picture."""
    options = _parser().parse_args(argv)
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
        task = progress.add_task("racing", total=len(cases) * rounds)
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
        options.out / "torch_speed",
        results,
        markdown(results, extra),
        [(r.title, {name: r.ratio(name, THEIRS) for name in r.seconds}) for r in results],
        unit="time over torch.nn.functional.dropout (lower is better)",
        own=(OURS, PACKED),
        digits=2,
        console=console,
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser("torch_speed", __doc__, rounds=7)
    parser.add_argument("--rates", type=cli.rate, nargs="+", default=[0.1, 0.5], metavar="RATE")
    return parser


def candidates(rate: float) -> dict[str, Apply]:
    """PyTorch's dropout and both samplers of regtorch."""
    key = regtorch.key(0)
    ours = functools.partial(regtorch.dropout, rate=rate, key=key)
    return {
        THEIRS: functools.partial(torch.nn.functional.dropout, p=rate),
        OURS: ours,
        PACKED: functools.partial(ours, sampler=regtorch.packed_bernoulli),
    }


def _bound(apply: Apply, x: torch.Tensor, backward: bool) -> Callable[[], object]:
    def run() -> object:
        y = apply(x)
        return torch.autograd.grad(y, x, x.detach()) if backward else y

    return run


def _extra_memory(run: Callable[[], object], x: torch.Tensor) -> float | None:
    """Peak memory of the process above what it holds before and the result, over the input's bytes.

    None where the system does not tell (it takes Linux, and leave to reset the peak).
    """
    try:
        _FORGET.write_text("5")
    except OSError:
        return None
    before = _resident("VmRSS")
    kept = run()  # held, as a caller would
    results = kept if isinstance(kept, tuple) else (kept,)
    size = x.numel() * x.element_size()
    return (_resident("VmHWM") - before) / size - len(results)


def _resident(field: str) -> int:
    line = next(row for row in _STATUS.read_text().splitlines() if row.startswith(field))
    return int(line.split()[1]) * 1024


def markdown(results: Sequence[Result], extra: Sequence[dict[str, float | None]]) -> str:
    """A table: time over PyTorch's, and extra memory in units of the array's own bytes."""
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
        times = [f"{result.ratio(name, THEIRS):.2f}" for name in names[1:]]
        bytes_ = ["" if memory[n] is None else f"{memory[n]:.2f}" for n in names]
        lines.append(f"| {result.title} | " + " | ".join([*times, *bytes_]) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
