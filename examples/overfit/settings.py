"""What a call of the program may choose, and the defaults."""

from __future__ import annotations

from dataclasses import dataclass

CLASSES = 10
PIXELS = 64
# Validation takes the images that lie beyond the largest training set, so that it is the same for
# every --train-size.
LARGEST_TRAIN_SIZE = 1000
HIDDEN_LAYERS = 3
FRAMEWORKS = ("jax", "torch")
FRAMEWORK_LABELS = {"jax": "JAX", "torch": "PyTorch"}
EVALUATIONS = 100


@dataclass(frozen=True)
class OptimizerDefaults:
    """What suits one optimizer here; the options override it.

    Attributes:
        learning_rate: The step size.
        weight_decay: The decay, in the optimizer's own meaning.
        coupled: Whether decay enters the gradient. Then a loss term can do the same.
    """

    learning_rate: float
    weight_decay: float
    coupled: bool


# AdamW shrinks weights by learning_rate * weight_decay a step, whatever the gradient; coupled Adam
# divides the decay by the size of the gradient first. Hence the other order of magnitude.
OPTIMIZERS = {
    "sgd": OptimizerDefaults(learning_rate=0.03, weight_decay=0.004, coupled=True),
    "adam": OptimizerDefaults(learning_rate=2e-3, weight_decay=0.003, coupled=True),
    "adamw": OptimizerDefaults(learning_rate=1e-3, weight_decay=1.0, coupled=False),
}


@dataclass(frozen=True)
class Settings:
    """One call's choices; every run of the call shares them.

    Attributes:
        steps: Optimizer steps of each run.
        seed: Decides images, initial weights, batches and dropout masks.
        rate: The probability that dropout zeroes an element.
        weight_decay: The optimizer's weight decay; the loss term gets one half of it.
        learning_rate: The optimizer's step size.
        optimizer: A key of `OPTIMIZERS`.
        train_size: How many images are trained on.
        batch_size: How many of them make one step.
        width: Units of each hidden layer.
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
        """Whether the optimizer's weight decay equals a loss term with one half of it."""
        return OPTIMIZERS[self.optimizer].coupled

    @property
    def steps_between_evaluations(self) -> int:
        """How many steps lie between two evaluations; at least one."""
        return max(1, self.steps // EVALUATIONS)
