"""Attention with dropout, from the whole weight matrix or blockwise without materializing it."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from regjax._checks import check_array, check_floating_dtype, check_number
from regjax._dropout.blockwise import Blocks, blockwise
from regjax._dropout.core import (
    SampledMask,
    apply_dropout,
    check_flag,
    is_number,
    real_dtype,
    require_key,
)
from regjax._dropout.pallas_attention import check_supported, kernel_attention
from regjax._dropout.scores import Scores, mixed_values, softmax, with_rank
from regjax._random.bernoulli import (
    EXACT,
    MaskSampler,
    Sampler,
    bernoulli,
    check_probability,
)
from regjax._random.by_example import check_batch_axis
from regjax._random.events import observer
from regjax._random.packed import mask_sampler
from regjax._random.threefry import at_most
from regshared.checks import check_bool, check_choice, check_integer, describe
from regshared.spellings import explain_names

if TYPE_CHECKING:
    from jax.typing import ArrayLike, DTypeLike
    from jaxtyping import Array, Bool, Float, Real

    from regjax._random.keys import KeyLike

    # Of any shape that broadcasts against "*batch heads queries keys", also of lower rank.
    Bias = Real[ArrayLike, "*#scores"] | None
    Mask = Bool[ArrayLike, "*#scores"] | Bias


@explain_names
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
    implementation: str | None = None,
    sampler: Sampler = bernoulli,
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
    matrix, so that **both forms drop the same elements, bit for bit**, whatever the block size. By
    default the matrix is materialized; with gradients, about 1.5 times the temporary memory of
    `jax.nn.dot_product_attention`, which has no dropout, was measured on a CPU.

    Batch, heads and queries may be sharded across devices with no communication; the keys and
    values of one head may not be sharded. Inside `shard_map` the shape is that of one device: pass
    the numbers of its examples, `sampler=by_example(examples)`.

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
        implementation: "xla" or None, or kernels that store neither scores nor mask: "pallas" on
            TPUs, "triton" on NVIDIA GPUs. The kernels are not the default, because they have not
            run on either yet: they are tested in Pallas's interpreter, and compiled for TPUs and
            the H100. The mask is the same. The kernels take float32 and bfloat16, depths from 64 to
            256 in multiples of 8, and no `bias`, `module` or `block_size`; of a mesh, all axes must
            be explicit or manual. Their result rounds as `block_size` does, and has no forward-mode
            derivative: pass "xla" for `jax.jvp`.
        sampler: The function that draws the mask; see `dropout`. `packed_bernoulli` packs along the
            heads, queries or batch, never along the keys. With `block_size`, a function of your own
            is rejected: it can only draw the whole mask. The numbers of `by_example` belong to a
            batch dimension, which excludes `broadcast_dropout`.
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
            is below 1, or given along with `module`; `sampler` draws no blocks; an einsum is given;
            the kernels of `implementation` do not support an argument; or as `dropout`. A traced
            rate out of range gives NaN.
        NotImplementedError: A program with kernels is compiled for another platform.

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
    drawn_by = mask_sampler(sampler)
    return attend(
        functools.partial(SampledMask, "dot_product_attention", drawn_by),
        query,
        key,
        value,
        bias,
        mask,
        dropout_rng=dropout_rng,
        dropout_rate=dropout_rate,
        deterministic=deterministic,
        broadcast_dropout=broadcast_dropout,
        is_causal=is_causal,
        scale=scale,
        block_size=block_size,
        implementation=implementation,
        sampler=drawn_by,
        dtype=dtype,
        precision=precision,
        module=module,
        qk_attn_weights_einsum=qk_attn_weights_einsum,
        attn_weights_value_einsum=attn_weights_value_einsum,
    )


def attend(
    make_mask: Callable[[tuple[int, ...]], Any],
    query: Any,
    key: Any,
    value: Any,
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
    implementation: str | None = None,
    sampler: MaskSampler = EXACT,
    dtype: DTypeLike | None = None,
    precision: lax.PrecisionLike = None,
    module: Any = None,
    qk_attn_weights_einsum: None = None,
    attn_weights_value_einsum: None = None,
) -> Float[Array, "*batch queries heads features"]:
    """Compute `dot_product_attention` with a mask that `make_mask` returns for its shared axes.

    In blocks, `sampler` draws the mask.
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
    bias, mask = (x if x is None else with_rank(x, query.ndim) for x in (bias, mask))
    rate = check_probability("dropout_rate", dropout_rate)
    flag = check_flag(deterministic)
    evaluates = flag is True or is_number(rate, 0)
    one_key = None if evaluates or is_number(rate, 1) else _require_rng(dropout_rng)
    broadcast_dropout = check_bool("broadcast_dropout", broadcast_dropout)
    shared = tuple(range(query.ndim - 2)) if broadcast_dropout else ()
    check_batch_axis(sampler, query.ndim - 3)
    sampler.check_fit((*query.shape[:-3], query.shape[-2], query.shape[-3], key.shape[-3]), shared)
    query, factor = _scaled(query, scale)
    scores = Scores(
        scale=factor,
        is_causal=check_bool("is_causal", is_causal),
        precision=precision,
    )
    zeros = functools.partial(jnp.zeros_like, value, shape=(*query.shape[:-1], value.shape[-1]))
    kernels = _check_implementation(implementation, block_size)
    if kernels != "xla":
        # The masks of `regjax.keyed` have no sampler, and are rejected.
        arrays, drawn_by = (query, key, value), getattr(make_mask(()), "sampler", None)
        check_supported(kernels, drawn_by, scores, arrays, bias, module)
        plain = functools.partial(
            kernel_attention, kernels, scores, arrays, mask, is_shared=broadcast_dropout
        )
        drop = functools.partial(plain, drawn_by, one_key, rate) if one_key is not None else zeros
        return plain() if evaluates else _unless(flag, drop, plain)
    if block_size is None:
        weights = _weights(scores, query, key, bias, mask)
        if module is not None:
            _sow(module, weights.astype(query.dtype))
        spec = make_mask(shared)

        def mixed(weights: Array, value: Array, rng: Any) -> Array:
            weights = apply_dropout(spec, weights, rate, rng, flag)
            return mixed_values(weights.astype(value.dtype), value, precision).astype(value.dtype)

        if not observer():  # under a checkpoint, an observer would record the mask twice
            # The backward pass drops the weights again, and stores only those before dropout.
            mixed = jax.checkpoint(mixed, prevent_cse=False)
        return mixed(weights, value, one_key)
    if module is not None:
        raise ValueError(
            f"module must be None with block_size={block_size}, which never materializes the "
            f"weights; got a {type(module).__name__}. Omit one of the two."
        )
    if not sampler.draws_parts:
        raise ValueError(
            "sampler must be bernoulli, packed_bernoulli or by_example of one of them with "
            f"block_size={block_size}; got {sampler.function}, which draws whole masks only. Omit "
            "block_size."
        )
    size = _check_block(block_size, key.shape[-3])
    blocks = Blocks(scores, size, key.shape[-3], broadcast_dropout)
    in_blocks = functools.partial(blockwise, blocks, sampler, query, key, value, bias, mask)
    if evaluates:
        return in_blocks()
    if one_key is None:
        return _unless(flag, zeros, in_blocks)
    recorded = None
    if observers := observer():
        plan = blocks.plan(query, rate)
        ticket = observers.expect_blocks("dot_product_attention", plan)
        recorded = ticket, flag, lax.stop_gradient(np.float32(rate) if plan.rate else rate)
    drop = functools.partial(in_blocks, one_key, rate, recorded)
    return _unless(flag, drop, in_blocks)


def _unless(flag: Any, drop: Callable[[], Array], plain: Callable[[], Array]) -> Array:
    """Return `plain()` where a flag is set, and `drop()` elsewhere."""
    return drop() if flag is False else lax.cond(flag, plain, drop)


def _check_implementation(implementation: str | None, block_size: int | None) -> str:
    implementation = "xla" if implementation is None else implementation
    check_choice("implementation", implementation, ("xla", "pallas", "triton"))
    if implementation != "xla" and block_size is not None:
        raise ValueError(
            f"block_size must be None with implementation={implementation!r}, whose tiles do not "
            f"change the result's mask; got {block_size}. Omit one of the two."
        )
    return implementation


@functools.partial(jax.jit, static_argnums=0)
def _weights(
    scores: Scores, query: Array, key: Array, bias: Any, mask: Any
) -> Float[Array, "*batch heads queries keys"]:
    """Return all weights, in one dispatch if the caller is not jitted."""
    return softmax(scores(query, key, bias, mask, 0))


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
