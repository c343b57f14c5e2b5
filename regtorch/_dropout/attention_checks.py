"""Checks of the arguments of attention: each rejects a wrong value, and names the argument."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from regshared.attention import check_attention_shapes, check_broadcasts
from regshared.checks import check_integer, describe
from regtorch._checks import check_number, check_tensor
from regtorch._dropout.core import real_dtype, require_key


def check_arrays(*arrays: Tensor) -> None:
    """Raise an error unless query, key and value are floating tensors of one dtype."""
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


def check_scale(query: Tensor, scale: float | Tensor | None) -> tuple[Tensor, float]:
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


def check_shapes(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, mask: Tensor | None
) -> None:
    """Raise an error that names the argument whose shape or dtype does not fit."""
    weights = check_attention_shapes(query.shape, key.shape, value.shape)
    if bias is not None and (check_tensor("bias", bias).is_complex() or bias.dtype == torch.bool):
        raise TypeError(f"bias must be real; got dtype {bias.dtype}. Pass booleans as mask.")
    if mask is not None and check_tensor("mask", mask).dtype != torch.bool:
        raise TypeError(
            f"mask must be boolean, True to attend; got dtype {mask.dtype}. Pass numbers to add to "
            "the scores as bias."
        )
    for name, array in (("bias", bias), ("mask", mask)):
        if array is not None:
            check_broadcasts(name, array.shape, weights)


def check_lengths(name: str, lengths: Any, batch: tuple[int, ...]) -> Tensor | None:
    """Return the lengths of the examples, in shape (*batch, 1, 1, 1)."""
    if lengths is None:
        return None
    lengths = check_tensor(name, lengths)
    if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise TypeError(
            f"{name} must be integers; got dtype {lengths.dtype}. Cast them: {name}.int()."
        )
    # As in jax.nn, the length of a tensor without a batch dimension may have shape (1,).
    if lengths.shape != batch and (batch or lengths.shape != (1,)):
        raise ValueError(
            f"{name} must have one number for each example, shape {tuple(batch)}; got shape "
            f"{tuple(lengths.shape)}. Pass a mask for lengths that differ between heads."
        )
    return lengths.long().reshape(*batch, 1, 1, 1)


def require_rng(dropout_rng: Tensor | torch.Generator | None) -> Tensor:
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


def check_block(block_size: int, keys: int) -> int:
    """Return the number of keys per block, at most all."""
    return max(1, min(check_integer("block_size", block_size, minimum=1), keys))
