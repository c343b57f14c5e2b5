"""Attention with dropout as Pallas kernels for NVIDIA GPUs, compiled by Triton.

They compute what the kernels of `flash` do. A program keeps its tile of queries, or of keys and
values, in registers, and reads the others in a loop. The sizes are powers of two: `run` pads the
depths, and the lengths to whole tiles.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from regjax._compat import type_like, vary_together
from regjax._dropout.flash_tiles import Flash, Operands, Tile, tile_counts
from regjax._dropout.kernels import require_platform, reverse_mode_only

if TYPE_CHECKING:
    from jaxtyping import Array

_ROWS_OF_BOTH = (((1,), (1,)), ((), ()))


def _finite(x: Array) -> Array:
    return jnp.where(x == -jnp.inf, 0, x)


class Refs(NamedTuple):
    """The inputs of a kernel."""

    scalars: Any
    inverse_keep: Any
    query: Any
    key: Any
    value: Any
    out: Any = None
    dot_out: Any = None
    log_total: Any = None
    allowed: Any = None


def _read(ref: Any, number: Any, size: int) -> Array:
    """Return a tile along the first axis; the whole array if all tiles share it."""
    return ref[...] if ref.shape[0] == 1 else ref[pl.ds(number * size, size), :]


def _allowed(flash: Flash, ref: Any, rows: Any, columns: Any) -> Any:
    if ref is None:
        return None
    sizes = zip((rows, columns), ref.shape, flash.tile, strict=True)
    return ref[tuple(pl.ds(0, 1) if n == 1 else pl.ds(i * t, t) for i, n, t in sizes)]


def _needed(flash: Flash, tile: Tile, columns: int) -> Any:
    """Return the number of tiles of keys that a tile of queries attends to."""
    if not flash.is_causal:
        return columns
    last = tile._start() + tile.first_query + flash.tile[0] - 1
    return jnp.minimum(lax.div(last, np.int32(flash.tile[1])) + 1, columns)


def _forward_kernel(flash: Flash, sizes: Any, columns: int, has_mask: bool, *refs: Any) -> None:
    *inputs, out, log_total = refs
    given = Refs(*inputs[:5], allowed=inputs[5] if has_mask else None)
    rows, head, example = (pl.program_id(axis) for axis in range(3))
    query = given.query[...]
    options = {"precision": flash.precision, "preferred_element_type": np.float32}

    def step(number: Any, state: Any) -> Any:
        top, total, result = state
        tile = Tile(flash, sizes, given.scalars, example, head, rows, number)
        key, value = (_read(x, number, flash.tile[1]) for x in (given.key, given.value))
        scores = tile.scores(query, key, _allowed(flash, given.allowed, rows, number))
        new_top = jnp.maximum(top, scores.max(-1))
        shrink = jnp.exp(top - _finite(new_top))
        powers = jnp.exp(scores - _finite(new_top)[:, None])
        keep = tile.keep(powers.shape)
        dropped = powers if keep is None else jnp.where(keep, powers, 0)
        mixed = jnp.dot(dropped.astype(value.dtype), value, **options)
        return new_top, total * shrink + powers.sum(-1), result * shrink[:, None] + mixed

    tile = Tile(flash, sizes, given.scalars, example, head, rows, 0)
    start = jnp.full(flash.tile[0], -jnp.inf), jnp.zeros(flash.tile[0]), jnp.zeros(out.shape)
    start = tuple(x.astype(np.float32) for x in start)
    top, total, result = lax.fori_loop(0, _needed(flash, tile, columns), step, start)
    seen = total > 0
    sums = jnp.where(seen, total, 1)
    out[...] = (result / sums[:, None] * given.inverse_keep[0, 0]).astype(out.dtype)
    log_total[...] = jnp.where(seen, _finite(top) + jnp.log(sums), 0)


class _Gradients(NamedTuple):
    """What the gradients of a tile require, of shape (queries, keys) or transposed."""

    weights: Array  # dropped, not yet scaled
    scores: Array


def _gradients(
    tile: Tile, given: Refs, query: Any, key: Any, value: Any, *, is_transposed: bool = False
) -> _Gradients:
    """Draw the mask again, and return the derivatives with respect to a tile of scores.

    The mask of a transposed tile is drawn transposed: where Triton transposes a mask, it repeats
    all operations that draw it in another layout, and does not finish in minutes.
    """
    flash, rows = tile.flash, tile.rows
    options = {"precision": flash.precision, "preferred_element_type": np.float32}
    log_total = given.log_total[pl.ds(rows * flash.tile[0], flash.tile[0])]
    out, dot = (_read(x, rows, flash.tile[0]) for x in (given.out, given.dot_out))
    mean = (out.astype(np.float32) * dot.astype(np.float32)).sum(-1)
    scores = tile.scores(query, key, _allowed(flash, given.allowed, rows, tile.columns))
    if is_transposed:
        scores, log_total, mean = scores.T, log_total[None], mean[None]
        mask = flash.mask and dataclasses.replace(flash.mask, is_transposed=True)
        tile = tile._replace(flash=dataclasses.replace(flash, mask=mask))
        products = lax.dot_general(value, dot, _ROWS_OF_BOTH, **options)
    else:
        log_total, mean = log_total[:, None], mean[:, None]
        products = lax.dot_general(dot, value, _ROWS_OF_BOTH, **options)
    weights = jnp.exp(scores - log_total)
    changes = products * given.inverse_keep[0, 0]
    keep = tile.keep(flash.tile)
    dropped = weights
    if keep is not None:
        changes, dropped = (jnp.where(keep, x, 0) for x in (changes, weights))
    dot_scores = weights * (changes - mean)
    return _Gradients(dropped.astype(value.dtype), dot_scores.astype(key.dtype))


def _query_kernel(flash: Flash, sizes: Any, columns: int, has_mask: bool, *refs: Any) -> None:
    *inputs, dot_query = refs
    given = Refs(*inputs) if has_mask else Refs(*inputs, allowed=None)
    rows, head, example = (pl.program_id(axis) for axis in range(3))
    query = _read(given.query, rows, flash.tile[0])
    options = {"precision": flash.precision, "preferred_element_type": np.float32}

    def step(number: Any, total: Any) -> Any:
        tile = Tile(flash, sizes, given.scalars, example, head, rows, number)
        key, value = (_read(x, number, flash.tile[1]) for x in (given.key, given.value))
        found = _gradients(tile, given, query, key, value)
        return total + jnp.dot(found.scores, key, **options)

    tile = Tile(flash, sizes, given.scalars, example, head, rows, 0)
    start = jnp.zeros(dot_query.shape, np.float32)
    total = lax.fori_loop(0, _needed(flash, tile, columns), step, start)
    dot_query[...] = (total * np.float32(flash.scale)).astype(dot_query.dtype)


def _key_kernel(flash: Flash, sizes: Any, rows: int, has_mask: bool, *refs: Any) -> None:
    *inputs, dot_key, dot_value = refs
    given = Refs(*inputs) if has_mask else Refs(*inputs, allowed=None)
    columns, head, example = (pl.program_id(axis) for axis in range(3))
    key, value = given.key[...], given.value[...]
    options = {"precision": flash.precision, "preferred_element_type": np.float32}

    def step(number: Any, totals: Any) -> Any:
        tile = Tile(flash, sizes, given.scalars, example, head, number, columns)
        query, dot = (_read(x, number, flash.tile[0]) for x in (given.query, given.dot_out))
        found = _gradients(tile, given, query, key, value, is_transposed=True)
        dot_key = jnp.dot(found.scores, query, **options)
        dot_value = jnp.dot(found.weights, dot, **options)
        return totals[0] + dot_key, totals[1] + dot_value

    first = 0
    if flash.is_causal and not flash.is_part:
        first = lax.div(columns * flash.tile[1], np.int32(flash.tile[0]))
    totals = jnp.zeros(key.shape, np.float32), jnp.zeros(value.shape, np.float32)
    totals = lax.fori_loop(first, rows, step, totals)
    dot_key[...] = (totals[0] * np.float32(flash.scale)).astype(dot_key.dtype)
    dot_value[...] = (totals[1] * given.inverse_keep[0, 0]).astype(dot_value.dtype)


def forward(flash: Flash, sizes: Any, operands: Operands) -> tuple[Array, Array]:
    """Return the result, and the logarithm of each row's sum."""
    query, key, value, allowed, scalars, inverse_keep = operands
    query = query if flash.interpret else require_platform("triton", query)
    batch, heads, queries, _ = query.shape
    group = heads // key.shape[1]
    rows, columns = tile_counts(flash, queries, key.shape[2])
    arrays = [scalars, inverse_keep, query, key, value] + ([] if allowed is None else [allowed])
    of_rows = _tiles(flash.tile[0])
    specs = [_whole(scalars), _whole(inverse_keep), of_rows(query)]
    specs += [_of_head(x, group) for x in (key, value)]
    specs += [] if allowed is None else [_of_allowed(allowed)]
    out = type_like((batch, heads, queries, value.shape[-1]), value.dtype, query)
    sums = type_like((batch, heads, queries), np.float32, query)
    return pl.pallas_call(
        functools.partial(_forward_kernel, flash, sizes, columns, allowed is not None),
        grid=(rows, heads, batch),
        in_specs=specs,
        out_specs=[of_rows(out), of_rows(sums)],
        out_shape=[out, sums],
        compiler_params=_parameters(query),
        interpret=flash.interpret,
        name="regjax_attention",
    )(*arrays)


