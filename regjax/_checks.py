"""Checks of arguments: each refuses a wrong value with an error that names the argument.

One form for every message: `argument must be X; got Y. Fix.` The wrong type is a TypeError, the
wrong value a ValueError. The two packages have the same checks.
"""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jax.core import Tracer
from jax.sharding import PartitionSpec, Sharding

if TYPE_CHECKING:
    from jax.typing import ArrayLike, DTypeLike
    from jaxtyping import Array

    Dim = Any  # an integer, or a symbolic size under `jax.export`


def describe(value: object) -> str:
    """Describe a wrong value in a few words: an array by dtype and shape, not by its numbers."""
    if isinstance(value, jax.Array | np.ndarray):
        return f"an array of dtype {value.dtype} and shape {value.shape}"
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def check_integer(
    name: str, value: Any, minimum: int | None = None, maximum: int | None = None
) -> int:
    """Return an integer as a Python int.

    Args:
        name: The name of the argument.
        value: A Python or NumPy integer, or a concrete 0-d array of an integer type; not a bool.
        minimum: The smallest value allowed.
        maximum: The largest value allowed.

    Raises:
        TypeError: `value` is not an integer, or it is traced.
        ValueError: `value` is out of range.
    """
    if type(value) is not int:
        if isinstance(value, Tracer):
            raise TypeError(f"{name} must be an integer known before tracing; got {value!r}.")
        try:
            if _is_bool(value) or getattr(value, "ndim", 0):
                raise TypeError
            value = operator.index(value)
        except TypeError:
            raise TypeError(f"{name} must be an integer; got {describe(value)}.") from None
    if minimum is not None and value < minimum:
        raise ValueError(f"{name} must be at least {minimum}; got {value}.")
    if maximum is not None and value > maximum:
        raise ValueError(f"{name} must be at most {maximum}; got {value}.")
    return value


def check_integers(name: str, value: Any) -> tuple[int, ...]:
    """Return a collection of integers, such as dimensions, as a tuple of Python ints.

    Raises:
        TypeError: `value` is neither a collection of integers nor a concrete 1-D array of them.
    """
    items = _items(name, value, Collection, "a sequence of integers, such as (0, 1)")
    return tuple(check_integer(f"{name}[{i}]", item) for i, item in enumerate(items))


def check_shape(name: str, value: Any) -> tuple[Dim, ...]:
    """Return a shape as a tuple of sizes.

    Args:
        name: The name of the argument.
        value: A sequence of integers, or a concrete 1-D array of them. Sizes that are symbolic, as
            under `jax.export`, stay as they are.

    Raises:
        TypeError: `value` is not a sequence of integers.
        ValueError: A size is negative.
    """
    if type(value) is tuple and all(type(n) is int and n >= 0 for n in value):
        return value
    items = _items(name, value, Sequence, "a sequence of sizes, such as (2, 3)")
    return tuple(
        n if export.is_symbolic_dim(n) else check_integer(f"{name}[{i}]", n, minimum=0)
        for i, n in enumerate(items)
    )


def check_bool(name: str, value: object) -> bool:
    """Return a flag as a Python bool.

    Args:
        name: The name of the argument.
        value: A bool, a NumPy bool, or a concrete 0-d boolean array.

    Raises:
        TypeError: `value` is anything else. A string or a number is not a flag: `bool("False")` is
            True.
    """
    if isinstance(value, bool):
        return value
    if not _is_bool(value) or isinstance(value, Tracer) or getattr(value, "ndim", 0):
        raise TypeError(f"{name} must be True or False; got {value!r}.")
    return bool(value)


def check_choice(name: str, value: Any, choices: Sequence[str]) -> str:
    """Return one of several words.

    Raises:
        TypeError: `value` is not a string.
        ValueError: `value` is none of the choices.
    """
    error = ValueError if isinstance(value, str) else TypeError
    if not isinstance(value, str) or value not in choices:
        *most, last = (f'"{choice}"' for choice in choices)
        raise error(f"{name} must be {', '.join(most)} or {last}; got {describe(value)}.")
    return value


def check_string(name: str, value: Any, wanted: str = "a string") -> str:
    """Return a string; `wanted` describes it for the message.

    Raises:
        TypeError: `value` is not a string.
    """
    if not isinstance(value, str):
        raise TypeError(f"{name} must be {wanted}; got {describe(value)}.")
    return value


