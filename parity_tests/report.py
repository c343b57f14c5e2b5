"""The results of the checks, as a table in the terminal, as JSON, and as a page with plots."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from parity_tests.checks import Check, Outcome
from parity_tests.output import write_atomically
from regshared.versions import versions


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


_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>Parity of regjax and regtorch</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 72rem }}
body {{ margin: 2rem auto; padding: 0 1rem }}
table {{ border-collapse: collapse; font-size: 14px; width: 100% }}
th, td {{ border-bottom: 1px solid #ccc; padding: .35rem .6rem; text-align: left }}
.agrees {{ color: #00602b }} .differs {{ color: #b00020; font-weight: bold }}
.skipped {{ color: #666 }} img {{ max-width: 100% }}
</style>
<h1>Parity of regjax and regtorch</h1>
<p>{summary}</p>
<table><thead><tr>{head}</tr></thead><tbody>
{rows}
</tbody></table>
{plots}
<h2>Verified promises</h2>
<dl>
{promises}
</dl>
<h2>Versions</h2>
<p>{versions}</p>
</html>
"""


def as_html(entries: Sequence[Entry]) -> str:
    """Return a standalone page: the table, a plot of the comparisons step by step, versions."""
    rows = "\n".join(
        f'<tr class="{entry.result}">'
        + "".join(f"<td>{html.escape(cells(entry).get(name, ''))}</td>" for name in HEADINGS)
        + "</tr>"
        for entry in entries
    )
    series = {
        f"{entry.check.name}: {name}" if len(entry.outcome.series) > 1 else entry.check.name: values
        for entry in entries
        if entry.outcome is not None
        for name, values in entry.outcome.series.items()
    }
    return _PAGE.format(
        summary=html.escape(summary(entries)),
        head="".join(f"<th>{html.escape(name)}</th>" for name in HEADINGS),
        rows=rows,
        plots=_plots(series) if series else "",
        promises="\n".join(
            f"<dt>{html.escape(e.check.name)}</dt><dd>{html.escape(e.check.promise)}</dd>"
            for e in entries
        ),
        versions=html.escape(", ".join(f"{name} {v}" for name, v in versions().items())),
    )


def summary(entries: Sequence[Entry]) -> str:
    """Return one line with the numbers of checks that agree, differ, and were skipped."""
    counts: dict[str, int] = dict.fromkeys(("agrees", "differs", "skipped"), 0)
    for entry in entries:
        counts[entry.result] += 1
    return ", ".join(f"{count} {word}" for word, count in counts.items() if count) or "nothing ran"


def _plots(series: Mapping[str, Sequence[float]]) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, values in series.items():
        # A logarithmic axis has no 0: draw it below the other differences.
        axes.plot(range(1, len(values) + 1), [max(value, 1e-18) for value in values], label=name)
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("difference of JAX and PyTorch, in norm")
    axes.set_title("The largest difference after each step", loc="left")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    encoded = base64.b64encode(picture.getvalue()).decode()
    source = f"data:image/png;base64,{encoded}"
    return f'<h2>Step by step</h2><img alt="differences over steps" src="{source}">'


def write(folder: Path, entries: Sequence[Entry]) -> list[Path]:
    """Write `parity.json` and, with matplotlib, `parity.html`; return the paths."""
    paths = [folder / "parity.json"]
    write_atomically(paths[0], as_json(entries))
    try:
        page = as_html(entries)
    except ImportError:
        return paths
    paths.append(folder / "parity.html")
    write_atomically(paths[1], page)
    return paths
