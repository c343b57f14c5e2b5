"""What a call of the program may choose, and the defaults."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """One call's choices.

    Attributes:
        steps: Optimizer steps of training.
        samples: Stochastic passes of each prediction.
        rate: The probability that dropout zeroes a hidden unit, in training and in prediction.
        width: Units of each hidden layer.
        train_size: How many images are trained on.
        seed: Decides images, initial weights, batches, masks and corruptions.
    """

    steps: int = 1000
    samples: int = 100
    rate: float = 0.5
    width: int = 256
    train_size: int = 1000
    seed: int = 0