def backward(
    flash: Flash, sizes: Any, operands: Operands, out: Array, log_total: Array, dot_out: Array
) -> tuple[Array, Array, Array]:
    """Return the gradients of the query, the key and the value."""
    query, key, value, allowed, scalars, inverse_keep = operands
    batch, heads, queries, _ = query.shape
    kv_heads, keys = key.shape[1:3]
    group = heads // kv_heads
    rows, columns = tile_counts(flash, queries, keys)
    has_mask = allowed is not None
    arrays = [scalars, inverse_keep, query, key, value, out, dot_out, log_total]
    arrays += [allowed] if has_mask else []
    options = {"compiler_params": _parameters(query), "interpret": flash.interpret}
    scalar_specs = [_whole(scalars), _whole(inverse_keep)]
    specs = [*scalar_specs, _of_head(query, 1), *(_of_head(x, group) for x in (key, value))]
    specs += [_of_head(x, 1) for x in (out, dot_out, log_total)]
    specs += [_of_allowed(allowed)] if has_mask else []
    (dot_query,) = pl.pallas_call(
        functools.partial(_query_kernel, flash, sizes, columns, has_mask),
        grid=(rows, heads, batch),
        in_specs=specs,
        out_specs=[_tiles(flash.tile[0])(query)],
        out_shape=[type_like(query.shape, query.dtype, query)],
        name="regjax_attention_dot_query",
        **options,
    )(*arrays)
    # Each head has its own gradients of a key that heads share; they add up in float32.
    of_columns, wide = _tiles(flash.tile[1], group), np.float32 if group > 1 else key.dtype
    dots = [type_like((batch, heads, *x.shape[2:]), wide, query) for x in (key, value)]
    specs = [*scalar_specs, _of_head(query, 1), of_columns(key), of_columns(value)]
    specs += [_of_head(x, 1) for x in (out, dot_out, log_total)]
    specs += [_of_allowed(allowed)] if has_mask else []
    found = pl.pallas_call(
        functools.partial(_key_kernel, flash, sizes, rows, has_mask),
        grid=(columns, heads, batch),
        in_specs=specs,
        out_specs=[_tiles(flash.tile[1])(x) for x in dots],
        out_shape=dots,
        name="regjax_attention_dot_key",
        **options,
    )(*arrays)
    if group > 1:
        found = [x.reshape(batch, kv_heads, group, *x.shape[2:]).sum(2) for x in found]
    dot_key, dot_value = found
    return dot_query, dot_key.astype(key.dtype), dot_value.astype(value.dtype)


