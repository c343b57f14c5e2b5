"""The order of the elements of a tensor in memory, in which PyTorch fills it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from regshared.checks import check_integers

if TYPE_CHECKING:
    from jaxtyping import Array, Shaped

    MemoryOrder = Sequence[int] | str | None


def check_memory_order(value: MemoryOrder, ndim: int) -> tuple[int, ...]:
    """Return the axes from the outermost to the innermost in memory.

    `value` is a permutation of the axes, `"channels_last"`, or None for row-major.
    """
    if value is None:
        return tuple(range(ndim))
    if isinstance(value, str):
        if value != "channels_last":
            raise ValueError(
                f'memory_order must be "channels_last" or a permutation of axes; got {value!r}.'
            )
        if ndim not in (4, 5):
            raise ValueError(
                "memory_order must be a permutation of axes if the array has not 4 or 5; got "
                f'"channels_last" for {ndim}.'
            )
        return (0, *range(2, ndim), 1)
    order = check_integers("memory_order", value)
    if sorted(order) != list(range(ndim)):
        raise ValueError(
            f"memory_order must be a permutation of the axes {tuple(range(ndim))}; got {order}."
        )
    return order


def is_row_major(order: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Return whether PyTorch treats a tensor as contiguous: axes of size 1 have no place."""
    moved = [axis for axis in order if shape[axis] != 1]
    return moved == sorted(moved)


def arranged(
    flat: Shaped[Array, " n"], shape: tuple[int, ...], order: tuple[int, ...]
) -> Shaped[Array, "*shape"]:
    """Return elements in the order of memory as an array of a shape."""
    array = flat.reshape([shape[axis] for axis in order])
    return array.transpose(*np.argsort(order).tolist())
