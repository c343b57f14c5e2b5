"""Plots of overfitting, of its remedies, and of functions with small and large coefficients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from examples.overfit.settings import FRAMEWORK_LABELS
from parity_tests import pictures

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

    from examples.overfit.curves import Curve
    from examples.overfit.recipes import Recipe
    from examples.overfit.settings import Settings

OVERFITTING, CURES, PARABOLAS = PICTURES = ("overfitting.png", "cures.png", "parabolas.png")
COEFFICIENTS = (1, 2, 5, 10, 50)

_LOSS = "cross-entropy (nats)"


def save_pictures(folder: Path, curves: Sequence[Curve], settings: Settings) -> None:
    """Draw and save the pictures of the finished runs.

    Args:
        folder: The folder; files are replaced atomically.
        curves: The curves, at least one.
        settings: The settings of the runs.

    Raises:
        OSError: A file cannot be written.
    """
    plain = [curve for curve in curves if curve.recipe.name == "none"]
    if plain:
        pictures.save(draw_overfitting(plain, settings), folder / OVERFITTING)
    pictures.save(draw_cures(curves), folder / CURES)
    pictures.save(draw_parabolas(), folder / PARABOLAS)


@pictures.styled
def draw_overfitting(curves: Sequence[Curve], settings: Settings) -> Figure:
    """Draw the run without regularization, whose validation loss falls and then rises."""
    figure = Figure(figsize=(pictures.WIDTH, 4.8))
    ax = figure.subplots()
    _draw_run(ax, curves)
    first = curves[0]
    if not first.diverged:
        _mark_lowest(ax, first)
        _mark_gap(ax, first)
    ax.set(xlabel="optimizer step", ylabel=_LOSS)
    _set_loss_axis(ax, _top(curves))
    ax.set_title(f"Overfitting: {settings.train_size} training images, no regularization")
    pictures.legend_on_top(figure, _legend(curves))
    return figure


@pictures.styled
def draw_cures(curves: Sequence[Curve]) -> Figure:
    """Draw a panel for each run, and one with the lowest and last loss of all runs."""
    figure = Figure(figsize=(pictures.WIDTH, 6))
    panels = figure.subplots(2, 3)
    groups = _by_recipe(curves)
    plain = groups.get("none", [])
    reference = {"color": pictures.palette().gray, "linewidth": 1.2}
    for panel, (name, group) in zip(panels.flat, groups.items(), strict=False):
        if name != "none" and plain:
            panel.plot(plain[0].steps, plain[0].validation_loss, **reference)
        _draw_run(panel, group)
        panel.set_title(group[0].recipe.label, fontsize="medium")
        amounts = _amounts(group[0].recipe)
        panel.text(
            0.98, 0.98, amounts, transform=panel.transAxes, ha="right", va="top", fontsize="small"
        )
        panel.set_xlabel("optimizer step", fontsize="small")
        _set_loss_axis(panel, _top(curves))
    for panel in panels.flat[len(groups) : -1]:
        panel.set_axis_off()
    for row in panels:
        row[0].set_ylabel(_LOSS, fontsize="small")
    for panel in panels[:, 1:].flat:  # all panels of losses have the same axes
        panel.tick_params(labelleft=False)
    _draw_summary(panels[-1, -1], groups)
    for panel in panels.flat:
        panel.tick_params(labelsize="small")
    handles = _legend(curves)
    if plain and len(groups) > 1:
        label = f"validation, {plain[0].recipe.label}"
        handles.append(Line2D([], [], **reference, label=label))
    pictures.legend_on_top(figure, handles, columns=3)
    return figure


def _by_recipe(curves: Sequence[Curve]) -> dict[str, list[Curve]]:
    groups: dict[str, list[Curve]] = {}
    for curve in curves:
        groups.setdefault(curve.recipe.name, []).append(curve)
    return groups


def _amounts(recipe: Recipe) -> str:
    amounts = {
        "coefficient": recipe.penalty,
        "rate": recipe.rate,
        "decay": recipe.weight_decay,
    }
    return ", ".join(f"{name} {value:g}" for name, value in amounts.items() if value)


def _draw_run(ax: Axes, curves: Sequence[Curve]) -> None:
    """Draw JAX as lines and PyTorch as rings, which lie on the lines where both agree."""
    palette = pictures.palette()
    for curve in curves:
        for losses, color in (
            (curve.train_loss, palette.blue),
            (curve.validation_loss, palette.vermilion),
        ):
            ax.plot(curve.steps, losses, **_look(curve.framework, color, len(curve.steps)))
    ax.set_xlim(0, curves[0].steps[-1])


def _look(framework: str, color: str, points: int) -> dict[str, Any]:
    if framework == "jax":
        return {"color": color, "linewidth": 2}
    return {
        "color": color,
        "linestyle": "none",
        "marker": "o",
        "markersize": 6,
        "markerfacecolor": pictures.palette().paper,
        "markeredgewidth": 1.3,
        "markevery": max(1, points // 12),
    }


def _legend(curves: Sequence[Curve]) -> list[Line2D]:
    palette = pictures.palette()
    return [
        Line2D([], [], **_look(framework, color, 1), label=f"{name}, {FRAMEWORK_LABELS[framework]}")
        for name, color in (("validation", palette.vermilion), ("training", palette.blue))
        for framework in FRAMEWORK_LABELS
        if any(curve.framework == framework for curve in curves)
    ]


def _top(curves: Sequence[Curve]) -> float:
    """Return the upper limit of the loss axis, which may be below the loss at step 0."""
    highest = [
        np.nanmax(np.where(np.isfinite(tail), tail, np.nan))
        for curve in curves
        if np.isfinite(tail := np.asarray(curve.validation_loss[curve.best :])).any()
    ]
    return 1.25 * max(highest, default=1.0)


def _set_loss_axis(ax: Axes, top: float) -> None:
    # Start below zero, so that rings at a loss of zero are not clipped.
    ax.set_ylim(-0.025 * top, top)


def _mark_lowest(ax: Axes, curve: Curve) -> None:
    step, loss = curve.steps[curve.best], curve.validation_loss[curve.best]
    color, edge = pictures.palette().vermilion, pictures.palette().paper
    ax.plot(step, loss, "o", color=color, markersize=9, markeredgecolor=edge, zorder=5)
    right = step < 0.6 * curve.steps[-1]
    ax.annotate(
        f"lowest: {loss:.2f} at step {step}",
        (step, loss),
        xytext=(10 if right else -10, -24),
        textcoords="offset points",
        ha="left" if right else "right",
        color=color,
    )


def _mark_gap(ax: Axes, curve: Curve) -> None:
    step, low, high = curve.steps[-1], curve.train_loss[-1], curve.validation_loss[-1]
    ax.annotate(
        "",
        (0.985 * step, high),
        xytext=(0.985 * step, low),
        arrowprops={
            "arrowstyle": "<->",
            "color": pictures.palette().ink,
            "shrinkA": 5,
            "shrinkB": 5,
        },
    )
    ax.text(
        0.97 * step,
        (low + high) / 2,
        f"gap at the end: {curve.gap:.2f}\n"
        f"accuracy: {curve.train_accuracy[-1]:.1%} in training, "
        f"{curve.validation_accuracy[-1]:.1%} in validation",
        ha="right",
        va="center",
    )


def _draw_summary(ax: Axes, groups: dict[str, list[Curve]]) -> None:
    """Draw the lowest validation loss of each run as a bar, and the last as a dot."""
    color = pictures.palette().vermilion
    for row, group in enumerate(groups.values()):
        curve = group[0]
        low, last = curve.validation_loss[curve.best], curve.validation_loss[-1]
        # Labels are above the lines instead of the axis, so that all panels have the same width.
        text = f"{curve.recipe.label}: {low:.2f} → {last:.2f}"
        ax.text(0, row - 0.3, text, transform=ax.get_yaxis_transform(), fontsize="x-small")
        ax.plot([low, last], [row, row], color=color)
        ax.plot(low, row, "|", color=color, markersize=9, markeredgewidth=2, clip_on=False)
        ax.plot(last, row, "o", color=color, clip_on=False)
    ax.set_yticks([])
    ax.spines["left"].set_visible(False)
    ax.set_ylim(len(groups) - 0.6, -0.9)
    ax.set_xlim(0, _top([group[0] for group in groups.values()]))
    ax.set_xlabel("validation loss (nats)", fontsize="small")
    ax.set_title("lowest → last loss", fontsize="medium")


@pictures.styled
def draw_parabolas() -> Figure:
    """Draw y = a x^2, which is steeper for larger coefficients."""
    figure = Figure(figsize=(pictures.WIDTH, 4.8))
    ax = figure.subplots()
    height, reach = 10.0, 2.0
    colors = mpl.colormaps["viridis"](np.linspace(0.75, 0.0, len(COEFFICIENTS)))
    for a, color in zip(COEFFICIENTS, colors, strict=True):
        edge = min(reach, (height / a) ** 0.5)
        x = np.linspace(-edge, edge, 401)
        ax.plot(x, a * x**2, color=color, linewidth=2.2)
        ax.annotate(
            f"a = {a}",
            (edge, a * edge**2),
            xytext=(0, 4) if edge < reach else (5, 0),
            textcoords="offset points",
            ha="center" if edge < reach else "left",
            va="bottom" if edge < reach else "center",
            fontweight="bold",
        )
    ax.set(xlabel="x", ylabel="y = a·x²", xlim=(-reach, reach), ylim=(0, height))
    ax.set_title("Small coefficients make a smooth function: y = a·x²", pad=24)
    return figure