def _whole(array: Array) -> pl.BlockSpec:
    return pl.BlockSpec(array.shape, lambda i, h, b: (0,) * array.ndim)


def _tiles(size: int, group: int = 1) -> Any:
    """Return a function from an array (batch, heads, length, ...) to its tiles along the length."""

    def tiles(array: Any) -> pl.BlockSpec:
        rest = array.shape[3:]
        zeros = (0,) * len(rest)
        return pl.BlockSpec(
            (None, None, size, *rest), lambda i, h, b: (b, lax.div(h, group), i, *zeros)
        )

    return tiles


def _of_head(array: Array, group: int) -> pl.BlockSpec:
    """Return the whole of a head; `group` heads of the grid share it."""
    zeros = (0,) * (array.ndim - 2)
    return pl.BlockSpec(
        (None, None, *array.shape[2:]), lambda i, h, b: (b, lax.div(h, group), *zeros)
    )


def _of_allowed(allowed: Array) -> pl.BlockSpec:
    """Return the mask of a head, which all heads or examples may share."""
    batch, heads, *rest = allowed.shape

    def index(i: Any, h: Any, b: Any) -> tuple[Any, ...]:
        return b if batch > 1 else 0, h if heads > 1 else 0, 0, 0

    return pl.BlockSpec((None, None, *rest), index)


