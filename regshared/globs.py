"""Globs over the names of parameters and of sites."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase


def matches(pattern: str, path: str) -> bool:
    """Return whether a glob matches a whole path.

    Args:
        pattern: Components separated by slashes or dots. Within one, `*`, `?` and `[...]` are
            wildcards; `**` alone matches any number of components, including none. A pattern of one
            component matches the last one only.
        path: Names joined by slashes, as in JAX, or by dots, as in PyTorch.

    Example:
        >>> [matches(glob, "encoder/0/kernel") for glob in ("encoder/*/kernel", "encoder/**")]
        [True, True]
        >>> [matches(glob, "encoder/0/kernel") for glob in ("kern*", "encoder/*", "encoder")]
        [True, False, False]
    """
    globs = components(pattern)
    return _fits(globs if len(globs) > 1 else ["**", *globs], components(path) if path else [])


def components(path: str) -> list[str]:
    """Split a name or a glob at slashes, as in JAX, and at dots, as in PyTorch.

    Example:
        >>> components("encoder/0/kernel"), components("encoder.0.weight")
        (['encoder', '0', 'kernel'], ['encoder', '0', 'weight'])
    """
    return path.replace(".", "/").split("/")


def words(name: str) -> list[str]:
    """Split a name at digits, signs and capitals, and return its words in lower case.

    Example:
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
