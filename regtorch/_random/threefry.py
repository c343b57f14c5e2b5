"""Threefry-2x32 with 20 rounds: a key and a counter in, 64 random bits out.

This file mirrors `regjax._random.threefry`. Words are int32 tensors instead of uint32, because
PyTorch has few operations on unsigned integers; additions wrap in both, and a mask makes right
shifts logical.

References:
    Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor


class Span(NamedTuple):
    """Consecutive indices along an axis."""

    start: int
    size: int


Words: TypeAlias = tuple[Tensor, Tensor]
# For each axis a span, a 1-D tensor of indices (int64), or None for the whole axis.
Part: TypeAlias = Sequence[Span | Tensor | None]

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_KEY_PARITY = 0x1BD11BDA
_WORD = 2**32
_LONGEST = 2**30  # one call of this length overflows no word
_PIECE = 2**17  # elements whose words fit the caches of two cores
_PIECE_ON_DEVICE = 2**24  # large enough to make the launch of a kernel negligible


def threefry2x32(key: Words, counter: Words) -> Words:
    """Encrypt counters elementwise: the block function, on pairs of int32 words (high, low)."""
    return _rounds(key, (counter[0] + key[0], counter[1] + key[1]))


def _rounds(key: Words, state: Words) -> Words:
    """Apply the 20 rounds to a counter to which the key was added."""
    k0, k1 = key
    schedule = (k0, k1, k0 ^ k1 ^ _KEY_PARITY)
    x0, x1 = state
    for group in range(5):
        for distance in _ROTATIONS[group % 2]:
            x0 = x0 + x1
            x1 = _rotate_left(x1, distance) ^ x0
        x0 = x0 + schedule[(group + 1) % 3]
        # Scalars first: the key and the group's number are added once, not once per element.
        x1 = x1 + (schedule[(group + 2) % 3] + (group + 1))
    return x0, x1


def encrypt(key: tuple[int, int], counter: tuple[int, int]) -> tuple[int, int]:
    """Apply the block function to unsigned Python integers: much faster than 0-d tensors."""
    schedule = (*key, key[0] ^ key[1] ^ _KEY_PARITY)
    x0, x1 = ((word + part) % _WORD for word, part in zip(counter, key, strict=True))
    for group in range(5):
        for distance in _ROTATIONS[group % 2]:
            x0 = (x0 + x1) % _WORD
            x1 = ((x1 << distance) % _WORD | x1 >> (32 - distance)) ^ x0
        x0 = (x0 + schedule[(group + 1) % 3]) % _WORD
        x1 = (x1 + schedule[(group + 2) % 3] + group + 1) % _WORD
    return x0, x1


def counter_bits(key: Words, shape: Sequence[int]) -> Tensor:
    """Return 32 random bits per element: both words of the block at its row-major index.

    The int32 tensor holds the bits of `jax.random.bits(key, shape, "uint32")` under JAX's default
    (partitionable) threefry.
    """
    return in_pieces(lambda start, stop: range_bits(key, start, stop), shape, key[0].device)


def part_bits(key: Words, whole: Sequence[Any], part: Part) -> Tensor:
    """Return the bits that `counter_bits` has for part of a tensor of shape `whole`.

    The first size is None if it is unknown; the bits do not depend on it.
    """
    shape = part_shape(whole, part)
    check_size(shape, key[0].device)
    rows, size = (shape[0], math.prod(shape[1:])) if shape else (1, 1)
    piece = max(1, _piece(key[0].device) // max(1, size))

    def bits(part: Part) -> Tensor:
        index = part_index(whole, part, key[0].device)
        out0, out1 = threefry2x32(key, index_words(index))
        return out0 ^ out1

    if rows <= piece or torch.compiler.is_compiling():
        return bits(part)
    return torch.cat([bits(_rows(part, i, min(piece, rows - i))) for i in range(0, rows, piece)])


def part_index(whole: Sequence[Any], part: Part, device: torch.device) -> Tensor:
    """Return the row-major index of each element of a part, as int64."""
    shape = part_shape(whole, part)
    index = torch.zeros((), dtype=torch.int64, device=device)
    for axis, (entry, size) in enumerate(zip(part, shape, strict=True)):
        if isinstance(entry, Tensor):
            along = entry.to(device)
        else:
            start = entry.start if isinstance(entry, Span) else 0
            along = torch.arange(start, start + size, device=device)
        stride = math.prod(whole[axis + 1 :])
        index = index + (along * stride).reshape(-1, *[1] * (len(shape) - axis - 1))
    return index.expand(shape)


def part_shape(whole: Sequence[Any], part: Part) -> tuple[Any, ...]:
    """Return the shape of a part of a tensor of shape `whole`."""
    return tuple(
        size if entry is None else entry.size if isinstance(entry, Span) else entry.shape[0]
        for size, entry in zip(whole, part, strict=True)
    )


def index_words(index: Tensor) -> Words:
    """Return 64-bit indices as a high and a low word."""
    # The conversion keeps the lower 32 bits; the sign has no meaning.
    return (index >> 32).to(torch.int32), index.to(torch.int32)


def _rows(part: Part, first: int, count: int) -> Part:
    """Return `count` of the first axis of a part."""
    entry, *rest = part
    if isinstance(entry, Tensor):
        return (entry[first : first + count], *rest)
    start = entry.start if isinstance(entry, Span) else 0
    return (Span(start + first, count), *rest)


def in_pieces(
    make: Callable[[int, int], Tensor], shape: Sequence[int], device: torch.device
) -> Tensor:
    """Return a tensor assembled from `make(start, stop)`, its elements from `start` to `stop`.

    PyTorch runs operation by operation, and threefry has a hundred: in pieces, the intermediate
    tensors stay in the cache and take almost no memory. A compiler fuses the operations anyway.
    """
    check_size(shape, device)
    size, piece = math.prod(shape), _piece(device)
    if size <= piece or torch.compiler.is_compiling():
        return make(0, size).reshape(tuple(shape))
    starts = range(0, size, piece)
    return torch.cat([make(i, min(i + piece, size)) for i in starts]).reshape(tuple(shape))


def _piece(device: torch.device) -> int:
    return _PIECE if device.type == "cpu" else _PIECE_ON_DEVICE


def check_size(shape: Sequence[int], device: torch.device) -> None:
    """Reject a shape that no tensor can have or that memory cannot hold, before anything is drawn.

    The second error is PyTorch's own RuntimeError, with the number of bytes.
    """
    size = math.prod(shape)
    if size >= 2**63:
        raise ValueError(f"shape must have fewer than 2**63 elements; got {tuple(shape)}.")
    if size > _LONGEST:
        torch.empty(size, dtype=torch.bool, device=device)


def range_bits(key: Words, start: int, stop: int) -> Tensor:
    """Return the bits at the row-major indices in [start, stop), as one flat int32 tensor."""
    cut = (start // _LONGEST + 1) * _LONGEST
    if stop > cut:  # the high word changes, or an int32 would not hold the number of elements
        return torch.cat([range_bits(key, start, cut), range_bits(key, cut, stop)])
    high, low = (key[0] + as_signed(start // _WORD), key[1] + as_signed(start % _WORD))
    index = torch.arange(stop - start, device=low.device, dtype=torch.int32)
    out0, out1 = _rounds(key, (high, index + low))
    return out0 ^ out1


def element_bits(key: Words, at: Tensor | None, start: int, stop: int) -> Tensor:
    """Return the bits of the elements from `start` to `stop`, whose indices are `at` (int64).

    Without `at`, the index of an element is its number.
    """
    if at is None:
        return range_bits(key, start, stop)
    out0, out1 = element_words(key, at, start, stop)
    return out0 ^ out1


def element_words(key: Words, at: Tensor | None, start: int, stop: int) -> Words:
    """Return both words of the block of each element; see `element_bits`."""
    device = key[0].device
    index = torch.arange(start, stop, device=device) if at is None else at.flatten()[start:stop]
    # The conversion keeps the lower 32 bits; the sign has no meaning.
    return threefry2x32(key, ((index >> 32).to(torch.int32), index.to(torch.int32)))


def shift_right(x: Tensor, distance: int) -> Tensor:
    """Shift the 32 bits of an int32 tensor to the right and fill with zeros."""
    return (x >> distance) & ((1 << (32 - distance)) - 1)


def _rotate_left(x: Tensor, distance: int) -> Tensor:
    # A product and a sum in one operation: the bits of the two halves do not overlap.
    return torch.add(shift_right(x, 32 - distance), x, alpha=1 << distance)


def as_signed(word: int) -> int:
    """Return the int32 that has the bits of a word."""
    return word - _WORD if word >= _WORD // 2 else word
