"""The scores of attention, their softmax, and the products with keys, queries and values."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import torch
from torch import Tensor

from regtorch._dropout.core import real_dtype

_LARGEST = 2**63 - 1


class Allowed(NamedTuple):
    """The tensors that restrict which keys a query may attend to.

    Attributes:
        mask: Booleans that broadcast to the scores, or None.
        queries: The number of queries of each example, of shape (*batch, 1, 1, 1), or None. Later
            queries attend to no key.
        keys: The number of keys of each example, likewise.
    """

    mask: Tensor | None
    queries: Tensor | None
    keys: Tensor | None


@dataclasses.dataclass(frozen=True)
class Scores:
    """The scores of a range of keys, -inf where a query may not attend.

    Attributes:
        scale: The factor of the products.
        is_causal: Whether query i may attend to keys 0 to i only.
        window: The numbers of keys before and after that of its own number to which a query may
            attend, or None.
    """

    scale: float
    is_causal: bool
    window: tuple[int, int] | None

    def __call__(
        self, query: Tensor, key: Tensor, bias: Tensor | None, allowed: Allowed, first: int = 0
    ) -> Tensor:
        """Return the scores from key `first` on, of shape (..., heads, queries, keys)."""
        wide = real_dtype(query.dtype)
        scores = products(query.to(wide), key.to(wide)) * self.scale
        if bias is not None:
            scores = scores + bias.to(wide)
        for seen in self._seen(scores, allowed, first):
            scores = scores.masked_fill(~seen, -math.inf)
        return scores

    def _seen(self, scores: Tensor, allowed: Allowed, first: int) -> list[Tensor]:
        """Return the masks of a block of scores, computed from indices where no tensor has them."""
        row, column = (torch.arange(n, device=scores.device) for n in scores.shape[-2:])
        row, column = row[:, None], column + first
        seen = [] if allowed.mask is None else [allowed.mask]
        if self.is_causal:
            seen.append(column <= row)
        if self.window is not None:
            left, right = (min(size, _LARGEST) for size in self.window)
            seen.append((row - column <= left) & (column - row <= right))
        for place, number in ((row, allowed.queries), (column, allowed.keys)):
            if number is not None:
                seen.append(place < number)
        return seen


def softmax(scores: Tensor) -> Tensor:
    """Return the softmax along the last axis; where all scores are -inf, 0 with zero gradients."""
    if not scores.shape[-1]:
        return scores
    powers = torch.exp(scores - finite(scores.detach().amax(-1, keepdim=True)))
    total = powers.sum(-1, keepdim=True)
    return powers / torch.where(total > 0, total, 1.0)


def finite(x: Tensor) -> Tensor:
    return torch.where(x == -math.inf, 0.0, x)


# The three products of attention; each is the derivative of the two others. A key's head serves a
# group of the query's heads.
def products(query: Tensor, key: Tensor) -> Tensor:
    """Return the product of each query with each key: (..., heads, queries, keys)."""
    return torch.einsum("...qhgd,...khd->...hgqk", _grouped(query, key, -2), key).flatten(-4, -3)


def mixed_values(weights: Tensor, value: Tensor) -> Tensor:
    """Return for each query the weighted sum of the values: (..., queries, heads, features)."""
    grouped = _grouped(weights, value, -3)
    return torch.einsum("...hgqk,...khd->...qhgd", grouped, value).flatten(-3, -2)


def gathered(weights: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Return for each key the weighted sum of the queries: (..., keys, kv_heads, depth)."""
    grouped = _grouped(weights, key, -3), _grouped(query, key, -2)
    return torch.einsum("...hgqk,...qhgd->...khd", *grouped)


def _grouped(x: Tensor, key: Tensor, dim: int) -> Tensor:
    """Group the heads of `x` by the head of the key that serves them."""
    kv_heads = key.shape[-2]
    return x.unflatten(dim, (kv_heads, x.shape[dim] // kv_heads))
