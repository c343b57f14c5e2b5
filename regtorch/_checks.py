"""Checks of arguments: each rejects a wrong value with an error that names the argument.

See `regshared.checks`. Both packages have the same checks.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from regshared.checks import check_integer, check_items, describe, is_bool

_M = TypeVar("_M", bound=nn.Module)


def check_shape(name: str, value: Any) -> tuple[Any, ...]:
    """Return a shape as a tuple; symbolic sizes, as under `torch.export`, stay symbolic."""
    if type(value) is tuple and all(type(n) is int and n >= 0 for n in value):
        return value
    items = check_items(name, value, Sequence, "a sequence of sizes, such as (2, 3)")
    return tuple(
        n if isinstance(n, torch.SymInt) else check_integer(f"{name}[{i}]", n, minimum=0)
        for i, n in enumerate(items)
    )


def check_number(name: str, value: Any, minimum: float = -math.inf) -> float:
    """Return a finite real number that is at least `minimum` as a Python float."""
    is_tensor = isinstance(value, Tensor)
    is_real = isinstance(value, numbers.Real) or (is_tensor and not value.is_complex())
    if not is_real or is_bool(value):
        raise TypeError(f"{name} must be a real number; got {describe(value)}.")
    if (is_tensor and value.ndim) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite scalar; got {describe(value)}.")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}; got {value}.")
    return float(value)


def check_tensor(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name} must be a tensor; got {describe(value)}. Make one: torch.as_tensor({name})."
        )
    return value


def has_negative(x: Tensor) -> bool:
    """Return whether an integer is negative, where reading does not wait for a device."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    try:
        return bool((x < 0).any())
    except RuntimeError:  # under torch.func.vmap there is no single value
        return False


def highest_word(x: Tensor) -> int:
    """Return the highest word of int64s, where reading does not wait for a device; otherwise 0."""
    if x.device.type != "cpu" or torch.compiler.is_compiling() or not x.numel():
        return 0
    try:
        low, high = (int(bound) for bound in x.aminmax())
    except RuntimeError:  # under torch.func.vmap there is no single value
        return 0
    return low % 2**64 if low < 0 else high


def check_module(name: str, value: _M) -> _M:
    if not isinstance(value, nn.Module):
        raise TypeError(f"{name} must be a torch.nn.Module; got {describe(value)}.")
    return value


def check_generator(name: str, value: Any) -> torch.Generator | None:
    """Return a generator or None; a key in a layer would draw the same mask at every step."""
    if value is not None and not isinstance(value, torch.Generator):
        raise TypeError(
            f"{name} must be a torch.Generator or None; got {describe(value)}. Pass "
            "torch.Generator().manual_seed(seed), or a new key to each call, layer(x, key=key): a "
            "key in a layer would draw the same mask at every step."
        )
    return value
