"""Attention by blocks of keys, in memory linear in sequence length."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from regtorch._dropout.core import inverse_keep_prob, keep_prob_of, real_dtype
from regtorch._dropout.scores import Allowed, Scores, finite, gathered, mixed_values, products
from regtorch._random.bernoulli import MaskSampler
from regtorch._random.collect import BlockwisePlan
from regtorch._random.threefry import Span


@dataclasses.dataclass(frozen=True)
class Blocks:
    """The static part of blockwise attention.

    Attributes:
        scores: Computes the scores of a block.
        size: The number of keys in a block; the last may have fewer.
        keys: The number of keys.
        broadcast_dropout: Whether rows and heads share one mask.
        sampler: Draws the mask.
    """

    scores: Scores
    size: int
    keys: int
    broadcast_dropout: bool
    sampler: MaskSampler

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
        self,
        query: Tensor,
        words: Tensor | None,
        given: Tensor | None,
        keep_prob: Any,
        first: int,
        size: int,
    ) -> Tensor | None:
        """Return the part of the whole mask that belongs to a block; None without dropout."""
        if words is None:
            return None
        whole = self.shape(query)
        part = (*[None] * len(whole[:-1]), Span(first, size))
        sampler = self.sampler if given is None else self.sampler.join(given)
        return sampler.draw_part(words, keep_prob, whole, part)


class _Attend(torch.autograd.Function):
    """The result, unscaled, in float32 or wider, and the logarithm of each row's sum.

    The logarithm is -inf for a query that attends to no key.

    Nothing else is stored for the backward pass, which computes the weights of a block and their
    mask again, by differentiable operations.
    """

    @staticmethod
    def forward(
        blocks: Blocks,
        keep_prob: float | Tensor,
        record: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        words: Tensor | None,
        given: Tensor | None,
        *allowed: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        wide = real_dtype(query.dtype)
        rows = (*query.shape[:-3], query.shape[-2], query.shape[-3])
        top = query.new_full(rows, -math.inf, dtype=wide)
        total = query.new_zeros(rows, dtype=wide)
        result = query.new_zeros((*query.shape[:-1], value.shape[-1]), dtype=wide)
        for first, size in blocks:
            keys, values, added = _parts((key, value, bias), first, size)
            scores = blocks.scores(query, keys, added, _seen(allowed, first, size), first)
            new_top = torch.maximum(top, scores.amax(-1))
            shrink = torch.exp(top - finite(new_top))
            powers = torch.exp(scores - finite(new_top)[..., None])
            top, total = new_top, total * shrink + powers.sum(-1)
            keep = blocks.keep(query, words, given, keep_prob, first, size)
            if record:
                record.block(first, keep, scores)
            kept = _selected(keep, powers)
            result = result * _per_query(shrink) + mixed_values(kept.to(value.dtype), values)
        attends = total > 0
        total = torch.where(attends, total, 1.0)
        log_total = torch.where(attends, finite(top) + torch.log(total), -math.inf)
        if record:
            record.end(words, finite(log_total), given)
        return result / _per_query(total), log_total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.blocks, ctx.keep_prob, _, *tensors = inputs
        ctx.save_for_backward(*tensors, *output)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, bias, words, given, *allowed, result, log_total = ctx.saved_tensors
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
            keys, values, added = _parts((key, value, bias), first, size)
            scores = blocks.scores(query, keys, added, _seen(allowed, first, size), first)
            weights = torch.exp(scores - finite(log_total)[..., None])
            keep = blocks.keep(query, words, given, ctx.keep_prob, first, size)
            grad_weights = _selected(keep, products(grad_result, values.to(wide)))
            grad_scores = weights * (grad_weights + shared[..., None])
            grad_products = grad_scores * blocks.scores.scale
            grad_query = grad_query + mixed_values(grad_products, keys.to(wide))
            grad_key, grad_value, grad_bias = _parts(others, first, size)
            if grad_key is not None:
                grad_key += gathered(grad_products, query.to(wide), keys)
            if grad_value is not None:
                grad_value += gathered(_selected(keep, weights), grad_result, values)
            if grad_bias is not None:
                grad_bias += grad_scores.sum_to_size(grad_bias.shape)
        unneeded = [None] * (2 + len(allowed))
        return None, None, None, grad_query.to(query.dtype), *others, *unneeded


def blockwise(
    blocks: Blocks,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    allowed: Allowed,
    dropout_rng: Tensor | None = None,
    rate: float | Tensor = 0.0,
    record: Any = None,
) -> tuple[Tensor, Tensor]:
    """Return the result, and the logarithm of each row's sum in float32 or wider."""
    wide = real_dtype(query.dtype)
    rate = rate.detach() if isinstance(rate, Tensor) else rate
    keep_prob = keep_prob_of(rate, wide)
    sampler, given = blocks.sampler.split()
    blocks = dataclasses.replace(blocks, sampler=sampler)
    arrays = (query, key, value, bias, dropout_rng, given, *allowed)
    result, log_total = _Attend.apply(blocks, keep_prob, record, *arrays)
    if dropout_rng is not None:
        realized = sampler.realized_keep_prob(keep_prob)
        realized = realized.to(wide) if isinstance(realized, Tensor) else realized
        result = result * inverse_keep_prob(realized, wide)
    if isinstance(rate, Tensor):
        result = torch.where((rate >= 0) & (rate <= 1), result, math.nan)
    return result.to(value.dtype), log_total


def _parts(inputs: Sequence[Any], first: int, size: int) -> tuple[Any, ...]:
    """Return the views of key, value and bias that belong to a block."""
    dims = (-3, -3, -1)
    return tuple(_part(x, dim, first, size) for x, dim in zip(inputs, dims, strict=True))


def _seen(allowed: Sequence[Tensor | None], first: int, size: int) -> Allowed:
    """Return `allowed` with the view of the mask that belongs to a block."""
    mask, queries, keys = allowed
    return Allowed(_part(mask, -1, first, size), queries, keys)


def _part(x: Tensor | None, dim: int, first: int, size: int) -> Tensor | None:
    return x if x is None or x.shape[dim] == 1 else x.narrow(dim, first, size)


def _selected(keep: Tensor | None, weights: Tensor) -> Tensor:
    return weights if keep is None else torch.where(keep, weights, 0.0)


def _per_query(x: Tensor) -> Tensor:
    return x.transpose(-1, -2)[..., None]
