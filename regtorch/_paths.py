"""Names of parameters: every way in which PyTorch code holds them, as one list of named tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import nn

if TYPE_CHECKING:
    from torch import Tensor

    Params = nn.Module | Tensor | Mapping[str, Tensor] | Iterable[Tensor | tuple[str, Tensor]]


def named_leaves(params: Params) -> list[tuple[str, Any]]:
    """List parameters with their names, in the order in which they come.

    Args:
        params: A module, one tensor, a dict from names to tensors, or an iterable of tensors or of
            `(name, tensor)` pairs. Tensors without a name are called by their position.

    Returns:
        Pairs of name and tensor. What is no tensor is passed on, for the caller to judge.

    Raises:
        TypeError: `params` is none of these.
        ValueError: `params` is a generator that yields nothing.

    Examples:
        >>> import torch
        >>> [name for name, _ in named_leaves(torch.nn.Linear(2, 3))]
        ['weight', 'bias']
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
            "params must be a module, a tensor, a dict from names to tensors, or an iterable of "
            f"tensors or (name, tensor) pairs, but it is {params!r}"
        )
    leaves: list[tuple[str, Any]] = [
        item if _is_named(item) else (str(position), item) for position, item in enumerate(params)
    ]
    if not leaves and isinstance(params, Iterator):
        raise ValueError(
            "params is a generator that yields nothing: module.parameters() can be walked only "
            "once, so call it again for each use, or pass the module itself"
        )
    return leaves


def matches(pattern: str, path: str) -> bool:
    """Tell whether a glob names a place.

    Args:
        pattern: Components between slashes or dots. In one, `*`, `?` and `[...]` stand for any
            characters; `**` alone stands for any number of components, also none. A pattern of one
            component is compared with the last one only.
        path: Names joined by slashes, as in JAX, or by dots, as in PyTorch.

    Returns:
        Whether the whole path fits the pattern.

    Examples:
        >>> [matches(glob, "encoder/0/kernel") for glob in ("encoder/*/kernel", "encoder/**")]
        [True, True]
        >>> [matches(glob, "encoder/0/kernel") for glob in ("kern*", "encoder/*", "encoder")]
        [True, False, False]
    """
    globs = components(pattern)
    return _fits(globs if len(globs) > 1 else ["**", *globs], components(path) if path else [])


def components(path: str) -> list[str]:
    """Split a name at slashes, as JAX joins it, and at dots, as PyTorch does.

    Args:
        path: The name, or a glob.

    Returns:
        The parts; of a name that is empty, one that is empty.

    Examples:
        >>> components("encoder/0/kernel"), components("encoder.0.weight")
        (['encoder', '0', 'kernel'], ['encoder', '0', 'weight'])
    """
    return path.replace(".", "/").split("/")


def words(name: str) -> list[str]:
    """Split a name as one reads it: at digits, signs and capitals.

    Args:
        name: Of a class, a module or a parameter.

    Returns:
        The words in lower case, in order.

    Examples:
        >>> words("LayerNorm_0"), words("weight_ih_l0"), words("RMSNorm")
        (['layer', 'norm'], ['weight', 'ih', 'l'], ['rms', 'norm'])
    """
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)]


def _is_named(item: Any) -> TypeGuard[tuple[str, Any]]:
    return isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str)


def _fits(globs: list[str], parts: list[str]) -> bool:
    if not globs:
        return not parts
    head, rest = globs[0], globs[1:]
    if head == "**":
        return any(_fits(rest, parts[start:]) for start in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], head) and _fits(rest, parts[1:])
