"""The settings of a call, and their defaults."""

from __future__ import annotations

from dataclasses import dataclass

CLASSES = 10
PIXELS = 64
# The validation set consists of the images after the largest training set, so that it is the same
# for every --train-size.
LARGEST_TRAIN_SIZE = 1000
HIDDEN_LAYERS = 3
FRAMEWORKS = ("jax", "torch")
FRAMEWORK_LABELS = {"jax": "JAX", "torch": "PyTorch"}
EVALUATIONS = 100


@dataclass(frozen=True)
class OptimizerDefaults:
    """The defaults of an optimizer.

    Attributes:
        learning_rate: The learning rate.
        weight_decay: The `weight_decay` of the optimizer.
        coupled: Whether decay is added to the gradient, as that of a loss term.
    """

    learning_rate: float
    weight_decay: float
    coupled: bool


# AdamW shrinks weights by learning_rate * weight_decay per step, independent of the gradient.
# Coupled Adam divides the decay by the size of the gradient, which needs smaller coefficients.
OPTIMIZERS = {
    "sgd": OptimizerDefaults(learning_rate=0.03, weight_decay=0.004, coupled=True),
    "adam": OptimizerDefaults(learning_rate=2e-3, weight_decay=0.003, coupled=True),
    "adamw": OptimizerDefaults(learning_rate=1e-3, weight_decay=1.0, coupled=False),
}


@dataclass(frozen=True)
class Settings:
    """The settings of all runs of a call.

    Attributes:
        steps: The number of optimizer steps of each run.
        seed: The seed of images, initial weights, batches and dropout masks.
        rate: The probability that dropout zeroes an element.
        weight_decay: The weight decay of the optimizer; the loss term has half this coefficient.
        learning_rate: The learning rate of the optimizer.
        optimizer: A key of `OPTIMIZERS`.
        train_size: The number of training images.
        batch_size: The number of images per step.
        width: The number of units of each hidden layer.
    """

    steps: int = 1000
    seed: int = 0
    rate: float = 0.3
    weight_decay: float = OPTIMIZERS["adam"].weight_decay
    learning_rate: float = OPTIMIZERS["adam"].learning_rate
    optimizer: str = "adam"
    train_size: int = 100
    batch_size: int = 25
    width: int = 128

    @property
    def coupled(self) -> bool:
        """Return whether weight decay is equivalent to a loss term with half the coefficient."""
        return OPTIMIZERS[self.optimizer].coupled

    @property
    def steps_between_evaluations(self) -> int:
        """Return the number of steps between two evaluations, at least 1."""
        return max(1, self.steps // EVALUATIONS)
