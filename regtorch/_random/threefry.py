"""Threefry-2x32 with 20 rounds: a key and a counter in, 64 random bits out.

The mirror of `regjax._random.threefry`. Words are int32 tensors here and not uint32, because
PyTorch has few operations on unsigned integers; additions wrap in both, and a shift to the right is
made logical by a mask.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
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
_LONGEST = 2**30  # what one call makes without thinking about words that overflow
_PIECE = 2**17  # elements whose words fit the caches of two cores
_PIECE_ON_DEVICE = 2**24  # large enough that starting a kernel takes no time beside it


def threefry2x32(key: Words, counter: Words) -> Words:
    """Encrypts counters: the block function, elementwise.

    Args:
        key: two int32 words, of any shape that broadcasts against the counters.
        counter: two int32 words, high and low.

    Returns:
        Two int32 words.
    """
    return _rounds(key, (counter[0] + key[0], counter[1] + key[1]))


def _rounds(key: Words, state: Words) -> Words:
    """The 20 rounds, from a counter to which the key was added."""
    k0, k1 = key
    schedule = (k0, k1, k0 ^ k1 ^ _KEY_PARITY)
    x0, x1 = state
    for group in range(5):
        for distance in _ROTATIONS[group % 2]:
            x0 = x0 + x1
            x1 = _rotate_left(x1, distance) ^ x0
        x0 = x0 + schedule[(group + 1) % 3]
        # Scalars first: the key and the group's number meet once, not once an element.
        x1 = x1 + (schedule[(group + 2) % 3] + (group + 1))
    return x0, x1


def encrypt(key: tuple[int, int], counter: tuple[int, int]) -> tuple[int, int]:
    """The block function on Python's integers, much faster than on 0-d tensors.

    Args:
        key: two unsigned words.
        counter: two unsigned words, high and low.

    Returns:
        Two unsigned words, those of `threefry2x32`.
    """
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
    """32 random bits an element: both words of the block at the element's row-major index.

    Equal to `jax.random.bits(key, shape, "uint32")` under JAX's default (partitionable) threefry,
    and to `regjax`'s; an int32 tensor that holds the same bits.
    """
    return in_pieces(lambda start, stop: range_bits(key, start, stop), shape, key[0].device)


def in_pieces(
    make: Callable[[int, int], Tensor], shape: Sequence[int], device: torch.device
) -> Tensor:
    """Makes a tensor from `make(start, stop)`, which gives its elements from `start` to `stop`.

    PyTorch runs operation by operation, and threefry has a hundred: piece by piece, what lies
    between them stays in the cache and takes no memory to speak of. A compiler fuses them anyway.
    """
    check_size(shape, device)
    size, piece = math.prod(shape), _PIECE if device.type == "cpu" else _PIECE_ON_DEVICE
    if size <= piece or torch.compiler.is_compiling():
        return make(0, size).reshape(tuple(shape))
    starts = range(0, size, piece)
    return torch.cat([make(i, min(i + piece, size)) for i in starts]).reshape(tuple(shape))


def check_size(shape: Sequence[int], device: torch.device) -> None:
    """Refuse a shape for which there is no memory before anything is drawn.

    Raises:
        ValueError: No tensor can have so many elements.
        RuntimeError: PyTorch's own error, with the number of bytes.
    """
    size = math.prod(shape)
    if size >= 2**63:
        raise ValueError(f"shape must have fewer than 2**63 elements; got {tuple(shape)}.")
    if size > _LONGEST:
        torch.empty(size, dtype=torch.bool, device=device)


def range_bits(key: Words, start: int, stop: int) -> Tensor:
    """The bits at the row-major indices from `start` up to `stop`, as one flat int32 tensor."""
    cut = (start // _LONGEST + 1) * _LONGEST
    if stop > cut:  # the high word changes, or an int32 would not hold the number of elements
        return torch.cat([range_bits(key, start, cut), range_bits(key, cut, stop)])
    high, low = (key[0] + as_signed(start // _WORD), key[1] + as_signed(start % _WORD))
    index = torch.arange(stop - start, device=low.device, dtype=torch.int32)
    out0, out1 = _rounds(key, (high, index + low))
    return out0 ^ out1


def shift_right(x: Tensor, distance: int) -> Tensor:
    """Shifts the 32 bits of an int32 tensor to the right and fills with zeros."""
    return (x >> distance) & ((1 << (32 - distance)) - 1)


def _rotate_left(x: Tensor, distance: int) -> Tensor:
    # A product and a sum in one operation: the bits of the two halves do not meet.
    return torch.add(shift_right(x, 32 - distance), x, alpha=1 << distance)


def as_signed(word: int) -> int:
    """The int32 that has the bits of a word."""
    return word - _WORD if word >= _WORD // 2 else word
