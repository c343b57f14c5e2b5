"""Attention with dropout, from the whole weight matrix or blockwise without materializing it."""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from regjax._checks import check_array, check_floating_dtype, check_number
from regjax._compat import scan_linear
from regjax._dropout.core import (
    SampledMask,
    apply_dropout,
    check_flag,
    inverse_keep_prob,
    is_number,
    keep_prob_of,
    mask_sharding,
    materialize_mask,
    real_dtype,
    require_key,
)
from regjax._random.bernoulli import EXACT, bernoulli_at, check_probability, exact_keep_prob
from regjax._random.collect import BlockwisePlan
from regjax._random.events import BlockwiseCall, observer
from regjax._random.keys import consume, key_words
from regjax._random.rounding import rounded
from regjax._random.threefry import at_most, slice_index
from regshared.checks import check_bool, check_integer, describe

if TYPE_CHECKING:
    from jax.typing import ArrayLike, DTypeLike
    from jaxtyping import Array, Bool, Float, Real

    from regjax._random.keys import KeyLike

    # Of any shape that broadcasts against "*batch heads queries keys", also of lower rank.
    Bias = Real[ArrayLike, "*#scores"] | None
    Mask = Bool[ArrayLike, "*#scores"] | Bias


def dot_product_attention(
    query: Float[ArrayLike, "*batch queries heads depth"],
    key: Float[ArrayLike, "*batch keys kv_heads depth"],
    value: Float[ArrayLike, "*batch keys kv_heads features"],
    bias: Bias = None,
    mask: Mask = None,
    *,
    dropout_rng: KeyLike | None = None,
    dropout_rate: ArrayLike = 0.0,
    deterministic: ArrayLike = False,
    broadcast_dropout: bool = False,
    is_causal: bool = False,
    scale: ArrayLike | None = None,
    block_size: int | None = None,
    dtype: DTypeLike | None = None,
    precision: lax.PrecisionLike = None,
    module: Any = None,
    qk_attn_weights_einsum: None = None,
    attn_weights_value_einsum: None = None,
) -> Float[Array, "*batch queries heads features"]:
    """Compute attention, with dropout of its weights in training.

        weights = softmax(scale * query . key + bias), 0 where the mask is False
        result  = dropout(weights) . value

    The softmax and the dropout of its weights are in float32 for half types. A query whose keys are
    all masked gives 0.

    With `block_size` the whole weight matrix is never materialized: weights are computed
    `block_size` keys at a time, forward and backward, and memory is linear in sequence length
    instead of quadratic. The mask of a block is drawn at the indices of its elements in the whole
    matrix, so that **both forms drop the same elements, bit for bit**, whatever the block size.

    Batch, heads and queries may be sharded across devices with no communication; the keys and
    values of one head may not be sharded. Inside `shard_map` the shape is that of one device: fold
    `jax.lax.axis_index` into `dropout_rng`.

    Args:
        query: Of shape (..., queries, heads, depth), with any number of batch dimensions.
        key: Of shape (..., keys, kv_heads, depth). Each of the `kv_heads` serves the same number of
            consecutive heads (grouped queries).
        value: Of shape (..., keys, kv_heads, features).
        bias: Added to the scores; broadcasts against (..., heads, queries, keys).
        mask: True where a query may attend to a key; broadcasts like `bias`. Zeros and ones of
            another dtype are accepted, as Flax's `make_causal_mask` and its decoding make them.
        dropout_rng: The PRNG key, under Flax's name; see `key` of `dropout`.
        dropout_rate: The probability that a weight is zeroed, in [0, 1]; may be traced.
        deterministic: True in evaluation; may be traced.
        broadcast_dropout: Whether all rows and heads share one mask, as in Flax's modules by
            default. PyTorch draws one for each.
        is_causal: Whether query i may attend to keys 0 to i only.
        scale: The factor of the products, `1 / sqrt(depth)` by default. A traced scalar multiplies
            the query instead, so that it can be learned; NaN then gives NaN.
        block_size: The number of keys per block; without it, all keys at once.
        dtype: The dtype of the computation; without it, the arrays must have the same dtype.
        precision: The precision of the products; see `jax.lax.Precision`.
        module: A Linen or NNX module into which the weights, before dropout, are sown.
        qk_attn_weights_einsum: Rejected. Linen accepts custom einsums, and would omit them silently
            if this function had no argument for them.
        attn_weights_value_einsum: Rejected likewise.

    Returns:
        An array of shape (..., queries, heads, features) in the dtype of the arrays.

    Raises:
        TypeError: The arrays are not floating or differ in dtype, `scale` is not a number, `mask`
            has numbers other than 0 and 1 (a traced one is not checked), or as `dropout`.
        ValueError: Shapes do not fit, with the argument named; `scale` is not finite; `block_size`
            is below 1, or given along with `module`; an einsum is given; or as `dropout`. A traced
            rate out of range gives NaN.

    Note (PyTorch):
        `regtorch.dot_product_attention` has this layout, and with the same key the same mask.
        `torch.nn.functional.scaled_dot_product_attention(..., attn_mask=mask, dropout_p=rate,
        enable_gqa=True)` has heads before lengths.

    Example:
        >>> import jax, jax.numpy as jnp, regjax
        >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 100, 4, 8))
        >>> options = dict(dropout_rng=jax.random.key(1), dropout_rate=0.1, is_causal=True)
        >>> y = regjax.dot_product_attention(q, k, v, **options)
        >>> blockwise = regjax.dot_product_attention(q, k, v, block_size=32, **options)
        >>> y.shape, bool(jnp.allclose(y, blockwise, atol=1e-5))
        ((2, 100, 4, 8), True)

        In Flax's modules:

        >>> from flax import linen as nn
        >>> layer = nn.MultiHeadDotProductAttention(
        ...     num_heads=4,
        ...     dropout_rate=0.1,
        ...     broadcast_dropout=False,
        ...     attention_fn=regjax.dot_product_attention,
        ... )

    References:
        Vaswani et al., "Attention is all you need", NeurIPS 2017. The blockwise form: Rabe, Staats,
        "Self-attention does not need O(n²) memory", 2021, and Dao et al., "FlashAttention", NeurIPS
        2022.
    """
    if qk_attn_weights_einsum is not None or attn_weights_value_einsum is not None:
        raise ValueError(
            "qk_attn_weights_einsum and attn_weights_value_einsum must be None; got an einsum. Use "
            "Linen's own attention_fn for it."
        )
    query, key, value = _arrays(query, key, value, dtype=dtype)
    bias = None if bias is None else _check_bias(check_array("bias", bias))
    mask = None if mask is None else _boolean(check_array("mask", mask))
    _check_shapes(query, key, value, bias, mask)
    bias, mask = (x if x is None else _with_rank(x, query.ndim) for x in (bias, mask))
    rate = check_probability("dropout_rate", dropout_rate)
    flag = check_flag(deterministic)
    evaluates = flag is True or is_number(rate, 0)
    one_key = None if evaluates or is_number(rate, 1) else _require_rng(dropout_rng)
    broadcast_dropout = check_bool("broadcast_dropout", broadcast_dropout)
    query, factor = _scaled(query, scale)
    scores = _Scores(
        scale=factor,
        is_causal=check_bool("is_causal", is_causal),
        precision=precision,
    )
    if block_size is None:
        weights = _weights(scores, query, key, bias, mask)
        if module is not None:
            _sow(module, weights.astype(query.dtype))
        shared = tuple(range(weights.ndim - 2)) if broadcast_dropout else ()
        spec = SampledMask("dot_product_attention", EXACT, shared)

        def mixed(weights: Array, value: Array, rng: Any) -> Array:
            weights = apply_dropout(spec, weights, rate, rng, flag)
            return _mixed(weights.astype(value.dtype), value, precision).astype(value.dtype)

        if not observer():  # under a checkpoint, an observer would record the mask twice
            # The backward pass drops the weights again, and stores only those before dropout.
            mixed = jax.checkpoint(mixed, prevent_cse=False)
        return mixed(weights, value, one_key)
    if module is not None:
        raise ValueError(
            f"module must be None with block_size={block_size}, which never materializes the "
            f"weights; got a {type(module).__name__}. Omit one of the two."
        )
    size = _check_block(block_size, key.shape[-3])
    blocks = _Blocks(scores, size, key.shape[-3], broadcast_dropout)
    attend = functools.partial(_blockwise, blocks, query, key, value, bias, mask)
    if evaluates:
        return attend()
    if one_key is None:
        zeros = functools.partial(jnp.zeros_like, value, shape=(*query.shape[:-1], value.shape[-1]))
        return zeros() if flag is False else lax.cond(flag, attend, zeros)
    recorded = None
    if observers := observer():
        plan = blocks.plan(query, rate)
        ticket = observers.expect_blocks("dot_product_attention", plan)
        recorded = ticket, flag, lax.stop_gradient(np.float32(rate) if plan.rate else rate)
    drop = functools.partial(attend, one_key, rate, recorded)
    return drop() if flag is False else lax.cond(flag, attend, drop)


