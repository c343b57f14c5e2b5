"""A check that `jax.vmap` does not give every row of a batch the same numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import jax
from jax.custom_batching import custom_vmap

if TYPE_CHECKING:
    from jaxtyping import Array

Generator = TypeVar("Generator")  # of a CPU, or of CUDA


@custom_vmap
def check_one_stream(g: Generator, x: Array) -> Generator:
    """Return `g`. Under `jax.vmap` of `x` alone, raise a ValueError.

    PyTorch draws the masks of all rows from one stream, one after the other, whereas each row of a
    mapped array would start from the same state.
    """
    del x
    return g


@check_one_stream.def_vmap
def _map_both(
    axis_size: int, in_batched: list[Any], g: Generator, x: Array
) -> tuple[Generator, Any]:
    del axis_size
    g_is_mapped, x_is_mapped = in_batched
    is_mapped = any(jax.tree.leaves(g_is_mapped))
    if x_is_mapped and not is_mapped:
        raise ValueError(
            "x must not be mapped by jax.vmap with a generator that is not: all rows would have "
            "the same mask. Call it on the whole batch, or map over a generator for each row."
        )
    return check_one_stream(g, x), g_is_mapped
