"""Attention with dropout, from the whole weight matrix or blockwise without materializing it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from regshared.checks import check_bool, check_window
from regshared.spellings import explain_names
from regtorch._dropout.attention_checks import (
    check_arrays,
    check_block,
    check_lengths,
    check_scale,
    check_shapes,
    require_rng,
)
from regtorch._dropout.blockwise import Blocks, blockwise
from regtorch._dropout.core import SampledMask, check_flag, is_number
from regtorch._dropout.dtensor import Place, is_dtensor, on_local_heads, sampler_at
from regtorch._dropout.scores import Allowed, Scores
from regtorch._dropout.whole import whole, whole_sums
from regtorch._random.bernoulli import MaskSampler, Sampler, bernoulli, check_probability
from regtorch._random.by_example import check_batch_axis
from regtorch._random.events import observer
from regtorch._random.packed import mask_sampler


@explain_names
def dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    dropout_rng: Tensor | torch.Generator | None = None,
    dropout_rate: float | Tensor = 0.0,
    deterministic: bool | Tensor = False,
    broadcast_dropout: bool = False,
    is_causal: bool = False,
    query_seq_lengths: Tensor | None = None,
    key_value_seq_lengths: Tensor | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    scale: float | Tensor | None = None,
    block_size: int | None = None,
    sampler: Sampler = bernoulli,
    return_residual: bool = False,
) -> Tensor | Any:  # Any, because return_residual=True returns a pair
    """Compute attention, with dropout of its weights in training.

        weights = softmax(scale * query . key + bias), 0 where the mask is False
        result  = dropout(weights) . value

    The softmax and the dropout of its weights are in float32 for half types. A query that may
    attend to no key gives 0.

    With `block_size` the whole weight matrix is never materialized: weights are computed
    `block_size` keys at a time, forward and backward, and memory is linear in sequence length. The
    mask of a block is drawn at the indices of its elements in the whole matrix, so that **both
    forms drop the same elements, bit for bit**, whatever the block size. The blockwise form has
    reverse-mode derivatives of every order, and none in forward mode. The other errors are those of
    `dropout`.

    Args:
        query: Of shape (..., queries, heads, depth), with any number of batch dimensions. A
            `DTensor` may be sharded along batch and heads, as key and value are.
        key: Of shape (..., keys, kv_heads, depth). Each of the `kv_heads` serves the same number of
            consecutive heads (grouped queries).
        value: Of shape (..., keys, kv_heads, features).
        bias: Added to the scores; broadcasts against (..., heads, queries, keys).
        mask: True where a query may attend to a key; broadcasts like `bias`.
        dropout_rng: The PRNG key, or a `torch.Generator`; see `key` of `dropout`.
        dropout_rate: The probability that a weight is zeroed; see `rate` of `dropout`.
        deterministic: See `dropout`.
        broadcast_dropout: Whether all rows and heads share one mask, as in Flax's modules by
            default. PyTorch draws one for each.
        is_causal: Whether query i may attend to keys 0 to i only.
        query_seq_lengths: The number of queries of each example, integers of the shape of the
            batch. Later queries are padding, and give 0. A number above `queries` excludes none,
            and one below 1 excludes all, as in `jax.nn.dot_product_attention`.
        key_value_seq_lengths: The number of keys of each example, likewise; no query attends to the
            later ones.
        local_window_size: A pair (left, right): query i may attend to keys `i - left` to
            `i + right` only. One number is both of them.
        scale: The factor of the products, `1 / sqrt(depth)` by default. A 0-d tensor multiplies the
            query instead, so that it can be learned; NaN then gives NaN.
        block_size: The number of keys per block; None for all keys at once.
        sampler: The function that draws the mask; see `dropout`. `packed_bernoulli` packs along the
            heads, queries or batch, never along the keys. With `block_size`, a function of your own
            is rejected: it can only draw the whole mask. The numbers of `by_example` belong to a
            batch dimension, which excludes `broadcast_dropout`.
        return_residual: Whether to return the logarithms of the softmax's sums, too.

    Returns:
        A tensor of shape (..., queries, heads, features) in the dtype of the tensors. With
        `return_residual`, a pair: that tensor, and for each query and head the logarithm of the sum
        of its exponentiated scores, before dropout, of shape (..., queries, heads) in the same
        dtype. No gradient flows to it. It is -inf for a query that attends to no key.

    Raises:
        TypeError: The tensors are not floating or differ in dtype, lengths are not integers,
            `scale` is not a number, or `mask` is not boolean.
        ValueError: Shapes do not fit, with the argument named; `scale` is not finite; a side of
            `local_window_size` is negative; `block_size` is below 1; or `sampler` draws no blocks.

    Note (PyTorch):
        `torch.nn.functional.scaled_dot_product_attention(..., attn_mask=mask, dropout_p=rate,
        enable_gqa=True)` has heads before lengths.

    Note (JAX):
        `regjax.dot_product_attention` with the same key drops the same weights.

    Example:
        >>> import torch, regtorch
        >>> q, k, v = torch.randn(3, 2, 100, 4, 8, generator=torch.Generator().manual_seed(0))
        >>> options = dict(dropout_rng=regtorch.key(1), dropout_rate=0.1, is_causal=True)
        >>> y = regtorch.dot_product_attention(q, k, v, **options)
        >>> blockwise = regtorch.dot_product_attention(q, k, v, block_size=32, **options)
        >>> y.shape, torch.allclose(y, blockwise, atol=1e-5)
        (torch.Size([2, 100, 4, 8]), True)

    References:
        Vaswani et al., "Attention is all you need", NeurIPS 2017. The blockwise form: Rabe, Staats,
        "Self-attention does not need O(n²) memory", 2021, and Dao et al., "FlashAttention", NeurIPS
        2022.
    """
    check_arrays(query, key, value)
    check_shapes(query, key, value, bias, mask)
    batch = query.shape[:-3]
    allowed = Allowed(
        mask,
        check_lengths("query_seq_lengths", query_seq_lengths, batch),
        check_lengths("key_value_seq_lengths", key_value_seq_lengths, batch),
    )
    rate = check_probability("dropout_rate", dropout_rate)
    flag = check_flag(deterministic)
    evaluates = flag is True or is_number(rate, 0)
    draws = not evaluates and not is_number(rate, 1)
    one_key = require_rng(dropout_rng).to(query.device) if draws else None
    is_shared = check_bool("broadcast_dropout", broadcast_dropout)
    shared = tuple(range(query.ndim - 2)) if is_shared else ()
    drawn_by = mask_sampler(sampler)
    check_batch_axis(drawn_by, query.ndim - 3)
    drawn_by.check_fit((*batch, query.shape[-2], query.shape[-3], key.shape[-3]), shared)
    with_residual = check_bool("return_residual", return_residual)
    if is_dtensor(query):

        def attend(tensors: tuple[Any, ...], place: Place) -> Any:
            query, key, value, bias, mask, queries, keys = tensors
            found = dot_product_attention(
                _heads_first(query),
                _heads_first(key),
                _heads_first(value),
                bias,
                mask,
                dropout_rng=dropout_rng,
                dropout_rate=dropout_rate,
                deterministic=deterministic,
                broadcast_dropout=broadcast_dropout,
                is_causal=is_causal,
                query_seq_lengths=queries if queries is None else queries[..., 0, 0, 0],
                key_value_seq_lengths=keys if keys is None else keys[..., 0, 0, 0],
                local_window_size=local_window_size,
                scale=scale,
                block_size=block_size,
                sampler=sampler_at(drawn_by, place, shared),
                return_residual=with_residual,
            )
            if not with_residual:
                return _heads_first(found)
            result, residual = found
            return _heads_first(result), residual.transpose(-1, -2)

        arrays = map(_heads_first, (query, key, value))
        found = on_local_heads(attend, *arrays, bias, *allowed)
        if not with_residual:
            return _heads_first(found)
        result, residual = found
        return _heads_first(result), residual.transpose(-1, -2)
    query, factor = check_scale(query, scale)
    scores = Scores(
        scale=factor,
        is_causal=check_bool("is_causal", is_causal),
        window=check_window("local_window_size", local_window_size),
    )
    inputs = Inputs(query, key, value, bias, allowed)
    if block_size is not None:
        drop = Drop(drawn_by, rate, one_key, flag, evaluates, is_shared)
        result, log_total = _in_blocks(scores, inputs, drop, block_size)
    else:
        spec = SampledMask("dot_product_attention", drawn_by, shared)
        result = whole(scores, *inputs, spec, rate, one_key, flag)
        log_total = whole_sums(scores, query, key, bias, allowed) if with_residual else None
    if log_total is None or not with_residual:
        return result
    return result, log_total.detach().transpose(-1, -2).to(result.dtype)


class Inputs(NamedTuple):
    """The tensors of attention, after all checks."""

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None
    allowed: Allowed


class Drop(NamedTuple):
    """The dropout of attention's weights, after all checks."""

    sampler: MaskSampler
    rate: float | Tensor
    key: Tensor | None  # None if no mask is drawn
    deterministic: bool | Tensor
    is_off: bool  # known without reading a tensor
    is_shared: bool


