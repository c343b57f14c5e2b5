"""Code that the tests of both packages share, without a framework."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

# Invalid numbers and depths of layers, and the error for a parameter named 'kernel'.
WRONG_LAYERS = [
    (-1, None, ValueError, r"layer_of\('kernel'\) must be at least 0; got -1"),
    (0, -1, ValueError, "depth must be at least 0; got -1"),
    (3, 2, ValueError, r"layer_of\('kernel'\) must be at most 2; got 3"),
    (0.5, None, TypeError, r"layer_of\('kernel'\) must be an integer; got 0\.5"),
    (True, None, TypeError, "must be an integer; got True"),
    (None, None, TypeError, "must be an integer; got None"),
]


def suggested(error: Any) -> Any:
    """Return the rule that the error of unknown parameters suggests, as a user would paste it."""
    return ast.literal_eval(str(error.value).partition("rule=")[2].removesuffix("."))


def line(file: str, marker: str) -> str:
    """Return the line of a comment of a file, in the format of a report."""
    lines = Path(file).read_text().splitlines()
    (number,) = [n for n, text in enumerate(lines, 1) if text.endswith(f"  # {marker}")]
    return f"{Path(file).name}:{number}"


def found(report: Any) -> list[tuple[Any, Any]]:
    """Return the problem and the sites of each finding of a report."""
    return [(finding.problem, finding.sites) for finding in report.findings]
