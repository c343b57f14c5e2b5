"""What a comparison of optimizers trains with, and what their NumPy recursions share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

Leaves = Mapping[str, np.ndarray]
Gradient = Callable[[Leaves, int], Leaves]
Rate = float | Callable[[int], float]


@dataclass(frozen=True)
class Case:
    """What to train with, and how exactly the frameworks then agree.

    Attributes:
        name: For the test report.
        optimizer: The class in `torch.optim`; in lower case, the function in `regjax.optim` and the
            recursion in `parity_tests.optimizers`.
        options: Its arguments under torch's names, `lr` among them.
        half_life: Steps in which the learning rate halves; None keeps it.
        mask: From a parameter's name to whether it decays; None for all.
        penalty: Coefficient of the L2 penalty in the loss, under the same mask.
        float64: Bound on the deviation in norm at every step.
        float32: The same in float32 over 1,000 steps; None asks for the same bits.
    """

    name: str
    optimizer: str
    options: Mapping[str, Any]
    half_life: int | None = None
    mask: Callable[[str], bool] | None = None
    penalty: float = 0.0
    float64: float = 1e-12
    float32: float | None = 1e-6

    def __str__(self) -> str:
        return self.name


def no_bias(name: str) -> bool:
    """The mask that most recipes ask for."""
    return not name.endswith("bias")


def decays(mask: Callable[[str], bool] | None, name: str) -> bool:
    """Whether a parameter decays; without a mask each does."""
    return mask is None or mask(name)


def at(rate: Rate, step: int) -> float:
    """A rate, or what its schedule says at a step."""
    return rate(step) if callable(rate) else rate
