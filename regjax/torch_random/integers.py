"""Random integers and permutations in PyTorch's order."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from regjax._checks import check_shape
from regjax.torch_random.layouts import arranged, check_memory_order
from regjax.torch_random.state import (
    TorchGenerator,
    check_generator,
    draw_longs,
    draw_words,
)
from regjax.torch_random.uniforms import check_precision
from regshared.checks import check_integer

if TYPE_CHECKING:
    from jax.typing import DTypeLike
    from jaxtyping import Array, Int32, Integer

    from regjax.torch_random.layouts import MemoryOrder

_LONGEST_RANGE_OF_WORDS = 2**28
_LONGEST_PERMUTATION = (2**32 - 1) // 20


def randint(
    g: TorchGenerator,
    shape: Sequence[int],
    low: int,
    high: int,
    dtype: DTypeLike = jnp.int32,
    *,
    memory_order: MemoryOrder = None,
) -> tuple[Integer[Array, "*shape"], TorchGenerator]:
    """Draw integers in [low, high): PyTorch's `torch.randint(low, high, shape)`.

    An integer is a word modulo `high - low`, plus `low`: a word of 32 bits, or of 64 if the range
    has at least 2**28 integers. The dtype does not change it.

    Args:
        g: The generator.
        shape: The shape of the result.
        low: The smallest integer.
        high: The integer above the largest.
        dtype: An integer dtype that holds the range. PyTorch's default is int64.
        memory_order: As for `dropout`.

    Returns:
        The integers, and the next state of the generator.

    Raises:
        TypeError: An argument has a wrong type.
        ValueError: `low` is not less than `high`, the dtype does not hold them, or it has 64 bits
            without `jax_enable_x64`.

    Example:
        >>> import torch
        >>> from regjax import torch_random
        >>> torch_random.randint(torch_random.generator(0), (5,), 0, 10)[0]
        Array([4, 9, 3, 0, 3], dtype=int32)
        >>> torch.randint(0, 10, (5,), generator=torch.Generator().manual_seed(0))
        tensor([4, 9, 3, 0, 3])
    """
    g, shape = check_generator(g), check_shape("shape", shape)
    low, high = check_integer("low", low), check_integer("high", high)
    dtype = _check_integer_dtype(dtype)
    limits = np.iinfo(dtype)
    if not limits.min <= low < high <= limits.max + 1:
        raise ValueError(
            f"low and high must satisfy {limits.min} <= low < high <= {limits.max + 1} for {dtype};"
            f" got {low} and {high}."
        )
    order = check_memory_order(memory_order, len(shape))
    return _randint(g, shape, low, high, dtype, order)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4, 5))
def _randint(
    g: TorchGenerator,
    shape: tuple[int, ...],
    low: int,
    high: int,
    dtype: np.dtype,
    order: tuple[int, ...],
) -> tuple[Integer[Array, "*shape"], TorchGenerator]:
    count, size = math.prod(shape), high - low
    # Unsigned numbers of 64 bits, also without `jax_enable_x64`.
    with jax.enable_x64(True):
        if size < _LONGEST_RANGE_OF_WORDS:
            words, g = draw_words(g, count)
            numbers = words.astype(np.uint64)
        else:
            numbers, g = draw_longs(g, count)
        # Unsigned, so that the sum wraps as PyTorch's does.
        remainder = numbers if size == 2**64 else lax.rem(numbers, np.uint64(size))
        shifted = remainder + np.uint64(low % 2**64)
        integers = lax.convert_element_type(shifted, dtype)
        return arranged(integers, shape, order), g


def permutation(g: TorchGenerator, n: int) -> tuple[Int32[Array, " n"], TorchGenerator]:
    """Draw a permutation of 0, ..., n - 1: PyTorch's `torch.randperm(n)`.

    The shuffle is serial: n - 1 swaps, each of an element and a random one not before it.

    Args:
        g: The generator.
        n: The number of elements, less than 214,748,364; from there on PyTorch draws otherwise.

    Returns:
        The permutation in int32 (PyTorch has int64), and the next state of the generator.

    Raises:
        TypeError: `n` is not an integer, or `g` is not a generator.
        ValueError: `n` is negative or too large.

    Example:
        >>> import torch
        >>> from regjax import torch_random
        >>> torch_random.permutation(torch_random.generator(0), 6)[0]
        Array([2, 5, 3, 0, 1, 4], dtype=int32)
        >>> torch.randperm(6, generator=torch.Generator().manual_seed(0))
        tensor([2, 5, 3, 0, 1, 4])

    References:
        Durstenfeld, "Algorithm 235: Random permutation", Communications of the ACM 7, 1964.
    """
    g = check_generator(g)
    n = check_integer("n", n, minimum=0, maximum=_LONGEST_PERMUTATION - 1)
    return _permutation(g, n)


@functools.partial(jax.jit, static_argnums=1)
def _permutation(g: TorchGenerator, n: int) -> tuple[Int32[Array, " n"], TorchGenerator]:
    start = jnp.arange(n, dtype=np.int32)
    if n < 2:
        return start, g
    words, g = draw_words(g, n - 1)
    partners = start[:-1] + lax.rem(words, n - start[:-1].astype(np.uint32)).astype(np.int32)

    def swap(index: Array, order: Array) -> Array:
        # One gather and one scatter: XLA copies the array in each step if two elements are read
        # and written separately.
        pair = jnp.stack([index, partners[index]])
        return order.at[pair].set(order[pair][::-1])

    return lax.fori_loop(0, n - 1, swap, start), g


def _check_integer_dtype(dtype: DTypeLike) -> np.dtype:
    try:
        found = None if dtype is None else np.dtype(dtype)
    except TypeError:
        found = None
    if found is None or not jnp.issubdtype(found, jnp.integer):
        raise TypeError(f"dtype must be an integer dtype, such as jnp.int32; got {dtype!r}.")
    return check_precision(found)