def _parameters(query: Array) -> Any:
    # A warp has registers for a part of a tile only: a deep one is divided among more.
    is_deep = query.shape[-1] * query.dtype.itemsize >= 512
    return plgpu.CompilerParams(num_warps=8 if is_deep else 4, num_stages=2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def flash_attention(flash: Flash, sizes: Any, operands: Operands) -> Array:
    """Return the result of attention; see `Flash` and `Operands`."""
    return forward(flash, sizes, operands)[0]


def _save(flash: Flash, sizes: Any, operands: Operands) -> tuple[Array, Any]:
    out, log_total = forward(flash, sizes, operands)
    return out, (operands, out, log_total)


def _pull_back(flash: Flash, sizes: Any, saved: Any, dot_out: Array) -> tuple[Operands]:
    operands, out, log_total = saved
    dots = backward(flash, sizes, operands, out, log_total, dot_out)
    return (Operands(*dots, None, None, None),)


flash_attention.defvjp(_save, _pull_back)


def tile_of(query: Array, keys: int) -> tuple[int, int]:
    """Return the numbers of queries and keys of a tile, which must fit the registers."""
    del keys  # shorter sequences are padded
    size = 64 if query.shape[-1] * query.dtype.itemsize <= 256 else 32
    return size, size


@functools.partial(jax.jit, static_argnums=0)
def _in_whole_tiles(flash: Flash, operands: Operands) -> Array:
    query, key, value, allowed, _, _ = operands
    sizes = query.shape[0], query.shape[2], key.shape[2]
    rows, columns = flash.tile
    padded = operands._replace(
        query=_padded(query, rows), key=_padded(key, columns), value=_padded(value, columns)
    )
    if allowed is not None:
        sizes_and_tiles = zip(allowed.shape[2:], flash.tile, strict=True)
        widths = [0 if size == 1 else -size % tile for size, tile in sizes_and_tiles]
        ends = [(0, 0), (0, 0), *((0, width) for width in widths)]
        padded = padded._replace(allowed=jnp.pad(allowed, ends))
    out: Any = flash_attention(flash, sizes, padded)
    return out[:, :, : sizes[1], : value.shape[3]]


def _padded(x: Array, length: int) -> Array:
    """Return an array with zeros up to whole tiles, and a depth that is a power of two."""
    depth = 1 << (x.shape[-1] - 1).bit_length()
    return jnp.pad(x, [(0, 0), (0, 0), (0, -x.shape[2] % length), (0, depth - x.shape[-1])])


def run(flash: Flash, operands: Operands) -> Array:
    """Return the result of attention, inside and outside `shard_map`."""
    operands = Operands(*vary_together(tuple(operands)))
    if flash.mask is not None:
        flash = dataclasses.replace(flash, mask=dataclasses.replace(flash.mask, is_reshaped=True))
    with reverse_mode_only("triton"):
        return _in_whole_tiles(flash, operands)
