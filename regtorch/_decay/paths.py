"""Parameter names: one named list from each form in which PyTorch code holds parameters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import nn

if TYPE_CHECKING:
    from torch import Tensor

    # A mapping, or an iterable of tensors or pairs: entries that a mask leaves out may be anything.
    Params = nn.Module | Tensor | Mapping[str, Any] | Iterable[Any]


def named_leaves(params: Params, what: str = "params") -> list[tuple[str, Any]]:
    """Return the names and values of parameters, in their order; unnamed ones have their positions.

    Example:
        >>> import torch
        >>> [name for name, _ in named_leaves([torch.ones(2), torch.ones(3)])]
        ['0', '1']
    """
    if isinstance(params, nn.Module):
        return list(params.named_parameters())
    if isinstance(params, torch.Tensor):
        return [("", params)]
    if isinstance(params, Mapping):
        return [(str(name), leaf) for name, leaf in params.items()]
    if not isinstance(params, Iterable) or isinstance(params, str):
        raise TypeError(
            f"{what} must be a module, a tensor, a dict from names to tensors, or an iterable of "
            f"tensors or (name, tensor) pairs; got {params!r}."
        )
    leaves: list[tuple[str, Any]] = [
        item if _is_named(item) else (str(position), item) for position, item in enumerate(params)
    ]
    if not leaves and isinstance(params, Iterator):
        raise ValueError(
            f"{what} must yield parameters; got a generator that yields nothing. Call "
            "module.parameters() again for each use, or pass the module itself."
        )
    return leaves


def _is_named(item: Any) -> TypeGuard[tuple[str, Any]]:
    return isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str)
