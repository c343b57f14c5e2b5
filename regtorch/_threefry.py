"""Threefry-2x32 with 20 rounds: a key and a counter in, 64 random bits out.

The mirror of `regjax._threefry`. Words are int32 tensors here and not uint32, because PyTorch has
few operations on unsigned integers; additions wrap in both, and a shift to the right is made
logical by a mask.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

Words: TypeAlias = tuple[Tensor, Tensor]

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_KEY_PARITY = 0x1BD11BDA
_WORD = 2**32


def threefry2x32(key: Words, counter: Words) -> Words:
    """Encrypts counters: the block function, elementwise.

    Args:
        key: two int32 words, of any shape that broadcasts against the counters.
        counter: two int32 words, high and low.

    Returns:
        Two int32 words.
    """
    k0, k1 = key
    schedule = (k0, k1, k0 ^ k1 ^ _KEY_PARITY)
    x0, x1 = counter[0] + k0, counter[1] + k1
    for group in range(5):
        for distance in _ROTATIONS[group % 2]:
            x0 = x0 + x1
            x1 = _rotate_left(x1, distance) ^ x0
        x0 = x0 + schedule[(group + 1) % 3]
        # Scalars first: the key and the group's number meet once, not once an element.
        x1 = x1 + (schedule[(group + 2) % 3] + (group + 1))
    return x0, x1


def counter_bits(key: Words, shape: Sequence[int]) -> Tensor:
    """32 random bits an element: both words of the block at the element's row-major index.

    Equal to `jax.random.bits(key, shape, "uint32")` under JAX's default (partitionable) threefry,
    and to `regjax`'s; an int32 tensor that holds the same bits.
    """
    return counter_range_bits(key, 0, math.prod(shape)).reshape(tuple(shape))


def counter_range_bits(key: Words, start: int, stop: int) -> Tensor:
    """The bits at the row-major indices from `start` up to `stop`, as one flat int32 tensor."""
    index = torch.arange(start, stop, device=key[0].device, dtype=torch.int64)
    low = index.to(torch.int32)  # keeps the lower 32 bits
    high = (index >> 32).to(torch.int32) if stop > _WORD else torch.zeros_like(key[0])
    out0, out1 = threefry2x32(key, (high, low))
    return out0 ^ out1


def shift_right(x: Tensor, distance: int) -> Tensor:
    """Shifts the 32 bits of an int32 tensor to the right and fills with zeros."""
    return (x >> distance) & ((1 << (32 - distance)) - 1)


def _rotate_left(x: Tensor, distance: int) -> Tensor:
    return (x << distance) | shift_right(x, 32 - distance)
