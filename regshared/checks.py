"""Checks of arguments: each rejects a wrong value with an error that names the argument.

Every message has the form `argument must be X; got Y. Fix.` A wrong type, or a traced value where a
concrete one is required, is a TypeError; a wrong value is a ValueError. Arrays and tensors are
recognized by their attributes.
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any


def describe(value: Any) -> str:
    """Describe a wrong value in a few words: an array by dtype and shape, not by its numbers."""
    if (
        hasattr(value, "dtype")
        and hasattr(value, "shape")
        and not isinstance(value, numbers.Number)
    ):
        noun = "a tensor" if hasattr(value, "requires_grad") else "an array"
        return f"{noun} of dtype {value.dtype} and shape {tuple(value.shape)}"
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def check_integer(
    name: str, value: Any, minimum: int | None = None, maximum: int | None = None
) -> int:
    """Return a Python or NumPy integer, or a concrete 0-d integer array, in a range as an int.

    A bool is not an integer.
    """
    if type(value) is not int:
        try:
            if is_bool(value) or getattr(value, "ndim", 0):
                raise TypeError
            value = operator.index(value)
        except TypeError as error:
            known = " known before tracing" if type(error).__name__.startswith("Tracer") else ""
            raise TypeError(f"{name} must be an integer{known}; got {describe(value)}.") from None
    if minimum is not None and value < minimum:
        raise ValueError(f"{name} must be at least {minimum}; got {value}.")
    if maximum is not None and value > maximum:
        raise ValueError(f"{name} must be at most {maximum}; got {value}.")
    return value


def check_integers(name: str, value: Any) -> tuple[int, ...]:
    """Return a collection of integers, or a concrete 1-D array of them, as a tuple of ints."""
    items = check_items(name, value, Collection, "a sequence of integers, such as (0, 1)")
    return tuple(check_integer(f"{name}[{i}]", item) for i, item in enumerate(items))


def check_window(name: str, value: Any) -> tuple[int, int] | None:
    """Return the sizes of a window to the left and to the right; one integer is both of them."""
    if value is None:
        return None
    is_pair = isinstance(value, tuple | list)
    sides = check_integers(name, value) if is_pair else (check_integer(name, value),) * 2
    if len(sides) != 2 or min(sides) < 0:
        raise ValueError(
            f"{name} must be a size or a pair (left, right), at least 0; got {describe(value)}. "
            "For no limit on one side, pass the number of keys."
        )
    return sides


def check_items(name: str, value: Any, kind: type, wanted: str) -> Collection[Any]:
    """Return the items of a `kind` or of a concrete 1-D array, but not of a string or mapping."""
    try:
        if getattr(value, "ndim", 0) == 1:
            return value.tolist()
        if hasattr(value, "dtype") or isinstance(value, str | bytes | Mapping):
            raise TypeError
        if not isinstance(value, kind):
            raise TypeError
    except TypeError:
        raise TypeError(f"{name} must be {wanted}; got {describe(value)}.") from None
    return value


def check_bool(name: str, value: Any) -> bool:
    """Return a bool, a NumPy bool, or a concrete 0-d boolean array as a Python bool.

    A string or a number is not a flag: `bool("False")` is True.
    """
    if isinstance(value, bool):
        return value
    try:
        if not is_bool(value) or getattr(value, "ndim", 0):
            raise TypeError
        return bool(value)
    except TypeError:
        raise TypeError(f"{name} must be True or False; got {value!r}.") from None


def is_bool(value: Any) -> bool:
    """Return whether a value is a bool, or has the boolean dtype of NumPy, JAX or PyTorch."""
    return isinstance(value, bool) or str(getattr(value, "dtype", "")) in ("bool", "torch.bool")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> str:
    """Return one of several words."""
    error = ValueError if isinstance(value, str) else TypeError
    if not isinstance(value, str) or value not in choices:
        *most, last = (f'"{choice}"' for choice in choices)
        raise error(f"{name} must be {', '.join(most)} or {last}; got {describe(value)}.")
    return value


def check_string(name: str, value: Any, wanted: str = "a string") -> str:
    """Return a string; `wanted` describes it in the message."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be {wanted}; got {describe(value)}.")
    return value


def check_strings(name: str, value: Any) -> list[str]:
    """Return a collection of globs, but not a single string, as a list."""
    if isinstance(value, str):
        raise TypeError(f"{name} must be a list of globs; got {value!r}. Pass [{value!r}].")
    if not isinstance(value, Collection) or not all(isinstance(each, str) for each in value):
        raise TypeError(f"{name} must be a list of globs; got {describe(value)}.")
    return list(value)


def check_callable(name: str, value: Any, signature: str) -> Callable[..., Any]:
    """Return a callable; `signature` describes its arguments in the message."""
    if not callable(value):
        raise TypeError(f"{name} must be a function {signature}; got {describe(value)}.")
    return value


def check_coefficient(name: str, value: Any, *, fix: str, below: float = math.inf) -> None:
    """Reject a value that is not a real number in [0, below); `fix` is the last sentence.

    For a traced value, and for a tensor, only shape and dtype are checked: a tracer has no number
    yet, and reading a tensor would wait for its device and break `torch.compile`. Infinity and NaN
    never pass.

    Example:
        >>> check_coefficient("weight_decay", 0.1, fix="Pass 0.0 for none.")
        >>> check_coefficient("weight_decay", -0.1, fix="Pass 0.0 for none.")
        Traceback (most recent call last):
        ValueError: weight_decay must be finite and not negative; got -0.1. Pass 0.0 for none.
    """
    if hasattr(value, "dtype"):
        dtype = str(value.dtype).removeprefix("torch.")
        is_real = dtype.startswith(("float", "bfloat", "int", "uint")) and value.ndim == 0
    else:
        is_real = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_real:
        raise TypeError(f"{name} must be a real number; got {value!r}. {fix}")
    if hasattr(value, "requires_grad"):
        return
    try:
        number = float(value)
    except TypeError:  # it is traced
        return
    if not 0.0 <= number < below:
        wanted = "be finite and not negative" if below == math.inf else f"lie in [0, {below:g})"
        raise ValueError(f"{name} must {wanted}; got {value}. {fix}")
