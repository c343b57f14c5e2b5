"""Attention with dropout, from the whole weight matrix or blockwise without materializing it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from regshared.checks import check_bool, check_integer, describe
from regshared.spellings import explain_names
from regtorch._checks import check_number, check_tensor
from regtorch._dropout.blockwise import Blocks, blockwise
from regtorch._dropout.core import (
    SampledMask,
    apply_dropout,
    check_flag,
    is_number,
    real_dtype,
    require_key,
)
from regtorch._dropout.dtensor import Place, is_dtensor, on_local_heads, sampler_at
from regtorch._dropout.scores import Scores, mixed_values, softmax
from regtorch._random.bernoulli import Sampler, bernoulli, check_probability
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
    scale: float | Tensor | None = None,
    block_size: int | None = None,
    sampler: Sampler = bernoulli,
) -> Tensor:
    """Compute attention, with dropout of its weights in training.

        weights = softmax(scale * query . key + bias), 0 where the mask is False
        result  = dropout(weights) . value

    The softmax and the dropout of its weights are in float32 for half types. A query whose keys are
    all masked gives 0.

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
        scale: The factor of the products, `1 / sqrt(depth)` by default. A 0-d tensor multiplies the
            query instead, so that it can be learned; NaN then gives NaN.
        block_size: The number of keys per block; None for all keys at once.
        sampler: The function that draws the mask; see `dropout`. `packed_bernoulli` packs along the
            heads, queries or batch, never along the keys. With `block_size`, a function of your own
            is rejected: it can only draw the whole mask. The numbers of `by_example` belong to a
            batch dimension, which excludes `broadcast_dropout`.

    Returns:
        A tensor of shape (..., queries, heads, features) in the dtype of the tensors.

    Raises:
        TypeError: The tensors are not floating or differ in dtype, `scale` is not a number, or
            `mask` is not boolean.
        ValueError: Shapes do not fit, with the argument named; `scale` is not finite; `block_size`
            is below 1; or `sampler` draws no blocks.

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
    _check_arrays(query, key, value)
    _check_shapes(query, key, value, bias, mask)
    rate = check_probability("dropout_rate", dropout_rate)
    flag = check_flag(deterministic)
    evaluates = flag is True or is_number(rate, 0)
    draws = not evaluates and not is_number(rate, 1)
    one_key = _require_rng(dropout_rng).to(query.device) if draws else None
    broadcast_dropout = check_bool("broadcast_dropout", broadcast_dropout)
    shared = tuple(range(query.ndim - 2)) if broadcast_dropout else ()
    drawn_by = mask_sampler(sampler)
    check_batch_axis(drawn_by, query.ndim - 3)
    drawn_by.check_fit((*query.shape[:-3], query.shape[-2], query.shape[-3], key.shape[-3]), shared)
    if is_dtensor(query):

        def attend(tensors: tuple[Any, ...], place: Place) -> Tensor:
            query, key, value, bias, mask = tensors
            return _heads_first(
                dot_product_attention(
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
                    scale=scale,
                    block_size=block_size,
                    sampler=sampler_at(drawn_by, place, shared),
                )
            )

        arrays = map(_heads_first, (query, key, value))
        return _heads_first(on_local_heads(attend, *arrays, bias, mask))
    query, factor = _scaled(query, scale)
    scores = Scores(
        scale=factor,
        is_causal=check_bool("is_causal", is_causal),
    )
    if block_size is None:
        weights = softmax(scores(query, key, bias, mask))
        spec = SampledMask("dot_product_attention", drawn_by, shared)
        weights = apply_dropout(spec, weights, rate, one_key, flag)
        return mixed_values(weights.to(value.dtype), value)
    if not drawn_by.draws_parts:
        raise ValueError(
            "sampler must be bernoulli, packed_bernoulli or by_example of one of them with "
            f"block_size={block_size}; got {drawn_by.function}, which draws whole masks only. Omit "
            "block_size."
        )
    size = _check_block(block_size, key.shape[-3])
    blocks = Blocks(scores, size, key.shape[-3], broadcast_dropout, drawn_by)
    arrays = (query, key, value, bias, mask)
    if evaluates:
        return blockwise(blocks, *arrays)
    if one_key is None:
        # This keeps the result in the graph, with a gradient of zeros.
        whole = blockwise(blocks, *arrays)
        keep = flag if isinstance(flag, Tensor) else torch.tensor(False, device=whole.device)
        return torch.where(keep, whole, 0)
    record = None
    if observers := observer():
        record = observers.blockwise("dot_product_attention", rate, blocks.plan(query), flag)
    dropped = blockwise(blocks, *arrays, one_key, rate, record)
    if isinstance(flag, Tensor):
        return torch.where(flag, blockwise(blocks, *arrays), dropped)
    return dropped


