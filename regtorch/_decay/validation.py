"""Which parameters decay, how much, towards what: the checks of loss terms and optimizers."""

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
    """Decide for each parameter whether it decays.

    Args:
        mask: `None` (every one), a dict from each name to a bool, a function of name and tensor,
            or, for tensors without names, a sequence of bools in their order.
        leaves: Pairs of name and tensor, as `regtorch._decay.paths.named_leaves` lists them.

    Returns:
        One bool for each pair, in order.

    Raises:
        ValueError: The mask does not fit the names, or the number of tensors.
        TypeError: A value of the mask is neither True nor False.

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
        _check_names("mask", mask, names)
        verdicts = [mask[name] for name in names]
    elif isinstance(mask, Sequence) and not isinstance(mask, str):
        _check_positions(mask, names)
        verdicts = list(mask)
    else:
        raise TypeError(
            "mask must be None, a dict from names to bools, a function of name and tensor, or a "
            f"sequence of bools, but it is {mask!r}"
        )
    return [_as_bool(name, verdict) for name, verdict in zip(names, verdicts, strict=True)]


def resolve_reference(
    reference: Params, leaves: Sequence[tuple[str, Any]]
) -> list[tuple[str, Any]]:
    """Find the reference that each parameter decays towards.

    Args:
        reference: What a penalty takes for parameters, with the names that `leaves` have, in any
            order.
        leaves: Pairs of name and tensor, as `regtorch._decay.paths.named_leaves` lists them.

    Returns:
        For each pair, in order, its name and the leaf of the reference.

    Raises:
        TypeError: The reference is nothing that holds parameters.
        ValueError: The reference has other names; the message gives the first that differs.

    Examples:
        >>> import torch
        >>> leaves = list(torch.nn.Linear(2, 3).named_parameters())
        >>> resolve_reference({"weight": torch.zeros(3, 2)}, leaves)
        Traceback (most recent call last):
        ValueError: reference and parameters differ at 'bias': the reference has nothing there
    """
    by_name = dict(named_leaves(reference, "reference"))
    names = [name for name, _ in leaves]
    _check_names("reference", by_name, names)
    return [(name, by_name[name]) for name in names]


def check_reference(name: str, leaf: Tensor, reference: Any) -> None:
    """Refuse a reference that a parameter cannot decay towards.

    Args:
        name: What the parameter is called.
        leaf: The parameter.
        reference: What stands in its place in the reference.

    Raises:
        TypeError: The reference is no float or complex tensor, or complex where the parameter is
            real.
        ValueError: It has another shape.

    Examples:
        >>> import torch
        >>> check_reference("kernel", torch.ones(2, 3), torch.ones(3))
        Traceback (most recent call last):
        ValueError: reference at 'kernel' has shape (3,), but the parameter has shape (2, 3)
    """
    is_tensor = isinstance(reference, torch.Tensor)
    if not is_tensor or not (reference.is_floating_point() or reference.is_complex()):
        found = f"a tensor of {reference.dtype}" if is_tensor else repr(reference)
        raise TypeError(
            f"reference at '{name}' must be a float or complex tensor, but it is {found}: pass the "
            "parameters to decay towards, or give it False in `mask`"
        )
    if reference.is_complex() and not leaf.is_complex():
        raise TypeError(f"reference at '{name}' is complex, but the parameter is real")
    if reference.shape != leaf.shape:
        raise ValueError(
            f"reference at '{name}' has shape {tuple(reference.shape)}, but the parameter has "
            f"shape {tuple(leaf.shape)}"
        )


def widened(tensor: Tensor) -> Tensor:
    """Compute in float32 with half types: they have too few digits to add up in.

    Args:
        tensor: Float or complex, of any shape.

    Returns:
        The same, at least in float32 or complex64.

    Examples:
        >>> import torch
        >>> widened(torch.ones(2, dtype=torch.bfloat16))
        tensor([1., 1.])
    """
    least = torch.complex64 if tensor.is_complex() else torch.float32
    return tensor.to(least) if tensor.dtype.itemsize < least.itemsize else tensor


def _as_bool(name: str, verdict: Any) -> bool:
    try:
        return check_bool("mask", verdict)
    except TypeError:
        raise TypeError(
            f"mask at '{name}' must be a bool, but it is {verdict!r}: a mask says whether a "
            "parameter decays; how strongly, weight_decay says"
        ) from None


def _check_names(what: str, named: Mapping[str, Any], names: Sequence[str]) -> None:
    known = set(names)
    for name in (*names, *named):
        if name not in named or name not in known:
            side = "parameters have" if name in named else f"{what} has"
            raise ValueError(f"{what} and parameters differ at '{name}': the {side} nothing there")


def _check_positions(mask: Sequence[bool], names: Sequence[str]) -> None:
    if list(names) != [str(position) for position in range(len(names))]:
        raise ValueError(
            "mask must be a dict from names to bools, or a function of name and tensor, since the "
            f"parameters have names; got a sequence. Pass {{{names[0]!r}: True}}, for example."
        )
    if len(mask) != len(names):
        raise ValueError(f"mask has {len(mask)} bools, but there are {len(names)} parameters")
