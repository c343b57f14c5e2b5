"""Checks of the arguments of attention: each rejects a wrong value, and names the argument."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from regjax._checks import check_array, check_floating_dtype, check_number
from regjax._dropout.core import real_dtype, require_key
from regjax._random.threefry import at_most
from regshared.attention import check_attention_shapes, check_broadcasts
from regshared.checks import check_callable, check_choice, check_integer, describe

if TYPE_CHECKING:
    from collections.abc import Callable

    from jax.typing import ArrayLike, DTypeLike
    from jaxtyping import Array, Bool

    from regjax._random.keys import KeyLike


def check_implementation(implementation: str | None, block_size: int | None) -> str | None:
    """Return "xla", "pallas" or "triton"; None if the platform decides."""
    if implementation is None:
        return None if block_size is None else "xla"
    check_choice("implementation", implementation, ("xla", "pallas", "triton"))
    if implementation != "xla" and block_size is not None:
        raise ValueError(
            f"block_size must be None with implementation={implementation!r}, whose tiles do not "
            f"change the result's mask; got {block_size}. Omit one of the two."
        )
    return implementation


def check_arrays(
    *arrays: ArrayLike, dtype: DTypeLike | None, promote_dtype: Callable[..., Any] | None
) -> list[Array]:
    """Return query, key and value as floating arrays of one dtype."""
    names = ("query", "key", "value")
    found = [check_array(name, array) for name, array in zip(names, arrays, strict=True)]
    if promote_dtype is not None:
        promote = check_callable("promote_dtype", promote_dtype, "(arrays, dtype)")
        promoted = promote(tuple(found), dtype=dtype)
        if not isinstance(promoted, tuple | list) or len(promoted) != 3:
            raise TypeError(
                "promote_dtype must return a tuple of query, key and value; got "
                f"{describe(promoted)}. Pass flax.nnx.nn.dtypes.promote_dtype, or dtype= alone."
            )
        found, dtype = [check_array(n, x) for n, x in zip(names, promoted, strict=True)], None
    for name, array in zip(names, found, strict=True):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(
                f"{name} must be floating; got dtype {array.dtype}. Cast it: "
                f"{name}.astype(jnp.float32)."
            )
        if array.ndim < 3:
            raise ValueError(
                f"{name} must have shape (..., length, heads, features); got {array.shape}."
            )
    if dtype is not None:
        return [array.astype(check_floating_dtype("dtype", dtype)) for array in found]
    if len({array.dtype for array in found}) > 1:
        dtypes = ", ".join(f"{n} {a.dtype}" for n, a in zip(names, found, strict=True))
        raise TypeError(
            f"query, key and value must have the same dtype; got {dtypes}. Pass dtype=."
        )
    return found


def check_scale(query: Array, scale: ArrayLike | None) -> tuple[Array, float]:
    """Return the query and the factor of its products.

    A traced scale multiplies the query, so that gradients flow to it and NaN gives NaN.
    """
    if scale is None:
        return query, 1 / math.sqrt(query.shape[-1])
    if not isinstance(scale, Tracer):
        return query, check_number("scale", scale)
    if scale.ndim or not jnp.issubdtype(scale.dtype, jnp.floating):
        raise TypeError(f"scale must be a real scalar; got {describe(scale)}.")
    wide = real_dtype(query.dtype)
    return (query.astype(wide) * scale.astype(wide)).astype(query.dtype), 1.0


def check_shapes(query: Array, key: Array, value: Array, bias: Any, mask: Any) -> None:
    """Raise a ValueError that names the argument whose shape does not fit; without, return None."""
    weights = check_attention_shapes(query.shape, key.shape, value.shape)
    for name, array in (("bias", bias), ("mask", mask)):
        if array is not None:
            check_broadcasts(name, array.shape, weights)


def check_lengths(name: str, lengths: Any, batch: tuple[int, ...]) -> Array | None:
    """Return the lengths of the examples as int32, of shape (*batch, 1, 1, 1)."""
    if lengths is None:
        return None
    lengths = check_array(name, lengths)
    if not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise TypeError(
            f"{name} must be integers; got dtype {lengths.dtype}. Cast them: "
            f"{name}.astype(jnp.int32)."
        )
    # As in jax.nn, the length of an array without a batch dimension may have shape (1,).
    if lengths.shape != batch and (batch or lengths.shape != (1,)):
        raise ValueError(
            f"{name} must have one number for each example, shape {batch}; got shape "
            f"{lengths.shape}. Pass a mask for lengths that differ between heads."
        )
    kind = lengths.dtype
    lengths = jnp.clip(lengths, 0, kind.type(min(jnp.iinfo(kind).max, 2**31 - 1)))
    return lengths.astype(np.int32).reshape(*batch, 1, 1, 1)


def check_dot_general(dot_general: Any, einsums: dict[str, Any]) -> Any:
    """Return a function of products or None, and reject the einsums of Linen."""
    for name, einsum in einsums.items():
        if einsum is not None:
            raise ValueError(
                f"{name} must be None; got {einsum!r}. Pass einsum_dot_general=, a pure function "
                "like jax.lax.dot_general, or use Linen's own attention_fn."
            )
    if dot_general is None:
        return None
    signature = "(lhs, rhs, dimension_numbers, precision, preferred_element_type)"
    return check_callable("einsum_dot_general", dot_general, signature)


def check_block(block_size: int, keys: int) -> int:
    """Return the number of keys per block, at most all."""
    size = check_integer("block_size", block_size, minimum=1)
    return max(1, keys) if at_most(keys, size) else size


def check_bias(bias: Any) -> Array | None:
    """Return a bias, and reject a mask that was passed as one."""
    if bias is None:
        return None
    bias = check_array("bias", bias)
    if bias.dtype == np.bool_ or jnp.issubdtype(bias.dtype, jnp.complexfloating):
        raise TypeError(f"bias must be real; got dtype {bias.dtype}. Pass booleans as mask.")
    return bias


def check_mask(mask: Any) -> Bool[Array, "*shape"] | None:
    """Return a mask of zeros and ones as booleans.

    A concrete mask with other numbers is a TypeError: it may be meant as a bias.
    """
    if mask is None:
        return None
    mask = check_array("mask", mask)
    if mask.dtype == np.bool_:
        return mask
    readable = not isinstance(mask, Tracer) and mask.is_fully_addressable
    if readable and not np.isin(np.asarray(mask), (0, 1)).all():
        raise TypeError(
            "mask must be boolean, True to attend, or 0 and 1; got other numbers of dtype "
            f"{mask.dtype}. Pass numbers to add to the scores as bias."
        )
    return mask != 0


def require_rng(dropout_rng: KeyLike | None) -> KeyLike:
    """Return `require_key(dropout_rng)`, with errors that name `dropout_rng` instead of `key`."""
    if dropout_rng is None:
        raise ValueError(
            "dropout_rng must be a random key in training; got None. Pass "
            "dropout_rng=jax.random.key(seed), or dropout_rng=regjax.site_key(root, step, site) "
            "inside a training loop, or deterministic=True to evaluate."
        )
    try:
        return require_key(dropout_rng)
    except (TypeError, ValueError) as error:
        raise type(error)(f"dropout_rng: {error}") from None
