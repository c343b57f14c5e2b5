"""Attention by blocks of keys, in memory linear in sequence length."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from regjax._compat import scan_linear
from regjax._dropout.core import (
    inverse_keep_prob,
    keep_prob_of,
    mask_sharding,
    real_dtype,
)
from regjax._dropout.scores import Allowed, Scores, per_query
from regjax._random.bernoulli import EXACT
from regjax._random.collect import BlockwisePlan
from regjax._random.events import BlockwiseCall, observer
from regjax._random.keys import consume, key_words
from regjax._random.threefry import Span
from regjax._random.xla import materialize, rounded

if TYPE_CHECKING:
    from jax.typing import ArrayLike
    from jaxtyping import Array, Float

    from regjax._random.bernoulli import MaskSampler
    from regjax._random.keys import KeyLike


@dataclasses.dataclass(frozen=True)
class Blocks:
    """The static part of blockwise attention: one value, hashable under jit."""

    scores: Scores
    size: int  # keys per block
    keys: int  # the number of keys; those of the last block may be padding
    broadcast_dropout: bool

    def firsts(self) -> Array:
        """Return the first key of each block."""
        return jnp.arange(0, self.keys, self.size, dtype=np.int32)

    def shape(self, query: Array) -> tuple[int, ...]:
        """Return the shape of the whole mask."""
        *batch, queries, heads, _ = query.shape
        rows = [1] * (len(batch) + 1) if self.broadcast_dropout else [*batch, heads]
        return (*rows, queries, self.keys)

    def plan(self, query: Array, rate: float | Float[Array, ""]) -> BlockwisePlan:
        """Return the properties of the mask that observers know before it is drawn."""
        *batch, queries, heads, _ = query.shape
        scores = (*batch, heads, queries, self.keys)
        number = rate if isinstance(rate, float) else None
        return BlockwisePlan(self.shape(query), scores, -(-self.keys // self.size), number)

    def keep(self, weights: Array, query: Array, draw: _Draw | None, first: Array) -> Array | None:
        """Return the mask of a block's weights; None without dropout."""
        if draw is None:
            return None
        whole = self.shape(query)
        layout = mask_sharding(weights, tuple(i for i, n in enumerate(whole) if n == 1))
        part = (*[None] * len(whole[:-1]), Span(first, self.size))
        keep_prob = draw.keep_prob
        number = keep_prob.value if isinstance(keep_prob, _Number) else keep_prob
        keep = draw.sampler.draw_part(draw.words, number, whole, part, layout)
        return materialize(keep) if self.broadcast_dropout else keep


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Number:
    """A number that is static under jit."""

    value: float


class _Draw(NamedTuple):
    """The sampler of a mask, and the arrays that it is drawn from."""

    sampler: MaskSampler
    words: Array
    keep_prob: Array | _Number
    # For observers: the ticket of this call, the flag that turns it off, and the rate.
    recorded: tuple[ArrayLike, ArrayLike, ArrayLike] | None


def _where_kept(keep: Array | None, weights: Array) -> Array:
    """Return the weights with zeros where the mask has them, not yet scaled."""
    return weights if keep is None else jnp.where(keep, weights, 0)


# The softmax requires the largest score and the sum of each row. The forward pass accumulates both,
# as in FlashAttention. The derivative has both already and is a sum over independent blocks: a scan
# without a state to store, which JAX can transpose and differentiate again.
@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _attend(
    blocks: Blocks, query: Array, key: Array, value: Array, bias: Any, allowed: Any, draw: Any
) -> tuple[Array, Array]:
    """Return the result, unscaled, in float32 or wider, and the logarithm of each row's sum.

    The logarithm is -inf for a query that attends to no key. `key`, `value`, `bias` and the mask of
    `allowed` are padded to whole blocks; `draw` is a `_Draw`, or None.
    """
    # Made from the query, to have its layout over devices.
    rows = jnp.swapaxes(jnp.zeros_like(query[..., 0], real_dtype(query.dtype)), -1, -2)
    features = (*query.shape[:-1], value.shape[-1])
    start = jnp.full_like(rows, -jnp.inf), rows, jnp.broadcast_to(per_query(rows), features)

    def block(state: tuple[Array, Array, Array], first: Array) -> tuple[Any, None]:
        top, total, result = state
        part = functools.partial(_part, first=first, size=blocks.size)
        seen = allowed._replace(mask=part(allowed.mask))
        scores = blocks.scores(query, part(key, -3), part(bias), seen, first, blocks.keys)
        new_top = jnp.maximum(top, scores.max(-1))
        shrink = jnp.exp(top - _finite(new_top))
        powers = jnp.exp(scores - _finite(new_top)[..., None])
        keep = blocks.keep(powers, query, draw, first)
        if record_block:
            record_block(first, keep, scores)
        dropped = _where_kept(keep, powers).astype(value.dtype)
        mixed = blocks.scores.mixed_values(dropped, part(value, -3))
        total = total * shrink + powers.sum(-1)
        return (new_top, total, result * per_query(shrink) + mixed), None

    # The derivative draws the same masks again, and records nothing.
    record_block = record_end = None
    if draw is not None and draw.recorded is not None and (observers := observer()):
        ticket, off, rate = draw.recorded
        words, inputs = (draw.words[0], draw.words[1]), _hash(query, key, bias, *allowed)
        call = BlockwiseCall(ticket, words, inputs, off)
        record_block = functools.partial(observers.block, call)
        record_end = functools.partial(observers.end, call, rate, draw.sampler.numbers)
    (top, total, result), _ = lax.scan(block, start, blocks.firsts())
    seen = total > 0
    total = jnp.where(seen, total, 1)
    log_total = jnp.where(seen, _finite(top) + jnp.log(total), -jnp.inf)
    if record_end:
        record_end(_finite(log_total))
    return result / per_query(total), log_total


