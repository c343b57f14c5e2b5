"""The settings of a call, and their defaults."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """The settings of a call.

    Attributes:
        steps: The number of optimizer steps.
        samples: The number of stochastic forward passes of each prediction.
        rate: The probability that dropout zeroes a hidden unit, in training and in prediction.
        width: The number of units of each hidden layer.
        train_size: The number of training images.
        seed: The seed of images, initial weights, batches, masks and corruptions.
    """

    steps: int = 1000
    samples: int = 100
    rate: float = 0.5
    width: int = 256
    train_size: int = 1000
    seed: int = 0
