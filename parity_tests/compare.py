"""The comparison of two training runs that every parity test uses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    Leaves = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Tier:
    """The required agreement of two runs, and their dtype.

    Attributes:
        dtype: Dtype of parameters and gradients.
        tolerance: The largest difference of two elements that passes; None requires equal bits.
        in_norm: Whether a difference is divided by the largest parameter of its step. An
            elementwise relative error would explode at weights close to zero.
        relative: The bound of the harness for gradients, updates and states, relative to their
            size; None for 100 times the tolerance.
        compute: The dtype of the computation, if it is smaller than `dtype`.
    """

    dtype: str
    tolerance: float | None
    in_norm: bool = False
    relative: float | None = None
    compute: str | None = None

    @property
    def eps(self) -> float:
        """The distance from 1 to the next number of the computation's dtype."""
        return float(ml_dtypes.finfo(self.compute or self.dtype).eps)

    @property
    def stored_eps(self) -> float:
        """The same for the dtype of the parameters."""
        return float(ml_dtypes.finfo(self.dtype).eps)

    @property
    def relative_tolerance(self) -> float:
        """The bound of gradients, updates and states."""
        return 100 * (self.tolerance or 0.0) if self.relative is None else self.relative


BITWISE = Tier("float32", tolerance=None)
FLOAT64 = Tier("float64", tolerance=1e-12, in_norm=True)
FLOAT32 = Tier("float32", tolerance=1e-5)
# Parameters in float32, products in bfloat16. A perceptron and an encoder with dropout, each with
# SGD and AdamW, from 20 seeds, differed in 5 steps by at most 0.0008 in the loss, 0.002 in
# parameters, and 0.04 in gradients, states and updates. Attention, trained by AdamW at a rate of
# 0.01, differed by 0.007 in the loss at step 2, and by 0.12 in a gradient at step 9.
BFLOAT16 = Tier("float32", tolerance=1e-2, relative=0.1, compute="bfloat16")


def assert_same_at_every_step(
    left: Sequence[Leaves],
    right: Sequence[Leaves],
    tier: Tier,
    *,
    names: tuple[str, str] = ("left", "right"),
) -> float:
    """Assert that two runs have the same parameters after every step.

    Args:
        left: Parameters by name after each step.
        right: The same for the other run.
        tier: How closely they must agree.
        names: Names of the two runs in a message.

    Returns:
        The largest deviation of any step, in the unit of the tier; in the bitwise tier 0.0.

    Raises:
        AssertionError: The runs differ; the message names the first such step (counted from 1) and
            the parameter with the largest deviation there. Runs without steps, or with unequal
            lengths, names, shapes or dtypes, differ too, and so do NaNs in the two tiers with a
            tolerance.

    Example:
        >>> import numpy as np
        >>> runs = [{"w": np.array([1.0, 2.0])}], [{"w": np.array([1.0, 2.5])}]
        >>> assert_same_at_every_step(*runs, FLOAT64)
        Traceback (most recent call last):
        AssertionError: left and right diverge at step 1 in 'w': deviation 2.000e-01 exceeds 1e-12
    """
    first, second = names
    if not len(left) == len(right) > 0:
        raise AssertionError(
            f"{first} has {len(left)} steps and {second} has {len(right)}: nothing to compare"
        )
    worst = 0.0
    for step, (one, other) in enumerate(zip(left, right, strict=True), start=1):
        _assert_same_form(one, other, f"{first} and {second} at step {step}")
        apart = deviations(one, other, tier)
        name = furthest(apart)
        limit = tier.tolerance or 0.0
        # `not <=` instead of `>`, so that NaN fails.
        if not apart[name] <= limit:
            raise AssertionError(
                f"{first} and {second} diverge at step {step} in '{name}': deviation "
                f"{apart[name]:.3e} exceeds {limit:g}"
            )
        worst = max(worst, apart[name])
    return worst


def deviation(left: Sequence[Leaves], right: Sequence[Leaves]) -> float:
    """Return the largest difference of two elements at the last step, over the largest parameter.

    Example:
        >>> import numpy as np
        >>> deviation([{"w": np.array([1.0, 2.0])}], [{"w": np.array([1.0, 2.5])}])
        0.2
    """
    return max(deviations(left[-1], right[-1], FLOAT64).values())


def _assert_same_form(one: Leaves, other: Leaves, where: str) -> None:
    if not one or sorted(one) != sorted(other):
        raise AssertionError(f"{where} have other names, or none: {[*one]}, {[*other]}")
    for name, leaf in one.items():
        forms = [(array.dtype, array.shape) for array in (leaf, other[name])]
        if forms[0] != forms[1]:
            raise AssertionError(f"{where} differ in form in '{name}': {forms[0]}, {forms[1]}")


def deviations(one: Leaves, other: Leaves, tier: Tier) -> dict[str, float]:
    """Return the deviation of each leaf, in the unit of the tier; 1.0 or 0.0 if it is bitwise."""
    if tier.tolerance is None:
        return {name: float(one[name].tobytes() != other[name].tobytes()) for name in one}
    scale = 1.0
    if tier.in_norm:
        largest = (np.abs(leaf).max(initial=0.0) for leaf in other.values())
        scale = max(largest, default=0.0) or 1.0
    return {
        name: float(np.abs(leaf - other[name]).max(initial=0.0) / scale)
        for name, leaf in one.items()
    }


def furthest(apart: Mapping[str, float]) -> str:
    """Return the name of the leaf with the largest deviation, or of the first NaN.

    Example:
        >>> furthest({"a": 1.0, "b": 2.0}), furthest({"a": 1.0, "b": float("nan"), "c": 2.0})
        ('b', 'b')
    """
    # argmax stops at the first NaN, which max would skip.
    return list(apart)[int(np.argmax(list(apart.values())))]
