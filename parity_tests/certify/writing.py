"""A certificate as lines of a table, as JSON, and as a page.

The JSON has these entries, and `"format"` grows by 1 if one of them changes its meaning:

| entry | value |
|---|---|
| `format` | 1 |
| `result` | `"agrees"`, `"differs"` or `"incomplete"` |
| `conclusion` | a sentence |
| `seed`, `steps`, `optimizer` | the seed of the script, the compared steps, a class of PyTorch |
| `tolerance`, `dtype` | the bound of losses, buffers and parameters, and the dtype of these |
| `rows` | a list with the attributes of `parity_tests.certify.certificate.Row` |
| `first_difference` | null, or `step`, `quantity`, `where` and `detail` |
| `losses` | a list of pairs, JAX's loss and PyTorch's |
| `notes` | a list of sentences |
| `files` | by `"script"` and `"port"`: `path` and `sha256` |
| `command`, `date` | a list of words, and the time in UTC |
| `versions`, `instruction_sets` | by package, and by framework |
| `platform` | the operating system and the machine |

Numbers that JSON does not have, NaN and infinities, are null.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import html
import json
import math
import platform
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from parity_tests import pages
from parity_tests.certify.certificate import Certificate, Row
from parity_tests.compare import Tier
from parity_tests.comparison import Comparison
from parity_tests.instructions import levels
from parity_tests.output import write_atomically
from regshared.versions import versions

FORMAT = 1
HEADINGS = ("quantity", "result", "compared", "differ", "not equal", "largest", "bound", "where")
PLOTTED = ("losses", "buffers", "updates", "parameters")
# The classes of results that pages have a color for.
_CLASSES = {"not compared": "incomplete", "none": "skipped"}


def cells(row: Row) -> list[str]:
    """Return the cells of a row under HEADINGS, without its detail."""
    step = f"step {row.step}" if row.step is not None and row.compared else ""
    where = " ".join(filter(None, [step, row.where]))
    return [
        row.name,
        row.result,
        f"{row.compared:,} {row.unit}" if row.compared else "",
        f"{row.differing:,}" if row.compared else "",
        f"{row.unequal:,}" if row.compared else "",
        "" if row.largest is None else f"{row.largest:.1e}",
        "equal" if row.bound is None else f"{row.bound:.0e}",
        where if row.largest or row.differing else "",
    ]


def digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def as_record(
    certificate: Certificate, digests: Mapping[Path, str], command: Sequence[str]
) -> dict[str, Any]:
    """Return the entries of the JSON; `digests` are those of both files as they ran."""
    files = {"script": certificate.script, "port": certificate.port}
    return {
        "format": FORMAT,
        "result": certificate.result,
        "conclusion": certificate.conclusion,
        "seed": certificate.seed,
        "steps": certificate.steps,
        "optimizer": certificate.optimizer,
        "tolerance": certificate.tolerance,
        "dtype": certificate.dtype,
        "rows": [dataclasses.asdict(row) for row in certificate.rows],
        "first_difference": certificate.first and dataclasses.asdict(certificate.first),
        "losses": [list(pair) for pair in certificate.losses],
        "notes": list(certificate.notes),
        "files": {
            name: {"path": str(path), "sha256": digests[path]} for name, path in files.items()
        },
        "command": list(command),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "platform": platform.platform(),
        "instruction_sets": levels(),
    }


def as_html(certificate: Certificate, record: dict[str, Any]) -> str:
    """Return a page with the conclusion, the table, a plot and the record."""
    rows = [(_CLASSES.get(row.result, row.result), cells(row)) for row in certificate.rows]
    details = [(row.name, row.detail) for row in certificate.rows if row.detail]
    facts = [
        ("seed", str(certificate.seed)),
        ("optimizer", certificate.optimizer),
        ("tolerance", f"{certificate.tolerance:g}, for {certificate.dtype}"),
        *((name, f"{f['path']}, SHA-256 {f['sha256']}") for name, f in record["files"].items()),
        ("command", shlex.join(record["command"])),
        ("date", record["date"]),
        ("versions", _listed(record["versions"])),
        ("platform", record["platform"]),
        ("instruction sets", _listed(record["instruction_sets"]) or "unknown"),
    ]
    parts = [
        f'<p class="{certificate.result}">{html.escape(certificate.conclusion)}</p>',
        *(f"<p>{html.escape(note)}</p>" for note in certificate.notes),
        pages.table(HEADINGS, rows),
        "<p>A deviation is relative to the largest number of its array, or to 1 if that is larger; "
        "of initial weights, to the largest number; of updates, the root mean square, relative to "
        "that of the update. Numbers differ if they exceed the bound.</p>",
        *(["<h2>Details</h2>", pages.definitions(details)] if details else []),
        _plot(certificate),
        "<h2>Record</h2>",
        pages.definitions(facts),
    ]
    title = f"Certificate: {certificate.script.name} and {certificate.port.name}"
    return pages.page(title, "\n".join(filter(None, parts)))


def _listed(values: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _plot(certificate: Certificate) -> str:
    """Return the losses and the deviations step by step; without matplotlib, an empty string."""
    shown = [row for row in certificate.rows if row.name in PLOTTED and row.compared]
    deviations = {row.name: row.by_step for row in shown}
    lengths = {len(values) for values in deviations.values()} | {len(certificate.losses)}
    if len(lengths) != 1 or not certificate.losses:
        return ""  # a row without a value at some step
    bounds = {row.name: row.bound or 0.0 for row in shown}
    tier = Tier(certificate.dtype, certificate.tolerance)
    comparison = Comparison(tier, deviations, certificate.losses, None, bounds=bounds)
    try:
        figure = comparison.figure()
    except ImportError:
        return ""
    text = (
        f"Losses of JAX and PyTorch, and the largest deviations, at {len(certificate.losses)} steps"
    )
    return f"<h2>Step by step</h2>\n{pages.image(figure, text)}"


def write(
    folder: Path, certificate: Certificate, digests: Mapping[Path, str], command: Sequence[str]
) -> list[Path]:
    """Write `certificate.json` and `certificate.html`; return the paths."""
    record = as_record(certificate, digests, command)
    paths = [folder / "certificate.json", folder / "certificate.html"]
    text = json.dumps(_without_infinities(record), indent=1, allow_nan=False)
    write_atomically(paths[0], text + "\n")
    write_atomically(paths[1], as_html(certificate, record))
    return paths


def _without_infinities(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_infinities(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_infinities(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
