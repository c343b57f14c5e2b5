"""Write the table of README about speed from the results of the other benchmarks.

python -m benchmarks.summary --out docs/benchmarks  # measures nothing
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from parity_tests import output

RESULTS = Path(__file__).parent.parent / "docs" / "benchmarks"
PEERS = ("Flax Linen", "Flax NNX", "Equinox", "Haiku", "Keras")
HEADINGS = ("", "regjax", "packed or blocks", "fastest JAX peer", "PyTorch")


def over_copy(title: str) -> list[str]:
    """Return the times of a race of large arrays over that of a copy."""
    record = json.loads((RESULTS / "dropout_speed.json").read_text())
    seconds = next(r["seconds"] for r in record["results"] if r["title"] == title)

    def ratio(name: str) -> float:
        pairs = zip(seconds[name], seconds["copy"], strict=True)
        return statistics.median(one / other for one, other in pairs)

    peer = min(map(ratio, PEERS))
    return [f"{x:.2f}" for x in (ratio("regjax"), ratio("regjax, packed"), peer, ratio("PyTorch"))]


def rows(name: str, pattern: str) -> list[list[str]]:
    """Return the cells after the title of the rows of a table whose beginnings match."""
    lines = (RESULTS / f"{name}.md").read_text().splitlines()
    found = [line for line in lines if re.match(rf"\| {pattern} \|", line)]
    if not found:
        raise ValueError(f"pattern must match a row of {name}.md; got {pattern}.")
    return [[cell.strip() for cell in line.strip("|").split("|")][1:] for line in found]


def span(name: str, pattern: str, column: int) -> str:
    """Return the range of a column over the rows that match."""
    numbers = sorted(float(row[column].replace(",", "")) for row in rows(name, pattern))
    low, high = f"{numbers[0]:.2f}", f"{numbers[-1]:.2f}"
    return low if low == high else f"{low} to {high}"


def estimate(chip: str, pattern: str, rate: str) -> list[str]:
    """Return the estimates of a compiler model at a rate, which is the second column."""
    pattern = rf"{pattern} \| {rate}"
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
        [time[1], f"{time[3]} (128)", f"{time[5]} (Flax)", time[6]],
        [memory[1], f"{memory[3]} (128)", f"{memory[5]} (Flax)", ""],
    )


def without_dropout() -> str:
    """Return the temporary megabytes of the same attention without dropout."""
    return rows("attention", r"4,096 positions, forward \+ backward")[1][0]


def table() -> str:
    """Return the table in Markdown."""
    lines: list[tuple[str, Callable[[], list[str]]]] = [
        *(
            (f"{title}, over a copy", lambda title=title: over_copy(title))
            for title in (
                "float32, rate 0.1, forward",
                "float32, rate 0.5, forward",
                "float32, rate 0.1, forward + backward",
                "bfloat16, rate 0.1, forward + backward",
            )
        ),
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
    head = f"| {' | '.join(HEADINGS)} |", "| --- | ---: | ---: | ---: | ---: |"
    body = (f"| {title} | {' | '.join(cells())} |" for title, cells in lines)
    return "\n".join((*head, *body)) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Write the table."""
    parser = output.Parser("python -m benchmarks.summary", __doc__)
    parser.add_out("outputs/benchmarks", "the table")
    path = parser.parse_args(argv).out / "summary.md"
    output.write_atomically(path, table())
    Console().print(table(), soft_wrap=True, markup=False)
    return 0


if __name__ == "__main__":
    output.run(main)
