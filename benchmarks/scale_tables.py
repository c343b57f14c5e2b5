"""The tables of `benchmarks.scale`, in Markdown, and the curves of its picture."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks import slopes
from benchmarks.slopes import short

WITHOUT, DROPOUT, DECAY = "without", "dropout", "decay"
TIME, MEMORY, TRACE, COMPILE = "time of a call", "memory", "trace", "compile"
# The measures with the unit of the record, of the table, and how many of the first are in one.
UNITS = {TIME: ("s", "ms", 1e-3), MEMORY: ("bytes", "MB", 1e6)}
UNITS |= dict.fromkeys((TRACE, COMPILE), ("s", "s", 1.0))
# Tracing does not depend on the number of elements or devices, nor compilation on elements.
TABLED = {
    "elements": (TIME, MEMORY),
    "sites": (TIME, MEMORY, TRACE, COMPILE),
    "leaves": (TIME, MEMORY, TRACE, COMPILE),
    "devices": (TIME, MEMORY, COMPILE),
}
COST = {"H100": "microseconds"}
CYCLES = "cycles"


@dataclass(frozen=True)
class Curves:
    """A measure of one program against its size: all figures of each candidate, by size."""

    axis: str
    title: str
    measure: str
    figures: Mapping[str, Mapping[int, Sequence[float]]]

    def medians(self, name: str) -> dict[int, float]:
        """Return the median at each size."""
        return {at: statistics.median(values) for at, values in self.figures[name].items()}

    def ratios(self, name: str) -> dict[int, float]:
        """Return the median over rounds of the ratio to the program without, at each size."""
        return {
            at: statistics.median(one / base for one, base in zip(values, bases, strict=True))
            for (at, values), bases in zip(
                self.figures[name].items(), self.figures[WITHOUT].values(), strict=True
            )
        }

    def law(self, name: str) -> str:
        """Return how a candidate grows, in words."""
        slope = slopes.fit(self.medians(name))
        return slope.name(self.axis) if slope else "one size"


def curves(part: Mapping[str, Any]) -> Iterator[Curves]:
    """Yield the curves of a measured part, in the order of the tables."""
    samples = part["samples"]
    keys = {TIME: "seconds", MEMORY: "bytes", TRACE: "trace", COMPILE: "compile"}
    for title in dict.fromkeys(sample["title"] for sample in samples):
        here = [sample for sample in samples if sample["title"] == title]
        for measure, key in keys.items():
            figures: dict[str, dict[int, Sequence[float]]] = {}
            for sample in here:
                for name, value in sample[key].items():
                    values = value if isinstance(value, list) else [value]
                    figures.setdefault(name, {})[sample["at"]] = values
            yield Curves(here[0]["axis"], title, measure, figures)


def steps(part: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield for each grid the compiled variants of the step, by name."""
    samples = part["samples"]
    for grid in dict.fromkeys(sample["grid"] for sample in samples):
        yield {sample["variant"]: sample for sample in samples if sample["grid"] == grid}


def markdown(content: Mapping[str, Any]) -> str:
    """Return the tables of the parts in the content."""
    measured = [line for name, part in content.items() if name in TABLED for line in _rows(part)]
    compiled = [
        _step(variants)
        for name, part in content.items()
        if name not in TABLED
        for variants in steps(part)
    ]
    tables = []
    if measured:
        cores = next(iter(content.values()))["environment"]["cores"]
        tables.append(
            [
                f"| program, by size; CPU times of {cores} cores | measure | candidate"
                " | smallest | largest | grows as | `without` grows as"
                " | over `without` at the largest | worst ratio |",
                "| --- | --- | --- | ---: | ---: | --- | --- | ---: | ---: |",
                *measured,
            ]
        )
    if compiled:
        tables.append(
            [
                "| train step, compiled and not run | devices | arguments, MB | temporary, MB"
                " | collectives | results of collectives, MB | estimated cost | dropout, share"
                " | decay, share |",
                "| --- | ---: | ---: | ---: | --- | ---: | ---: | ---: | ---: |",
                *compiled,
            ]
        )
    return "\n\n".join("\n".join(table) for table in tables) + "\n"


def _rows(part: Mapping[str, Any]) -> Iterator[str]:
    for found in curves(part):
        if found.measure not in TABLED[found.axis]:
            continue
        _, unit, scale = UNITS[found.measure]
        for name in found.figures:
            if name == WITHOUT:
                continue
            medians, ratios = found.medians(name), found.ratios(name)
            first, last = min(medians), max(medians)
            worst = max(ratios, key=lambda at: ratios[at])
            yield (
                f"| {found.title}; {short(first)} to {short(last)} {found.axis}"
                f" | {found.measure}, {unit} | {name}"
                f" | {_digits(medians[first] / scale)} | {_digits(medians[last] / scale)}"
                f" | {found.law(name)} | {found.law(WITHOUT)}"
                f" | {ratios[last]:.2f} | {ratios[worst]:.2f} at {short(worst)} |"
            )


def _digits(number: float) -> str:
    """Return a number with three digits, or without a fraction."""
    return f"{number:,.0f}" if number >= 1000 else f"{number:.3g}"


def _step(variants: Mapping[str, Any]) -> str:
    without, dropout, decay = (variants[name] for name in (WITHOUT, DROPOUT, DECAY))
    pair = (without, dropout)

    def change(get: Callable[[Mapping[str, Any]], str]) -> str:
        return _change(*map(get, pair))

    kinds = sorted({kind for one in pair for kind in one["collectives"]})
    counts = [f"{change(lambda one, kind=kind: str(_count(one, kind)))} {kind}" for kind in kinds]
    added = [one["cost"] - without["cost"] for one in (dropout, decay)]
    total = without["cost"] + sum(added)
    shares = [f"{100 * each / total:.1f} %" if total else "" for each in added]
    unit = COST.get(without["grid"].partition(":")[0], CYCLES)
    cells = [
        without["grid"],
        without["devices"],
        f"{without['argument'] / 1e6:.1f}",
        change(lambda one: f"{one['temporary'] / 1e6:.1f}"),
        ", ".join(counts) or "none",
        change(lambda one: f"{moved(one) / 1e6:.1f}"),
        f"{total:,.0f} {unit}" if total else "",
        *shares,
    ]
    return f"| {' | '.join(map(str, cells))} |"


def _count(step: Mapping[str, Any], kind: str) -> int:
    return step["collectives"].get(kind, (0, 0))[0]


def moved(step: Mapping[str, Any]) -> int:
    """Return the bytes of the results of all collectives of a step."""
    return sum(size for _, size in step["collectives"].values())


def _change(before: str, after: str) -> str:
    """Return one figure, or that without and with dropout where they differ."""
    return before if before == after else f"{before} → {after}"
