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
from typing import TypeAlias

import torch
from torch import Tensor

Words: TypeAlias = tuple[Tensor, Tensor]

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


def in_pieces(
    make: Callable[[int, int], Tensor], shape: Sequence[int], device: torch.device
) -> Tensor:
    """Return a tensor assembled from `make(start, stop)`, its elements from `start` to `stop`.

    PyTorch runs operation by operation, and threefry has a hundred: in pieces, the intermediate
    tensors stay in the cache and take almost no memory. A compiler fuses the operations anyway.
    """
    check_size(shape, device)
    size, piece = math.prod(shape), _PIECE if device.type == "cpu" else _PIECE_ON_DEVICE
    if size <= piece or torch.compiler.is_compiling():
        return make(0, size).reshape(tuple(shape))
    starts = range(0, size, piece)
    return torch.cat([make(i, min(i + piece, size)) for i in starts]).reshape(tuple(shape))


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
