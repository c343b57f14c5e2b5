"""The picture: increasingly corrupted digits, and the predictions of the network."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from examples.uncertainty.corruptions import CORRUPTIONS, SIDE
from parity_tests.output import replacing

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes

    from examples.uncertainty.study import Scene, Study

PICTURE = "uncertainty.png"

# The palette of Okabe and Ito, which is safe for color blindness.
_BLUE, _RED, _GREEN, _INK, _GREY = "#0072B2", "#D55E00", "#009E73", "#333333", "#999999"
_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _GREY,
    "axes.labelcolor": _INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "lines.linewidth": 2,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
    "savefig.dpi": 130,
}


def save_picture(folder: Path, study: Study) -> None:
    """Draw the study, and save the picture atomically.

    Raises:
        OSError: The file cannot be written.
    """
    with mpl.rc_context(_STYLE), replacing(folder / PICTURE) as temporary:
        draw(study).savefig(temporary, format="png")


def draw(study: Study) -> Figure:
    """Draw a row for each corruption: a digit at every strength, entropy, and accuracy."""
    figure = Figure(figsize=(15, 10), layout="constrained")
    halves: Any = figure.subfigures(1, 2, width_ratios=(1.15, 1))
    left, right = halves
    columns = len(CORRUPTIONS[0].strengths)
    images = left.subplots(len(CORRUPTIONS), columns)
    curves = right.subplots(len(CORRUPTIONS), 2)
    shown = _typical_image(study)
    for row, corruption in enumerate(CORRUPTIONS):
        scenes = study.of(corruption)
        for ax, scene in zip(images[row], scenes, strict=True):
            _draw_image(ax, scene, shown)
        images[row, 0].set_ylabel(corruption.name, fontweight="bold")
        _draw_entropy(curves[row, 0], scenes)
        _draw_accuracy(curves[row, 1], scenes)
    left.suptitle(
        "An increasingly corrupted digit: the prediction of the mean of many passes,\n"
        "and its entropy in nats (bar; the dark part is mutual information)"
    )
    count = len(study.scenes[0].pixels)
    right.suptitle(f"Means over {count} digits. MC: many passes, dropout on. Off: one pass.")
    curves[0, 0].legend(loc="upper right", fontsize=8)
    curves[-1, 1].legend(loc="lower left", fontsize=8)
    return figure


def _typical_image(study: Study) -> int:
    """Return the image whose entropies have the least squared distance from the mean."""
    entropies = np.stack([scene.many.entropy for scene in study.scenes])
    distance = np.square(entropies - entropies.mean(1, keepdims=True)).sum(0)
    sure = np.all([s.many.right for s in study.scenes if not s.strength], axis=0)
    return int(np.where(sure, distance, np.inf).argmin())


def _draw_image(ax: Axes, scene: Scene, place: int) -> None:
    ax.imshow(scene.pixels[place].reshape(SIDE, SIDE), cmap="gray_r", vmin=0, vmax=1)
    ax.set(xticks=[], yticks=[])
    ax.grid(visible=False)
    probs = scene.many.probs[place]
    right = bool(scene.many.right[place])
    for spine in ax.spines.values():
        spine.set(visible=True, color=_GREEN if right else _RED, linewidth=2)
    ax.set_title(f"{probs.argmax()}  ({probs.max():.0%})", loc="center", fontsize=10)
    entropy, disagreement = scene.many.entropy[place], scene.disagreement[place]
    # A bar below the image, as long as the entropy is of the largest possible.
    bar: dict[str, Any] = {"transform": ax.transAxes, "clip_on": False, "solid_capstyle": "butt"}
    for value, color in ((entropy, "#9ecae1"), (disagreement, _BLUE)):
        ax.plot([0, value / np.log(10)], [-0.07, -0.07], color=color, linewidth=5, **bar)
    ax.set_xlabel(f"{scene.strength:g}:  {entropy:.2f}", labelpad=8, fontsize=9)


def _draw_entropy(ax: Axes, scenes: list[Scene]) -> None:
    strengths = [scene.strength for scene in scenes]
    entropies, disagreements = (
        [values.mean() for values in column]
        for column in zip(*((s.many.entropy, s.disagreement) for s in scenes), strict=True)
    )
    ax.plot(strengths, entropies, "o-", color=_BLUE, label="entropy, MC")
    ax.plot(strengths, disagreements, "o:", color=_BLUE, ms=4, label="mutual information, MC")
    ax.plot(strengths, [s.one.entropy.mean() for s in scenes], color=_GREY, label="entropy, off")
    ax.set(xlabel=_axis(scenes), ylabel="nats", ylim=(0, 1.25))


def _draw_accuracy(ax: Axes, scenes: list[Scene]) -> None:
    strengths = [scene.strength for scene in scenes]
    ax.plot(strengths, [s.many.right.mean() for s in scenes], "o-", color=_INK, label="accuracy")
    for label, color, views in (
        ("confidence, MC", _BLUE, [s.many for s in scenes]),
        ("confidence, off", _GREY, [s.one for s in scenes]),
    ):
        ax.plot(strengths, [v.confidence.mean() for v in views], "--", color=color, label=label)
    ax.set(xlabel=_axis(scenes), ylim=(0, 1.05))


def _axis(scenes: list[Scene]) -> str:
    return f"{scenes[0].corruption.name}: {scenes[0].corruption.unit}"