@dataclasses.dataclass(frozen=True)
class _Scores:
    """The scores of a range of keys, -inf where a query may not attend."""

    scale: float
    is_causal: bool
    precision: Any

    def __call__(
        self, query: Array, key: Array, bias: Any, mask: Any, first: int | Array, keys: int = 0
    ) -> Float[Array, "*batch heads queries keys"]:
        """Return the scores of the keys from `first` on; those from `keys` on, if set, are -inf."""
        heads, kv_heads = query.shape[-2], key.shape[-2]
        wide = real_dtype(query.dtype)
        if heads == kv_heads:
            scores = jnp.einsum(
                "...qhd,...khd->...hqk",
                query,
                key,
                precision=self.precision,
                preferred_element_type=wide,
            )
        else:
            split = kv_heads, heads // kv_heads
            grouped = query.reshape(*query.shape[:-2], *split, query.shape[-1])
            scores = jnp.einsum(
                "...qhgd,...khd->...hgqk",
                grouped,
                key,
                precision=self.precision,
                preferred_element_type=wide,
            )
            scores = scores.reshape(*scores.shape[:-4], heads, *scores.shape[-2:])
        scores = scores * wide(self.scale)
        if bias is not None:
            scores = scores + bias.astype(wide)
        allowed = [] if mask is None else [mask]
        along = lax.broadcasted_iota(np.int32, scores.shape[-2:], 1) + first
        if self.is_causal:
            allowed.append(along <= lax.broadcasted_iota(np.int32, scores.shape[-2:], 0))
        if keys:
            allowed.append(along < keys)
        for each in allowed:
            scores = jnp.where(_with_rank(each, scores.ndim), scores, -jnp.inf)
        return scores


