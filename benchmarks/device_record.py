"""The record of a device check: its JSON, and its tables in Markdown."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.race import Result
from parity_tests.output import write_atomically

PASSED, FAILED, SKIPPED, LATE = "passed", "failed", "skipped", "not run"
HEADINGS = {"dropout": "a copy", "attention": "attention without dropout"}


@dataclass(frozen=True)
class Outcome:
    """The outcome of a check.

    Attributes:
        name: The name of the check.
        status: "passed", "failed", "skipped" for a stated reason, or "not run" for lack of time.
        detail: What was compared, what differs, or why the check was skipped.
        seconds: Its duration.
    """

    name: str
    status: str
    detail: str
    seconds: float = 0.0


@dataclass(frozen=True)
class Timing:
    """The times of one case.

    Attributes:
        kind: "dropout" or "attention".
        base: The candidate that the others are compared with.
        result: The seconds of a call, by candidate and round.
        calls: The number of calls whose time was measured at once.
        left_out: Why a candidate has no time, by its name.
    """

    kind: str
    base: str
    result: Result
    calls: int
    left_out: Mapping[str, str]


@dataclass(frozen=True)
class Record:
    """The content of a JSON file.

    Attributes:
        device: Kind, platform, number, runtime and driver.
        is_rehearsal: Whether a CPU took the place of the device; the times then have no meaning.
        date: The day in UTC, in ISO format.
        environment: The machine and the versions.
        checks: The outcomes of the checks.
        timings: The times.
        left_out: What was not measured, and why.
        seconds: The duration of the run.
    """

    device: Mapping[str, Any]
    is_rehearsal: bool
    date: str
    environment: Mapping[str, Any]
    checks: Sequence[Outcome]
    timings: Sequence[Timing]
    left_out: Sequence[str]
    seconds: float

    @property
    def code(self) -> int:
        """The exit code: 0 if all checks passed or were skipped for a reason, otherwise 1."""
        return int(any(check.status in (FAILED, LATE) for check in self.checks))


def save(stem: Path, record: Record) -> str:
    """Write STEM.json and STEM.md, and return the Markdown."""
    write_atomically(stem.with_suffix(".json"), json.dumps(asdict(record), indent=1) + "\n")
    text = markdown(record)
    write_atomically(stem.with_suffix(".md"), text)
    return text


def load(path: Path) -> Record:
    """Return the record that `save` wrote."""
    content = json.loads(path.read_text(encoding="utf-8"))
    checks = [Outcome(**check) for check in content.pop("checks")]
    timings = [
        Timing(**{**timing, "result": Result(**timing["result"])})
        for timing in content.pop("timings")
    ]
    return Record(checks=checks, timings=timings, **content)


def markdown(record: Record) -> str:
    """Return the device, the checks, and a table of times for each kind of case."""
    parts = [_heading(record), _checks(record.checks)]
    parts += [_times([x for x in record.timings if x.kind == kind]) for kind in HEADINGS]
    parts += ["".join(f"- {line}\n" for line in record.left_out)]
    return "\n".join(part for part in parts if part)


def _heading(record: Record) -> str:
    device, versions = record.device, record.environment["versions"]
    driver = f"driver {device['driver']}" if device["driver"] else ""
    installed = [f"{name} {version}" for name, version in versions.items() if version]
    details = ", ".join(x for x in (device["runtime"], driver, *installed) if x)
    title = f"**{device['number']} x {device['kind']}** ({device['platform']}), {record.date}"
    lines = [f"{title}; {details}. The run took {record.seconds:.0f} s."]
    if record.is_rehearsal:
        lines.append("This is a rehearsal on a CPU: its times have no meaning.")
    return "\n".join(lines) + "\n"


def _checks(checks: Sequence[Outcome]) -> str:
    lines = ["| check | outcome | detail |", "| --- | --- | --- |"]
    lines += [f"| {x.name} | {x.status} | {x.detail.replace('|', '/')} |" for x in checks]
    return "\n".join(lines) + "\n"


def _times(timings: Sequence[Timing]) -> str:
    """Return a table of the times of the base, and of the others over it; notes below it."""
    if not timings:
        return ""
    first = timings[0]
    names = list(dict.fromkeys(n for x in timings for n in (*x.result.seconds, *x.left_out)))
    others = [name for name in names if name != first.base]
    over = f"over {HEADINGS[first.kind]}"
    lines = [
        f"| medians, {over} | ms | " + " | ".join(others) + " |",
        "| --- |" + " ---: |" * (len(others) + 1),
    ]
    for timing in timings:
        result = timing.result
        milliseconds = result.nanoseconds(timing.base) * result.elements / 1e6
        cells = [
            f"{result.ratio(name, timing.base):.2f}" if name in result.seconds else "none"
            for name in others
        ]
        lines.append(f"| {result.title} | {milliseconds:.3f} | {' | '.join(cells)} |")
    reasons = {(name, why): None for x in timings for name, why in x.left_out.items()}
    lines += [""] * bool(reasons) + [f"- No time of {name}: {why}" for name, why in reasons]
    return "\n".join(lines) + "\n"
