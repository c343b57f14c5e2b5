"""Attention with dropout, from the whole weight matrix or blockwise without materializing it."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from regjax._dropout.attention_checks import (
    check_arrays,
    check_bias,
    check_block,
    check_dot_general,
    check_implementation,
    check_lengths,
    check_mask,
    check_scale,
    check_shapes,
    require_rng,
)
from regjax._dropout.blockwise import Blocks, blockwise
from regjax._dropout.core import SampledMask, check_flag, is_number
from regjax._dropout.kernel_choice import default_implementation
from regjax._dropout.pallas_attention import check_supported, kernel_attention
from regjax._dropout.scores import Allowed, Scores, with_rank
from regjax._dropout.whole import whole, whole_sums, whole_weights
from regjax._random.bernoulli import MaskSampler, Sampler, bernoulli, check_probability
from regjax._random.by_example import check_batch_axis
from regjax._random.events import observer
from regjax._random.packed import mask_sampler
from regshared.checks import check_bool, check_window
from regshared.spellings import explain_names

if TYPE_CHECKING:
    from jax.typing import ArrayLike, DTypeLike
    from jaxtyping import Array, Bool, Float, Int, Real

    from regjax._random.keys import KeyLike

    # Of any shape that broadcasts against "*batch heads queries keys", also of lower rank.
    Bias = Real[ArrayLike, "*#scores"] | None
    Mask = Bool[ArrayLike, "*#scores"] | Bias
    Lengths = Int[ArrayLike, "*examples"] | None
    Result = Float[Array, "*batch queries heads features"]


@explain_names
def dot_product_attention(
    query: Float[ArrayLike, "*batch queries heads depth"],
    key: Float[ArrayLike, "*batch keys kv_heads depth"],
    value: Float[ArrayLike, "*batch keys kv_heads features"],
    bias: Bias = None,
    mask: Mask = None,
    broadcast_dropout: bool = False,
    dropout_rng: KeyLike | None = None,
    dropout_rate: ArrayLike = 0.0,
    deterministic: ArrayLike = False,
    dtype: DTypeLike | None = None,
    precision: lax.PrecisionLike = None,
    module: Any = None,
    *,
    is_causal: bool = False,
    query_seq_lengths: Lengths = None,
    key_value_seq_lengths: Lengths = None,
    local_window_size: int | tuple[int, int] | None = None,
    scale: ArrayLike | None = None,
    block_size: int | None = None,
    implementation: str | None = None,
    sampler: Sampler = bernoulli,
    return_residual: bool = False,
    promote_dtype: Callable[..., Any] | None = None,
    force_fp32_for_softmax: bool = False,
    einsum_dot_general: Callable[..., Any] | None = None,
    qk_attn_weights_einsum: None = None,
    attn_weights_value_einsum: None = None,
) -> Result | Any:  # Any, because return_residual=True returns a pair
    """Compute attention, with dropout of its weights in training.

        weights = softmax(scale * query . key + bias), 0 where the mask is False
        result  = dropout(weights) . value

    The softmax and the dropout of its weights are in float32 for half types. A query that may
    attend to no key gives 0. The arguments are those of `jax.nn.dot_product_attention`, and those
    of the functions of Flax, in the order of Flax.

    With `block_size` the whole weight matrix is never materialized: weights are computed
    `block_size` keys at a time, forward and backward, and memory is linear in sequence length
    instead of quadratic. The mask of a block is drawn at the indices of its elements in the whole
    matrix, so that **both forms drop the same elements, bit for bit**, whatever the block size. By
    default the matrix is materialized; with gradients, 0.75 times the temporary memory of
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
        broadcast_dropout: Whether all rows and heads share one mask, as in Flax's modules by
            default. PyTorch draws one for each.
        dropout_rng: The PRNG key, under Flax's name; see `key` of `dropout`.
        dropout_rate: The probability that a weight is zeroed, in [0, 1]; may be traced.
        deterministic: True in evaluation; may be traced.
        dtype: The dtype of the computation; without it, the arrays must have the same dtype.
        precision: The precision of the products; see `jax.lax.Precision`.
        module: A Linen or NNX module into which the weights, before dropout, are sown.
        is_causal: Whether query i may attend to keys 0 to i only.
        query_seq_lengths: The number of queries of each example, integers of the shape of the
            batch. Later queries are padding, and give 0. A number above `queries` excludes none,
            and one below 1 excludes all, as in `jax.nn.dot_product_attention`.
        key_value_seq_lengths: The number of keys of each example, likewise; no query attends to the
            later ones.
        local_window_size: A pair (left, right): query i may attend to keys `i - left` to
            `i + right` only. One number is both of them.
        scale: The factor of the products, `1 / sqrt(depth)` by default. A traced scalar multiplies
            the query instead, so that it can be learned; NaN then gives NaN.
        block_size: The number of keys per block; without it, all keys at once.
        implementation: "xla", or kernels that store neither scores nor mask: "pallas" on TPUs,
            "triton" on NVIDIA GPUs. The mask is the same. The kernels take float32 and bfloat16,
            depths from 64 to 256 in multiples of 8, and no `bias`, `module`, `block_size`, lengths,
            window, residual or `einsum_dot_general`; of a mesh, all axes must be explicit or
            manual. Their result rounds as `block_size` does, and has no forward-mode derivative:
            pass "xla" for `jax.jvp`. The default is "pallas" on a TPU, where its limits hold and
            XLA does not divide the arrays: on a single device, on a mesh of explicit axes, or
            inside `shard_map`. They have been run by Pallas's interpreter and compiled for TPUs and
            the H100, but not run there. Before the first such call, they therefore solve a small
            problem on the TPU itself; if the result differs from that of blocks, a warning says so,
            and "xla" is used. "triton" is never the default.
        sampler: The function that draws the mask; see `dropout`. `packed_bernoulli` packs along the
            heads, queries or batch, never along the keys. With `block_size`, a function of your own
            is rejected: it can only draw the whole mask. The numbers of `by_example` belong to a
            batch dimension, which excludes `broadcast_dropout`.
        return_residual: Whether to return the logarithms of the softmax's sums, too.
        promote_dtype: A function like NNX's, called as `promote_dtype((query, key, value),
            dtype=dtype)`, that returns the three arrays in one dtype.
        force_fp32_for_softmax: The dtype of the weights that are sown, as in Linen: True for
            float32, False for that of the arrays. The softmax is in float32 or wider in any case,
            and the result has the dtype of the arrays, where Linen's becomes float32.
        einsum_dot_general: A pure function that computes both products in place of that of JAX, as
            in Linen.
        qk_attn_weights_einsum: Rejected: Linen's quantized einsums may update a module, which a
            derivative that computes a product again cannot. Linen would omit it silently if this
            function had no argument for it.
        attn_weights_value_einsum: Rejected likewise.

    Returns:
        An array of shape (..., queries, heads, features) in the dtype of the arrays. With
        `return_residual`, a pair: that array, and for each query and head the logarithm of the sum
        of its exponentiated scores, before dropout, of shape (..., queries, heads) in the same
        dtype. No gradient flows to it. It is -inf for a query that attends to no key.

    Raises:
        TypeError: The arrays are not floating or differ in dtype, lengths are not integers, `scale`
            is not a number, `mask` has numbers other than 0 and 1 (a traced one is not checked), or
            as `dropout`.
        ValueError: Shapes do not fit, with the argument named; `scale` is not finite; a side of
            `local_window_size` is negative; `block_size` is below 1, or given along with `module`;
            `sampler` draws no blocks; an einsum is given; the kernels of `implementation` do not
            support an argument; or as `dropout`. A traced rate out of range gives NaN.
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
    return attend(functools.partial(SampledMask, "dot_product_attention"), **locals())


def attend(
    make_mask: Callable[[MaskSampler, tuple[int, ...]], Any],
    query: Any,
    key: Any,
    value: Any,
    bias: Bias = None,
    mask: Mask = None,
    broadcast_dropout: bool = False,
    dropout_rng: KeyLike | None = None,
    dropout_rate: ArrayLike = 0.0,
    deterministic: ArrayLike = False,
    dtype: DTypeLike | None = None,
    precision: lax.PrecisionLike = None,
    module: Any = None,
    *,
    is_causal: bool = False,
    query_seq_lengths: Lengths = None,
    key_value_seq_lengths: Lengths = None,
    local_window_size: int | tuple[int, int] | None = None,
    scale: ArrayLike | None = None,
    block_size: int | None = None,
    implementation: str | None = None,
    sampler: Sampler = bernoulli,
    return_residual: bool = False,
    promote_dtype: Callable[..., Any] | None = None,
    force_fp32_for_softmax: bool = False,
    einsum_dot_general: Callable[..., Any] | None = None,
    qk_attn_weights_einsum: None = None,
    attn_weights_value_einsum: None = None,
) -> Result | tuple[Result, Float[Array, "*batch queries heads"]]:
    """Compute `dot_product_attention` with the mask of `make_mask(sampler, shared axes)`.

    In blocks, the sampler draws the mask.
    """
    query, key, value = check_arrays(query, key, value, dtype=dtype, promote_dtype=promote_dtype)
    bias, mask = check_bias(bias), check_mask(mask)
    check_shapes(query, key, value, bias, mask)
    batch = query.shape[:-3]
    allowed = Allowed(
        mask if mask is None else with_rank(mask, query.ndim),
        check_lengths("query_seq_lengths", query_seq_lengths, batch),
        check_lengths("key_value_seq_lengths", key_value_seq_lengths, batch),
    )
    rate = check_probability("dropout_rate", dropout_rate)
    flag = check_flag(deterministic)
    evaluates = flag is True or is_number(rate, 0)
    one_key = None if evaluates or is_number(rate, 1) else require_rng(dropout_rng)
    is_shared = check_bool("broadcast_dropout", broadcast_dropout)
    shared = tuple(range(query.ndim - 2)) if is_shared else ()
    drawn_by = mask_sampler(sampler)
    check_batch_axis(drawn_by, query.ndim - 3)
    drawn_by.check_fit((*batch, query.shape[-2], query.shape[-3], key.shape[-3]), shared)
    query, factor = check_scale(query, scale)
    einsums = {
        "qk_attn_weights_einsum": qk_attn_weights_einsum,
        "attn_weights_value_einsum": attn_weights_value_einsum,
    }
    scores = Scores(
        scale=factor,
        is_causal=check_bool("is_causal", is_causal),
        window=check_window("local_window_size", local_window_size),
        precision=precision,
        dot_general=check_dot_general(einsum_dot_general, einsums),
    )
    is_sown_wide = check_bool("force_fp32_for_softmax", force_fp32_for_softmax)
    with_residual = check_bool("return_residual", return_residual)
    bias = bias if bias is None else with_rank(bias, query.ndim)
    inputs = Inputs(query, key, value, bias, allowed)
    spec = make_mask(drawn_by, shared)
    drop = Drop(spec, drawn_by, rate, one_key, flag, evaluates, is_shared)
    # The masks of `regjax.keyed` have no sampler, and are not drawn in kernels.
    limits = getattr(spec, "sampler", None), scores, inputs, module, with_residual
    kernels = check_implementation(implementation, block_size)
    if kernels in ("pallas", "triton"):
        check_supported(kernels, *limits)
    kernels = kernels or default_implementation(*limits)
    if kernels != "xla":
        return _in_kernels(kernels, scores, inputs, drop)
    if block_size is not None:
        result, log_total = _in_blocks(scores, inputs, drop, module, block_size)
    else:
        sown = np.float32 if is_sown_wide else query.dtype
        result, log_total = _whole(scores, inputs, drop, module, sown, with_residual)
    if not with_residual:
        return result
    return result, jnp.swapaxes(lax.stop_gradient(log_total), -1, -2).astype(result.dtype)


class Inputs(NamedTuple):
    """The arrays of attention, after all checks."""

    query: Array
    key: Array
    value: Array
    bias: Any
    allowed: Allowed


class Drop(NamedTuple):
    """The dropout of attention's weights, after all checks."""

    spec: Any
    sampler: MaskSampler
    rate: Any
    key: Any  # None if no mask is drawn
    deterministic: Any
    is_off: bool  # known before tracing
    is_shared: bool

    def unless_off(self, drop: Callable[[], Any], plain: Callable[[], Any]) -> Any:
        """Return `plain()` where dropout is off, and `drop()` elsewhere."""
        if self.is_off:
            return plain()
        flag = self.deterministic
        return drop() if flag is False else lax.cond(flag, plain, drop)


def _in_kernels(kernels: str, scores: Scores, inputs: Inputs, drop: Drop) -> Array:
    arrays = inputs[:3]
    plain = functools.partial(
        kernel_attention, kernels, scores, arrays, inputs.allowed.mask, is_shared=drop.is_shared
    )
    if drop.key is None:
        return drop.unless_off(functools.partial(_zeros, *arrays), plain)
    return drop.unless_off(functools.partial(plain, drop.spec.sampler, drop.key, drop.rate), plain)


def _zeros(query: Array, key: Array, value: Array) -> Array:
    return jnp.zeros_like(value, shape=(*query.shape[:-1], value.shape[-1]))


def _whole(
    scores: Scores, inputs: Inputs, drop: Drop, module: Any, sown: Any, with_residual: bool
) -> tuple[Array, Any]:
    query, key, _, bias, allowed = inputs
    if module is not None:
        _sow(module, whole_weights(scores, query, key, bias, allowed).astype(sown))
    result = whole(scores, *inputs, drop.spec, drop.rate, drop.key, drop.deterministic)
    return result, whole_sums(scores, query, key, bias, allowed) if with_residual else None


def _in_blocks(
    scores: Scores, inputs: Inputs, drop: Drop, module: Any, block_size: int
) -> tuple[Array, Array]:
    if module is not None:
        raise ValueError(
            f"module must be None with block_size={block_size}, which never materializes the "
            f"weights; got a {type(module).__name__}. Omit one of the two."
        )
    if not drop.sampler.draws_parts:
        raise ValueError(
            "sampler must be bernoulli, packed_bernoulli or by_example of one of them with "
            f"block_size={block_size}; got {drop.sampler.function}, which draws whole masks only. "
            "Omit block_size."
        )
    keys = inputs.key.shape[-3]
    blocks = Blocks(scores, check_block(block_size, keys), keys, drop.is_shared)
    plain = functools.partial(blockwise, blocks, drop.sampler, *inputs)
    if drop.is_off:
        return plain()
    if drop.key is None:

        def zeros() -> tuple[Array, Array]:
            result, log_total = plain()
            return jnp.zeros_like(result), log_total

        return drop.unless_off(zeros, plain)
    recorded = None
    if observers := observer():
        plan = blocks.plan(inputs.query, drop.rate)
        ticket = observers.expect_blocks("dot_product_attention", plan)
        rate = np.float32(drop.rate) if plan.rate else drop.rate
        recorded = ticket, drop.deterministic, lax.stop_gradient(rate)
    dropped = functools.partial(plain, drop.key, drop.rate, recorded)
    return drop.unless_off(dropped, plain)


def _sow(module: Any, weights: Array) -> None:
    """Sow the weights where Flax's own function does."""
    nnx: Any = sys.modules.get("flax.nnx")
    collection = "intermediates"
    if nnx is not None and isinstance(module, nnx.Module):
        collection = nnx.Intermediate
    module.sow(collection, "attention_weights", weights)
