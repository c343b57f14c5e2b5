"""The tiles of attention that a kernel reads, with their scores and their mask."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from regjax._random.tiles import Starts, TileKey, TileMask
from regjax._random.xla import rounded

if TYPE_CHECKING:
    from jaxtyping import Array

# The scalars of a call are the two words of the key, the threshold, whether all is kept, the first
# head and the first query, and the high words, then the low words, of the numbers of the examples.
_HEAD, _QUERY, _EXAMPLES = 4, 5, 6


@dataclasses.dataclass(frozen=True)
class Flash:
    """The static part of a call: one value, hashable under jit."""

    scale: float
    is_causal: bool
    precision: Any
    mask: TileMask | None  # None without dropout
    is_shared: bool  # whether all rows and heads share one mask
    tile: tuple[int, int] = (256, 512)  # queries and keys
    is_part: bool = False  # whether the first query may not be that of the whole matrix
    interpret: bool = False


class Operands(NamedTuple):
    """The arrays of a call, with heads before lengths; the batch has one dimension."""

    query: Array
    key: Array
    value: Array
    allowed: Array | None  # int8, zero where a query may not attend
    scalars: Any  # uint32, of shape (1, 6 + 2 * batch)
    inverse_keep: Any  # of shape (1, 1)


class Tile(NamedTuple):
    """A tile of the matrix of scores."""

    flash: Flash
    sizes: tuple[int, int, int]  # examples, queries and keys of the operands
    scalars: Any
    example: Any
    head: Any
    rows: Any  # the number of the tile along the queries
    columns: Any

    @property
    def first_query(self) -> Any:
        """The first query of the tile, in the operands."""
        return self.rows * self.flash.tile[0]

    @property
    def first_key(self) -> Any:
        return self.columns * self.flash.tile[1]

    def is_needed(self) -> Any:
        """Return whether any query of the tile may attend to any of its keys."""
        if not self.flash.is_causal:
            return True
        return self.first_key < self._start() + self.first_query + self.flash.tile[0]

    def _start(self) -> Any:
        return self.scalars[0, _QUERY].astype(np.int32) if self.flash.is_part else 0

    def scores(self, query: Array, key: Array, allowed: Any) -> Array:
        """Return the scores, -inf where a query may not attend."""
        options = {"precision": self.flash.precision, "preferred_element_type": np.float32}
        scores = lax.dot_general(query, key, (((1,), (1,)), ((), ())), **options)
        scores = scores * np.float32(self.flash.scale)
        if self.flash.interpret:  # a CPU would contract the product with the difference to the top
            scores = rounded(scores)
        along = lax.broadcasted_iota(np.int32, scores.shape, 1) + self.first_key
        if allowed is not None:
            scores = jnp.where(allowed[...].astype(np.int32) != 0, scores, -jnp.inf)
        if self.flash.is_causal:
            first = self.first_query + self._start()
            row = lax.broadcasted_iota(np.int32, scores.shape, 0) + first
            scores = jnp.where(along <= row, scores, -jnp.inf)
        if self.sizes[2] % self.flash.tile[1]:
            scores = jnp.where(along < self.sizes[2], scores, -jnp.inf)
        return scores

    def keep(self, size: tuple[int, ...], **options: Any) -> Array | None:
        """Return the mask of the tile; None without dropout."""
        mask, scalars = self.flash.mask, self.scalars
        if mask is None:
            return None

        def word(place: Any) -> Any:
            return scalars[0, place]

        zero = np.uint32(0)
        example, head = (zero, zero), zero
        if not self.flash.is_shared:
            high, low = _EXAMPLES + self.example, _EXAMPLES + self.sizes[0] + self.example
            example = word(high), word(low)
            head = word(_HEAD) + self.head.astype(np.uint32)
        query = word(_QUERY) + self.first_query.astype(np.uint32)
        starts = Starts(example, head, query, self.first_key.astype(np.uint32))
        key = TileKey((word(0), word(1)), word(2), word(3) != 0)
        return mask.draw(key, starts, (size[0], size[1]), **options)

    def key_rows(self, array: Array) -> Array:
        """Return the rows of a tile of keys or values; zeros after the last key."""
        return _rows_before(array, self.first_key, self.sizes[2])

    def query_rows(self, array: Array) -> Array:
        """Return the rows of a tile of queries; zeros after the last query."""
        return _rows_before(array, self.first_query, self.sizes[1])


def _rows_before(array: Array, first: Any, size: int) -> Array:
    # What a tile reads beyond the end of an array is undefined.
    if size % array.shape[0] == 0:
        return array
    row = lax.broadcasted_iota(np.int32, array.shape, 0) + first
    return jnp.where(row < size, array, jnp.zeros_like(array))


def tile_counts(flash: Flash, queries: int, keys: int) -> tuple[int, int]:
    """Return the number of tiles along the queries and the keys."""
    return -(-queries // flash.tile[0]), -(-keys // flash.tile[1])


def last_needed(flash: Flash, i: Any, j: Any) -> Any:
    """Return the tile of keys to read: beyond the last that a query attends to, none is new."""
    if not flash.is_causal or flash.is_part:
        return j
    return jnp.minimum(j, lax.div((i + 1) * flash.tile[0] - 1, flash.tile[1]))


def of_rows(flash: Flash, array: Any, place: Any) -> pl.BlockSpec:
    block = None, None, flash.tile[0], array.shape[-1]
    return pl.BlockSpec(block, lambda *ids: (*place(*ids)[:3], 0))


def specs(flash: Flash, operands: Operands, out: Any, group: int, place: Any) -> list[pl.BlockSpec]:
    """Return the tiles of all inputs; those of the backward pass if `out` is given."""

    def of_keys(array: Array) -> pl.BlockSpec:
        def index(*ids: Any) -> tuple[Any, ...]:
            b, h, _, j = place(*ids)
            return b, lax.div(h, group) if group > 1 else h, j, 0

        return pl.BlockSpec((None, None, flash.tile[1], array.shape[-1]), index)

    def of_sums(*ids: Any) -> tuple[Any, ...]:
        b, h, i, _ = place(*ids)
        return b, h, 0, i

    found = [pl.BlockSpec(memory_space=pltpu.SMEM)] * 2
    found.append(of_rows(flash, operands.query, place))
    found += [of_keys(operands.key), of_keys(operands.value)]
    if out is not None:
        found += [of_rows(flash, out, place)] * 2
        found.append(pl.BlockSpec((None, None, 1, flash.tile[0]), of_sums))
    if operands.allowed is not None:
        found.append(_of_allowed(flash, operands.allowed, place))
    return found


def _of_allowed(flash: Flash, allowed: Array, place: Any) -> pl.BlockSpec:
    """Return the tile of a mask, which one query, head or example may share with all others."""
    own = [size != 1 for size in allowed.shape]
    sizes = [tile if is_own else 1 for tile, is_own in zip(flash.tile, own[2:], strict=True)]

    def index(*ids: Any) -> tuple[Any, ...]:
        return tuple(at if is_own else 0 for at, is_own in zip(place(*ids), own, strict=True))

    return pl.BlockSpec((None, None, *sizes), index)
