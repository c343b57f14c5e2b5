"""Dropout of words: a dropped word is dropped wherever it occurs in the batch."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from regjax._checks import check_array
from regjax._dropout.core import (
    apply_dropout,
    check_inexact,
    guard_rate,
    inverse_keep_prob,
    keep_prob_of,
    where_kept,
)
from regjax._random.bernoulli import bernoulli_at, exact_keep_prob
from regshared.spellings import explain_names

if TYPE_CHECKING:
    from jax.typing import ArrayLike
    from jaxtyping import Array, Bool, Float, Inexact, Integer

    from regjax._random.keys import KeyLike


@explain_names
def embedding_dropout(
    x: Inexact[ArrayLike, "*ids features"],
    ids: Integer[ArrayLike, "*ids"],
    rate: ArrayLike,
    *,
    key: KeyLike | None = None,
    deterministic: ArrayLike = False,
) -> Inexact[Array, "*ids features"]:
    """Zero each word with probability `rate`, wherever it occurs; divide the others by `1 - rate`.

    With `x = table[ids]` it is bitwise identical to dropout of whole rows of the table,

        dropout(table, rate, key=key, broadcast_dims=(1,))[ids]

    but draws only for the words that occur: nothing of the table's size is materialized. Dropping
    rows of `x` instead would drop a word in one place and keep it in the next. The result and other
    errors are those of `dropout`.

    Args:
        x: Floating or complex: the embeddings of the words, one feature vector for each id.
        ids: The words, nonnegative integers of any shape.
        rate: See `dropout`.
        key: See `dropout`.
        deterministic: See `dropout`.

    Raises:
        TypeError: `ids` are not integers.
        ValueError: `x.shape` is not `(*ids.shape, features)`, or an id is negative, which indexing
            would count from the end of a table of unknown length. A traced id is not checked: a
            negative one is a separate word.

    Example:
        >>> import jax, jax.numpy as jnp, regjax
        >>> ids = jnp.array([[0, 2, 0], [1, 2, 3]])
        >>> x = jnp.ones((4, 2))[ids]
        >>> regjax.embedding_dropout(x, ids, 0.5, key=jax.random.key(0))[:, :, 0]
        Array([[0., 2., 0.],
               [0., 2., 2.]], dtype=float32)

    References:
        Gal, Ghahramani, "A theoretically grounded application of dropout in recurrent neural
        networks", NeurIPS 2016.
    """
    x = check_inexact(x)
    return apply_dropout(_Words(_check_ids(ids, x.shape)), x, rate, key, deterministic)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["ids"], meta_fields=["name"])
@dataclasses.dataclass(frozen=True)
class _Words:
    """The elements of a mask over the vocabulary at the indices of the words that occur."""

    ids: Integer[Array, "*ids"]
    name: str = "embedding_dropout"

    @guard_rate
    def __call__(
        self, x: Inexact[Array, "*ids features"], key: KeyLike, rate: float | Float[Array, ""]
    ) -> tuple[Inexact[Array, "*ids features"], Bool[Array, "*ids 1"]]:
        """Mask and scale as `dropout` does."""
        ids, keep_prob = self.ids, keep_prob_of(rate, x.dtype)
        high = (ids >> 32) if ids.dtype.itemsize == 8 else jnp.zeros_like(ids)
        index = (high.astype(jnp.uint32), ids.astype(jnp.uint32))
        keep = bernoulli_at(key, keep_prob, index)[..., None]
        return where_kept(keep, x, inverse_keep_prob(exact_keep_prob(keep_prob), x.dtype)), keep


def _check_ids(ids: Integer[ArrayLike, "*ids"], shape: tuple[int, ...]) -> Integer[Array, "*ids"]:
    ids = check_array("ids", ids)
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(f"ids must be integers; got dtype {ids.dtype}.")
    if not shape or shape[:-1] != ids.shape:
        raise ValueError(
            f"ids must have the shape of x without its last axis, {shape[:-1]}; got {ids.shape} "
            f"with x of shape {shape}."
        )
    can_be_read = not isinstance(ids, Tracer) and ids.is_fully_addressable and ids.size
    # JAX's minimum would be traced inside a trace; NumPy's is not.
    if can_be_read and (lowest := np.asarray(ids).min()) < 0:
        raise ValueError(
            f"ids must not be negative; got {lowest}. Count words from the start of the table."
        )
    return ids
