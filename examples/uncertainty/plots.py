"""The picture: increasingly corrupted digits, and the predictions of the network."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from examples.uncertainty.corruptions import CORRUPTIONS, SIDE
from parity_tests import pictures

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes

    from examples.uncertainty.study import Scene, Study

PICTURE = "uncertainty.png"

# The largest possible entropy, of ten digits with equal probabilities.
_LARGEST = float(np.log(10))


def save_picture(folder: Path, study: Study) -> None:
    """Draw the study, and save the picture atomically.

    Raises:
        OSError: The file cannot be written.
    """
    pictures.save(draw(study), folder / PICTURE)


@pictures.styled
def draw(study: Study) -> Figure:
    """Draw a digit at every strength of each corruption, and below it entropies and accuracies."""
    figure = Figure(figsize=(pictures.WIDTH, 10.5))
    halves: Any = figure.subfigures(2, 1, height_ratios=(1.55, 1))
    digits, means = halves
    columns = len(CORRUPTIONS[0].strengths)
    images: Any = digits.subplots(len(CORRUPTIONS), columns)
    curves: Any = means.subplots(2, len(CORRUPTIONS), sharex="col", sharey="row")
    shown = _typical_image(study)
    for row, line, corruption in zip(images, curves.T, CORRUPTIONS, strict=True):
        scenes = study.of(corruption)
        for ax, scene in zip(row, scenes, strict=True):
            _draw_image(ax, scene, shown)
        row[0].set_ylabel(f"{corruption.name}\n{corruption.unit}", fontsize="small")
        _draw_entropy(line[0], scenes)
        _draw_accuracy(line[1], scenes)
        line[0].set_title(corruption.name, fontsize="medium")
        line[1].set_xlabel(corruption.unit, fontsize="small")
    for ax in curves.flat:
        ax.tick_params(labelsize="small")
    curves[0, 0].set_ylabel("mean, in nats", fontsize="small")
    curves[1, 0].set_ylabel("mean over images", fontsize="small")
    pictures.legend_on_top(digits, _image_legend())
    handles = [*curves[0, 0].lines, *curves[1, 0].lines]
    pictures.legend_on_top(means, handles, columns=2)
    settings = study.settings
    pictures.caption(
        figure,
        f"Above: a test image, the prediction with its probability, and its entropy. Below: means "
        f"over {len(study.scenes[0].pixels)} test images. MC: the mean of {settings.samples} "
        f"passes with dropout on, rate {settings.rate:g}, as for the images; off: one pass with "
        "dropout off.",
    )
    return figure


def _image_legend() -> list[Any]:
    palette = pictures.palette()
    frames = [
        Patch(fill=False, edgecolor=palette.green, linestyle="-", linewidth=2, label="correct"),
        Patch(
            fill=False, edgecolor=palette.vermilion, linestyle="--", linewidth=2, label="incorrect"
        ),
    ]
    return [
        *frames,
        Patch(
            facecolor=pictures.lighter(palette.blue),
            label=f"entropy (full width: {_LARGEST:.2f} nats)",
        ),
        Patch(facecolor=palette.blue, label="mutual information"),
    ]


def _typical_image(study: Study) -> int:
    """Return the image whose entropies have the least squared distance from the mean."""
    entropies = np.stack([scene.many.entropy for scene in study.scenes])
    distance = np.square(entropies - entropies.mean(1, keepdims=True)).sum(0)
    sure = np.all([s.many.right for s in study.scenes if not s.strength], axis=0)
    return int(np.where(sure, distance, np.inf).argmin())


def _draw_image(ax: Axes, scene: Scene, place: int) -> None:
    """Draw an image in the frame of its prediction, with bars and the prediction below."""
    palette = pictures.palette()
    ax.imshow(scene.pixels[place].reshape(SIDE, SIDE), extent=(0, SIDE, SIDE, 0), vmin=0, vmax=1)
    right = bool(scene.many.right[place])
    color, line = (palette.green, "-") if right else (palette.vermilion, "--")
    look: Any = {"clip_on": False, "linewidth": 2}
    ax.add_patch(Rectangle((0, 0), SIDE, SIDE, fill=False, edgecolor=color, linestyle=line, **look))
    entropy, disagreement = scene.many.entropy[place], scene.disagreement[place]
    for value, shade in ((entropy, pictures.lighter(palette.blue)), (disagreement, palette.blue)):
        ax.add_patch(Rectangle((0, SIDE + 0.5), SIDE * value / _LARGEST, 0.6, facecolor=shade))
    probs = scene.many.probs[place]
    text = f"{probs.argmax()} ({probs.max():.0%})\n{entropy:.2f} nats"
    ax.text(SIDE / 2, SIDE + 1.4, text, ha="center", va="top", fontsize="x-small")
    ax.set_title(f"{scene.strength:g}", loc="center", fontsize="small", pad=4)
    ax.set(xticks=[], yticks=[], ylim=(SIDE + 4.2, -0.2), xlim=(-0.2, SIDE + 0.2))
    ax.spines[:].set_visible(False)


def _draw_entropy(ax: Axes, scenes: list[Scene]) -> None:
    palette = pictures.palette()
    strengths = [scene.strength for scene in scenes]
    entropies, disagreements = (
        [values.mean() for values in column]
        for column in zip(*((s.many.entropy, s.disagreement) for s in scenes), strict=True)
    )
    color = palette.blue
    ax.plot(strengths, entropies, "o-", color=color, ms=5, label="entropy, MC")
    ax.plot(strengths, disagreements, "o:", color=color, ms=4, label="mutual information, MC")
    off = [scene.one.entropy.mean() for scene in scenes]
    ax.plot(strengths, off, color=palette.gray, label="entropy, off")
    ax.set_ylim(0, 1.25)


def _draw_accuracy(ax: Axes, scenes: list[Scene]) -> None:
    palette = pictures.palette()
    strengths = [scene.strength for scene in scenes]
    accuracies = [scene.many.right.mean() for scene in scenes]
    ax.plot(strengths, accuracies, "o-", color=palette.ink, ms=5, label="accuracy, MC")
    for label, color, views in (
        ("confidence, MC", palette.blue, [s.many for s in scenes]),
        ("confidence, off", palette.gray, [s.one for s in scenes]),
    ):
        ax.plot(strengths, [v.confidence.mean() for v in views], "--", color=color, label=label)
    ax.set_ylim(0, 1.05)