def _in_blocks(
    scores: Scores, inputs: Inputs, drop: Drop, block_size: int
) -> tuple[Tensor, Tensor]:
    if not drop.sampler.draws_parts:
        raise ValueError(
            "sampler must be bernoulli, packed_bernoulli or by_example of one of them with "
            f"block_size={block_size}; got {drop.sampler.function}, which draws whole masks only. "
            "Omit block_size."
        )
    keys = inputs.key.shape[-3]
    blocks = Blocks(scores, check_block(block_size, keys), keys, drop.is_shared, drop.sampler)
    if drop.is_off:
        return blockwise(blocks, *inputs)
    flag = drop.deterministic
    if drop.key is None:
        # This keeps the result in the graph, with a gradient of zeros.
        plain, log_total = blockwise(blocks, *inputs)
        keep = flag if isinstance(flag, Tensor) else torch.tensor(False, device=plain.device)
        return torch.where(keep, plain, 0), log_total
    record = None
    if observers := observer():
        plan = blocks.plan(inputs.query)
        record = observers.blockwise("dot_product_attention", drop.rate, plan, flag)
    dropped, log_total = blockwise(blocks, *inputs, drop.key, drop.rate, record)
    if isinstance(flag, Tensor):
        plain, _ = blockwise(blocks, *inputs)
        return torch.where(flag, plain, dropped), log_total
    return dropped, log_total


def _heads_first(x: Tensor) -> Tensor:
    """Exchange length and heads."""
    return x.transpose(-3, -2)