@_attend.defjvp
def _attend_jvp(blocks: Blocks, primals: Any, tangents: Any) -> tuple[Any, Any]:
    result, log_total = _attend(blocks, *primals)
    dot_query, *dots, _, _ = tangents
    # Wide, and cast inside a block, so that the blocks' gradients of a query add up in float32.
    dots = (dot_query.astype(result.dtype), *dots)

    # Recomputed in the backward pass, block by block, and never stored.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def block(primals: Any, dots: Any, log_total: Array, first: Array) -> tuple[Array, Array]:
        query, key, value, bias, allowed, draw = primals
        part = functools.partial(_part, first=first, size=blocks.size)
        seen = allowed._replace(mask=part(allowed.mask))

        def scores_of(query: Array, key: Array, bias: Any) -> Array:
            return blocks.scores(query, part(key, -3), part(bias), seen, first, blocks.keys)

        def mixed(weights: Array, value: Array) -> Array:
            keep = blocks.keep(weights, query, draw, first)
            dropped = _where_kept(keep, weights).astype(value.dtype)
            return blocks.scores.mixed_values(dropped, part(value, -3))

        dot_query, dot_key, dot_value, dot_bias = dots
        dot_query = dot_query.astype(query.dtype)
        scores, dot_scores = jax.jvp(scores_of, (query, key, bias), (dot_query, dot_key, dot_bias))
        weights = jnp.exp(scores - _finite(log_total)[..., None])
        changes = weights * dot_scores
        return mixed(changes, value) + mixed(weights, dot_value), changes.sum(-1)

    def step(dots: Any, sums: Any, first: Array) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, sums, block(primals, dots, log_total, first)), None

    zeros = (jnp.zeros_like(result), jnp.zeros_like(log_total))
    (dot_result, dot_log_total), _ = scan_linear(step, dots, zeros, blocks.firsts())
    dot_result -= result * per_query(dot_log_total)
    return (result, log_total), (dot_result, dot_log_total)


# Outside any jit, each call would build and compile another scan.
_attend_in_one = jax.jit(_attend, static_argnums=0)


def blockwise(
    blocks: Blocks,
    sampler: MaskSampler,
    query: Array,
    key: Array,
    value: Array,
    bias: Any,
    allowed: Allowed,
    dropout_rng: KeyLike | None = None,
    rate: float | Float[Array, ""] = 0.0,
    recorded: tuple[ArrayLike, ArrayLike, ArrayLike] | None = None,
) -> tuple[Array, Array]:
    """Return the result, and the logarithm of each row's sum in float32 or wider."""
    # At least one block, even without keys: a scan traces one before it runs.
    whole = blocks.size * (-(-blocks.keys // blocks.size) if blocks.keys else 1)
    padding = whole - blocks.keys
    pad = functools.partial(_padded, padding=padding)
    wide = real_dtype(query.dtype)
    draw, scale = None, wide(1)
    if dropout_rng is not None:
        rate = rounded(rate) if isinstance(rate, jax.Array) else rate
        keep_prob = keep_prob_of(rate, query.dtype)
        consume(dropout_rng)
        words = jnp.stack(key_words(dropout_rng))
        # A number shows the packed sampler which words it needs. The exact one needs all bits, and
        # one program then serves every rate.
        is_static = isinstance(keep_prob, float) and sampler is not EXACT
        share = _Number(float(keep_prob)) if is_static else jnp.asarray(keep_prob, np.float32)
        draw = _Draw(sampler, words, share, recorded)
        realized = sampler.realized_keep_prob(keep_prob)
        realized = realized.astype(wide) if isinstance(realized, jax.Array) else realized
        scale = inverse_keep_prob(realized, query.dtype)
    allowed = allowed._replace(mask=pad(allowed.mask))
    arrays = query, pad(key, -3), pad(value, -3), pad(bias), allowed
    result, log_total = _attend_in_one(blocks, *arrays, draw)
    result = result * scale
    if isinstance(rate, jax.Array):
        result = jnp.where((rate >= 0) & (rate <= 1), result, jnp.nan)
    return result.astype(value.dtype), log_total


def _finite(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    return jnp.where(x == -jnp.inf, 0, x)


def _hash(*arrays: Array | None) -> Array:
    """Return a number that distinguishes arrays, from their bits weighted by their positions."""
    total = jnp.zeros((), jnp.uint32)
    for x in arrays:
        if x is not None:
            width = min(32, 8 * x.dtype.itemsize)
            bits = x if x.dtype == np.bool_ else lax.bitcast_convert_type(x, f"uint{width}")
            for dim in range(bits.ndim):  # one dimension at a time keeps the layout over devices
                places = lax.broadcasted_iota(jnp.uint32, bits.shape, dim)
                bits = bits.astype(jnp.uint32) * (np.uint32(2654435761) * places + np.uint32(1))
            total = total * np.uint32(31) + bits.sum(dtype=jnp.uint32)
    return total


def _part(x: Any, axis: int = -1, *, first: Array, size: int) -> Any:
    """Return the slice of an array for a block of keys; the array itself if all blocks share it."""
    if x is None or x.shape[axis] == 1:
        return x
    return lax.dynamic_slice_in_dim(x, first, size, axis % x.ndim)


def _padded(x: Any, axis: int = -1, *, padding: int) -> Any:
    if x is None or not padding or (axis == -1 and x.shape[axis] == 1):
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, padding)
    return jnp.pad(x, widths)
