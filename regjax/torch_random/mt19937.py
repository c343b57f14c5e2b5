"""The Mersenne Twister MT19937, a block of 624 words at a time.

A word of the next block depends on words of this block, and on the word 227 places before it: three
vector operations compute a block.

References:
    Matsumoto and Nishimura, "Mersenne Twister: a 623-dimensionally equidistributed uniform
    pseudo-random number generator", ACM TOMACS 8, 1998; initialized as of 2002.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

if TYPE_CHECKING:
    from jaxtyping import Array, Int32, UInt32

SIZE = 624
_OFFSET = 397
_MATRIX, _UPPER, _LOWER = np.uint32(0x9908B0DF), np.uint32(0x80000000), np.uint32(0x7FFFFFFF)
_MULTIPLIER = np.uint32(1812433253)


@jax.jit
def seeded_block(seed: UInt32[Array, ""]) -> UInt32[Array, " block"]:
    """Return the block that follows from a 32-bit seed. No word of it is drawn."""

    def following(word: Array, index: Array) -> tuple[Array, Array]:
        word = _MULTIPLIER * (word ^ (word >> np.uint32(30))) + index
        return word, word

    _, rest = lax.scan(following, seed, jnp.arange(1, SIZE, dtype=np.uint32))
    return jnp.append(seed, rest)


@functools.partial(jax.jit, static_argnums=2)
def advance(
    block: UInt32[Array, " block"],
    position: Int32[Array, ""],
    count: int,
    used: Int32[Array, ""] | None = None,
) -> tuple[UInt32[Array, " count"], UInt32[Array, " block"], Int32[Array, ""]]:
    """Return the next `count` words, and the block and the position after `used` of them.

    `position` is the number of words of the block that are drawn. As in PyTorch it is never 0 after
    a draw, since a block is computed when its first word is drawn; 0 is a block without any words
    to draw, like 624. `used` is `count` by default.
    """
    if not count:
        return jnp.zeros(0, np.uint32), block, position
    start = jnp.where(position == 0, SIZE, position)
    _, blocks = lax.scan(_next_block, block, length=-(-count // SIZE))
    words = jnp.append(block, blocks)
    end = start + (count if used is None else used)
    first = (end - 1) // SIZE * SIZE
    last_block = lax.dynamic_slice(words, (first,), (SIZE,))
    end = end - first
    if used is not None:
        last_block, end = (
            jnp.where(used == 0, old, new) for old, new in ((block, last_block), (position, end))
        )
    return _tempered(lax.dynamic_slice(words, (start,), (count,))), last_block, end


def _next_block(block: Array, _: None) -> tuple[Array, Array]:
    span = SIZE - _OFFSET
    first = block[_OFFSET:] ^ _twisted(block[:span], block[1 : span + 1])
    second = first ^ _twisted(block[span : 2 * span], block[span + 1 : 2 * span + 1])
    rest = SIZE - 2 * span - 1
    third = second[:rest] ^ _twisted(block[2 * span : -1], block[2 * span + 1 :])
    last = second[rest : rest + 1] ^ _twisted(block[-1:], first[:1])
    following = jnp.concatenate([first, second, third, last])
    return following, following


def _twisted(word: UInt32[Array, " n"], following: UInt32[Array, " n"]) -> UInt32[Array, " n"]:
    mixed = (word & _UPPER) | (following & _LOWER)
    is_odd = following & np.uint32(1)
    return (mixed >> np.uint32(1)) ^ (is_odd * _MATRIX)


def _tempered(y: UInt32[Array, " n"]) -> UInt32[Array, " n"]:
    y ^= y >> np.uint32(11)
    y ^= (y << np.uint32(7)) & np.uint32(0x9D2C5680)
    y ^= (y << np.uint32(15)) & np.uint32(0xEFC60000)
    return y ^ (y >> np.uint32(18))
