"""A 64-bit number as a high and a low word."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Array, UInt32


def as_words(number: int) -> UInt32[Array, " pair"]:
    """Return the high and the low word of a 64-bit number."""
    return jnp.array([number >> 32, number & 0xFFFFFFFF], np.uint32)


def as_number(words: Any) -> int:
    """Return the number of a high and a low word."""
    high, low = (int(word) for word in words)
    return high << 32 | low