@functools.partial(jax.jit, static_argnums=0)
def _weights(
    scores: _Scores, query: Array, key: Array, bias: Any, mask: Any
) -> Float[Array, "*batch heads queries keys"]:
    """Return all weights, in one dispatch if the caller is not jitted."""
    return _softmax(scores(query, key, bias, mask, 0))


@jax.custom_jvp
def _softmax(scores: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Return the softmax along the last axis; zeros, with zero gradients, if all are -inf."""
    # A row with a finite score has a sum of at least 1, so the bounds change only other rows.
    limits = jnp.finfo(scores.dtype)
    top = jnp.maximum(scores.max(-1, keepdims=True, initial=-jnp.inf), limits.min)
    powers = jnp.exp(scores - top)
    return powers / jnp.maximum(powers.sum(-1, keepdims=True), limits.tiny)


@_softmax.defjvp
def _softmax_jvp(primals, tangents):
    # Use the result, which the backward pass stores anyway; the intermediates would be stored too.
    weights = _softmax(*primals)
    changes = weights * tangents[0]
    return weights, changes - weights * changes.sum(-1, keepdims=True)


def _finite(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    return jnp.where(x == -jnp.inf, 0, x)


def _mixed(
    weights: Float[Array, "*batch heads queries keys"],
    value: Float[Array, "*batch keys kv_heads features"],
    precision: Any,
) -> Float[Array, "*batch queries heads features"]:
    heads, kv_heads = weights.shape[-3], value.shape[-2]
    options = {"precision": precision, "preferred_element_type": real_dtype(value.dtype)}
    if heads == kv_heads:
        return jnp.einsum("...hqk,...khd->...qhd", weights, value, **options)
    split = kv_heads, heads // kv_heads
    grouped = weights.reshape(*weights.shape[:-3], *split, *weights.shape[-2:])
    mixed = jnp.einsum("...hgqk,...khd->...qhgd", grouped, value, **options)
    return mixed.reshape(*mixed.shape[:-3], heads, mixed.shape[-1])


@dataclasses.dataclass(frozen=True)
class _Blocks:
    """The static part of blockwise attention: one value, hashable under jit."""

    scores: _Scores
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
        shape = (*whole[:-1], self.size)
        index = slice_index(whole, shape, {len(whole) - 1: first}, out_sharding=layout)
        make = functools.partial(bernoulli_at, draw.words, draw.keep_prob, index)
        return materialize_mask(make) if self.broadcast_dropout else make()


class _Draw(NamedTuple):
    """The arrays that a mask is drawn from."""

    words: Array
    keep_prob: Array
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
    blocks: _Blocks, query: Array, key: Array, value: Array, bias: Any, mask: Any, draw: Any
) -> tuple[Array, Array]:
    """Return the result, unscaled, in float32 or wider, and the logarithm of each row's sum.

    `key`, `value`, `bias` and `mask` are padded to whole blocks; `draw` is a `_Draw`, or None.
    """
    # Made from the query, to have its layout over devices.
    rows = jnp.swapaxes(jnp.zeros_like(query[..., 0], real_dtype(query.dtype)), -1, -2)
    features = (*query.shape[:-1], value.shape[-1])
    start = jnp.full_like(rows, -jnp.inf), rows, jnp.broadcast_to(_per_query(rows), features)

    def block(state: tuple[Array, Array, Array], first: Array) -> tuple[Any, None]:
        top, total, result = state
        part = functools.partial(_part, first=first, size=blocks.size)
        scores = blocks.scores(query, part(key, -3), part(bias), part(mask), first, blocks.keys)
        new_top = jnp.maximum(top, scores.max(-1))
        shrink = jnp.exp(top - _finite(new_top))
        powers = jnp.exp(scores - _finite(new_top)[..., None])
        keep = blocks.keep(powers, query, draw, first)
        if record_block:
            record_block(first, keep, scores)
        dropped = _where_kept(keep, powers).astype(value.dtype)
        mixed = _mixed(dropped, part(value, -3), blocks.scores.precision)
        total = total * shrink + powers.sum(-1)
        return (new_top, total, result * _per_query(shrink) + mixed), None

    # The derivative draws the same masks again, and records nothing.
    record_block = record_end = None
    if draw is not None and draw.recorded is not None and (observers := observer()):
        ticket, off, rate = draw.recorded
        words, inputs = (draw.words[0], draw.words[1]), _hash(query, key, bias, mask)
        call = BlockwiseCall(ticket, words, inputs, off)
        record_block = functools.partial(observers.block, call)
        record_end = functools.partial(observers.end, call, rate)
    (top, total, result), _ = lax.scan(block, start, blocks.firsts())
    seen = total > 0
    total = jnp.where(seen, total, 1)
    log_total = jnp.where(seen, _finite(top) + jnp.log(total), 0)
    if record_end:
        record_end(log_total)
    return result / _per_query(total), log_total


@_attend.defjvp
def _attend_jvp(blocks: _Blocks, primals: Any, tangents: Any) -> tuple[Any, Any]:
    result, log_total = _attend(blocks, *primals)
    dot_query, *dots, _, _ = tangents
    # Wide, and cast inside a block, so that the blocks' gradients of a query add up in float32.
    dots = (dot_query.astype(result.dtype), *dots)

    # Recomputed in the backward pass, block by block, and never stored.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def block(primals: Any, dots: Any, log_total: Array, first: Array) -> tuple[Array, Array]:
        query, key, value, bias, mask, draw = primals
        part = functools.partial(_part, first=first, size=blocks.size)
        allowed = part(mask)

        def scores_of(query: Array, key: Array, bias: Any) -> Array:
            return blocks.scores(query, part(key, -3), part(bias), allowed, first, blocks.keys)

        def mixed(weights: Array, value: Array) -> Array:
            keep = blocks.keep(weights, query, draw, first)
            dropped = _where_kept(keep, weights).astype(value.dtype)
            return _mixed(dropped, part(value, -3), blocks.scores.precision)

        dot_query, dot_key, dot_value, dot_bias = dots
        dot_query = dot_query.astype(query.dtype)
        scores, dot_scores = jax.jvp(scores_of, (query, key, bias), (dot_query, dot_key, dot_bias))
        weights = jnp.exp(scores - log_total[..., None])
        changes = weights * dot_scores
        return mixed(changes, value) + mixed(weights, dot_value), changes.sum(-1)

    def step(dots: Any, sums: Any, first: Array) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, sums, block(primals, dots, log_total, first)), None

    zeros = (jnp.zeros_like(result), jnp.zeros_like(log_total))
    (dot_result, dot_log_total), _ = scan_linear(step, dots, zeros, blocks.firsts())
    dot_result -= result * _per_query(dot_log_total)
    return (result, log_total), (dot_result, dot_log_total)


# Outside any jit, each call would build and compile another scan.
_attend_in_one = jax.jit(_attend, static_argnums=0)


def _blockwise(
    blocks: _Blocks,
    query: Array,
    key: Array,
    value: Array,
    bias: Any,
    mask: Any,
    dropout_rng: KeyLike | None = None,
    rate: float | Float[Array, ""] = 0.0,
    recorded: tuple[ArrayLike, ArrayLike, ArrayLike] | None = None,
) -> Array:
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
        draw = _Draw(words, jnp.asarray(keep_prob, np.float32), recorded)
        scale = inverse_keep_prob(exact_keep_prob(keep_prob), query.dtype)
    arrays = query, pad(key, -3), pad(value, -3), pad(bias), pad(mask)
    result, _ = _attend_in_one(blocks, *arrays, draw)
    result = result * scale
    if isinstance(rate, jax.Array):
        result = jnp.where((rate >= 0) & (rate <= 1), result, jnp.nan)
    return result.astype(value.dtype)


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


def _with_rank(x: Array, ndim: int) -> Array:
    """Return `x` with leading dimensions of size 1, as silent rank promotion would add them."""
    return x.reshape(*[1] * (ndim - x.ndim), *x.shape)


def _per_query(x: Float[Array, "*batch heads queries"]) -> Float[Array, "*batch queries heads 1"]:
    return jnp.swapaxes(x, -1, -2)[..., None]


def _arrays(*arrays: ArrayLike, dtype: DTypeLike | None) -> list[Array]:
    names = ("query", "key", "value")
    found = [check_array(name, array) for name, array in zip(names, arrays, strict=True)]
    for name, array in zip(names, found, strict=True):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(
                f"{name} must be floating; got dtype {array.dtype}. Cast it: "
                f"{name}.astype(jnp.float32)."
            )
        if array.ndim < 3:
            raise ValueError(
                f"{name} must have shape (..., length, heads, features); got {array.shape}."
            )
    if dtype is not None:
        return [array.astype(check_floating_dtype("dtype", dtype)) for array in found]
    if len({array.dtype for array in found}) > 1:
        dtypes = ", ".join(f"{n} {a.dtype}" for n, a in zip(names, found, strict=True))
        raise TypeError(
            f"query, key and value must have the same dtype; got {dtypes}. Pass dtype=."
        )
    return found


def _scaled(query: Array, scale: ArrayLike | None) -> tuple[Array, float]:
    """Return the query and the factor of its products.

    A traced scale multiplies the query, so that gradients flow to it and NaN gives NaN.
    """
    if scale is None:
        return query, 1 / math.sqrt(query.shape[-1])
    if not isinstance(scale, Tracer):
        return query, check_number("scale", scale)
    if scale.ndim or not jnp.issubdtype(scale.dtype, jnp.floating):
        raise TypeError(f"scale must be a real scalar; got {describe(scale)}.")
    wide = real_dtype(query.dtype)
    return (query.astype(wide) * scale.astype(wide)).astype(query.dtype), 1.0


def _check_shapes(query: Array, key: Array, value: Array, bias: Any, mask: Any) -> None:
    """Raise a ValueError that names the argument whose shape does not fit."""
    *batch, queries, heads, depth = query.shape
    *key_batch, keys, kv_heads, key_depth = key.shape
    if key_batch != batch or key_depth != depth:
        raise ValueError(
            f"query and key must have the same batch and depth; got shapes {query.shape} and "
            f"{key.shape}."
        )
    if value.shape[:-1] != key.shape[:-1]:
        raise ValueError(
            f"value must have key's shape {key.shape[:-1]} before its features; got {value.shape}."
        )
    if not kv_heads or heads % kv_heads:
        raise ValueError(f"query must have a multiple of key's {kv_heads} heads; got {heads}.")
    whole = (*batch, heads, queries, keys)
    for name, array in (("bias", bias), ("mask", mask)):
        if array is None:
            continue
        pairs = zip(array.shape[::-1], whole[::-1], strict=False)
        if array.ndim > len(whole) or any(size not in (1, full) for size, full in pairs):
            raise ValueError(
                f"{name} must broadcast to (..., heads, queries, keys) = {whole}; got "
                f"{array.shape}."
            )


def _check_block(block_size: int, keys: int) -> int:
    size = check_integer("block_size", block_size, minimum=1)
    return max(1, keys) if at_most(keys, size) else size


def _check_bias(bias: Array) -> Array:
    """Reject a mask that was passed as a bias."""
    if bias.dtype == np.bool_ or jnp.issubdtype(bias.dtype, jnp.complexfloating):
        raise TypeError(f"bias must be real; got dtype {bias.dtype}. Pass booleans as mask.")
    return bias


def _boolean(mask: Array) -> Bool[Array, "*shape"]:
    """Return a mask of zeros and ones as booleans.

    A concrete mask with other numbers is a TypeError: it may be meant as a bias.
    """
    if mask.dtype == np.bool_:
        return mask
    readable = not isinstance(mask, Tracer) and mask.is_fully_addressable
    if readable and not np.isin(np.asarray(mask), (0, 1)).all():
        raise TypeError(
            "mask must be boolean, True to attend, or 0 and 1; got other numbers of dtype "
            f"{mask.dtype}. Pass numbers to add to the scores as bias."
        )
    return mask != 0


def _require_rng(dropout_rng: KeyLike | None) -> KeyLike:
    """Return `require_key(dropout_rng)`, with errors that name `dropout_rng` instead of `key`."""
    if dropout_rng is None:
        raise ValueError(
            "dropout_rng must be a random key in training; got None. Pass "
            "dropout_rng=jax.random.key(seed), or dropout_rng=regjax.site_key(root, step, site) "
            "inside a training loop, or deterministic=True to evaluate."
        )
    try:
        return require_key(dropout_rng)
    except (TypeError, ValueError) as error:
        raise type(error)(f"dropout_rng: {error}") from None


def _sow(module: Any, weights: Array) -> None:
    """Sow the weights where Flax's own function does."""
    nnx: Any = sys.modules.get("flax.nnx")
    collection = "intermediates"
    if nnx is not None and isinstance(module, nnx.Module):
        collection = nnx.Intermediate
    module.sow(collection, "attention_weights", weights)