def _heads_first(x: Tensor) -> Tensor:
    """Exchange length and heads."""
    return x.transpose(-3, -2)


def _check_arrays(*arrays: Tensor) -> None:
    names = ("query", "key", "value")
    for name, array in zip(names, arrays, strict=True):
        check_tensor(name, array)
        if not array.is_floating_point():
            raise TypeError(
                f"{name} must be floating; got dtype {array.dtype}. Cast it: "
                f"{name}.to(torch.float32)."
            )
        if array.ndim < 3:
            raise ValueError(
                f"{name} must have shape (..., length, heads, features); got {tuple(array.shape)}."
            )
    if len({array.dtype for array in arrays}) > 1:
        dtypes = ", ".join(f"{n} {a.dtype}" for n, a in zip(names, arrays, strict=True))
        raise TypeError(f"query, key and value must have the same dtype; got {dtypes}. Cast them.")


def _scaled(query: Tensor, scale: float | Tensor | None) -> tuple[Tensor, float]:
    """Return the query and the factor of its products.

    A tensor scale multiplies the query, so that gradients flow to it and NaN gives NaN.
    """
    if scale is None:
        return query, 1 / math.sqrt(query.shape[-1])
    if not isinstance(scale, Tensor):
        return query, check_number("scale", scale)
    if scale.ndim or not scale.is_floating_point():
        raise TypeError(f"scale must be a real scalar; got {describe(scale)}.")
    wide = real_dtype(query.dtype)
    return (query.to(wide) * scale.to(wide)).to(query.dtype), 1.0


def _check_shapes(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, mask: Tensor | None
) -> None:
    """Raise an error that names the argument whose shape or dtype does not fit."""
    *batch, queries, heads, depth = query.shape
    *key_batch, keys, kv_heads, key_depth = key.shape
    if key_batch != batch or key_depth != depth:
        raise ValueError(
            f"query and key must have the same batch and depth; got shapes {tuple(query.shape)} "
            f"and {tuple(key.shape)}."
        )
    if value.shape[:-1] != key.shape[:-1]:
        raise ValueError(
            f"value must have key's shape {tuple(key.shape[:-1])} before its features; got "
            f"{tuple(value.shape)}."
        )
    if not kv_heads or heads % kv_heads:
        raise ValueError(f"query must have a multiple of key's {kv_heads} heads; got {heads}.")
    whole = (*batch, heads, queries, keys)
    if bias is not None and (check_tensor("bias", bias).is_complex() or bias.dtype == torch.bool):
        raise TypeError(f"bias must be real; got dtype {bias.dtype}. Pass booleans as mask.")
    if mask is not None and check_tensor("mask", mask).dtype != torch.bool:
        raise TypeError(
            f"mask must be boolean, True to attend; got dtype {mask.dtype}. Pass numbers to add to "
            "the scores as bias."
        )
    for name, array in (("bias", bias), ("mask", mask)):
        if array is None:
            continue
        pairs = zip(array.shape[::-1], whole[::-1], strict=False)
        if array.ndim > len(whole) or any(size not in (1, full) for size, full in pairs):
            raise ValueError(
                f"{name} must broadcast to (..., heads, queries, keys) = {whole}; got "
                f"{tuple(array.shape)}."
            )


def _require_rng(dropout_rng: Tensor | torch.Generator | None) -> Tensor:
    """Return `require_key(dropout_rng)`, with errors that name `dropout_rng` instead of `key`."""
    if dropout_rng is None:
        raise ValueError(
            "dropout_rng must be a random key in training; got None. Pass "
            "dropout_rng=regtorch.key(seed), or dropout_rng=regtorch.site_key(root, step, site) "
            "inside a training loop, or a torch.Generator, or deterministic=True to evaluate."
        )
    try:
        return require_key(dropout_rng)
    except (TypeError, ValueError) as error:
        raise type(error)(f"dropout_rng: {error}") from None


def _check_block(block_size: int, keys: int) -> int:
    return max(1, min(check_integer("block_size", block_size, minimum=1), keys))
