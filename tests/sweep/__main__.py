"""Call every public function and layer with wrong values, one argument at a time.

    python -m tests.sweep                     # a few minutes
    python -m tests.sweep --packages regjax   # one package

It prints each call that accepts a wrong value, and each error that does not begin with the
argument. `tests/test_sweep.py` asserts that there are none. Exit code: 0 if there are none,
otherwise 1.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence

from parity_tests import output

PACKAGES = ("regjax", "regtorch")


def main(argv: Sequence[str] | None = None) -> int:
    """Print the calls that are not fine, and the number of calls with each verdict."""
    parser = output.Parser("python -m tests.sweep", __doc__)
    text = "packages to call (default: both)"
    packages = output.one_of(PACKAGES)
    parser.add_argument("--packages", nargs="+", default=PACKAGES, help=text, **packages)
    options = parser.parse_args(argv)
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

    from tests.sweep.calls import sweep

    warnings.simplefilter("ignore")
    found = []
    columns = SpinnerColumn(), MofNCompleteColumn(), TextColumn("{task.description}")
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=None)
        for package in options.packages:
            for finding in sweep(package):
                found.append(finding)
                progress.update(task, description=finding.call.partition("(")[0], advance=1)
    for finding in found:
        if finding.verdict != "fine":
            print(*finding, sep="\t")
    print(dict(Counter(finding.verdict for finding in found)))
    return int(any(finding.verdict != "fine" for finding in found))


if __name__ == "__main__":
    output.run(main)
