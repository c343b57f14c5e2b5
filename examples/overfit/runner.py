"""All runs of one call, one after the other; what has finished is kept, whatever happens next."""

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
    """What `train_jax.train` and `train_torch.train` have in common."""

    def __call__(
        self,
        problem: Problem,
        recipe: Recipe,
        settings: Settings,
        on_evaluation: Callable[[int], None],
    ) -> Curve:
        """Trains one network by one recipe."""
        ...


def run_all(
    settings: Settings,
    frameworks: Sequence[str],
    *,
    on_evaluation: Callable[[Recipe, str, int], None],
    on_finished: Callable[[Curve], None],
) -> None:
    """Runs every recipe in every framework.

    The frameworks take turns, so that an interrupted call leaves pairs to compare.

    Args:
        settings: What the runs share.
        frameworks: "jax", "torch" or both; no other is imported.
        on_evaluation: Told the recipe, the framework and the steps done, at each evaluation.
        on_finished: Given each curve as soon as it is there.
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
    """Imports one framework's `train`, and with it that framework."""
    return import_module(f"examples.overfit.train_{framework}").train
