"""The results as a JSON file and as a table, in the terminal and in Markdown."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from itertools import groupby
from typing import TYPE_CHECKING, Any

from examples.overfit.curves import largest_difference
from examples.overfit.settings import FRAMEWORK_LABELS
from parity_tests.output import write_atomically
from regshared.versions import versions

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from rich.table import Table

    from examples.overfit.curves import Curve
    from examples.overfit.settings import Settings

CURVES_FILE = "curves.json"
TABLE_FILE = "table.md"
HEADINGS = (
    "run",
    "framework",
    "train best",
    "train last",
    "valid best",
    "at step",
    "valid last",
    "acc best",
    "acc last",
    "gap",
    "differ",
)
_DISTRIBUTIONS = {
    "jax": ("jax", "jaxlib", "optax"),
    "torch": ("torch",),
}


def save_curves(
    folder: Path, settings: Settings, frameworks: Sequence[str], curves: Sequence[Curve]
) -> None:
    """Write settings, versions and all curves so far, atomically.

    A number that is not finite becomes null, since JSON has no NaN.

    Raises:
        OSError: The file cannot be written.
    """
    content = {
        "settings": {**asdict(settings), "frameworks": list(frameworks)},
        "versions": versions(packages(frameworks)),
        "units": {
            "train_loss": "mean cross-entropy in nats: whole training set, no dropout, no penalty",
            "train_accuracy": "fraction of the training set classified correctly",
            "validation_loss": "mean cross-entropy in nats: validation set, no dropout, no penalty",
            "validation_accuracy": "fraction of the validation set classified correctly",
            "seconds": "wall time of the run, including compilation and evaluations",
        },
        "runs": [_as_json(curve) for curve in curves],
    }
    write_atomically(folder / CURVES_FILE, json.dumps(content, indent=1, allow_nan=False) + "\n")


def _as_json(curve: Curve) -> dict[str, Any]:
    return {
        **{f"recipe_{key}": value for key, value in asdict(curve.recipe).items()},
        "framework": curve.framework,
        "steps": curve.steps,
        "train_loss": [_finite_or_none(value) for value in curve.train_loss],
        "train_accuracy": curve.train_accuracy,
        "validation_loss": [_finite_or_none(value) for value in curve.validation_loss],
        "validation_accuracy": curve.validation_accuracy,
        "seconds": round(curve.seconds, 3),
    }


def _finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def packages(frameworks: Iterable[str]) -> list[str]:
    """Return the packages on which the figures depend."""
    names = ["regjax", "numpy", "scikit-learn", "matplotlib"]
    for framework in frameworks:
        names += _DISTRIBUTIONS[framework]
    return names


def headings(curves: Sequence[Curve]) -> tuple[str, ...]:
    """Return the headings of the table; with one framework it has no column `differ`."""
    return HEADINGS if len({curve.framework for curve in curves}) > 1 else HEADINGS[:-1]


def rows(curves: Sequence[Curve]) -> list[tuple[str, ...]]:
    """Return the cells of the table: a row for each run in each framework."""
    columns = len(headings(curves))
    table = []
    for _, group in groupby(curves, key=lambda curve: curve.recipe.name):
        pair = list(group)
        for i, curve in enumerate(pair):
            differ = ""
            if i == 1:
                losses = [(c.train_loss, c.validation_loss) for c in pair]
                differ = f"{max(map(largest_difference, *losses)):.0e}"
            table.append((*_cells(curve), differ)[:columns])
    return table


def _cells(curve: Curve) -> tuple[str, ...]:
    return (
        curve.recipe.label,
        FRAMEWORK_LABELS[curve.framework],
        _loss(min(curve.train_loss)),
        _loss(curve.train_loss[-1]),
        _loss(curve.validation_loss[curve.best]),
        str(curve.steps[curve.best]),
        _loss(curve.validation_loss[-1]),
        f"{max(curve.validation_accuracy):.1%}",
        f"{curve.validation_accuracy[-1]:.1%}",
        _loss(curve.gap),
    )


def _loss(value: float) -> str:
    if not math.isfinite(value):
        return "not finite"
    return f"{value:.0e}" if 0 < abs(value) < 5e-4 or abs(value) >= 1e4 else f"{value:.3f}"


def captions(curves: Sequence[Curve], settings: Settings) -> list[str]:
    """Return an explanation of the columns, and a comparison of both forms of L2."""
    lines = [
        "Losses are mean cross-entropy in nats over the whole training or validation set, with "
        "dropout off and without the penalty, so that they are comparable. best: lowest loss, or "
        "highest accuracy, of any evaluation; last: after the last step; gap: valid last - train "
        "last."
    ]
    if "differ" in headings(curves):
        lines[0] += (
            " differ: the largest distance between the JAX and PyTorch loss curves at any "
            "evaluation."
        )
    for framework, label in FRAMEWORK_LABELS.items():
        run = {c.recipe.name: c for c in curves if c.framework == framework}
        if {"l2_in_loss", "weight_decay"} <= run.keys():
            distance = largest_difference(
                run["l2_in_loss"].validation_loss, run["weight_decay"].validation_loss
            )
            lines.append(
                f"{label}: the validation losses of 'L2 in the loss' (coefficient "
                f"{run['l2_in_loss'].recipe.penalty:g}) and 'weight decay' "
                f"({settings.weight_decay:g}) differ by at most {distance:.0e}: "
                + (
                    f"decay in {settings.optimizer} is coupled, so half the coefficient in the "
                    "loss gives the same run."
                    if settings.coupled
                    else f"decay in {settings.optimizer} is decoupled, so no loss term is "
                    "equivalent."
                )
            )
    lines += [
        f"'{c.recipe.label}' in {FRAMEWORK_LABELS[c.framework]} diverged: lower --learning-rate "
        "or --weight-decay."
        for c in curves
        if c.diverged
    ]
    return lines


def terminal_table(curves: Sequence[Curve]) -> Table:
    """Return the table for rich, with at most 80 columns."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=0)
    for i, heading in enumerate(headings(curves)):
        # A line for each word; otherwise rich would break the names of the runs.
        words = "\n".join(heading.replace("framework", "frame- work").split())
        table.add_column(words, justify="left" if i < 2 else "right", no_wrap=True)
    for row in rows(curves):
        table.add_row(*row)
    return table


def markdown_table(curves: Sequence[Curve], settings: Settings) -> str:
    """Return the same table in Markdown, with the captions below it."""
    columns = headings(curves)
    alignments = ["---"] * 2 + ["---:"] * (len(columns) - 2)
    lines = [_markdown_row(row) for row in (columns, alignments, *rows(curves))]
    return "\n".join(lines) + "\n\n" + "\n\n".join(captions(curves, settings)) + "\n"


def _markdown_row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def save_table(folder: Path, curves: Sequence[Curve], settings: Settings) -> None:
    """Write the table as Markdown.

    Raises:
        OSError: The file cannot be written.
    """
    write_atomically(folder / TABLE_FILE, markdown_table(curves, settings))
