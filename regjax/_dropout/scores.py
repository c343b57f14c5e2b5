"""The scores of attention, their softmax, and the values mixed by them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from regjax._dropout.core import real_dtype

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float

_LARGEST = 2**31 - 1


class Allowed(NamedTuple):
    """The arrays that restrict which keys a query may attend to.

    Attributes:
        mask: Booleans that broadcast to the scores, or None.
        queries: The number of queries of each example, of shape (*batch, 1, 1, 1), or None. Later
            queries attend to no key.
        keys: The number of keys of each example, likewise.
    """

    mask: Any
    queries: Any
    keys: Any


@dataclasses.dataclass(frozen=True)
class Scores:
    """The static part of attention, and its two products.

    Attributes:
        scale: The factor of the products.
        is_causal: Whether query i may attend to keys 0 to i only.
        window: The numbers of keys before and after that of its own number to which a query may
            attend, or None.
        precision: The precision of the products.
        dot_general: The function of the products in place of that of JAX, or None.
    """

    scale: float
    is_causal: bool
    window: tuple[int, int] | None
    precision: Any
    dot_general: Callable[..., Array] | None

    def __call__(
        self,
        query: Array,
        key: Array,
        bias: Any,
        allowed: Allowed,
        first: int | Array,
        keys: int = 0,
    ) -> Float[Array, "*batch heads queries keys"]:
        """Return the scores of the keys from `first` on, -inf where a query may not attend.

        The keys from `keys` on, if set, are padding.
        """
        query, key = _heads_first(query), _heads_first(key)
        if query.shape[-3] == key.shape[-3]:
            scores = self._einsum("...hqd,...hkd->...hqk", query, key)
        else:
            scores = self._einsum("...hgqd,...hkd->...hgqk", _grouped(query, key), key)
            scores = scores.reshape(*query.shape[:-1], key.shape[-2])
        scores = scores * scores.dtype.type(self.scale)
        if bias is not None:
            scores = scores + bias.astype(scores.dtype)
        for seen in self._seen(scores, allowed, first, keys):
            scores = jnp.where(with_rank(seen, scores.ndim), scores, -jnp.inf)
        return scores

    def _seen(
        self, scores: Array, allowed: Allowed, first: int | Array, keys: int
    ) -> Iterator[Bool[Array, "*#scores"]]:
        """Yield the masks of a block of scores, computed from indices where no array has them."""
        row, column = (lax.broadcasted_iota(np.int32, scores.shape[-2:], dim) for dim in (0, 1))
        column = column + first
        if allowed.mask is not None:
            yield allowed.mask
        if self.is_causal:
            yield column <= row
        if self.window is not None:
            left, right = (np.int32(min(size, _LARGEST)) for size in self.window)
            yield (row - column <= left) & (column - row <= right)
        for place, number in ((row, allowed.queries), (column, allowed.keys)):
            if number is not None:
                yield with_rank(place, scores.ndim) < number
        if keys:
            yield column < keys

    def mixed_values(
        self,
        weights: Float[Array, "*batch heads queries keys"],
        value: Float[Array, "*batch keys kv_heads features"],
    ) -> Float[Array, "*batch queries heads features"]:
        """Return the sums of the values, weighted for each query."""
        value = _heads_first(value)
        if weights.shape[-3] == value.shape[-3]:
            return _heads_first(self._einsum("...hqk,...hkd->...hqd", weights, value))
        mixed = self._einsum("...hgqk,...hkd->...hgqd", _grouped(weights, value), value)
        return _heads_first(mixed.reshape(*weights.shape[:-1], value.shape[-1]))

    def _einsum(self, formula: str, x: Array, y: Array) -> Array:
        options: dict[str, Any] = (
            {} if self.dot_general is None else {"_dot_general": self.dot_general}
        )
        wide = real_dtype(y.dtype)
        return jnp.einsum(
            formula, x, y, precision=self.precision, preferred_element_type=wide, **options
        )


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


def with_rank(x: Array, ndim: int) -> Array:
    """Return `x` with leading dimensions of size 1, as silent rank promotion would add them."""
    return x.reshape(*[1] * (ndim - x.ndim), *x.shape)


def _heads_first(x: Array) -> Array:
    """Exchange length and heads.

    Products of arrays with heads first read the matrix of weights in one layout; otherwise XLA on a
    CPU keeps a transposed copy of it.
    """
    return jnp.swapaxes(x, -2, -3)


def _grouped(x: Array, key: Array) -> Array:
    """Split the heads of `x` into groups, one for each head of the keys or values."""
    heads, kv_heads = x.shape[-3], key.shape[-3]
    return x.reshape(*x.shape[:-3], kv_heads, heads // kv_heads, *x.shape[-2:])


def per_query(x: Float[Array, "*batch heads queries"]) -> Float[Array, "*batch queries heads 1"]:
    return jnp.swapaxes(x, -1, -2)[..., None]
