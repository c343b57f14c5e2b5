"""Attention with dropout, from the whole weight matrix or blockwise without materializing it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from regshared.checks import check_bool, check_integer, describe
from regtorch._checks import check_number, check_tensor
from regtorch._dropout.core import (
    SampledMask,
    apply_dropout,
    check_flag,
    inverse_keep_prob,
    is_number,
    keep_prob_of,
    real_dtype,
    require_key,
)
from regtorch._random.bernoulli import EXACT, bernoulli_at, check_probability, exact_keep_prob
from regtorch._random.collect import BlockwisePlan
from regtorch._random.events import observer


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
        query: Of shape (..., queries, heads, depth), with any number of batch dimensions.
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

    Returns:
        A tensor of shape (..., queries, heads, features) in the dtype of the tensors.

    Raises:
        TypeError: The tensors are not floating or differ in dtype, `scale` is not a number, or
            `mask` is not boolean.
        ValueError: Shapes do not fit, with the argument named; `scale` is not finite; or
            `block_size` is below 1.

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
    query, factor = _scaled(query, scale)
    scores = _Scores(
        scale=factor,
        is_causal=check_bool("is_causal", is_causal),
    )
    if block_size is None:
        weights = _softmax(scores(query, key, bias, mask))
        shared = tuple(range(weights.ndim - 2)) if broadcast_dropout else ()
        spec = SampledMask("dot_product_attention", EXACT, shared)
        weights = apply_dropout(spec, weights, rate, one_key, flag)
        return _mixed(weights.to(value.dtype), value)
    size = _check_block(block_size, key.shape[-3])
    blocks = _Blocks(scores, size, key.shape[-3], broadcast_dropout)
    arrays = (query, key, value, bias, mask)
    if evaluates:
        return _blockwise(blocks, *arrays)
    if one_key is None:
        # This keeps the result in the graph, with a gradient of zeros.
        whole = _blockwise(blocks, *arrays)
        keep = flag if isinstance(flag, Tensor) else torch.tensor(False, device=whole.device)
        return torch.where(keep, whole, 0)
    record = None
    if observers := observer():
        record = observers.blockwise("dot_product_attention", rate, blocks.plan(query), flag)
    dropped = _blockwise(blocks, *arrays, one_key, rate, record)
    if isinstance(flag, Tensor):
        return torch.where(flag, _blockwise(blocks, *arrays), dropped)
    return dropped


@dataclasses.dataclass(frozen=True)
class _Scores:
    """The scores of a range of keys, -inf where a query may not attend."""

    scale: float
    is_causal: bool

    def __call__(
        self, query: Tensor, key: Tensor, bias: Tensor | None, mask: Tensor | None, first: int = 0
    ) -> Tensor:
        """Return the scores from key `first` on, of shape (..., heads, queries, keys)."""
        wide = real_dtype(query.dtype)
        scores = _products(query.to(wide), key.to(wide)) * self.scale
        if bias is not None:
            scores = scores + bias.to(wide)
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf)
        if self.is_causal:
            queries, keys = (torch.arange(n, device=query.device) for n in scores.shape[-2:])
            scores = scores.masked_fill(keys + first > queries[:, None], -math.inf)
        return scores


def _softmax(scores: Tensor) -> Tensor:
    """Return the softmax along the last axis; where all scores are -inf, 0 with zero gradients."""
    if not scores.shape[-1]:
        return scores
    powers = torch.exp(scores - _finite(scores.detach().amax(-1, keepdim=True)))
    total = powers.sum(-1, keepdim=True)
    return powers / torch.where(total > 0, total, 1.0)


def _finite(x: Tensor) -> Tensor:
    return torch.where(x == -math.inf, 0.0, x)


# The three products of attention; each is the derivative of the two others. A key's head serves a
# group of the query's heads.
def _products(query: Tensor, key: Tensor) -> Tensor:
    """Return the product of each query with each key: (..., heads, queries, keys)."""
    return torch.einsum("...qhgd,...khd->...hgqk", _grouped(query, key, -2), key).flatten(-4, -3)


def _mixed(weights: Tensor, value: Tensor) -> Tensor:
    """Return for each query the weighted sum of the values: (..., queries, heads, features)."""
    grouped = _grouped(weights, value, -3)
    return torch.einsum("...hgqk,...khd->...qhgd", grouped, value).flatten(-3, -2)


def _gathered(weights: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Return for each key the weighted sum of the queries: (..., keys, kv_heads, depth)."""
    grouped = _grouped(weights, key, -3), _grouped(query, key, -2)
    return torch.einsum("...hgqk,...qhgd->...khd", *grouped)


