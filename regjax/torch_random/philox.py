"""Philox-4x32 with 10 rounds, in 32-bit integers: a key and a counter in, 128 random bits out.

References:
    Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Array, UInt32

    Word: TypeAlias = UInt32[Array, "*_shape"]
    Counter: TypeAlias = tuple[Word, Word, Word, Word]

_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (np.uint32(0x9E3779B9), np.uint32(0xBB67AE85))


def philox4x32(key: tuple[Word, Word], counter: Counter) -> Counter:
    """Encrypt counters, elementwise; in keys and counters, the lowest word is the first."""
    (key_0, key_1), (a, b, c, d) = key, counter
    for _ in range(_ROUNDS):
        (high_0, low_0), (high_1, low_1) = (
            _product(a, _MULTIPLIERS[0]),
            _product(c, _MULTIPLIERS[1]),
        )
        a, b, c, d = high_1 ^ b ^ key_0, low_1, high_0 ^ d ^ key_1, low_0
        key_0, key_1 = key_0 + _KEY_STEPS[0], key_1 + _KEY_STEPS[1]
    return a, b, c, d


def _product(x: Word, factor: int) -> tuple[Word, Word]:
    """Return the high and the low word of a product, from products of halves of 16 bits."""
    half, mask = np.uint32(16), np.uint32(0xFFFF)
    x_high, x_low = x >> half, x & mask
    high, low = np.uint32(factor >> 16), np.uint32(factor & 0xFFFF)
    # No sum overflows: (2**16 - 1)**2 + 2 * (2**16 - 1) is 2**32 - 1.
    middle = x_high * low + (x_low * low >> half)
    other = x_low * high + (middle & mask)
    return x_high * high + (middle >> half) + (other >> half), x * np.uint32(factor)
