"""Attention from the whole matrix of weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regtorch._dropout.core import apply_dropout
from regtorch._dropout.scores import Allowed, Scores, mixed_values, softmax


def whole(
    scores: Scores,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    allowed: Allowed,
    spec: Any,
    rate: Any,
    rng: Tensor | None,
    deterministic: bool | Tensor,
) -> Tensor:
    """Return the result of attention; the last four arguments are those of `apply_dropout`."""
    weights = softmax(scores(query, key, bias, allowed))
    weights = apply_dropout(spec, weights, rate, rng, deterministic)
    return mixed_values(weights.to(value.dtype), value)


def whole_sums(
    scores: Scores, query: Tensor, key: Tensor, bias: Tensor | None, allowed: Allowed
) -> Tensor:
    """Return the logarithm of each row's sum, -inf for a query that attends to no key."""
    with torch.no_grad():
        return torch.logsumexp(scores(query, key, bias, allowed), -1)
