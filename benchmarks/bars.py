"""Bar charts of ratios: medians with quartiles, a line at 1.0, and the origin of the figures."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.race import Record, Spread
from parity_tests import pictures

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PEERS = "other libraries"
NOT_MEASURED = "not reported"
# In inches: a bar with the space around it, and the title and the axis of a panel. In bars: the
# space between two groups.
_BAR, _FRAME, _GAP = 0.16, 0.75, 0.5
_TITLE_CHARACTERS, _UNIT_CHARACTERS = 38, 40


@dataclass(frozen=True)
class Panel:
    """One panel of a bar chart.

    Attributes:
        title: Its title.
        groups: For each label of the axis, the bars of each series.
    """

    title: str
    groups: Mapping[str, Mapping[str, Spread]]


def race_panel(title: str, spreads: Mapping[str, Spread], own: Collection[str]) -> Panel:
    """Return a panel with a bar for each candidate.

    Args:
        title: The title of the panel.
        spreads: The figures of each candidate.
        own: The candidates of this project; the shortest name is that of the series.
    """
    series = {name: min(own, key=len) if name in own else PEERS for name in spreads}
    return Panel(title, {name: {series[name]: spread} for name, spread in spreads.items()})


def draw_race(
    record: Record, *, base: str, own: Collection[str], unit: str, reference: str
) -> Figure:
    """Draw a panel for each result: the time of each candidate over that of `base`."""
    panels = [
        race_panel(
            result.title,
            {name: result.ratios(name, base) for name in result.seconds if name != base},
            own,
        )
        for result in record.results
    ]
    return draw(panels, unit=unit, reference=reference, caption=origin(record))


@pictures.styled
def draw(panels: Sequence[Panel], *, unit: str, reference: str, caption: Sequence[str]) -> Figure:
    """Draw horizontal bars, with two panels in each row, which share their axes.

    Args:
        panels: The panels, row by row.
        unit: The label of the axes, of which lower is better.
        reference: The candidate with the figure 1.0, in words.
        caption: Sentences below the panels.
    """
    from matplotlib.figure import Figure

    rows = [panels[start : start + 2] for start in range(0, len(panels), 2)]
    layouts = [_layout(row) for row in rows]
    heights = [_FRAME + _BAR * _end(layout) for layout in layouts]
    figure = Figure(figsize=(pictures.WIDTH, 1.2 + sum(heights)))
    grid: Any = figure.subplots(
        len(rows),
        len(rows[0]),
        squeeze=False,
        sharex="row",
        sharey="row",
        height_ratios=heights,
    )
    colors = _colors(panels)
    for row, layout, line in zip(rows, layouts, grid, strict=True):
        for axes, panel in zip(line, row, strict=False):
            _draw_panel(axes, panel, layout, colors)
        for axes in line[len(row) :]:
            axes.remove()
    for axes in figure.axes[-len(rows[0]) :]:  # the lowest of each column
        axes.set_xlabel(
            f"{textwrap.fill(unit, _UNIT_CHARACTERS)}\n(lower is better)", fontsize="small"
        )
    _add_legend(figure, colors, reference)
    pictures.caption(figure, *caption)
    return figure


Layout = dict[str, dict[str, float]]


def _layout(row: Sequence[Panel]) -> Layout:
    """Return the place of each bar on the shared axis of a row, by label and series."""
    layout: Layout = {}
    for label in dict.fromkeys(label for panel in row for label in panel.groups):
        start = _end(layout)
        series = dict.fromkeys(name for panel in row for name in panel.groups.get(label, ()))
        layout[label] = {name: start + place for place, name in enumerate(series)}
    return layout


def _end(layout: Layout) -> float:
    """Return the place of the next group."""
    return max((max(bars.values()) + 1 + _GAP for bars in layout.values()), default=0.0)


def _colors(panels: Sequence[Panel]) -> dict[str, Any]:
    """Return the color of each series: warm for this project, gray for others."""
    palette = pictures.palette()
    warm = itertools.cycle((palette.vermilion, palette.orange))
    gray = itertools.cycle((palette.gray, pictures.lighter(palette.gray)))
    series = (name for panel in panels for bars in panel.groups.values() for name in bars)
    return {name: next(warm if name.startswith("reg") else gray) for name in dict.fromkeys(series)}


def _draw_panel(axes: Axes, panel: Panel, layout: Layout, colors: Mapping[str, Any]) -> None:
    palette = pictures.palette()
    for series, color in colors.items():
        bars = {
            layout[label][series]: group[series]
            for label, group in panel.groups.items()
            if series in group
        }
        _draw_series(axes, bars, color)
    for label in layout.keys() - panel.groups.keys():
        place = _middle(layout[label])
        look: Any = {"va": "center", "fontsize": "small", "bbox": _box()}
        axes.text(0.01, place, NOT_MEASURED, transform=axes.get_yaxis_transform(), **look)
    axes.axvline(1, color=palette.ink, linestyle="--", linewidth=1.2, zorder=2)
    axes.set_yticks([_middle(bars) for bars in layout.values()], layout)
    axes.set_ylim(_end(layout) - _GAP / 2 - 0.5, -_GAP / 2 - 0.5)  # the first label at the top
    highest = max(spread.high for group in panel.groups.values() for spread in group.values())
    axes.set_xlim(0, max(axes.get_xlim()[1], 1.2 * max(highest, 1)))  # shared with the other panel
    axes.tick_params(labelsize="small")
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    axes.set_title(textwrap.fill(panel.title, _TITLE_CHARACTERS), fontsize="small")


def _draw_series(axes: Axes, bars: Mapping[float, Spread], color: Any) -> None:
    palette = pictures.palette()
    spreads = list(bars.values())
    medians = [spread.median for spread in spreads]
    whiskers = (
        [spread.median - spread.low for spread in spreads],
        [spread.high - spread.median for spread in spreads],
    )
    drawn = axes.barh(
        list(bars),
        medians,
        height=0.85,
        color=color,
        xerr=whiskers if any(map(any, whiskers)) else None,
        error_kw={"ecolor": palette.ink, "elinewidth": 1},
    )
    texts = [f"{median:.2f}" for median in medians]
    axes.bar_label(drawn, texts, padding=3, fontsize="x-small", bbox=_box())


def _box() -> dict[str, Any]:
    """Return the background of a text, which interrupts the line at 1.0."""
    return {"facecolor": pictures.palette().paper, "edgecolor": "none", "pad": 0.6}


def _middle(bars: Mapping[str, float]) -> float:
    return sum(bars.values()) / len(bars)


def _add_legend(figure: Figure, colors: Mapping[str, Any], reference: str) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [Patch(color=color, label=name) for name, color in colors.items()]
    ink = pictures.palette().ink
    handles.append(
        Line2D([], [], color=ink, linestyle="--", linewidth=1.2, label=f"1.0: {reference}")
    )
    pictures.legend_on_top(figure, handles)


def origin(record: Record) -> list[str]:
    """Return sentences about the rounds, the machine, the versions and the date of a run.

    Example:
        >>> here = {"python": "3.14.0", "machine": "x86_64", "cores": 2, "versions": {"jax": "0.9"}}
        >>> for sentence in origin(Record(here, [], {})):
        ...     print(sentence)
        Machine: x86_64, 2 cores.
        Versions: Python 3.14.0, jax 0.9.
        The date was not recorded.
    """
    here = record.environment
    rounds = sorted({result.rounds for result in record.results})
    sentences = [machine(here), versions(here)]
    if rounds:
        counts = " or ".join(map(str, rounds))
        sentences.insert(0, f"Bars: medians over {counts} rounds; whiskers: quartiles.")
    return [*sentences, dates("Measured", {result.date for result in record.results})]


def machine(environment: Mapping[str, Any]) -> str:
    """Return a sentence about the processor."""
    cores = f"{environment['cores']} cores" if environment.get("cores") else ""
    known = filter(None, (environment.get("cpu"), environment.get("machine"), cores))
    return f"Machine: {', '.join(known)}."


def versions(environment: Mapping[str, Any]) -> str:
    """Return a sentence about the versions of Python and of the installed packages."""
    if not environment:
        return "The versions were not recorded."
    found = {"Python": environment["python"], **environment["versions"]}
    return (
        f"Versions: {', '.join(f'{name} {version}' for name, version in found.items() if version)}."
    )


def dates(verb: str, days: Collection[str]) -> str:
    """Return a sentence about the first and the last of several days.

    Example:
        >>> dates("Measured", {"2026-01-02", "2026-01-05"}), dates("Measured", {"2026-01-02"})
        ('Measured 2026-01-02 to 2026-01-05.', 'Measured 2026-01-02.')
    """
    if not all(days) or not days:
        return "The date was not recorded."
    return f"{verb} {' to '.join(sorted({min(days), max(days)}))}."
