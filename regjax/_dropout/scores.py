"""The scores of attention, their softmax, and the values mixed by them."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from regjax._dropout.core import real_dtype

if TYPE_CHECKING:
    from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True)
class Scores:
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
            scores = jnp.where(with_rank(each, scores.ndim), scores, -jnp.inf)
        return scores


@jax.custom_jvp
def softmax(scores: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Return the softmax along the last axis; zeros, with zero gradients, if all are -inf."""
    # A row with a finite score has a sum of at least 1, so the bounds change only other rows.
    limits = jnp.finfo(scores.dtype)
    top = jnp.maximum(scores.max(-1, keepdims=True, initial=-jnp.inf), limits.min)
    powers = jnp.exp(scores - top)
    return powers / jnp.maximum(powers.sum(-1, keepdims=True), limits.tiny)


@softmax.defjvp
def _softmax_jvp(primals, tangents):
    # Use the result, which the backward pass stores anyway; the intermediates would be stored too.
    weights = softmax(*primals)
    changes = weights * tangents[0]
    return weights, changes - weights * changes.sum(-1, keepdims=True)


def mixed_values(
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


def with_rank(x: Array, ndim: int) -> Array:
    """Return `x` with leading dimensions of size 1, as silent rank promotion would add them."""
    return x.reshape(*[1] * (ndim - x.ndim), *x.shape)
