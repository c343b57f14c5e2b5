"""Output of a race: a table in Markdown, the times as JSON, and a bar chart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from benchmarks.race import Record, Result, load, save
from parity_tests import pictures
from parity_tests.output import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def publish(
    stem: Path,
    results: Sequence[Result],
    text: str,
    draw: Callable[[Record], Figure],
    *,
    console: Console,
    **extra: object,
) -> None:
    """Write STEM.json, STEM.md and STEM.png, and print the table.

    Args:
        stem: The path without a suffix.
        results: All times, for the JSON.
        text: The table, in Markdown.
        draw: A function that draws the content of the JSON.
        console: The console to print to.
        **extra: Everything else, for the JSON.
    """
    save(stem.with_suffix(".json"), results, **extra)
    show(stem, text, draw, console)


def show(stem: Path, text: str, draw: Callable[[Record], Figure] | None, console: Console) -> None:
    """Write STEM.md, and with `draw` STEM.png from STEM.json, and print the table."""
    write_atomically(stem.with_suffix(".md"), text)
    if draw is not None:
        pictures.save(draw(load(stem.with_suffix(".json"))), stem.with_suffix(".png"))
    console.print(text, soft_wrap=True, markup=False)
    console.print(f"Table, times and picture: {stem}.{{md,json,png}}", soft_wrap=True)
