"""Which parameters decay, and by how much: the checks of the loss term."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

    Mask = Mapping[str, bool] | Callable[[str, Tensor], bool] | Sequence[bool] | None


def check_coefficient(name: str, value: Any, *, fix: str) -> None:
    """Refuse a negative, infinite or NaN coefficient; a tensor is not looked into.

    Args:
        name: What the caller calls the argument.
        value: A number, or a 0-d tensor. Reading a tensor would wait for its device and would break
            `torch.compile` and `torch.func.vmap`, so only its shape and dtype are checked.
        fix: What to pass instead, as the end of the message.

    Raises:
        TypeError: `value` is a bool, or no real number.
        ValueError: `value` is negative, infinite or NaN.

    Examples:
        >>> check_coefficient("weight_decay", -0.1, fix="pass 0.0 for none")
        Traceback (most recent call last):
        ValueError: weight_decay must be finite and not negative, but it is -0.1: pass 0.0 for none
    """
    if isinstance(value, torch.Tensor):
        is_number = value.ndim == 0 and not value.is_complex() and value.dtype != torch.bool
    else:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number:
        raise TypeError(f"{name} must be a real number, but it is {value!r}: {fix}")
    if not isinstance(value, torch.Tensor) and not 0.0 <= value < math.inf:
        raise ValueError(f"{name} must be finite and not negative, but it is {value}: {fix}")


def resolve_mask(mask: Mask, leaves: Sequence[tuple[str, Any]]) -> list[bool]:
    """Say for each parameter whether it decays.

    Args:
        mask: `None` (every one), a dict from each name to a bool, a function of name and tensor,
            or, for tensors without names, a sequence of bools in their order.
        leaves: Pairs of name and tensor, as `regtorch._paths.named_leaves` lists them.

    Returns:
        One bool for each pair, in order.

    Raises:
        ValueError: The mask does not fit the names, or the number of tensors.
        TypeError: The mask says something else than True or False.

    Examples:
        >>> import torch
        >>> leaves = list(torch.nn.Linear(2, 3).named_parameters())
        >>> resolve_mask(lambda name, tensor: tensor.ndim > 1, leaves)
        [True, False]
        >>> resolve_mask({"weight": True}, leaves)
        Traceback (most recent call last):
        ValueError: mask and parameters differ at 'bias': the mask has nothing there
    """
    names = [name for name, _ in leaves]
    if mask is None:
        return [True] * len(leaves)
    if callable(mask):
        verdicts = [mask(name, leaf) for name, leaf in leaves]
    elif isinstance(mask, Mapping):
        _check_names(mask, names)
        verdicts = [mask[name] for name in names]
    elif isinstance(mask, Sequence) and not isinstance(mask, str):
        _check_positions(mask, names)
        verdicts = list(mask)
    else:
        raise TypeError(
            "mask must be None, a dict from names to bools, a function of name and tensor, or a "
            f"sequence of bools, but it is {mask!r}"
        )
    for name, verdict in zip(names, verdicts, strict=True):
        if not isinstance(verdict, bool):
            raise TypeError(
                f"mask at '{name}' must be a bool, but it is {verdict!r}: a mask says whether a "
                "parameter decays; how strongly, weight_decay says"
            )
    return verdicts


def _check_names(mask: Mapping[str, bool], names: Sequence[str]) -> None:
    known = set(names)
    for name in (*names, *mask):
        if name not in mask or name not in known:
            side = "parameters have" if name in mask else "mask has"
            raise ValueError(f"mask and parameters differ at '{name}': the {side} nothing there")


def _check_positions(mask: Sequence[bool], names: Sequence[str]) -> None:
    if list(names) != [str(position) for position in range(len(names))]:
        raise ValueError(
            "mask is a sequence, but the parameters have names: pass a dict from names to bools, "
            f"such as {{{names[0]!r}: True}}, or a function of name and tensor"
        )
    if len(mask) != len(names):
        raise ValueError(f"mask has {len(mask)} bools, but there are {len(names)} parameters")
