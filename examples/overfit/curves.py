"""The losses and accuracies of a run, and the figures of the table."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from examples.overfit.recipes import Recipe


@dataclass
class Curve:
    """One run in one framework, with evaluations from before the first step to after the last.

    Both losses are means over a whole set, with dropout off and without the penalty, so that they
    are comparable.

    Attributes:
        recipe: The recipe of the run.
        framework: "jax" or "torch".
        steps: The number of optimizer steps before each evaluation.
        train_loss: Mean cross-entropy over the training set, in nats.
        train_accuracy: The fraction of the training set that is classified correctly.
        validation_loss: Mean cross-entropy over the validation set, in nats.
        validation_accuracy: The fraction of the validation set that is classified correctly.
        seconds: Wall time of the run, including compilation and evaluations.
    """

    recipe: Recipe
    framework: str
    steps: list[int] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)
    train_accuracy: list[float] = field(default_factory=list)
    validation_loss: list[float] = field(default_factory=list)
    validation_accuracy: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def record(
        self, step: int, *, train: tuple[float, float], validation: tuple[float, float]
    ) -> None:
        """Add one evaluation: loss and accuracy over each set."""
        self.steps.append(step)
        self.train_loss.append(train[0])
        self.train_accuracy.append(train[1])
        self.validation_loss.append(validation[0])
        self.validation_accuracy.append(validation[1])

    @property
    def best(self) -> int:
        """Return the index of the lowest validation loss; 0 if all are NaN."""
        loss = np.asarray(self.validation_loss)
        return int(np.argmin(np.where(np.isnan(loss), np.inf, loss)))

    @property
    def gap(self) -> float:
        """Return validation loss minus training loss after the last step, in nats."""
        return self.validation_loss[-1] - self.train_loss[-1]

    @property
    def diverged(self) -> bool:
        """Return whether a loss after the last step is not finite."""
        return not np.isfinite(self.train_loss[-1] + self.validation_loss[-1])


def largest_difference(one: list[float], other: list[float]) -> float:
    """Return the largest distance between two curves at any evaluation; NaN if either has a NaN."""
    return float(np.max(np.abs(np.subtract(one, other))))
