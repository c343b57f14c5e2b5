"""What a run leaves behind, and the figures that the table takes from it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from examples.overfit.recipes import Recipe


@dataclass
class Curve:
    """One run in one framework, evaluated before the first step, now and then, and at the end.

    Both losses are means over a whole set, with dropout off and without the penalty: only so can
    they be compared.

    Attributes:
        recipe: What was run.
        framework: "jax" or "torch".
        steps: How many optimizer steps came before each evaluation.
        train_loss: Mean cross-entropy over the training set, in nats.
        train_accuracy: The part of the training set that is classified correctly.
        validation_loss: Mean cross-entropy over the validation set, in nats.
        validation_accuracy: The part of the validation set that is classified correctly.
        seconds: Wall time of the run, compilation and evaluations included.
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
        """Adds one evaluation: loss and accuracy over each set."""
        self.steps.append(step)
        self.train_loss.append(train[0])
        self.train_accuracy.append(train[1])
        self.validation_loss.append(validation[0])
        self.validation_accuracy.append(validation[1])

    @property
    def best(self) -> int:
        """Which evaluation has the lowest validation loss; the first one if all are NaN."""
        loss = np.asarray(self.validation_loss)
        return int(np.argmin(np.where(np.isnan(loss), np.inf, loss)))

    @property
    def gap(self) -> float:
        """Validation loss minus training loss after the last step, in nats."""
        return self.validation_loss[-1] - self.train_loss[-1]

    @property
    def diverged(self) -> bool:
        """Whether the run ended in something else than a finite loss."""
        return not np.isfinite(self.train_loss[-1] + self.validation_loss[-1])


def largest_difference(one: list[float], other: list[float]) -> float:
    """The largest distance between two curves at any evaluation; NaN where either has one."""
    return float(np.max(np.abs(np.subtract(one, other))))
