"""Tiles of the keep mask of attention, drawn inside a kernel at their place in the whole mask.

The functions are plain arithmetic on 32-bit words, as compilers of kernels understand it: starts
and the key are scalars, and vectors have two dimensions, queries by keys.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from regjax._random.packed import LANES, bits_of, compare_words, word_bits
from regjax._random.threefry import Places, add_product, product_words, threefry2x32

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, UInt32

    from regjax._random.threefry import Words

_WORD = 2**32


class TileKey(NamedTuple):
    """The scalars that every tile of a mask is drawn from.

    Attributes:
        words: The two words of the PRNG key.
        threshold: The number of integers of `bits` bits that are kept, if it is traced.
        everything: Whether all are kept, likewise; the number may not fit a word then.
    """

    words: Words
    threshold: UInt32[Array, ""]
    everything: Bool[Array, ""]


class Starts(NamedTuple):
    """The first element of a tile: along the batch the words of the example's number."""

    example: tuple[Any, Any]
    head: Any
    query: Any
    key: Any


@dataclasses.dataclass(frozen=True)
class TileMask:
    """How tiles of a keep mask of shape (batch, heads, queries, keys) are drawn.

    Attributes:
        shape: The whole shape; the size of the batch is None if the number of examples is unknown.
        bits: The number of bits of the keep probability that count.
        threshold: The number of integers of so many bits that are kept; None if it is traced.
        is_exact: Whether the sampler is `bernoulli`, not `packed_bernoulli`.
        packed: The axis along which 32 elements share words; None if each has its own.
        is_reshaped: Whether queries get their words by a reshape; Triton cannot slice.
        is_transposed: Whether tiles have keys before queries; requires `is_reshaped`.
    """

    shape: tuple[int | None, int, int, int]
    bits: int
    threshold: int | None
    is_exact: bool
    packed: int | None = None
    is_reshaped: bool = False
    is_transposed: bool = False

    def draw(
        self,
        key: TileKey,
        starts: Starts,
        size: tuple[int, int],
        detour: Callable[[Array], Array] = lambda words: words,
    ) -> Bool[Array, "queries keys"]:
        """Return the mask of a tile; queries that share words begin at a multiple of 32.

        `size` is the number of queries and keys. `detour` returns the words that queries share
        unchanged, for the sake of the schedule.
        """
        if self.packed is None:
            index = _index(self.shape, starts, size, self.is_transposed)
            return self._compare_own(key, index)
        if self.threshold is None:
            bits_of_t, everything = word_bits(key.threshold, self.bits), key.everything
        else:
            bits_of_t, everything = bits_of(self.threshold, self.bits)
        rows, columns = size
        along_queries = self.packed == 2
        first: list[Any] = list(starts)
        place = starts.example[1] if self.packed == 0 else first[self.packed]
        word, lane = place // np.uint32(LANES), place % np.uint32(LANES)
        first[self.packed] = (starts.example[0], word) if self.packed == 0 else word
        whole: list[Any] = list(self.shape)
        whole[self.packed] //= LANES
        words_size = (rows // LANES if along_queries else rows, columns)
        index = _index(whole, Starts(*first), words_size, self.is_transposed)
        words = compare_words(key.words, index, bits_of_t, everything)
        if not along_queries:
            return (words >> lane) & np.uint32(1) != 0
        words = detour(words)
        if self.is_reshaped:
            return self._reshape(words, size)
        # A row of words at a time: a reshape to 32 rows each would change the layout.
        bit = np.uint32(1) << lax.broadcasted_iota(np.uint32, (LANES, columns), 0)
        bits = [jnp.broadcast_to(words[i : i + 1], bit.shape) & bit for i in range(words_size[0])]
        return jnp.concatenate(bits) != 0

    def _reshape(
        self, words: UInt32[Array, "*words"], size: tuple[int, int]
    ) -> Bool[Array, "queries keys"]:
        axis, shape = (2, size[::-1]) if self.is_transposed else (1, size)
        lane = lax.broadcasted_iota(np.uint32, [LANES if i == axis else 1 for i in range(3)], axis)
        bits = jnp.expand_dims(words, axis) & (np.uint32(1) << lane)
        return bits.reshape(shape) != 0

    def _compare_own(self, key: TileKey, index: Words) -> Bool[Array, "queries keys"]:
        """Compare the first bits of each element's own word with the threshold."""
        out0, out1 = threefry2x32(key.words, index)
        drawn = (out0 ^ out1) >> np.uint32(32 - self.bits)
        if self.threshold is None:
            return _is_below(drawn, key.threshold) | key.everything
        if self.threshold == 2**self.bits:
            return jnp.ones_like(drawn, bool)
        return _is_below(drawn, np.uint32(self.threshold))


def _index(
    shape: Sequence[Any], starts: Starts, size: tuple[int, int], is_transposed: bool
) -> Words:
    """Return the row-major index, in an array of a shape, of each element of a tile."""
    batch, *others = shape
    fits_word = batch is not None and math.prod((batch, *others)) <= _WORD
    high, low = starts.example
    for length, start in zip(others, starts[1:], strict=True):
        if fits_word:
            low = low * np.uint32(length) + start
        else:
            along = Places(high, low)
            high, low = add_product((jnp.uint32(0), start), along, product_words((length,)))
    order = -1 if is_transposed else 1
    row, column = (lax.broadcasted_iota(np.int32, size[::order], i) for i in (0, 1)[::order])
    index = (row * np.int32(others[-1]) + column).astype(np.uint32) + low
    if fits_word:
        return jnp.uint32(0), index
    return high + _is_below(index, low).astype(np.uint32), index


def _is_below(x: UInt32[Array, "*shape"], y: Any) -> Bool[Array, "*shape"]:
    """Return `x < y`; vectors on TPUs have signed comparisons only."""
    sign = np.uint32(1 << 31)
    return (x ^ sign).astype(np.int32) < (y ^ sign).astype(np.int32)
