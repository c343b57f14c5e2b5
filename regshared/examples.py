"""Checks of masks by example: both packages draw them, and reject the same calls."""

from __future__ import annotations

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


def check_attention_axis(axis: int, ndim: int) -> None:
    """Reject examples along another than the first `ndim` dimensions of attention."""
    if not 0 <= axis < ndim:
        raise ValueError(
            f"axis must be one of the {ndim} batch dimensions of query; got {axis} in by_example. "
            "Pass a single example for a query without batch dimensions."
        )
