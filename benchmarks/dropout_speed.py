"""Measure dropout of each library relative to a copy of the array, forward and with the gradient.

python -m benchmarks.dropout_speed          # 16.8 M elements, as in README
python -m benchmarks.dropout_speed --quick  # 1 M elements, to test
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks import bars, cli
from benchmarks import candidates as field
from benchmarks.race import WORK, Record, Result, environment, load, race
from benchmarks.report import publish
from parity_tests import output

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = "dropout_speed"
COLUMNS = 4096


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the tables, and write JSON and a picture."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.redraw:
        return cli.redraw(parser, options.out / NAME, load, draw)
    rows, rounds = (256, 5) if options.quick else (options.size // COLUMNS, options.rounds)
    console = Console()
    races = [
        (dtype, backward, rate)
        for dtype in options.dtypes
        for backward in WORK
        for rate in options.rates
    ]
    results = []
    with Progress(console=console) as progress:
        task = progress.add_task("measuring", total=len(races) * rounds)
        for dtype, backward, rate in races:
            results.append(
                _race(
                    (rows, COLUMNS),
                    rate,
                    dtype,
                    backward=backward,
                    rounds=rounds,
                    log=progress.console.print,
                    on_round=lambda: progress.advance(task),
                )
            )
    for result in results:
        console.print(table(result))
    publish(options.out / NAME, results, summary(results), draw, console=console)
    return 0


def _parser() -> cli.Parser:
    parser = cli.parser(NAME, __doc__, rounds=11)
    text = "number of elements (default: %(default)s)"
    parser.add_argument(
        "--size", type=output.integer(COLUMNS), default=2**24, metavar="N", help=text
    )
    cli.add_rates(parser)
    parser.add_argument(
        "--dtypes",
        nargs="+",
        default=["float32"],
        **output.one_of(["float32", "bfloat16"]),
        help="dtypes of the array (default: float32)",
    )
    return parser


def _race(
    shape: tuple[int, int],
    rate: float,
    dtype: str,
    *,
    backward: bool,
    rounds: int,
    log: Callable[[str], None],
    on_round: Callable[[], None],
) -> Result:
    x, key = jnp.ones(shape, dtype), jax.random.key(0)
    applies = {field.COPY: field.copy, **field.own(rate), **field.peers(rate, log)}
    runs = field.in_jax(applies, x, key, backward=backward)
    runs |= field.in_torch(rate, x.size, dtype, backward=backward, log=log)
    title = f"{dtype}, rate {rate}, {WORK[backward]}"
    return race(title, runs, elements=x.size, rounds=rounds, on_round=on_round)


def peers_of(result: Result) -> list[str]:
    """Return the candidates that are neither regjax nor the copy."""
    return [name for name in result.seconds if name not in (field.COPY, *field.OWN)]


def table(result: Result) -> Table:
    """Return a table of one race: time per element, over the copy, and over regjax."""
    title = f"{result.title}, {result.elements / 1e6:.1f} M elements"
    made = Table(title=title, title_justify="left")
    for heading in ("", "ns / element", "over copy", "over regjax"):
        made.add_column(heading, justify="right" if heading else "left")
    fastest = result.fastest(peers_of(result)) if peers_of(result) else None
    for name in result.seconds:
        made.add_row(
            f"{name} (fastest peer)" if name == fastest else name,
            f"{result.nanoseconds(name):.2f}",
            f"{result.ratio(name, field.COPY):.2f}",
            f"{result.ratio(name, field.EXACT):.2f}",
        )
    return made


def summary(results: Sequence[Result]) -> str:
    """Return a Markdown table of both samplers over a copy, and the fastest peers over regjax."""
    rows = [
        f"| {results[0].elements / 1e6:.1f} M elements on {environment()['cores']} cores "
        "| regjax / copy | packed / copy | fastest JAX peer / regjax "
        "| PyTorch / regjax | compiled PyTorch / regjax |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for result in results:
        in_jax = [name for name in peers_of(result) if not name.startswith("PyTorch")]
        ratios = [(field.EXACT, field.COPY), (field.PACKED, field.COPY)]
        ratios += [(result.fastest(in_jax), field.EXACT)] if in_jax else []
        ratios += [(name, field.EXACT) for name in peers_of(result) if name not in in_jax]
        cells = " | ".join(f"{result.ratio(*pair):.2f}" for pair in ratios)
        rows.append(f"| {result.title} | {cells} |")
    return "\n".join(rows) + "\n"


def draw(record: Record) -> Figure:
    """Draw a panel for each race: the time of each candidate over that of the copy."""
    return bars.draw_race(
        record,
        base=field.COPY,
        own=field.OWN,
        unit="time / time of a copy of the array",
        reference="a copy of the array",
    )


if __name__ == "__main__":
    output.run(main)
