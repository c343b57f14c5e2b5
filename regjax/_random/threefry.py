"""Threefry-2x32 with 20 rounds: a key and a counter in, 64 random bits out.

It is written out instead of called for two reasons. The bits stay the same under every version and
configuration of JAX; and XLA fuses 20 unrolled rounds of elementwise arithmetic with their
consumer, so that a mask is never materialized.

References:
    Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from regjax._compat import InconclusiveDimensionOperation
from regjax._random.xla import iota_in_place

if TYPE_CHECKING:
    from jax.typing import ArrayLike
    from jaxtyping import Array, UInt32

    Layout: TypeAlias = NamedSharding | PartitionSpec | None
    # Two words of shapes that broadcast against each other, and against those they meet.
    Words: TypeAlias = tuple[UInt32[Array, "*_hi"], UInt32[Array, "*_lo"]]

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_KEY_PARITY = 0x1BD11BDA
_WORD = 2**32


def threefry2x32(key: Words, counter: Words) -> Words:
    """Encrypt counters with the block function, elementwise; a pair is a high and a low word."""
    return _rounds(key, (counter[0] + key[0], counter[1] + key[1]))


def _rounds(key: Words, state: Words) -> Words:
    """Apply the 20 rounds to a counter to which the key was added."""
    k0, k1 = key
    schedule = (k0, k1, k0 ^ k1 ^ np.uint32(_KEY_PARITY))
    x0, x1 = state
    for group in range(5):
        for distance in _ROTATIONS[group % 2]:
            x0 = x0 + x1
            x1 = ((x1 << np.uint32(distance)) | (x1 >> np.uint32(32 - distance))) ^ x0
        x0 = x0 + schedule[(group + 1) % 3]
        # Scalars first: the key and the group number are added once, not once per element.
        x1 = x1 + (schedule[(group + 2) % 3] + np.uint32(group + 1))
    return x0, x1


def counter_bits(
    key: Words, shape: Sequence[int], *, out_sharding: Layout = None
) -> UInt32[Array, "*shape"]:
    """Return 32 random bits per element: both words of the block at its row-major index, xored.

    Equal to `jax.random.bits(key, shape, "uint32")` under JAX's default (partitionable) threefry.
    """
    shape = tuple(shape)
    if not at_most(math.prod(shape), _WORD):
        out0, out1 = threefry2x32(key, row_major_index(shape, out_sharding))
    else:
        # The index is added to the key: XLA would hoist a separate index, which does not change
        # within a loop, and keep it in memory, an array as large as x.
        low = row_major_index(shape, out_sharding, start=key[1])[1]
        out0, out1 = _rounds(key, (key[0], low))
    return out0 ^ out1


def row_major_index(
    shape: tuple[int, ...],
    out_sharding: Layout,
    *,
    start: UInt32[Array, ""] | None = None,
    in_place: bool = False,
) -> Words:
    """Return each element's row-major index, plus `start`, as a high and a low word.

    The sum must fit in the low word if `start` is given. There is one iota per axis, never a
    reshape of one long iota: a reshape would mix the axes, and XLA could no longer compute only its
    own shard on each device. The slower axes are summed before the faster ones broadcast the sum,
    so that they cost almost nothing. `in_place` keeps XLA:TPU from computing the index along each
    axis beforehand, in a separate kernel; that is worth some more arithmetic where the array is
    small.
    """
    check_size(shape)
    along = iota_in_place if in_place else _along
    carries = start is None and not at_most(math.prod(shape), _WORD)
    hi = jnp.zeros((), jnp.uint32)
    lo = hi if start is None else start
    for axis, size in enumerate(shape):
        if not at_most(size, 1):
            index = along(shape, axis, out_sharding)
            hi, lo = _add_product((hi, lo), index, product_words(shape[axis + 1 :]), carries)
    return hi, jnp.broadcast_to(lo, shape, out_sharding=out_sharding)


def slice_index(
    whole: tuple[int, ...],
    shape: tuple[int, ...],
    starts: Mapping[int, ArrayLike],
    *,
    out_sharding: Layout = None,
) -> Words:
    """Return the row-major index, in an array of shape `whole`, of each element of a slice.

    `starts` maps an axis to the start of the slice, 0 for axes not listed; they may be traced.
    """
    carries = not at_most(math.prod(whole), _WORD)
    hi = lo = jnp.zeros((), jnp.uint32)
    for axis, size in enumerate(whole):
        if not at_most(size, 1):
            along = _along(shape, axis, out_sharding)
            if axis in starts:
                along = along + jnp.asarray(starts[axis]).astype(jnp.uint32)
            hi, lo = _add_product((hi, lo), along, product_words(whole[axis + 1 :]), carries)
    return hi, lo


def at_most(size: int, limit: int) -> bool:
    """Return whether a size is known to be at most `limit`.

    The answer may be unknown for a symbolic size of `jax.export`. Every caller treats False as
    "perhaps larger" and draws the same mask in both cases.
    """
    try:
        return bool(size <= limit)
    except InconclusiveDimensionOperation:
        return False


def check_size(shape: Sequence[int]) -> None:
    """Reject a shape of 2**63 elements or more, for which XLA would end the process."""
    if _split(shape)[0] >= 2**63:
        raise ValueError(f"shape must have fewer than 2**63 elements; got {tuple(shape)}.")


def product_words(sizes: Sequence[int]) -> tuple[Any, Any]:
    """Return the product of sizes modulo 2**64 as a high and a low word.

    The words are NumPy scalars if every size is a number. A symbolic size has a value only at run
    time, and the words of a product that contains one are arrays.
    """
    known, symbols = _split(sizes)
    high, low = np.uint32(known // _WORD % _WORD), np.uint32(known % _WORD)
    for size in symbols:
        factor = jnp.asarray(size).astype(jnp.uint32)
        high, low = factor * high + _multiply_high(factor, low), factor * low
    return high, low


def _split(sizes: Sequence[int]) -> tuple[int, Sequence[int]]:
    """Return the product of the sizes that are numbers, and those that are symbols."""
    product = math.prod(sizes)
    if isinstance(product, int):
        return product, ()
    numbers = [size for size in sizes if is_number(size)]
    return math.prod(numbers), [size for size in sizes if not is_number(size)]


def is_number(size: int) -> bool:
    """Return whether a size is a number, not a symbol of `jax.export`."""
    return isinstance(size, int | np.integer)


def _along(shape: tuple[int, ...], axis: int, out_sharding: Layout) -> UInt32[Array, "*_shape"]:
    """Return the index along one axis, of length 1 along every other."""
    if out_sharding is not None:
        is_named = isinstance(out_sharding, NamedSharding)
        spec = out_sharding.spec if is_named else out_sharding
        alone = PartitionSpec(*[None] * axis, *spec[axis : axis + 1])
        out_sharding = out_sharding.update(spec=alone) if is_named else alone
    sizes = [1] * len(shape)
    sizes[axis] = shape[axis]
    return lax.broadcasted_iota(np.uint32, sizes, axis, out_sharding=out_sharding)


def _add_product(
    total: Words, along: UInt32[Array, "*_shape"], stride: tuple[Any, Any], carries: bool
) -> Words:
    """Return total + along * stride modulo 2**64; without `carries` the high word stays 0."""
    hi, lo = total
    stride_hi, stride_lo = stride
    product = along * stride_lo
    new_lo = lo + product
    if not carries:
        return hi, new_lo
    overflow = (new_lo < product).astype(jnp.uint32)
    return hi + _multiply_high(along, stride_lo) + along * stride_hi + overflow, new_lo


def _multiply_high(x: UInt32[Array, "*shape"], factor: Any) -> UInt32[Array, "*shape"]:
    """Return the upper 32 bits of x * factor, by schoolbook multiplication of 16-bit halves."""
    half = np.uint32(16)
    mask = np.uint32(0xFFFF)
    x_hi, x_lo = x >> half, x & mask
    f_hi, f_lo = factor >> half, factor & mask
    middle = x_hi * f_lo + ((x_lo * f_lo) >> half)  # at most 2**32 - 1 - 2**16: no overflow
    cross = (middle & mask) + x_lo * f_hi
    return x_hi * f_hi + (middle >> half) + (cross >> half)
