"""Globs over the names of parameters and of sites."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase


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


def _fits(globs: list[str], parts: list[str]) -> bool:
    if not globs:
        return not parts
    head, rest = globs[0], globs[1:]
    if head == "**":
        return any(_fits(rest, parts[start:]) for start in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], head) and _fits(rest, parts[1:])
