"""Checks of masks and references, for penalties and optimizers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from regshared.checks import check_bool
from regtorch._decay.paths import named_leaves

if TYPE_CHECKING:
    from torch import Tensor

    from regtorch._decay.paths import Params

    Mask = Mapping[str, bool] | Callable[[str, Tensor], bool] | Sequence[bool] | None


def resolve_mask(mask: Mask, leaves: Sequence[tuple[str, Any]]) -> list[bool]:
    """Return one bool for each named tensor, in order: whether it decays."""
    names = [name for name, _ in leaves]
    if mask is None:
        return [True] * len(leaves)
    if callable(mask):
        decisions = [mask(name, leaf) for name, leaf in leaves]
    elif isinstance(mask, Mapping):
        _check_names("mask", mask, names)
        decisions = [mask[name] for name in names]
    elif isinstance(mask, Sequence) and not isinstance(mask, str):
        _check_positions(mask, names)
        decisions = list(mask)
    else:
        raise TypeError(
            "mask must be None, a dict from names to bools, a function of name and tensor, or a "
            f"sequence of bools; got {mask!r}."
        )
    return [_as_bool(name, decision) for name, decision in zip(names, decisions, strict=True)]


def resolve_reference(
    reference: Params, leaves: Sequence[tuple[str, Any]]
) -> list[tuple[str, Any]]:
    """Return the name and the reference of each parameter, in the order of the parameters."""
    by_name = dict(named_leaves(reference, "reference"))
    names = [name for name, _ in leaves]
    _check_names("reference", by_name, names)
    return [(name, by_name[name]) for name in names]


def check_reference(name: str, leaf: Tensor, reference: Any) -> None:
    """Raise an error if the parameter `name` cannot decay toward this reference."""
    is_tensor = isinstance(reference, torch.Tensor)
    if not is_tensor or not (reference.is_floating_point() or reference.is_complex()):
        found = f"a tensor of {reference.dtype}" if is_tensor else repr(reference)
        raise TypeError(
            f"reference at '{name}' must be a float or complex tensor; got {found}. Pass the "
            "parameters to decay toward, or set it to False in `mask`."
        )
    if reference.is_complex() and not leaf.is_complex():
        raise TypeError(
            f"reference at '{name}' must be real, as the parameter is; got a complex one. Pass its "
            "real part."
        )
    if reference.shape != leaf.shape:
        raise ValueError(
            f"reference at '{name}' must have the parameter's shape {tuple(leaf.shape)}; got "
            f"{tuple(reference.shape)}."
        )


def widened(tensor: Tensor) -> Tensor:
    """Return a tensor in at least float32 or complex64: half types have too few digits for sums."""
    least = torch.complex64 if tensor.is_complex() else torch.float32
    return tensor.to(least) if tensor.dtype.itemsize < least.itemsize else tensor


def _as_bool(name: str, decision: Any) -> bool:
    try:
        return check_bool("mask", decision)
    except TypeError:
        raise TypeError(
            f"mask at '{name}' must be a bool; got {decision!r}. Set the rate with weight_decay."
        ) from None


def _check_names(what: str, named: Mapping[str, Any], names: Sequence[str]) -> None:
    known = set(names)
    for name in (*names, *named):
        if name not in named or name not in known:
            found = f"'{name}', which is none of them" if name in named else f"none for '{name}'"
            raise ValueError(f"{what} must have one entry for each parameter; got {found}.")


def _check_positions(mask: Sequence[bool], names: Sequence[str]) -> None:
    if list(names) != [str(position) for position in range(len(names))]:
        raise ValueError(
            "mask must be a dict from names to bools, or a function of name and tensor, for "
            f"parameters with names; got a sequence. Pass {{{names[0]!r}: True}}, for example."
        )
    if len(mask) != len(names):
        raise ValueError(
            f"mask must have one bool for each of the {len(names)} parameters; got {len(mask)}."
        )
