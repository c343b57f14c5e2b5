"""The picture of `benchmarks.scale`: curves on logarithmic axes, with their slopes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from benchmarks import bars, scale_tables
from benchmarks.scale_tables import COMPILE, COST, CYCLES, MEMORY, TIME, TRACE, Curves
from parity_tests import pictures

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_ROW = 2.3  # inches
BUILD = "trace and compile"
LABELS = {TIME: "CPU seconds per call", MEMORY: "bytes on a device", BUILD: "CPU seconds to build"}
MOVED = "bytes in collectives"
# The candidate of a title: the first of these that is in the panel.
_MAIN = (scale_tables.DROPOUT, "decay by mask", scale_tables.DECAY)


@pictures.styled
def draw(content: Mapping[str, Any]) -> Figure:
    """Draw a row of panels for each program: time, memory and build, or cost and communication."""
    from matplotlib.figure import Figure

    rows = [row for name, part in content.items() for row in _rows(name, part)]
    figure = Figure(figsize=(pictures.WIDTH, 1.2 + _ROW * len(rows)))
    grid: Any = figure.subplots(len(rows), 3, squeeze=False)
    for line, row in zip(grid, rows, strict=True):
        for axes, found in zip(line, row, strict=True):
            _draw_panel(axes, found)
    names = dict.fromkeys(name for row in rows for found in row for name in found.figures)
    _add_legend(figure, list(names))
    pictures.caption(figure, *_origin(content))
    return figure


def _rows(name: str, part: Mapping[str, Any]) -> list[list[Curves]]:
    if name not in scale_tables.TABLED:
        return _step_rows(part)
    by_title: dict[str, dict[str, Curves]] = {}
    for found in scale_tables.curves(part):
        by_title.setdefault(found.title, {})[found.measure] = found
    return [
        [by_measure[TIME], by_measure[MEMORY], _build(by_measure[TRACE], by_measure[COMPILE])]
        for by_measure in by_title.values()
    ]


def _build(trace: Curves, compilation: Curves) -> Curves:
    """Return the sum of both times, round by round."""
    figures = {
        name: {
            at: [
                one + other for one, other in zip(times, compilation.figures[name][at], strict=True)
            ]
            for at, times in curve.items()
        }
        for name, curve in trace.figures.items()
    }
    return Curves(trace.axis, trace.title, BUILD, figures)


def _step_rows(part: Mapping[str, Any]) -> list[list[Curves]]:
    """Return cost, memory and communication of the step for each kind with several grids."""
    rows = []
    steps = list(scale_tables.steps(part))
    for kind in dict.fromkeys(_kind(variants) for variants in steps):
        here = [variants for variants in steps if _kind(variants) == kind]
        if len(here) < 2 or kind == "CPU":
            continue
        measures = {
            f"{COST.get(kind, CYCLES)}, estimated": lambda one: one["cost"],
            MEMORY: lambda one: one["argument"] + one["temporary"],
            MOVED: scale_tables.moved,
        }
        row = []
        for measure, get in measures.items():
            figures: dict[str, dict[int, Sequence[float]]] = {}
            for variants in sorted(here, key=lambda each: next(iter(each.values()))["devices"]):
                for name, one in variants.items():
                    figures.setdefault(name, {})[one["devices"]] = [get(one)]
            row.append(Curves("devices", f"train step, {kind}", measure, figures))
        rows.append(row)
    return rows


def _kind(variants: Mapping[str, Any]) -> str:
    return next(iter(variants.values()))["grid"].partition(":")[0]


def _draw_panel(axes: Axes, found: Curves) -> None:
    from matplotlib.ticker import NullLocator

    for name in found.figures:
        medians = found.medians(name)
        axes.plot(list(medians), list(medians.values()), **_look(name))
    heights = [height for name in found.figures for height in found.medians(name).values()]
    sizes = sorted({at for curve in found.figures.values() for at in curve})
    axes.set_xscale("log")
    axes.set_yscale("log")
    if heights and min(heights) > 0:  # at least a decade, so that there are labeled ticks
        axes.set_ylim(min(heights) / 3, max(heights) * 4)
    if sizes and sizes[-1] < 1000:
        few = sizes if len(sizes) < 5 else sizes[:: len(sizes) // 4]
        axes.set_xticks(few, [str(size) for size in few])
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
    axes.tick_params(labelsize="small")
    main = next((name for name in _MAIN if name in found.figures), None)
    law = f"\n{main}: {found.law(main)}" if main else ""
    axes.set_title(f"{found.title}{law}", fontsize="x-small", fontweight="normal", loc="center")
    axes.set_xlabel(found.axis, fontsize="small")
    axes.set_ylabel(LABELS.get(found.measure, found.measure), fontsize="small")


def _look(name: str) -> dict[str, Any]:
    palette = pictures.palette()
    colors = {
        scale_tables.WITHOUT: palette.gray,
        scale_tables.DROPOUT: palette.vermilion,
        "dropout, packed": palette.orange,
        scale_tables.DECAY: palette.blue,
        "decay by mask": palette.green,
        "L2 penalty": palette.purple,
    }
    dashes = "--" if name == scale_tables.WITHOUT else "-"
    return {"color": colors[name], "linestyle": dashes, "marker": "o", "markersize": 3}


def _add_legend(figure: Figure, names: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], label=name, **_look(name)) for name in names]
    pictures.legend_on_top(figure, handles, min(6, len(handles)))


def _origin(content: Mapping[str, Any]) -> list[str]:
    """Return sentences about the machine, its load, the versions and the dates."""
    parts = list(content.values())
    environment = parts[0]["environment"]
    loads = [load for part in parts for load in part["load"]]
    sentences = [
        "Titles: the exponent of growth, and the size from which it holds. Times: CPU time of all "
        "threads, median.",
        bars.machine(environment),
        f"Load average {min(loads):.1f} to {max(loads):.1f}.",
        bars.versions(environment),
        bars.dates("Measured", {part["date"] for part in parts}),
    ]
    if any(name in content for name in ("tpu", "gpu")):
        sentences.append(
            "Train steps: compiled for devices that were not present; costs are estimates of the "
            "compiler. Nothing was timed there."
        )
    return sentences
