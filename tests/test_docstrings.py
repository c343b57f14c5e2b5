"""Paragraphs under `Raises:` are filled; a short line is a trace of an edit."""

from __future__ import annotations

import ast
import re
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(path for name in ("regjax", "regtorch") for path in (ROOT / name).rglob("*.py"))
WIDTH = 100


def broken_lines(docstring: str) -> list[str]:
    """Return the lines under `Raises:` that have room for the next word."""
    _, _, rest = docstring.partition("Raises:\n")
    section = re.split(r"\n\s*(?:\n|$)", rest)[0].split("\n")
    return [
        line
        for line, following in pairwise(section)
        if not re.match(r"\s+\w+: ", following)
        and len(line) + 1 + len(following.split()[0]) <= WIDTH
    ]


def test_raises_paragraphs_are_filled():
    found = []
    for path in FILES:
        nodes = ast.walk(ast.parse(path.read_text()))
        kinds = (ast.FunctionDef, ast.ClassDef, ast.Module)
        docstrings = (ast.get_docstring(n, clean=False) for n in nodes if isinstance(n, kinds))
        found += [(path.name, line) for text in docstrings for line in broken_lines(text or "")]
    assert not found


@pytest.mark.parametrize(
    ("last", "is_broken"), [("short,\n            or long", True), ("x" * 99, False)]
)
def test_a_broken_line_is_detected(last, is_broken):
    text = (
        f"Raises:\n        ValueError: {last}\n        TypeError: none.\n\n    Example:\n        a"
    )
    assert bool(broken_lines(text)) == is_broken
