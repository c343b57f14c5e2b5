"""Checks of arguments: each refuses a wrong value with an error that names the argument.

One form for every message: `argument must be X; got Y. Fix.` The wrong type is a TypeError, the
wrong value a ValueError. The two packages have the same checks.
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

_M = TypeVar("_M", bound=nn.Module)


def describe(value: object) -> str:
    """Describe a wrong value in a few words: a tensor by dtype and shape, not by its numbers."""
    if isinstance(value, Tensor):
        return f"a tensor of dtype {value.dtype} and shape {tuple(value.shape)}"
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def check_integer(
    name: str, value: Any, minimum: int | None = None, maximum: int | None = None
) -> int:
    """Return an integer as a Python int.

    Args:
        name: The name of the argument.
        value: A Python or NumPy integer, or a 0-d tensor of an integer type; not a bool.
        minimum: The smallest value allowed.
        maximum: The largest value allowed.

    Raises:
        TypeError: `value` is not an integer.
        ValueError: `value` is out of range.
    """
    if type(value) is not int:
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
        TypeError: `value` is neither a collection of integers nor a 1-D array of them.
    """
    items = _items(name, value, Collection, "a sequence of integers, such as (0, 1)")
    return tuple(check_integer(f"{name}[{i}]", item) for i, item in enumerate(items))


def check_shape(name: str, value: Any) -> tuple[Any, ...]:
    """Return a shape as a tuple of sizes.

    Args:
        name: The name of the argument.
        value: A sequence of integers, or a 1-D array of them. Sizes that are symbolic, as under
            `torch.export`, stay as they are.

    Raises:
        TypeError: `value` is not a sequence of integers.
        ValueError: A size is negative.
    """
    if type(value) is tuple and all(type(n) is int and n >= 0 for n in value):
        return value
    items = _items(name, value, Sequence, "a sequence of sizes, such as (2, 3)")
    return tuple(
        n if isinstance(n, torch.SymInt) else check_integer(f"{name}[{i}]", n, minimum=0)
        for i, n in enumerate(items)
    )


def check_bool(name: str, value: object) -> bool:
    """Return a flag as a Python bool.

    Args:
        name: The name of the argument.
        value: A bool, a NumPy bool, or a 0-d boolean tensor.

    Raises:
        TypeError: `value` is anything else. A string or a number is not a flag: `bool("False")` is
            True.
    """
    if isinstance(value, bool):
        return value
    if not _is_bool(value) or getattr(value, "ndim", 0):
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


def check_string(name: str, value: Any, wanted: str = "a string") -> str:
    """Return a string; `wanted` describes it for the message.

    Raises:
        TypeError: `value` is not a string.
    """
    if not isinstance(value, str):
        raise TypeError(f"{name} must be {wanted}; got {describe(value)}.")
    return value


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
        TypeError: `value` is not a real number.
        ValueError: `value` is infinite or NaN, or a tensor with more than one element.
    """
    is_tensor = isinstance(value, Tensor)
    is_real = isinstance(value, numbers.Real) or (is_tensor and not value.is_complex())
    if not is_real or _is_bool(value):
        raise TypeError(f"{name} must be a real number; got {describe(value)}.")
    if (is_tensor and value.ndim) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite scalar; got {describe(value)}.")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}; got {value}.")
    return float(value)


def check_tensor(name: str, value: Any) -> Tensor:
    """Return a tensor.

    Raises:
        TypeError: `value` is not a tensor.
    """
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name} must be a tensor; got {describe(value)}. Make one: torch.as_tensor({name})."
        )
    return value


def check_module(name: str, value: _M) -> _M:
    """Return a module.

    Raises:
        TypeError: `value` is not a module.
    """
    if not isinstance(value, nn.Module):
        raise TypeError(f"{name} must be a torch.nn.Module; got {describe(value)}.")
    return value


def check_generator(name: str, value: Any) -> torch.Generator | None:
    """Return a generator, or None.

    Raises:
        TypeError: `value` is neither. A key there would give the same mask at every step.
    """
    if value is not None and not isinstance(value, torch.Generator):
        raise TypeError(
            f"{name} must be a torch.Generator or None; got {describe(value)}. A key in a "
            "layer would draw the same mask at every step: pass a new key to each call, "
            "layer(x, key=key), or torch.Generator().manual_seed(seed) here."
        )
    return value


def _is_bool(value: object) -> bool:
    # The type of a NumPy bool equals Python's; NumPy itself need not be installed.
    dtype = getattr(value, "dtype", None)
    return isinstance(value, bool) or dtype == torch.bool or dtype == bool  # noqa: E721


def _items(name: str, value: Any, kind: type, wanted: str) -> Collection[Any]:
    """The items of a list, a tuple or the like; not those of a string or a dict."""
    if getattr(value, "ndim", 0) == 1:  # a tensor, or an array of NumPy
        return value.tolist()
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, kind):
        raise TypeError(f"{name} must be {wanted}; got {describe(value)}.")
    return value
