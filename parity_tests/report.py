"""The results of the checks, as a table in the terminal, as JSON, and as a page with plots."""

from __future__ import annotations

import html
import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from parity_tests import pages, pictures
from parity_tests.checks import Check, Outcome
from parity_tests.output import write_atomically
from regshared.versions import versions

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ABOUT = "Relative difference of the parameters of JAX and PyTorch after each step"


@dataclass(frozen=True)
class Entry:
    """A check and its outcome.

    Attributes:
        check: The check.
        outcome: Its outcome; None if the check could not run.
        missing: The reason why it could not run, in one line.
        seconds: The time it took.
    """

    check: Check
    outcome: Outcome | None
    missing: str = ""
    seconds: float = 0.0

    @property
    def result(self) -> str:
        """Return `agrees`, `differs` or `skipped`."""
        if self.outcome is None:
            return "skipped"
        return "agrees" if self.outcome.passed else "differs"


def cells(entry: Entry) -> dict[str, str]:
    """Return the columns of the table, by heading."""
    outcome = entry.outcome
    if outcome is None:
        return {"check": entry.check.name, "result": entry.result, "detail": entry.missing}
    return {
        "check": entry.check.name,
        "result": entry.result,
        "compared": f"{outcome.compared:,} {outcome.unit}",
        "required": outcome.bound,
        "max ulp": "" if outcome.ulp is None else str(outcome.ulp),
        "max difference": "" if outcome.difference is None else f"{outcome.difference:.1e}",
        "p-value": "" if outcome.p_value is None else f"{outcome.p_value:.2g}",
        "detail": outcome.detail,
    }


HEADINGS = (
    "check",
    "result",
    "compared",
    "required",
    "max ulp",
    "max difference",
    "p-value",
    "detail",
)


def found(entry: Entry) -> str:
    """Return the result of a check in few words, for a narrow terminal."""
    if entry.outcome is None:
        return entry.missing
    written = cells(entry)
    figures = [
        f"{written['max ulp']} ulp" if written["max ulp"] else "",
        f"{written['max difference']} apart" if written["max difference"] else "",
        f"p {written['p-value']}" if written["p-value"] else "",
        written["detail"],
    ]
    return "; ".join([figure for figure in figures if figure]) or "equal"


def as_json(entries: Sequence[Entry]) -> str:
    """Return all results as JSON."""
    record = {
        "versions": versions(),
        "checks": [
            {
                "name": entry.check.name,
                "promise": entry.check.promise,
                "result": entry.result,
                "missing": entry.missing,
                "seconds": round(entry.seconds, 3),
                "outcome": entry.outcome and asdict(entry.outcome),
            }
            for entry in entries
        ],
    }
    return json.dumps(record, indent=1) + "\n"


def as_markdown(entries: Sequence[Entry]) -> str:
    """Return a table with one row for each check, for the documentation."""
    lines = [f"{summary(entries)}. {', '.join(f'{name} {v}' for name, v in versions().items())}."]
    deviations = {
        entry.check.name: entry.outcome.difference or 0.0
        for entry in entries
        if entry.outcome is not None and "in norm" in entry.outcome.bound
    }
    if deviations:
        ranked = sorted(deviations, key=lambda name: deviations[name])
        lines.append(
            f"Of the {len(ranked)} comparisons in norm, {ranked[0]} has the smallest deviation "
            f"({deviations[ranked[0]]:.1e}) and {ranked[-1]} the largest "
            f"({deviations[ranked[-1]]:.1e})."
        )
    lines += ["", "| check | promise | compared | required | found |", "|---" * 5 + "|"]
    for entry in entries:
        written = cells(entry)
        row = (
            f"`{entry.check.name}`",
            entry.check.promise,
            written.get("compared", ""),
            written.get("required", ""),
            found(entry) if entry.result == "agrees" else f"**{entry.result}**: {found(entry)}",
        )
        lines.append("| " + " | ".join(cell.replace("|", "/") for cell in row) + " |")
    return "\n".join(lines) + "\n"


def as_html(entries: Sequence[Entry]) -> str:
    """Return a standalone page: the table, a plot of the comparisons step by step, versions."""
    rows = [(e.result, [cells(e).get(name, "") for name in HEADINGS]) for e in entries]
    series = {
        f"{entry.check.name}: {name}" if len(entry.outcome.series) > 1 else entry.check.name: values
        for entry in entries
        if entry.outcome is not None
        for name, values in entry.outcome.series.items()
    }
    parts = [
        f"<p>{html.escape(summary(entries))}</p>",
        pages.table(HEADINGS, rows),
        _plots(series) if series else "",
        "<h2>Verified promises</h2>",
        pages.definitions([(entry.check.name, entry.check.promise) for entry in entries]),
        "<h2>Versions</h2>",
        f"<p>{html.escape(', '.join(f'{name} {v}' for name, v in versions().items()))}</p>",
    ]
    return pages.page("Parity of regjax and regtorch", "\n".join(parts))


def summary(entries: Sequence[Entry]) -> str:
    """Return one line with the numbers of checks that agree, differ, and were skipped."""
    counts: dict[str, int] = dict.fromkeys(("agrees", "differs", "skipped"), 0)
    for entry in entries:
        counts[entry.result] += 1
    words = {"agrees": "agree", "differs": "differ"}  # the plurals
    return (
        ", ".join(
            f"{count} {word if count == 1 else words.get(word, word)}"
            for word, count in counts.items()
            if count
        )
        or "nothing ran"
    )


def _plots(series: Mapping[str, Sequence[float]]) -> str:
    text = f"{ABOUT}, for {len(series)} runs: {', '.join(series)}"
    return f"<h2>Step by step</h2>\n{pages.image(draw(series), text)}"


@pictures.styled
def draw(series: Mapping[str, Sequence[float]]) -> Figure:
    """Draw a panel for each run: the difference of JAX and PyTorch after each step."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    columns = min(4, len(series))
    rows = -(-len(series) // columns)
    figure = Figure(figsize=(pictures.WIDTH, 1.2 + 1.4 * rows))
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for axes in panels[len(series) :]:
        axes.remove()
    for axes, (name, values) in zip(panels, series.items(), strict=False):
        pictures.plot_differences(axes, range(1, len(values) + 1), values)
        axes.set_title(name.replace(": ", ":\n").replace("/", "/\n"), fontsize="small")
        axes.text(
            0.02, 0.98, pictures.gaps(values), transform=axes.transAxes, va="top", fontsize="small"
        )
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.tick_params(labelsize="small")
    low, high = panels[0].get_ylim()
    panels[0].set_ylim(low / 10, high * 1000)  # the notes are above all points
    figure.supxlabel("step")
    figure.supylabel(textwrap.fill(ABOUT, 40))
    return figure


def write(folder: Path, entries: Sequence[Entry]) -> list[Path]:
    """Write `parity.json`, `parity.md` and, with matplotlib, `parity.html`; return the paths."""
    paths = [folder / "parity.json", folder / "parity.md"]
    write_atomically(paths[0], as_json(entries))
    write_atomically(paths[1], as_markdown(entries))
    try:
        page = as_html(entries)
    except ImportError:
        return paths
    paths.append(folder / "parity.html")
    write_atomically(paths[-1], page)
    return paths
