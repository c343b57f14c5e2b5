"""The results as tables and sentences, in the terminal and in Markdown, and as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from examples.uncertainty.corruptions import CORRUPTIONS
from examples.uncertainty.study import detection
from parity_tests.output import write_atomically

if TYPE_CHECKING:
    from pathlib import Path

    from rich.table import Table

    from examples.uncertainty.study import Scene, Study

TABLE_FILE, RESULTS_FILE = "uncertainty.md", "uncertainty.json"
SCENES = (
    "corruption",
    "strength",
    "accuracy off",
    "accuracy MC",
    "entropy off",
    "entropy MC",
    "MI",
    "log loss off",
    "log loss MC",
    "ECE off",
    "ECE MC",
)
EXPLANATION = (
    "off: one pass with dropout off. MC: the mean of {samples} passes with dropout on, rate "
    "{rate:g}. Figures are means over {images} test images; entropies and losses are in nats. MI: "
    "mutual information of the passes. ECE: expected calibration error, the difference of "
    "confidence and accuracy, in 15 bins. AUROC: the probability that an image that one pass with "
    "dropout off classifies incorrectly has a higher score than a correctly classified one, over "
    "all strengths; 0.5 is chance."
)


def scene_rows(study: Study) -> list[tuple[str, ...]]:
    """Return the cells of the table of scenes."""
    return [
        (
            scene.corruption.name,
            f"{scene.strength:g}",
            *(f"{view.right.mean():.1%}" for view in (scene.one, scene.many)),
            *(f"{view.entropy.mean():.3f}" for view in (scene.one, scene.many)),
            f"{scene.disagreement.mean():.3f}",
            *(f"{view.log_loss:.3f}" for view in (scene.one, scene.many)),
            *(f"{view.calibration_error:.3f}" for view in (scene.one, scene.many)),
        )
        for scene in study.scenes
    ]


def detection_rows(study: Study) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return the headings and the cells of the table of AUROCs."""
    groups = {c.name: study.of(c) for c in CORRUPTIONS} | {"all": study.scenes}
    found = {name: detection(scenes) for name, scenes in groups.items()}
    headings = ("AUROC of errors", *found["all"])
    return headings, [(n, *(f"{v:.3f}" for v in scores.values())) for n, scores in found.items()]


def conclusions(study: Study) -> list[str]:
    """Return sentences that compare many passes with one, and the scores with each other."""
    clean, corrupted = study.scenes[0], [scene for scene in study.scenes if scene.strength]
    calibrated = sum(s.many.calibration_error < s.one.calibration_error for s in corrupted)
    likelier = sum(s.many.log_loss < s.one.log_loss for s in corrupted)
    lines = [
        "On clean images the calibration error is "
        f"{clean.one.calibration_error:.3f} with dropout off and "
        f"{clean.many.calibration_error:.3f} with MC. On corrupted images, MC is better calibrated "
        f"in {calibrated} of {len(corrupted)} cases, and has the lower log loss in {likelier}."
    ]
    headings, rows = detection_rows(study)
    best = {name: headings[1 + int(np.argmax(list(map(float, cells))))] for name, *cells in rows}
    winners = "; ".join(f"{name}, {score}" for name, score in best.items())
    lines.append(f"The best score for the detection of errors: {winners}.")
    for corruption in CORRUPTIONS:
        entropies = [scene.many.entropy.mean() for scene in study.of(corruption)]
        peak = int(np.argmax(entropies))
        if peak < len(entropies) - 1:
            lines.append(
                f"Under {corruption.name} the entropy rises to {entropies[peak]:.2f} at "
                f"{corruption.strengths[peak]:g} ({corruption.unit}) and falls to "
                f"{entropies[-1]:.2f} at {corruption.strengths[-1]:g}: all passes may agree on an "
                "image that is far from every digit."
            )
    return lines


def tables(study: Study) -> list[tuple[tuple[str, ...], list[tuple[str, ...]]]]:
    """Return both tables, as headings and rows of cells."""
    return [(SCENES, scene_rows(study)), detection_rows(study)]


def terminal_tables(study: Study) -> list[Table]:
    """Return the tables for rich."""
    from rich import box
    from rich.table import Table

    made = []
    for headings, rows in tables(study):
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
        for place, heading in enumerate(headings):
            # A line for each word, since the table of scenes is wide.
            words = "\n".join(heading.split())
            table.add_column(words, justify="right" if place else "left", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        made.append(table)
    return made


def sentences(study: Study) -> list[str]:
    """Return an explanation of the columns, and the conclusions."""
    settings, images = study.settings, len(study.scenes[0].pixels)
    about = EXPLANATION.format(samples=settings.samples, rate=settings.rate, images=images)
    return [about, *conclusions(study)]


def save(folder: Path, study: Study) -> None:
    """Write the tables as Markdown and the figures as JSON, atomically.

    Raises:
        OSError: A file cannot be written.
    """
    blocks = []
    for headings, rows in tables(study):
        marks = ["---", *["---:"] * (len(headings) - 1)]
        blocks.append("\n".join(f"| {' | '.join(row)} |" for row in (headings, marks, *rows)))
    write_atomically(folder / TABLE_FILE, "\n\n".join([*blocks, *sentences(study)]) + "\n")
    content = {"settings": asdict(study.settings), "scenes": [_as_json(s) for s in study.scenes]}
    write_atomically(folder / RESULTS_FILE, json.dumps(content, indent=1) + "\n")


def _as_json(scene: Scene) -> dict[str, Any]:
    views = {
        name: {
            "accuracy": float(view.right.mean()),
            "confidence": float(view.confidence.mean()),
            "entropy": float(view.entropy.mean()),
            "log_loss": view.log_loss,
            "calibration_error": view.calibration_error,
        }
        for name, view in (("one_pass", scene.one), ("mc", scene.many))
    }
    about = {"corruption": scene.corruption.name, "strength": float(scene.strength)}
    return about | views | {"mutual_information": float(scene.disagreement.mean())}
