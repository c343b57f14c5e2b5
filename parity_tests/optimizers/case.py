"""The case of a comparison of optimizers, and code that the NumPy recursions share."""

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
    """An optimizer with its options, and how closely the frameworks must agree.

    Attributes:
        name: The name in reports.
        optimizer: The class in `torch.optim`; in lower case, the function in `regjax.optim` and the
            recursion in `parity_tests.optimizers`.
        options: Its arguments under torch's names, including `lr`.
        half_life: The number of steps in which the learning rate halves; None keeps it constant.
        mask: Returns whether a parameter of a given name decays; None for all.
        penalty: The coefficient of the L2 penalty in the loss, under the same mask.
        float64: The bound on the deviation in norm at every step.
        float32: The same in float32 over 1,000 steps; None requires equal bits.
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
    """Return whether the parameter is not a bias, a common mask."""
    return not name.endswith("bias")


def decays(mask: Callable[[str], bool] | None, name: str) -> bool:
    """Return whether a parameter decays; without a mask every parameter does."""
    return mask is None or mask(name)


def at(rate: Rate, step: int) -> float:
    """Return a rate, or the value of its schedule at a step."""
    return rate(step) if callable(rate) else rate
