"""Dropout of words: a dropped word is dropped wherever it occurs in the batch."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from regshared.spellings import explain_names
from regtorch._checks import has_negative
from regtorch._dropout.core import (
    apply_dropout,
    check_inexact,
    inverse_keep_prob,
    keep_prob_of,
    where_kept,
)
from regtorch._dropout.dtensor import is_dtensor, on_local_part
from regtorch._random.bernoulli import bernoulli_at, exact_keep_prob


@explain_names
def embedding_dropout(
    x: Tensor,
    ids: Tensor,
    rate: float | Tensor,
    *,
    key: Tensor | torch.Generator | None = None,
    deterministic: bool | Tensor = False,
) -> Tensor:
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
        TypeError: `ids` is not a tensor of integers.
        ValueError: `x.shape` is not `(*ids.shape, features)`, or an id is negative, which indexing
            would count from the end of a table of unknown length. Ids are not checked under
            transforms or where reading them would wait for the device: a negative one is a separate
            word.

    Example:
        >>> import torch, regtorch
        >>> ids = torch.tensor([[0, 2, 0], [1, 2, 3]])
        >>> x = torch.ones(4, 2)[ids]
        >>> regtorch.embedding_dropout(x, ids, 0.5, key=regtorch.key(0))[:, :, 0]
        tensor([[0., 2., 0.],
                [0., 2., 2.]])

    References:
        Gal and Ghahramani, "A theoretically grounded application of dropout in recurrent neural
        networks", NeurIPS 2016.
    """
    x = check_inexact(x)
    if is_dtensor(x):
        options = {"key": key, "deterministic": deterministic}
        return on_local_part(
            lambda local, place: embedding_dropout(local, place.local(ids, 1), rate, **options), x
        )
    return apply_dropout(_Words(), x, rate, key, deterministic, _check_ids(ids, x.shape))


@dataclasses.dataclass(frozen=True)
class _Words:
    """The elements of a mask over the vocabulary at the indices of the words that occur."""

    name: str = "embedding_dropout"

    def keep(
        self, x: Tensor, key: Tensor, rate: float | Tensor, given: Tensor | None = None
    ) -> Tensor:
        assert given is not None
        return bernoulli_at(key, keep_prob_of(rate, x.dtype), given.to(torch.int64))[..., None]

    def apply(self, x: Tensor, keep: Tensor, rate: float | Tensor) -> Tensor:
        share = exact_keep_prob(keep_prob_of(rate, x.dtype))
        return where_kept(keep, x, inverse_keep_prob(share, x.dtype))

    def slope(self) -> _Words:
        return self


def _check_ids(ids: Tensor, shape: torch.Size) -> Tensor:
    is_tensor = isinstance(ids, Tensor)
    if not is_tensor or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        found = f"dtype {ids.dtype}" if is_tensor else repr(ids)
        raise TypeError(f"ids must be a tensor of integers; got {found}.")
    if not shape or shape[:-1] != ids.shape:
        raise ValueError(
            f"ids must have the shape of x without its last axis, {tuple(shape[:-1])}; got "
            f"{tuple(ids.shape)} with x of shape {tuple(shape)}."
        )
    if has_negative(ids):
        raise ValueError(
            f"ids must not be negative; got {int(ids.min())}. Count words from the start of the "
            "table."
        )
    return ids
