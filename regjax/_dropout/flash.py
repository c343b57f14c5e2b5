"""Attention with dropout as Pallas kernels for TPUs: forward, and the two of the backward pass.

A kernel reads tiles of queries and keys, and draws the mask of a tile at its place in the whole
matrix; neither scores nor mask ever leave the core. The forward pass computes what the blockwise
form does, with a block of one tile.

References:
    Dao et al., "FlashAttention", NeurIPS 2022.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from regjax._compat import type_like, vary_together
from regjax._dropout.flash_tiles import (
    Flash,
    Operands,
    Tile,
    last_needed,
    of_rows,
    specs,
    tile_counts,
)
from regjax._dropout.kernels import require_platform, reverse_mode_only

if TYPE_CHECKING:
    from jaxtyping import Array


def _finite(x: Array) -> Array:
    return jnp.where(x == -jnp.inf, 0, x)


def _forward_kernel(flash: Flash, sizes: Any, has_mask: bool, with_sums: bool, *every: Any) -> None:
    scalars, inverse_keep, query, key, value, *refs = every
    allowed, refs = (refs[0], refs[1:]) if has_mask else (None, refs)
    out, *refs = refs
    log_total, refs = (refs[0], refs[1:]) if with_sums else (None, refs)
    top, total, result = refs
    example, head, rows, columns = (pl.program_id(axis) for axis in range(4))
    tile = Tile(flash, sizes, scalars, example, head, rows, columns)

    @pl.when(columns == 0)
    def _():
        top[...] = jnp.full_like(top, -jnp.inf)
        total[...] = jnp.zeros_like(total)
        result[...] = jnp.zeros_like(result)

    @pl.when(tile.is_needed())
    def _():
        scores = tile.scores(query[...], key[...], allowed)
        new_top = jnp.maximum(top[...], scores.max(-1, keepdims=True))
        shrink = jnp.exp(top[...] - _finite(new_top))
        powers = jnp.exp(scores - _finite(new_top))
        keep = tile.keep(powers.shape)
        dropped = powers if keep is None else jnp.where(keep, powers, 0)
        dropped = dropped.astype(value.dtype)
        options = {"precision": flash.precision, "preferred_element_type": np.float32}
        mixed = jnp.dot(dropped, tile.key_rows(value[...]), **options)
        top[...] = new_top
        total[...] = total[...] * shrink + powers.sum(-1, keepdims=True)
        result[...] = result[...] * shrink + mixed

    @pl.when(columns == pl.num_programs(3) - 1)
    def _():
        seen = total[...] > 0
        sums = jnp.where(seen, total[...], 1)
        scale = inverse_keep[0, 0]
        out[...] = (result[...] / sums * scale).astype(out.dtype)
        if log_total is not None:
            column = jnp.where(seen, _finite(top[...]) + jnp.log(sums), 0)
            log_total[...] = _to_row(column)


def _to_row(column: Array) -> Array:
    """Return a column as a row: on a TPU, a transposition of a whole tile."""
    return jnp.broadcast_to(column, (column.shape[0], 128)).T[:1]


def _to_columns(row: Array) -> Array:
    """Return 128 equal columns."""
    return jnp.broadcast_to(row, (128, row.shape[1])).T


def _detour(words: Array) -> Array:
    """Return words unchanged, by way of two rotations.

    The compiler schedules a block from its end. The rotations take long in an idle unit, and move
    arithmetic of the words into the cycles of the first matrix products, otherwise without any.
    """
    return pltpu.roll(pltpu.roll(words, 64, 1), words.shape[1] - 64, 1)


class _Rows(NamedTuple):
    """A tile of queries, and what the derivatives of their scores require."""

    query: Array
    dot_out: Array
    mean: Array  # of the changes of a query's weights
    log_total: Array


def _mean(tile: Tile, out: Any, dot_out: Any) -> Array:
    wide, dot = (tile.query_rows(x[...]).astype(np.float32) for x in (out, dot_out))
    return (wide * dot).sum(-1, keepdims=True)


class _Gradients(NamedTuple):
    """The weights of a tile, dropped but not yet scaled, and the derivatives of its scores."""

    weights: Array
    scores: Array


def _gradients(
    tile: Tile,
    rows: _Rows,
    key: Array,
    value: Array,
    allowed: Any,
    inverse_keep: Any,
    **options_of_mask: Any,
) -> _Gradients:
    """Draw the mask again, and return the derivatives with respect to a tile of scores."""
    options = {"precision": tile.flash.precision, "preferred_element_type": np.float32}
    scores = tile.scores(rows.query, key, allowed)
    weights = jnp.exp(scores - rows.log_total)
    if tile.sizes[1] % tile.flash.tile[0]:  # sums of queries that do not exist are undefined
        row = lax.broadcasted_iota(np.int32, scores.shape, 0) + tile.first_query
        weights = jnp.where(row < tile.sizes[1], weights, 0)
    changes = lax.dot_general(rows.dot_out, value, (((1,), (1,)), ((), ())), **options)
    changes = changes * inverse_keep[0, 0]
    keep = tile.keep(scores.shape, **options_of_mask)
    dropped = weights
    if keep is not None:
        changes, dropped = (jnp.where(keep, x, 0) for x in (changes, weights))
    dot_scores = weights * (changes - rows.mean)
    return _Gradients(dropped.astype(value.dtype), dot_scores.astype(key.dtype))


def _query_kernel(flash: Flash, sizes: Any, has_mask: bool, *refs: Any) -> None:
    scalars, inverse_keep, query, key, value, out, dot_out, log_row = refs[:8]
    allowed = refs[8] if has_mask else None
    dot_query, total, mean, log_total = refs[-4:]
    example, head, rows, columns = (pl.program_id(axis) for axis in range(4))
    tile = Tile(flash, sizes, scalars, example, head, rows, columns)

    @pl.when(columns == 0)
    def _():
        total[...] = jnp.zeros_like(total)
        mean[...] = jnp.broadcast_to(_mean(tile, out, dot_out), mean.shape)
        log_total[...] = _to_columns(log_row[...])

    @pl.when(tile.is_needed())
    def _():
        options = {"precision": flash.precision, "preferred_element_type": np.float32}
        queries, dot = (tile.query_rows(x[...]) for x in (query, dot_out))
        keys, values = (tile.key_rows(x[...]) for x in (key, value))
        copies = flash.tile[1] // 128
        of_rows = _Rows(queries, dot, *(jnp.tile(x[...], (1, copies)) for x in (mean, log_total)))
        found = _gradients(tile, of_rows, keys, values, allowed, inverse_keep, detour=_detour)
        total[...] += jnp.dot(found.scores, keys, **options)

    @pl.when(columns == pl.num_programs(3) - 1)
    def _():
        dot_query[...] = (total[...] * np.float32(flash.scale)).astype(dot_query.dtype)


def _key_kernel(flash: Flash, sizes: Any, group: int, has_mask: bool, *refs: Any) -> None:
    scalars, inverse_keep, query, key, value, out, dot_out, log_row = refs[:8]
    allowed = refs[8] if has_mask else None
    dot_key, dot_value, key_total, value_total = refs[-4:]
    example, kv_head, columns, step = (pl.program_id(axis) for axis in range(4))
    count = pl.num_programs(3) // group
    head, rows = kv_head * group + lax.div(step, count), lax.rem(step, count)
    tile = Tile(flash, sizes, scalars, example, head, rows, columns)

    @pl.when(step == 0)
    def _():
        key_total[...] = jnp.zeros_like(key_total)
        value_total[...] = jnp.zeros_like(value_total)

    @pl.when(tile.is_needed())
    def _():
        options = {"precision": flash.precision, "preferred_element_type": np.float32}
        queries, dot = (tile.query_rows(x[...]) for x in (query, dot_out))
        keys, values = (tile.key_rows(x[...]) for x in (key, value))
        log_total = _to_columns(log_row[...])[:, :1]
        of_rows = _Rows(queries, dot, _mean(tile, out, dot_out), log_total)
        found = _gradients(tile, of_rows, keys, values, allowed, inverse_keep)
        over_queries = (((0,), (0,)), ((), ()))
        key_total[...] += lax.dot_general(found.scores, queries, over_queries, **options)
        value_total[...] += lax.dot_general(found.weights, dot, over_queries, **options)

    @pl.when(step == pl.num_programs(3) - 1)
    def _():
        dot_key[...] = (key_total[...] * np.float32(flash.scale)).astype(dot_key.dtype)
        dot_value[...] = (value_total[...] * inverse_keep[0, 0]).astype(dot_value.dtype)


def forward(flash: Flash, operands: Operands, *, with_sums: bool = False) -> Any:
    """Return the result, and on demand the logarithm of each row's sum, a row for each head."""
    query, key, value, allowed, _, _ = operands
    query = query if flash.interpret else require_platform("pallas", query)
    batch, heads, queries, _ = query.shape
    kv_heads, keys, features = value.shape[1:]
    rows, columns = tile_counts(flash, queries, keys)

    def place(b: Any, h: Any, i: Any, j: Any) -> tuple[Any, ...]:
        return b, h, i, last_needed(flash, i, j)

    out = type_like((batch, heads, queries, features), value.dtype, query)
    out_specs, out_shape = [of_rows(flash, out, place)], [out]
    if with_sums:
        block = None, None, 1, flash.tile[0]
        out_specs.append(pl.BlockSpec(block, lambda b, h, i, j: (b, h, 0, i)))
        out_shape.append(type_like((batch, heads, 1, queries), np.float32, query))
    sizes = batch, queries, keys
    has_mask = allowed is not None
    found = pl.pallas_call(
        functools.partial(_forward_kernel, flash, sizes, has_mask, with_sums),
        grid=(batch, heads, rows, columns),
        in_specs=specs(flash, operands, None, heads // kv_heads, place),
        out_specs=out_specs,
        out_shape=out_shape,
        scratch_shapes=[
            pltpu.VMEM((flash.tile[0], width), jnp.float32) for width in (1, 1, features)
        ],
        compiler_params=_parameters(1),
        interpret=flash.interpret,
        name="regjax_attention",
    )(operands.scalars, operands.inverse_keep, query, key, value, *([allowed] if has_mask else []))
    return found if with_sums else found[0]


def backward(
    flash: Flash, operands: Operands, out: Array, log_total: Array, dot_out: Array
) -> tuple[Array, Array, Array]:
    """Return the gradients of the query, the key and the value."""
    query, key, value, allowed, _, _ = operands
    batch, heads, queries, _ = query.shape
    kv_heads, keys = value.shape[1:3]
    group, sizes = heads // kv_heads, (batch, queries, keys)
    rows, columns = tile_counts(flash, queries, keys)
    arrays = [operands.scalars, operands.inverse_keep, query, key, value, out, dot_out, log_total]
    has_mask = allowed is not None
    arrays += [allowed] if has_mask else []
    call = functools.partial(pl.pallas_call, interpret=flash.interpret)

    def at_queries(b: Any, h: Any, i: Any, j: Any) -> tuple[Any, ...]:
        return b, h, i, last_needed(flash, i, j)

    grid = batch, heads, rows, columns
    (dot_query,) = call(
        functools.partial(_query_kernel, flash, sizes, has_mask),
        grid=grid,
        in_specs=specs(flash, operands, out, group, at_queries),
        out_specs=[of_rows(flash, query, at_queries)],
        out_shape=[type_like(query.shape, query.dtype, query)],
        scratch_shapes=[
            pltpu.VMEM((flash.tile[0], width), jnp.float32) for width in (query.shape[-1], 128, 128)
        ],
        compiler_params=_parameters(1),
        name="regjax_attention_dot_query",
    )(*arrays)

    def at_keys(b: Any, h: Any, j: Any, step: Any) -> tuple[Any, ...]:
        head, i = h * group + lax.div(step, rows), lax.rem(step, rows)
        if flash.is_causal and not flash.is_part:
            first = lax.div(j * flash.tile[1], flash.tile[0])
            i = jnp.minimum(jnp.maximum(i, first), rows - 1)
        return b, head, i, j

    def of_keys(array: Array) -> pl.BlockSpec:
        block = None, None, flash.tile[1], array.shape[-1]
        return pl.BlockSpec(block, lambda b, h, j, step: (b, h, j, 0))

    dot_key, dot_value = call(
        functools.partial(_key_kernel, flash, sizes, group, has_mask),
        grid=(batch, kv_heads, columns, group * rows),
        in_specs=specs(flash, operands, out, group, at_keys),
        out_specs=[of_keys(key), of_keys(value)],
        out_shape=[type_like(x.shape, x.dtype, query) for x in (key, value)],
        scratch_shapes=[
            pltpu.VMEM((flash.tile[1], x.shape[-1]), jnp.dtype(np.float32)) for x in (key, value)
        ],
        compiler_params=_parameters(1),
        name="regjax_attention_dot_key",
    )(*arrays)
    return dot_query, dot_key, dot_value


def _parameters(sequential: int) -> Any:
    kinds: Any = ["parallel"] * (4 - sequential) + ["arbitrary"] * sequential
    return pltpu.CompilerParams(dimension_semantics=tuple(kinds))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def flash_attention(flash: Flash, operands: Operands) -> Array:
    """Return the result of attention; see `Flash` and `Operands`."""
    return forward(flash, operands)


def _save(flash: Flash, operands: Operands) -> tuple[Array, Any]:
    out, log_total = forward(flash, operands, with_sums=True)
    return out, (operands, out, log_total)


def _pull_back(flash: Flash, saved: Any, dot_out: Array) -> tuple[Operands]:
    operands, out, log_total = saved
    dots = backward(flash, operands, out, log_total, dot_out)
    return (Operands(*dots, None, None, None),)


flash_attention.defvjp(_save, _pull_back)


# Outside any jit, each call would build and compile the kernels again.
_flash_in_one = jax.jit(flash_attention, static_argnums=0)


def run(flash: Flash, operands: Operands) -> Array:
    """Return the result of attention, inside and outside `shard_map`."""
    operands = Operands(*vary_together(tuple(operands)))
    with reverse_mode_only("pallas"):
        return _flash_in_one(flash, operands)
