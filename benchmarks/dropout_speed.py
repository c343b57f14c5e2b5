"""How fast dropout is: each library's over a copy of the array, forward and with the gradient.

python -m benchmarks.dropout_speed          # 16.8 M elements, as README quotes it
python -m benchmarks.dropout_speed --quick  # 1 M elements, to see that it runs
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks import candidates as field
from benchmarks.race import Result, environment, race, save

WORK = {False: "forward", True: "forward + backward"}
OWN = (field.COPY, field.OURS, field.PACKED)


def main(argv: Sequence[str] | None = None) -> int:
    """Races, prints the table, and writes JSON and a picture."""
    options = _parser().parse_args(argv)
    rows, rounds = (256, 5) if options.quick else (options.size // 4096, options.rounds)
    console = Console()
    races = list(itertools.product(options.dtypes, WORK, options.rates))
    results = []
    with Progress(console=console) as progress:
        task = progress.add_task("racing", total=len(races) * rounds)
        for dtype, backward, rate in races:
            results.append(
                _race(
                    (rows, 4096),
                    rate,
                    dtype,
                    backward=backward,
                    rounds=rounds,
                    say=progress.console.print,
                    on_round=lambda: progress.advance(task),
                )
            )
    for result in results:
        console.print(table(result))
    save(options.out / "dropout_speed.json", results)
    (options.out / "dropout_speed.md").write_text(summary(results))
    draw(options.out / "dropout_speed.png", results)
    console.print(f"Times and picture: {options.out}", soft_wrap=True)
    return 0


def _positive(text: str) -> int:
    value = int(text)
    if value < 4096:
        raise argparse.ArgumentTypeError(f"must be at least 4096; got {text}")
    return value


def _rate(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"must lie strictly between 0 and 1; got {text}")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dropout_speed", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--size", type=_positive, default=2**24, help="elements (default: %(default)s)"
    )
    parser.add_argument("--rates", type=_rate, nargs="+", default=[0.1, 0.5], metavar="RATE")
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=["float32", "bfloat16"])
    parser.add_argument(
        "--rounds",
        type=int,
        choices=range(1, 1000),
        metavar="N",
        default=11,
        help="runs of each (default: 11)",
    )
    parser.add_argument("--quick", action="store_true", help="a small array and few rounds")
    parser.add_argument(
        "--out", type=Path, default=Path("outputs/benchmarks"), help="folder (default: %(default)s)"
    )
    return parser


def _race(shape, rate, dtype, *, backward, rounds, say, on_round) -> Result:
    x, key = jnp.ones(shape, dtype), jax.random.key(0)
    applies = {field.COPY: field.copy, **field.ours(rate), **field.peers(rate, say)}
    runs = field.in_jax(applies, x, key, backward=backward)
    runs |= field.in_torch(rate, x.size, dtype, backward=backward, say=say)
    title = f"{dtype}, rate {rate}, {WORK[backward]}"
    return race(title, runs, elements=x.size, rounds=rounds, on_round=on_round)


def peers_of(result: Result) -> list[str]:
    """The candidates that are neither ours nor the copy."""
    return [name for name in result.seconds if name not in OWN]


def table(result: Result) -> Table:
    """One race: time of an element, over the copy, over ours."""
    title = f"{result.title}, {result.elements / 1e6:.1f} M elements"
    drawn = Table(title=title, title_justify="left")
    for heading in ("", "ns / element", "over copy", "over regjax"):
        drawn.add_column(heading, justify="right" if heading else "left")
    fastest = result.fastest(peers_of(result)) if peers_of(result) else None
    for name in result.seconds:
        drawn.add_row(
            f"{name} (fastest peer)" if name == fastest else name,
            f"{result.nanoseconds(name):.2f}",
            f"{result.ratio(name, field.COPY):.2f}",
            f"{result.ratio(name, field.OURS):.2f}",
        )
    return drawn


def summary(results: Sequence[Result]) -> str:
    """Markdown: both samplers over a copy, and the fastest peers over them."""
    rows = [
        f"| {results[0].elements / 1e6:.1f} M elements on {environment()['cores']} cores "
        "| regjax / copy | packed / copy | fastest JAX peer / regjax "
        "| PyTorch / regjax | compiled PyTorch / regjax |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for result in results:
        rivals = [name for name in peers_of(result) if not name.startswith("PyTorch")]
        ratios = [(field.OURS, field.COPY), (field.PACKED, field.COPY)]
        ratios += [(result.fastest(rivals), field.OURS)] if rivals else []
        ratios += [(name, field.OURS) for name in peers_of(result) if name not in rivals]
        cells = " | ".join(f"{result.ratio(*pair):.2f}" for pair in ratios)
        rows.append(f"| {result.title} | {cells} |")
    return "\n".join(rows) + "\n"


def draw(path: Path, results: Sequence[Result]) -> None:
    """Bars of each candidate's time over the copy, one panel a race."""
    from matplotlib.figure import Figure

    columns = 2
    rows = -(-len(results) // columns)
    figure = Figure(figsize=(11, 0.6 + 3.4 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for axes in panels[len(results) :]:
        axes.remove()
    for axes, result in zip(panels[: len(results)], results, strict=True):
        names = list(result.seconds)[::-1]
        ratios = [result.ratio(name, field.COPY) for name in names]
        colours = ["#D55E00" if n in OWN[1:] else "#999999" for n in names]
        bars = axes.barh(names, ratios, color=colours)
        axes.bar_label(bars, [f"{ratio:.1f}" for ratio in ratios], padding=3)
        axes.axvline(1, color="#333333", linewidth=1)
        axes.set_title(result.title, loc="left", fontweight="bold")
        axes.set_xlabel("time over a copy of the array (lower is better)")
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.12)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)


if __name__ == "__main__":
    raise SystemExit(main())
