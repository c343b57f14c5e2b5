"""Checks of masks by example: both packages draw them, and reject the same calls."""

from __future__ import annotations

import math
from collections.abc import Sequence


def check_rows(axis: int, count: int, shape: Sequence[int], shared: Sequence[int]) -> None:
    """Raise a ValueError if there is not one example for each row of x along a dimension.

    Args:
        axis: The dimension of the examples, which may be negative.
        count: The number of examples.
        shape: The shape of x.
        shared: The dimensions along which x shares one mask.
    """
    if not -len(shape) <= axis < len(shape):
        raise ValueError(
            f"axis must be a dimension of x, which has {len(shape)}; got {axis} in by_example."
        )
    axis %= len(shape)
    if axis in shared:
        raise ValueError(
            "sampler must not be by_example where the examples share one mask; got a mask shared "
            f"along dimension {axis}, that of the examples. Omit the sampler: such a mask does not "
            "depend on the examples."
        )
    if shape[axis] != count:
        raise ValueError(
            f"examples must have one number for each of the {shape[axis]} rows of x along "
            f"dimension {axis}; got {count}."
        )


def check_reach(highest: int, shape: Sequence[int], dims: Sequence[int], bits: int) -> None:
    """Raise a ValueError if the masks of two examples may be the same, since their indices wrap.

    Args:
        highest: The highest example.
        shape: The shape of x.
        dims: The dimensions of x along which one example has a mask of one length: those that are
            shared, and that of the examples.
        bits: The number of bits of an index.
    """
    skipped = {dim % len(shape) for dim in dims}
    size = math.prod(length for dim, length in enumerate(shape) if dim not in skipped)
    if highest * size >= 2**bits:
        raise ValueError(
            f"examples must be below 2**{bits} / {size}, for {size} elements of one example; got "
            f"{highest}. Count them from the start of the data, or pass a hash of fewer bits."
        )


def check_attention_axis(axis: int, ndim: int) -> None:
    """Reject examples along another than the first `ndim` dimensions of attention."""
    if not 0 <= axis < ndim:
        raise ValueError(
            f"axis must be one of the {ndim} batch dimensions of query; got {axis} in by_example. "
            "Pass a single example for a query without batch dimensions."
        )
