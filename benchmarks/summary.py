"""Write the tables of README and of the page about speed from the results of other benchmarks.

python -m benchmarks.summary --out docs/benchmarks  # measures nothing
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich.console import Console

from benchmarks import bars, modelled, race
from benchmarks.race import WORK
from parity_tests import output

RESULTS = Path(__file__).parent.parent / "docs" / "benchmarks"
PEERS = ("Flax Linen", "Flax NNX", "Equinox", "Haiku", "Keras")
OWN_TORCH = ("regtorch", "regtorch, packed")
HEADINGS = ("", "regjax", "packed or blocks", "fastest JAX peer", "PyTorch")


def large_arrays(name: str) -> list[race.Result]:
    """Return the races of large arrays that a benchmark recorded."""
    return list(race.load(RESULTS / f"{name}.json").results)


def over_copy(result: race.Result) -> list[str]:
    """Return the times of a race of large arrays over that of a copy."""
    names = "regjax", "regjax, packed", result.fastest(PEERS), "PyTorch"
    return [f"{result.ratio(name, 'copy'):.2f}" for name in names]


def rows(name: str, pattern: str) -> list[list[str]]:
    """Return the cells after the title of the rows of a table whose beginnings match."""
    lines = (RESULTS / f"{name}.md").read_text().splitlines()
    found = [line for line in lines if re.match(rf"\| {pattern} \|", line)]
    if not found:
        raise ValueError(f"pattern must match a row of {name}.md; got {pattern}.")
    return [[cell.strip() for cell in line.strip("|").split("|")][1:] for line in found]


def span(name: str, pattern: str, column: int) -> str:
    """Return the range of a column over the rows that match."""
    return _range([float(row[column].replace(",", "")) for row in rows(name, pattern)])


def estimate(chip: str, pattern: str, rate: str) -> list[str]:
    """Return the estimates of a compiler model at a rate, which is the second column."""
    pattern = rf"{pattern}, forward \| {rate}"
    peer = f"{span(chip, pattern, 3)} (Flax)"
    return [span(chip, pattern, 1), span(chip, pattern, 2), peer, ""]


def transformer(rate: str) -> list[str]:
    """Return the milliseconds that dropout adds to a training step of a transformer."""
    cost = {row[0]: row[2] for row in rows("transformer_step", f"rate {rate}, 4 layers")}
    peer = min((name for name in PEERS), key=lambda name: float(cost[name]))
    return [cost["regjax"], cost["regjax, packed"], f"{cost[peer]} ({peer})", ""]


def attention(title: str) -> tuple[list[str], list[str]]:
    """Return time over attention without dropout, and temporary megabytes."""
    time, memory = rows("attention", title)
    return (
        [time[1], f"{time[3]} (128)", f"{time[7]} (Flax)", time[8]],
        [memory[1], f"{memory[3]} (128)", f"{memory[7]} (Flax)", ""],
    )


def without_dropout() -> str:
    """Return the temporary megabytes of the same attention without dropout."""
    return rows("attention", r"4,096 positions, forward \+ backward")[1][0]


def table() -> str:
    """Return the table in Markdown."""
    races = {result.title: result for result in large_arrays("dropout_speed")}
    shown = (
        "float32, rate 0.1, forward",
        "float32, rate 0.5, forward",
        "float32, rate 0.1, forward + backward",
        "bfloat16, rate 0.1, forward + backward",
    )
    lines: list[tuple[str, Callable[[], list[str]]]] = [
        *((f"{title}, over a copy", lambda one=races[title]: over_copy(one)) for title in shown),
        ("transformer step, rate 0.1, ms added", lambda: transformer("0.1")),
        (
            "regtorch, float32, rate 0.1, forward + backward, over PyTorch",
            lambda: [
                *rows("torch_speed", r"float32, rate 0.1, forward \+ backward")[0][:2],
                "",
                "1.00",
            ],
        ),
        (
            "attention, 4,096 positions, forward + backward, over no dropout",
            lambda: attention(r"4,096 positions, forward \+ backward")[0],
        ),
        (
            f"temporary MB of the same; without dropout {without_dropout()}",
            lambda: attention(r"4,096 positions, forward \+ backward")[1],
        ),
        ("H100, estimate, rate 0.5, over a copy", lambda: estimate("gpu_model", "H100.*", "0.5")),
        ("H100, estimate, rate 0.1, over a copy", lambda: estimate("gpu_model", "H100.*", "0.1")),
        ("v5e, estimate, rate 0.5, over a copy", lambda: estimate("tpu_model", "v5e.*", "0.5")),
        ("v5e, estimate, rate 0.1, over a copy", lambda: estimate("tpu_model", "v5e.*", "0.1")),
    ]
    return in_markdown(HEADINGS, [[title, *cells()] for title, cells in lines])


def in_markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Return a table with a column of titles and columns of numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def measured() -> str:
    """Return the times of large arrays on a CPU, with the machine and the date."""
    record = race.load(RESULTS / "dropout_speed.json")
    in_torch = {result.title: result for result in large_arrays("torch_speed")}
    head = f"{record.results[0].elements / 1e6:.1f} M elements on a CPU, over a copy"
    columns = "regjax", "packed", "fastest JAX peer", "PyTorch", "compiled PyTorch"
    own = "regtorch / PyTorch", "packed regtorch / PyTorch"
    body = []
    for result in record.results:
        beside = in_torch[result.title]
        compiled = result.ratio("PyTorch, compiled", "copy")
        ratios = [beside.ratio(name, "torch F.dropout") for name in OWN_TORCH]
        cells = *over_copy(result), f"{compiled:.2f}", *(f"{x:.2f}" for x in ratios)
        body.append([result.title, *cells])
    _, *others = bars.origin(record)  # a sentence about the picture
    said = " ".join([f"Medians over {record.results[0].rounds} rounds.", *others])
    return in_markdown([head, *columns, *own], body) + f"\n{said}\n"


def estimated(name: str) -> str:
    """Return the ranges over all layouts of the estimates of a compiler, with its versions."""
    record = modelled.load(RESULTS / f"{name}.json")
    names = list(dict.fromkeys(row.name for row in record.programs))
    body = []
    for kind, backward, rate in dict.fromkeys(_subject(row) for row in record.programs):
        here = [row for row in record.programs if _subject(row) == (kind, backward, rate)]
        cells = [_range([row.over_copy for row in here if row.name == name]) for name in names]
        body.append([f"{kind}, {modelled.DTYPE}, rate {rate}, {WORK[backward]}", *cells])
    said = f"{bars.dates('Compiled', [record.date])} {bars.versions(record.environment)}\n"
    return in_markdown(["compiler's estimate over a copy", *names], body) + "\n" + said


def _subject(row: modelled.Row) -> tuple[str, bool, float]:
    return row.chips, row.backward, row.rate


def _range(numbers: Sequence[float]) -> str:
    low, high = f"{min(numbers):.2f}", f"{max(numbers):.2f}"
    return low if low == high else f"{low} to {high}"


TABLES: Mapping[str, Callable[[], str]] = {
    "summary": table,
    "speed_on_cpu": measured,
    "speed_on_tpu": functools.partial(estimated, "tpu_model"),
    "speed_on_gpu": functools.partial(estimated, "gpu_model"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Write the tables."""
    parser = output.Parser("python -m benchmarks.summary", __doc__)
    parser.add_out("outputs/benchmarks", "the tables")
    folder = parser.parse_args(argv).out
    for name, make in TABLES.items():
        text = make()
        output.write_atomically(folder / f"{name}.md", text)
        Console().print(text, soft_wrap=True, markup=False)
    return 0


if __name__ == "__main__":
    output.run(main)
