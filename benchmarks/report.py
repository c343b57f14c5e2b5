"""How a race is shown: a table as text, the times as JSON, and a picture of bars."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from rich.console import Console

from benchmarks.race import Result, save
from parity_tests.output import replacing, write_atomically

Panels = Sequence[tuple[str, Mapping[str, float]]]

OWN_COLOUR = "#D55E00"
PEER_COLOUR = "#999999"


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
    """Writes STEM.md, STEM.json and STEM.png, and says so.

    Args:
        stem: the path without an ending.
        results: all times, for the JSON.
        text: the table, in Markdown.
        panels: for each panel of the picture its title and the value of each candidate.
        unit: what the values are, for the axis.
        own: the candidates to stand out.
        digits: how many decimals the picture shows.
        console: where to print.
    """
    save(stem.with_suffix(".json"), results)
    write_atomically(stem.with_suffix(".md"), text)
    draw(stem.with_suffix(".png"), panels, unit=unit, own=own, digits=digits)
    console.print(text, soft_wrap=True, markup=False)
    console.print(f"Table, times and picture: {stem}.{{md,json,png}}", soft_wrap=True)


def draw(path: Path, panels: Panels, *, unit: str, own: Collection[str], digits: int = 1) -> None:
    """Draws one panel of horizontal bars for each race, two beside each other."""
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
        names = list(values)[::-1]  # bars grow from below
        heights = [values[name] for name in names]
        colours = [OWN_COLOUR if name in own else PEER_COLOUR for name in names]
        bars = axes.barh(names, heights, color=colours)
        axes.bar_label(bars, [f"{height:.{digits}f}" for height in heights], padding=3)
        axes.set_title(title, loc="left", fontweight="bold")
        axes.set_xlabel(unit)
        axes.axvline(0, color="#333333", linewidth=1)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.12)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