def _grouped(x: Tensor, key: Tensor, dim: int) -> Tensor:
    """Group the heads of `x` by the head of the key that serves them."""
    kv_heads = key.shape[-2]
    return x.unflatten(dim, (kv_heads, x.shape[dim] // kv_heads))


@dataclasses.dataclass(frozen=True)
class _Blocks:
    """The static part of blockwise attention.

    Attributes:
        scores: Computes the scores of a block.
        size: The number of keys in a block; the last may have fewer.
        keys: The number of keys.
        broadcast_dropout: Whether rows and heads share one mask.
    """

    scores: _Scores
    size: int
    keys: int
    broadcast_dropout: bool

    def __iter__(self) -> Any:
        """Yield the first key of each block, and the number of its keys."""
        return ((i, min(self.size, self.keys - i)) for i in range(0, self.keys, self.size))

    def shape(self, query: Tensor) -> tuple[int, ...]:
        *batch, queries, heads, _ = query.shape
        rows = [1] * (len(batch) + 1) if self.broadcast_dropout else [*batch, heads]
        return (*rows, queries, self.keys)

    def plan(self, query: Tensor) -> BlockwisePlan:
        """Return the shapes of the whole mask, and of the scores."""
        *batch, queries, heads, _ = query.shape
        return BlockwisePlan(self.shape(query), (*batch, heads, queries, self.keys))

    def keep(
        self, query: Tensor, words: Tensor | None, keep_prob: Any, first: int, size: int
    ) -> Tensor | None:
        """Return the part of the whole mask that belongs to a block; None without dropout."""
        if words is None:
            return None
        rows = self.shape(query)[:-1]
        row = torch.arange(math.prod(rows), device=query.device).reshape(*rows, 1)
        along = torch.arange(first, first + size, device=query.device)
        return bernoulli_at(words, keep_prob, row * self.keys + along)


class _Attend(torch.autograd.Function):
    """The result, unscaled, in float32 or wider, and the logarithm of each row's sum.

    Nothing else is stored for the backward pass, which computes the weights of a block and their
    mask again, by differentiable operations.
    """

    @staticmethod
    def forward(
        blocks: _Blocks,
        keep_prob: float | Tensor,
        record: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
        words: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        wide = real_dtype(query.dtype)
        rows = (*query.shape[:-3], query.shape[-2], query.shape[-3])
        top = query.new_full(rows, -math.inf, dtype=wide)
        total = query.new_zeros(rows, dtype=wide)
        result = query.new_zeros((*query.shape[:-1], value.shape[-1]), dtype=wide)
        for first, size in blocks:
            keys, values, added, seen = _parts((key, value, bias, mask), first, size)
            scores = blocks.scores(query, keys, added, seen, first)
            new_top = torch.maximum(top, scores.amax(-1))
            shrink = torch.exp(top - _finite(new_top))
            powers = torch.exp(scores - _finite(new_top)[..., None])
            top, total = new_top, total * shrink + powers.sum(-1)
            keep = blocks.keep(query, words, keep_prob, first, size)
            if record:
                record.block(first, keep, scores)
            kept = _selected(keep, powers)
            result = result * _per_query(shrink) + _mixed(kept.to(value.dtype), values)
        saw = total > 0
        total = torch.where(saw, total, 1.0)
        log_total = torch.where(saw, _finite(top) + torch.log(total), 0.0)
        if record:
            record.end(words, log_total)
        return result / _per_query(total), log_total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.blocks, ctx.keep_prob, _, *tensors = inputs
        ctx.save_for_backward(*tensors, *output)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, bias, mask, words, result, log_total = ctx.saved_tensors
        blocks, wide = ctx.blocks, result.dtype
        grad_result, grad_log_total = grad_outputs
        # The gradient that each weight of a row receives through the row's sum.
        shared = grad_log_total - (grad_result * result).sum(-1).transpose(-1, -2)
        # In the wide dtype, since every block adds to the gradient of every query.
        grad_query = torch.zeros_like(query, dtype=wide)
        others = [
            torch.zeros_like(x) if wanted else None
            for x, wanted in zip((key, value, bias), ctx.needs_input_grad[4:7], strict=True)
        ]
        # The masks are drawn again without being recorded.
        for first, size in blocks:
            keys, values, added, seen = _parts((key, value, bias, mask), first, size)
            scores = blocks.scores(query, keys, added, seen, first)
            weights = torch.exp(scores - log_total[..., None])
            keep = blocks.keep(query, words, ctx.keep_prob, first, size)
            grad_weights = _selected(keep, _products(grad_result, values.to(wide)))
            grad_scores = weights * (grad_weights + shared[..., None])
            grad_products = grad_scores * blocks.scores.scale
            grad_query = grad_query + _mixed(grad_products, keys.to(wide))
            grad_key, grad_value, grad_bias, _ = _parts((*others, None), first, size)
            if grad_key is not None:
                grad_key += _gathered(grad_products, query.to(wide), keys)
            if grad_value is not None:
                grad_value += _gathered(_selected(keep, weights), grad_result, values)
            if grad_bias is not None:
                grad_bias += grad_scores.sum_to_size(grad_bias.shape)
        return None, None, None, grad_query.to(query.dtype), *others, None, None


def _blockwise(
    blocks: _Blocks,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    dropout_rng: Tensor | None = None,
    rate: float | Tensor = 0.0,
    record: Any = None,
) -> Tensor:
    wide = real_dtype(query.dtype)
    rate = rate.detach() if isinstance(rate, Tensor) else rate
    keep_prob = keep_prob_of(rate, wide)
    result, _ = _Attend.apply(blocks, keep_prob, record, query, key, value, bias, mask, dropout_rng)
    if dropout_rng is not None:
        result = result * inverse_keep_prob(exact_keep_prob(keep_prob), wide)
    if isinstance(rate, Tensor):
        result = torch.where((rate >= 0) & (rate <= 1), result, math.nan)
    return result.to(value.dtype)


def _parts(inputs: Sequence[Any], first: int, size: int) -> tuple[Any, ...]:
    """Return the views of key, value, bias and mask that belong to a block."""
    dims = (-3, -3, -1, -1)
    return tuple(
        x if x is None or x.shape[dim] == 1 else x.narrow(dim, first, size)
        for x, dim in zip(inputs, dims, strict=True)
    )


def _selected(keep: Tensor | None, weights: Tensor) -> Tensor:
    return weights if keep is None else torch.where(keep, weights, 0.0)


def _per_query(x: Tensor) -> Tensor:
    return x.transpose(-1, -2)[..., None]


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
