"""Attention with a function that drops weights, with the sums of PyTorch's own attention."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable

import torch
from torch import Tensor


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    *,
    drop: Callable[[Tensor], Tensor],
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    """Compute `F.scaled_dot_product_attention` from all weights, (..., heads, queries, keys)."""
    device = query.device.type
    given, outside = query.dtype, contextlib.nullcontext()
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        given, outside = torch.get_autocast_dtype(device), torch.autocast(device, enabled=False)
    wide = torch.float32 if given.itemsize < 4 else given
    with outside:
        query, key, value = (x.to(given).to(wide) for x in (query, key, value))
        if enable_gqa:
            groups = query.shape[-3] // key.shape[-3]
            key, value = (x.repeat_interleave(groups, dim=-3) for x in (key, value))
        factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
        root = math.sqrt(abs(factor))
        scores = (query * math.copysign(root, factor)) @ (key.transpose(-2, -1) * root)
        if is_causal:
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
        if attn_mask is not None:
            if attn_mask.dtype == torch.bool:
                scores = scores.masked_fill(~attn_mask, -math.inf)
            else:
                scores = scores + attn_mask.to(wide)
        weights = torch.softmax(scores, dim=-1)
        if attn_mask is not None:
            # A query whose keys are all masked.
            nothing = (scores == -math.inf).all(dim=-1, keepdim=True)
            weights = weights.masked_fill(nothing, 0.0)
        return (drop(weights) @ value).to(given)
