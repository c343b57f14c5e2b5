"""Numbers other than masks and normal variates: functions of the key, the index and the dtype.

The words are those of `regtorch.bits`, one for each element; float64 takes two. `at` are the
indices of the elements (int64), if they are part of a larger draw.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from regtorch._random.keys import key_words
from regtorch._random.threefry import element_bits, element_words, in_pieces, shift_right

# The binary digits of a uniform variate, as in PyTorch's own.
_DIGITS = {torch.float16: 11, torch.bfloat16: 8}


def uniform(
    key: Tensor,
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    at: Tensor | None = None,
) -> Tensor:
    """Draw uniform variates in (0, 1), at the centers of 2**23 equal intervals.

    In float32 they are `(1 - 2**-24) - jax.random.uniform(key, shape)`, exactly: a large variate
    is a kept element of `bernoulli`, so that `floor(keep_prob + uniform)` keeps what
    `regtorch.bernoulli` keeps for every `keep_prob` of at least 1/2. In float64 they are the
    centers of 2**52 intervals. Half types are truncated to 11 and 8 binary digits, and may be 0.
    """
    words = key_words(key)

    def make(start: int, stop: int) -> Tensor:
        if dtype == torch.float64:
            high, low = element_words(words, at, start, stop)
            bits = ((high.to(torch.int64) & 0xFFFFFFFF) << 20) | shift_right(low, 12)
            return (1 - 2.0**-53) - bits.to(torch.float64) * 2.0**-52
        bits = shift_right(element_bits(words, at, start, stop), 9)
        u = (1 - 2.0**-24) - bits.to(torch.float32) * 2.0**-23
        if dtype in _DIGITS:
            u = torch.floor(u * 2.0 ** _DIGITS[dtype]) * 2.0 ** -_DIGITS[dtype]
        return u.to(dtype)

    return in_pieces(make, tuple(shape), key.device)


def integers(
    key: Tensor, shape: Sequence[int], low: int, high: int, at: Tensor | None = None
) -> Tensor:
    """Draw integers (int64) in [low, high): `low + floor(bits * (high - low) / 2**32)`.

    `high - low` is at most 2**31. An integer has a probability that is off by 2**-32 at most.
    """
    return low + ((_unsigned(key, shape, at) * (high - low)) >> 32)


def permutation(key: Tensor, size: int) -> Tensor:
    """Draw a permutation (int64): the order that sorts the bits, stable."""
    return torch.argsort(_unsigned(key, (size,)), stable=True)


def _unsigned(key: Tensor, shape: Sequence[int], at: Tensor | None = None) -> Tensor:
    make = functools.partial(element_bits, key_words(key), at)
    return in_pieces(make, tuple(shape), key.device).to(torch.int64) & 0xFFFFFFFF
