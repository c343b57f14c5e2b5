"""Threefry-2x32 with 20 rounds: a key and a counter in, 64 random bits out.

It is written out instead of called for two reasons. The bits stay the same under every version and
configuration of JAX; and XLA fuses 20 unrolled rounds of elementwise arithmetic with their
consumer, so that a mask is never materialized.

References:
    Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from regjax._compat import InconclusiveDimensionOperation
from regjax._random.xla import iota_in_place

if TYPE_CHECKING:
    from jaxtyping import Array, UInt32

    Layout: TypeAlias = NamedSharding | PartitionSpec | None
    # Two words of shapes that broadcast against each other, and against those they meet.
    Words: TypeAlias = tuple[UInt32[Array, "*_hi"], UInt32[Array, "*_lo"]]
    Part: TypeAlias = Sequence["Span | Places | None"]

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


class Span(NamedTuple):
    """Consecutive indices along an axis; `start` may be traced."""

    start: Any
    size: int


class Places(NamedTuple):
    """Any indices along an axis: the two words of each; a high word of None is 0."""

    high: UInt32[Array, " places"] | None
    low: UInt32[Array, " places"]


def counter_bits(
    key: Words, shape: Sequence[int], *, out_sharding: Layout = None
) -> UInt32[Array, "*shape"]:
    """Return 32 random bits per element: both words of the block at its row-major index, xored.

    Equal to `jax.random.bits(key, shape, "uint32")` under JAX's default (partitionable) threefry.
    """
    return part_bits(key, shape, (), out_sharding=out_sharding)


def part_bits(
    key: Words, whole: Sequence[Any], part: Part, *, out_sharding: Layout = None
) -> UInt32[Array, "*_part"]:
    """Return `counter_bits(key, whole)` at a part of the array; see `part_index`."""
    # The index is added to the key: XLA would hoist a separate index, which does not change within
    # a loop, and keep it in memory, an array as large as x.
    out0, out1 = _rounds(key, part_index(whole, part, out_sharding, start=key))
    return out0 ^ out1


def part_shape(whole: Sequence[Any], part: Part) -> tuple[int, ...]:
    """Return the shape of a part of an array of shape `whole`."""
    entries = part or (None,) * len(whole)
    sizes = zip(whole, entries, strict=True)
    return tuple([_length(entry, size) for size, entry in sizes])


def _length(entry: Span | Places | None, size: Any) -> int:
    if entry is None:
        return size
    return entry.size if isinstance(entry, Span) else entry.low.shape[0]


def part_index(
    whole: Sequence[Any],
    part: Part = (),
    out_sharding: Layout = None,
    *,
    start: Words | None = None,
    in_place: bool = False,
) -> Words:
    """Return the row-major index, in an array of shape `whole`, of each element of a part.

    The index has a high and a low word. There is one iota per axis, never a reshape of one long
    iota: a reshape would mix the axes, and XLA could no longer compute only its own shard on each
    device. The slower axes are summed before the faster ones broadcast the sum, so that they cost
    almost nothing.

    Args:
        whole: The shape of the array. The first size is None if it is unknown; the index does not
            depend on it.
        part: For each axis a `Span`, `Places`, or None for the whole axis; () for the whole array.
        out_sharding: The layout of the part.
        start: Added to the index, word by word, without a carry.
        in_place: Keeps XLA:TPU from computing the index along each axis beforehand, in a separate
            kernel. That is worth some more arithmetic where the array is small.
    """
    whole, entries = tuple(whole), tuple(part) or (None,) * len(whole)
    shape = part_shape(whole, part)
    check_size(shape)
    along = functools.partial(_along, shape=shape, out_sharding=out_sharding, in_place=in_place)
    # The last axes have an index of one word, which needs no carry.
    outer = 0
    while outer < len(whole) and not _fits_word(whole[outer:]):
        outer += 1
    high = base = jnp.zeros((), jnp.uint32)
    for axis in range(outer):
        if whole[axis] is None or not at_most(whole[axis], 1):
            words, stride = along(entries[axis], axis), product_words(whole[axis + 1 :])
            high, base = add_product((high, base), words, stride)
    low = base if start is None else start[1] if not outer else base + start[1]
    has_inner = False
    for axis in range(outer, len(whole)):
        if not at_most(whole[axis], 1):
            low = low + along(entries[axis], axis)[1] * product_words(whole[axis + 1 :])[1]
            has_inner = True
    if outer and has_inner:
        inner = low if start is None else low - start[1]
        high = high + (inner < base).astype(jnp.uint32)
    if start is not None:
        high = high + start[0] if outer else start[0]
    return high, jnp.broadcast_to(low, shape, out_sharding=out_sharding)


def _fits_word(sizes: tuple[Any, ...]) -> bool:
    return None not in sizes and at_most(math.prod(sizes), _WORD)


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


def _along(
    entry: Span | Places | None,
    axis: int,
    *,
    shape: tuple[int, ...],
    out_sharding: Layout,
    in_place: bool,
) -> Places:
    """Return the indices along one axis, of length 1 along every other."""
    if isinstance(entry, Places):
        high = None if entry.high is None else _expanded(entry.high, axis, shape, out_sharding)
        return Places(high, _expanded(entry.low, axis, shape, out_sharding))
    if in_place:
        index = iota_in_place(shape, axis, out_sharding)
    else:
        sizes = [1] * len(shape)
        sizes[axis] = shape[axis]
        layout = _layout_along(axis, out_sharding)
        index = lax.broadcasted_iota(np.uint32, sizes, axis, out_sharding=layout)
    if isinstance(entry, Span):
        index = index + jnp.asarray(entry.start).astype(jnp.uint32)
    return Places(None, index)


def _layout_along(axis: int, out_sharding: Layout) -> Layout:
    """Return the layout of an array that has only one axis of another, the others of length 1."""
    own = spec_of(out_sharding, axis + 1)[axis]
    return with_spec(out_sharding, (*[None] * axis, own))


def spec_of(layout: Layout, ndim: int) -> tuple[Any, ...]:
    """Return the mesh axes of each dimension of an array; all None without a layout."""
    spec = layout.spec if isinstance(layout, NamedSharding) else layout or ()
    return (*spec, *[None] * (ndim - len(spec)))


def with_spec(layout: Layout, spec: Sequence[Any]) -> Layout:
    """Return a layout with other mesh axes of the dimensions; None without a layout."""
    if layout is None:
        return None
    new = PartitionSpec(*spec)
    return layout.update(spec=new) if isinstance(layout, NamedSharding) else new


def _expanded(
    values: UInt32[Array, " places"], axis: int, shape: tuple[int, ...], out_sharding: Layout
) -> UInt32[Array, "*_shape"]:
    """Return a vector along one axis, in the layout of the part along that axis."""
    layout = _layout_along(axis, out_sharding)
    if layout is None and any(jax.typeof(values).sharding.spec):
        layout = PartitionSpec()
    expanded = lax.expand_dims(values, [dim for dim in range(len(shape)) if dim != axis])
    return expanded if layout is None else jax.sharding.reshard(expanded, layout)


def add_product(total: Words, along: Places, stride: tuple[Any, Any]) -> Words:
    """Return total + along * stride modulo 2**64."""
    hi, lo = total
    stride_hi, stride_lo = stride
    product = along.low * stride_lo
    new_lo = lo + product
    overflow = (new_lo < product).astype(jnp.uint32)
    new_hi = hi + _multiply_high(along.low, stride_lo) + along.low * stride_hi + overflow
    return new_hi if along.high is None else new_hi + along.high * stride_lo, new_lo


def _multiply_high(x: UInt32[Array, "*shape"], factor: Any) -> UInt32[Array, "*shape"]:
    """Return the upper 32 bits of x * factor, by schoolbook multiplication of 16-bit halves."""
    half = np.uint32(16)
    mask = np.uint32(0xFFFF)
    x_hi, x_lo = x >> half, x & mask
    f_hi, f_lo = factor >> half, factor & mask
    middle = x_hi * f_lo + ((x_lo * f_lo) >> half)  # at most 2**32 - 1 - 2**16: no overflow
    cross = (middle & mask) + x_lo * f_hi
    return x_hi * f_hi + (middle >> half) + (cross >> half)
