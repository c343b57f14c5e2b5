"""Compare regjax, regtorch and the layers they replace, and print a report.

    python -m parity_tests            # everything; minutes
    python -m parity_tests --quick    # fewer draws and steps
    python -m parity_tests --list     # the checks by name
    python -m parity_tests --only masks dropout
    python -m parity_tests certify --help    # compare a script of your own with its port

Exit code: 0 if everything that ran agrees, 1 if anything differs or nothing ran.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Sequence

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from parity_tests import output, report
from parity_tests.certify import program
from parity_tests.checks import Check, all_checks
from parity_tests.report import Entry


def main(argv: Sequence[str] | None = None) -> int:
    """Run the checks, or certify a port, and return the exit code."""
    words = sys.argv[1:] if argv is None else argv
    if words[:1] == ["certify"]:
        return program.main(words[1:])
    options = _parser().parse_args(words)
    console = Console()
    checks = [check for check in all_checks() if _wanted(check, options.only)]
    if options.list:
        for check in checks:
            console.print(f"{check.name:20} {check.promise}", soft_wrap=True, markup=False)
        return 0
    entries = []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("comparing", total=len(checks))
        for check in checks:
            progress.update(task, description=check.name)
            entries.append(run(check, quick=options.quick))
            progress.advance(task)
    console.print(_table(entries))
    console.print(report.summary(entries))
    for path in report.write(options.out, entries):
        console.print(f"written: {path}", soft_wrap=True)
    results = {entry.result for entry in entries}
    return 0 if "agrees" in results and "differs" not in results else 1


def _parser() -> argparse.ArgumentParser:
    parser = output.Parser("python -m parity_tests", __doc__)
    parser.add_quick("fewer draws and steps")
    parser.add_selection("check", lambda: (check.name for check in all_checks()))
    parser.add_out("outputs/parity", "JSON, Markdown and HTML")
    return parser


def _wanted(check: Check, only: Sequence[str]) -> bool:
    return not only or any(check.name.startswith(name) for name in only)


def run(check: Check, *, quick: bool) -> Entry:
    """Run one check; return an entry without an outcome if a framework is missing."""
    for package in check.needs:
        if importlib.util.find_spec(package) is None:
            return Entry(check, None, missing=f"{package} is not installed")
    start = time.perf_counter()
    outcome = check.run(quick)
    return Entry(check, outcome, seconds=time.perf_counter() - start)


def _table(entries: Sequence[Entry]) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in ("check", "result", "compared", "found"):
        table.add_column(heading, no_wrap=heading != "found", overflow="fold")
    styles = {"agrees": "green", "differs": "bold red", "skipped": "dim"}
    for entry in entries:
        compared = report.cells(entry).get("compared", "")
        style = styles[entry.result]
        table.add_row(entry.check.name, entry.result, compared, report.found(entry), style=style)
    return table


if __name__ == "__main__":
    output.run(main)
