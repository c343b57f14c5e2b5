"""The runs of a call, one after the other; finished runs survive an interruption."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Protocol

from examples.overfit.data import load_problem
from examples.overfit.recipes import recipes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from examples.overfit.curves import Curve
    from examples.overfit.data import Problem
    from examples.overfit.recipes import Recipe
    from examples.overfit.settings import Settings


class Train(Protocol):
    """The type of `train_jax.train` and `train_torch.train`."""

    def __call__(
        self,
        problem: Problem,
        recipe: Recipe,
        settings: Settings,
        on_evaluation: Callable[[int], None],
    ) -> Curve:
        """Train a network with a recipe."""
        ...


def run_all(
    settings: Settings,
    frameworks: Sequence[str],
    *,
    on_evaluation: Callable[[Recipe, str, int], None],
    on_finished: Callable[[Curve], None],
) -> None:
    """Run every recipe in every framework.

    Each recipe runs in all frameworks before the next, so that an interrupted call leaves
    comparable pairs.

    Args:
        settings: The settings of all runs.
        frameworks: "jax", "torch" or both; only these are imported.
        on_evaluation: Called with the recipe, the framework and the number of completed steps.
        on_finished: Called with each finished curve.
    """
    trains = {framework: load_train(framework) for framework in frameworks}
    problem = load_problem(settings)
    for recipe in recipes(settings.weight_decay, settings.rate):
        for framework, train in trains.items():
            on_finished(
                train(
                    problem,
                    recipe,
                    settings,
                    lambda step, at=(recipe, framework): on_evaluation(*at, step),
                )
            )


def load_train(framework: str) -> Train:
    """Import `train` of a framework, and thereby the framework."""
    return import_module(f"examples.overfit.train_{framework}").train
