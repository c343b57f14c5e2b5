"""The five runs, as data: the regularization of each."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """One run.

    Attributes:
        name: Its name in files.
        label: Its name in tables and pictures.
        penalty: The coefficient of `l2_penalty` in the loss.
        weight_decay: The `weight_decay` of the optimizer.
        rate: The probability that dropout zeroes an element.
    """

    name: str
    label: str
    penalty: float = 0.0
    weight_decay: float = 0.0
    rate: float = 0.0


def recipes(weight_decay: float, rate: float) -> tuple[Recipe, ...]:
    """Return the five runs.

    The penalty is one half of the weight decay: the gradient of `penalty * w**2` is
    `2 * penalty * w`, while an optimizer adds `weight_decay * w`. Both runs are therefore the same
    for SGD and Adam.

    Args:
        weight_decay: The decay of the runs with decay.
        rate: The rate of the runs with dropout.
    """
    return (
        Recipe("none", "no regularization"),
        Recipe("l2_in_loss", "L2 in the loss", penalty=weight_decay / 2),
        Recipe("weight_decay", "weight decay", weight_decay=weight_decay),
        Recipe("dropout", "dropout", rate=rate),
        Recipe("dropout_decay", "dropout + decay", weight_decay=weight_decay, rate=rate),
    )
