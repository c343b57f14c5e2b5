"""Output of a race: a table in Markdown, the times as JSON, and a bar chart."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from rich.console import Console

from benchmarks.race import Result, save
from parity_tests.output import replacing, write_atomically

Panels = Sequence[tuple[str, Mapping[str, float]]]

OWN_COLOR = "#D55E00"
PEER_COLOR = "#999999"


def publish(
    stem: Path,
    results: Sequence[Result],
    text: str,
    panels: Panels,
    *,
    unit: str,
    own: Collection[str],
    digits: int = 1,
    console: Console,
) -> None:
    """Write STEM.md, STEM.json and STEM.png, and print the table.

    Args:
        stem: The path without a suffix.
        results: All times, for the JSON.
        text: The table, in Markdown.
        panels: The title of each panel, and the value of each candidate.
        unit: The label of the axis.
        own: The highlighted candidates.
        digits: The number of decimals in the picture.
        console: The console to print to.
    """
    save(stem.with_suffix(".json"), results)
    write_atomically(stem.with_suffix(".md"), text)
    draw(stem.with_suffix(".png"), panels, unit=unit, own=own, digits=digits)
    console.print(text, soft_wrap=True, markup=False)
    console.print(f"Table, times and picture: {stem}.{{md,json,png}}", soft_wrap=True)


def draw(path: Path, panels: Panels, *, unit: str, own: Collection[str], digits: int = 1) -> None:
    """Draw a panel of horizontal bars for each race, in two columns."""
    from matplotlib.figure import Figure

    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    most = max(len(values) for _, values in panels)
    size = (5.5 * columns, 0.6 + (1.0 + 0.27 * most) * lines)
    figure = Figure(figsize=size, layout="constrained")
    places = figure.subplots(lines, columns, squeeze=False).flat
    for axes in places[len(panels) :]:
        axes.remove()
    for axes, (title, values) in zip(places[: len(panels)], panels, strict=True):
        names = list(values)[::-1]  # matplotlib starts at the bottom
        heights = [values[name] for name in names]
        colors = [OWN_COLOR if name in own else PEER_COLOR for name in names]
        bars = axes.barh(names, heights, color=colors)
        axes.bar_label(bars, [f"{height:.{digits}f}" for height in heights], padding=3)
        axes.set_title(title, loc="left", fontweight="bold")
        axes.set_xlabel(unit)
        axes.axvline(0, color="#333333", linewidth=1)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.12)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
