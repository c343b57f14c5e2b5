"""Checks of arguments: each rejects a wrong value with an error that names the argument.

See `regshared.checks`. Both packages have the same checks.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jax.core import Tracer
from jax.sharding import PartitionSpec, Sharding

from regshared.checks import (
    check_integer,
    check_items,
    describe,
)

if TYPE_CHECKING:
    from jax.typing import ArrayLike, DTypeLike
    from jaxtyping import Array

    Dim = Any  # an integer, or a symbolic size under `jax.export`


def check_shape(name: str, value: Any) -> tuple[Dim, ...]:
    """Return a sequence of sizes, or a concrete 1-D array of them, as a tuple.

    Symbolic sizes, as under `jax.export`, stay symbolic.
    """
    if type(value) is tuple and all(type(n) is int and n >= 0 for n in value):
        return value
    items = check_items(name, value, Sequence, "a sequence of sizes, such as (2, 3)")
    return tuple(
        n if export.is_symbolic_dim(n) else check_integer(f"{name}[{i}]", n, minimum=0)
        for i, n in enumerate(items)
    )


def check_number(name: str, value: Any, minimum: float = -math.inf) -> float:
    """Return a finite, concrete real number that is at least `minimum` as a Python float."""
    number = as_number(name, value)
    is_real = any(jnp.issubdtype(number.dtype, kind) for kind in (jnp.floating, jnp.integer))
    if not is_real or isinstance(number, Tracer):
        raise TypeError(
            f"{name} must be a real number known before tracing; got {describe(value)}."
        )
    if number.ndim or not np.isfinite(number):
        raise ValueError(f"{name} must be a finite scalar; got {describe(value)}.")
    if number < minimum:
        raise ValueError(f"{name} must be at least {minimum}; got {value}.")
    return float(number)


def as_number(name: str, value: Any) -> Any:
    """Return a tracer unchanged, and anything else as a NumPy array, for a check of its dtype.

    A value that NumPy cannot hold, such as a PRNG key or a ragged list, is a TypeError.
    """
    if isinstance(value, Tracer):
        return value
    try:
        return np.asarray(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number; got {describe(value)}.") from None


def check_array(name: str, value: ArrayLike) -> Array:
    """Return `value`, or what JAX can convert to an array, as an array.

    None, a string and a pytree of arrays are TypeErrors.
    """
    if isinstance(value, jax.Array):
        return value
    try:
        if value is None:
            raise TypeError
        return jnp.asarray(value)
    except (TypeError, ValueError) as error:
        fix = (
            " Map over the leaves of a pytree: jax.tree.map." if isinstance(value, Mapping) else ""
        )
        cause = None if value is None else error
        raise TypeError(f"{name} must be an array; got {describe(value)}.{fix}") from cause


def check_floating_dtype(
    name: str, value: DTypeLike, wanted: str = "a floating dtype, such as jnp.float32"
) -> np.dtype:
    """Return a floating dtype; `wanted` describes it in the message."""
    try:
        dtype = None if value is None else np.dtype(value)
    except TypeError:
        dtype = None
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"{name} must be {wanted}; got {value!r}.")
    return dtype


def check_layout(name: str, value: Any) -> Any:
    """Return a layout over devices: a sharding, a partition spec, or None."""
    if value is not None and not isinstance(value, Sharding | PartitionSpec):
        raise TypeError(
            f"{name} must be a Sharding, a PartitionSpec or None; got {describe(value)}."
        )
    return value


@contextlib.contextmanager
def naming(**names: str) -> Iterator[None]:
    """Prefix an error about a function's argument with the layer's name for that argument.

    Args:
        **names: The layer's name for each of the function's arguments, as in `naming(x="inputs")`.
    """
    try:
        yield
    except (TypeError, ValueError) as error:
        # An inner function may already have added its own name, with a colon.
        argument, _, rest = str(error).partition(" ")
        name, is_nested = argument.removesuffix(":"), argument.endswith(":")
        if name not in names or type(error) not in (TypeError, ValueError):
            raise
        raise type(error)(f"{names[name]}: {rest if is_nested else error}") from None