def check_strings(name: str, value: Any) -> list[str]:
    """Return a collection of globs as a list.

    Raises:
        TypeError: `value` is a single string, or anything else than a collection of strings.
    """
    if isinstance(value, str):
        raise TypeError(f"{name} must be a collection of globs: [{value!r}].")
    if not isinstance(value, Collection) or not all(isinstance(each, str) for each in value):
        raise TypeError(f"{name} must be a collection of globs; got {describe(value)}.")
    return list(value)


def check_callable(name: str, value: Any, signature: str) -> Callable[..., Any]:
    """Return a function.

    Args:
        name: The name of the argument.
        value: Anything that can be called.
        signature: What it takes, for the message.

    Raises:
        TypeError: `value` cannot be called.
    """
    if not callable(value):
        raise TypeError(f"{name} must be a function {signature}; got {describe(value)}.")
    return value


def check_number(name: str, value: Any, minimum: float = -math.inf) -> float:
    """Return a finite real number, not below `minimum`, as a Python float.

    Raises:
        TypeError: `value` is not a real number, or it is traced.
        ValueError: `value` is infinite or NaN, or an array with more than one element.
    """
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
    """Return a tracer as it is, and anything else as a NumPy array, for a check of its dtype.

    Raises:
        TypeError: NumPy cannot hold `value`: a PRNG key, a ragged list.
    """
    if isinstance(value, Tracer):
        return value
    try:
        return np.asarray(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number; got {describe(value)}.") from None


def check_array(name: str, value: ArrayLike) -> Array:
    """Return an array, or what JAX can make one from, as an array.

    Raises:
        TypeError: `value` is not an array: None, a string, a pytree of arrays.
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
    """Return a floating dtype; `wanted` describes it for the message.

    Raises:
        TypeError: `value` is not a dtype, or not a floating one.
    """
    try:
        dtype = None if value is None else np.dtype(value)
    except TypeError:
        dtype = None
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"{name} must be {wanted}; got {value!r}.")
    return dtype


def check_layout(name: str, value: Any) -> Any:
    """Return a layout over devices.

    Raises:
        TypeError: `value` is neither a sharding nor None.
    """
    if value is not None and not isinstance(value, Sharding | PartitionSpec):
        raise TypeError(
            f"{name} must be a Sharding, a PartitionSpec or None; got {describe(value)}."
        )
    return value


# The settings that layers of several frameworks share, and what each of them must be.
_SETTINGS: dict[str, Callable[[str, Any], Any]] = {
    "block_size": lambda name, value: check_integer(name, value, minimum=1),
    "broadcast_dims": check_integers,
    "channel_axis": check_integer,
    "gamma_scale": lambda name, value: check_number(name, value, minimum=0),
    "mode": lambda name, value: check_choice(name, value, ("row", "batch")),
    "rng_collection": check_string,
    "sampler": lambda name, value: check_callable(name, value, "(key, keep_prob, shape)"),
    "scale_by_keep": check_bool,
    "share_channels": check_bool,
    "time_axis": check_integer,
    "with_noise": check_bool,
}


def check_settings(layer: object) -> None:
    """Refuse a wrong setting when a layer is made, not when it first drops.

    Raises:
        TypeError: A setting is of the wrong type.
        ValueError: A setting has a value that it cannot have.
    """
    for name, check in _SETTINGS.items():
        if hasattr(layer, name):
            check(name, getattr(layer, name))


@contextlib.contextmanager
def naming(**names: str) -> Iterator[None]:
    """Put a layer's own name of an argument ahead of an error about the function's argument.

    Args:
        **names: From the function's argument to the layer's, as in `naming(x="inputs")`.
    """
    try:
        yield
    except (TypeError, ValueError) as error:
        # An inner function may have put its own name ahead already, with a colon.
        argument, _, rest = str(error).partition(" ")
        name, is_nested = argument.removesuffix(":"), argument.endswith(":")
        if name not in names or type(error) not in (TypeError, ValueError):
            raise
        raise type(error)(f"{names[name]}: {rest if is_nested else error}") from None


def _is_bool(value: object) -> bool:
    return isinstance(value, bool) or getattr(value, "dtype", None) == np.bool_


def _items(name: str, value: Any, kind: type, wanted: str) -> Collection[Any]:
    """The items of a list, a tuple or the like; not those of a string or a dict."""
    is_array = isinstance(value, jax.Array | np.ndarray)
    if is_array and value.ndim == 1 and not isinstance(value, Tracer):
        return [*np.asarray(value)]
    if is_array or isinstance(value, str | bytes | Mapping) or not isinstance(value, kind):
        raise TypeError(f"{name} must be {wanted}; got {describe(value)}.")
    return value
