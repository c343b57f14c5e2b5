"""The names of sites: the paths of modules in a JAX model, and those of the PyTorch model."""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence

from regshared.checks import check_string, describe

# The part of a path or name that is the number of an iteration.
NUMBER = "{}"
_WANTED = 'a dict from paths to names, such as {"layers/1": "1"}'


def site_names(paths: Iterable[str], names: Mapping[str, str] | None) -> dict[str, str]:
    """Return the name of each path: by default, its parts joined by dots.

    The entry of `names` with the longest module path that contains a path replaces that part.
    """
    paths = list(paths)
    if names is None:
        return check_distinct({path: path.replace("/", ".") for path in paths})
    check_names(names)
    found: dict[str, str] = {}
    used: set[str] = set()
    for path in paths:
        module = module_of(path, names)
        if module is not None:
            used.add(module)
            found[path] = name_in(module, path, names)
    if missing := [path for path in paths if path not in found]:
        raise ValueError(
            f"names must have every site; got none for {missing}. Add these paths or those of "
            'their modules, or {"": ""} to keep the rest.'
        )
    if unknown := sorted(set(names) - used - {""}):
        raise ValueError(
            f"names must be paths of sites, or of modules with sites; got {unknown}. The sites "
            f"are {[_plain(path) for path in paths]}."
        )
    return check_distinct(found)


def is_changed(module: object) -> bool:
    """Return whether a module of the user overrides the call of a framework's layer."""
    place = inspect.unwrap(type(module).__call__).__module__.partition(".")[0]
    return place not in ("flax", "equinox", "regjax")


def check_names(names: Mapping[str, str]) -> None:
    """Raise a TypeError unless `names` maps strings to strings."""
    if not isinstance(names, Mapping):
        raise TypeError(f"names must be {_WANTED}; got {describe(names)}.")
    for path, name in names.items():
        check_string("a path in names", path)
        check_string(f"names[{path!r}]", name, "the name of a module in PyTorch")


def module_of(path: str, names: Mapping[str, str]) -> str | None:
    """Return the longest path of `names` that contains `path`."""
    path = _plain(path)
    within = [m for m in names if not m or path == m or path.startswith((f"{m}/", f"{m}:"))]
    return max(within, key=len, default=None)


def name_in(module: str, path: str, names: Mapping[str, str]) -> str:
    """Return the name of a path in a module of `names`; `:1` is a further draw of the module.

    The numbers in the name of the module stand for the first ones in the path.
    """
    place, _, draw = path.partition(":")
    owner, _, owner_draw = module.partition(":")
    rest = place.split("/")
    numbers = names[module].count(NUMBER)
    for _ in filter(None, owner.split("/")):
        while rest[0] == NUMBER:
            rest.pop(0)
            numbers -= 1
        rest.pop(0)
    while numbers > 0 and rest and rest[0] == NUMBER:
        rest.pop(0)
        numbers -= 1
    name = ".".join(filter(None, (names[module], *rest)))
    return f"{name}:{draw}" if draw and not owner_draw else name


def numbered(name: str, lengths: Sequence[int]) -> list[str]:
    """Return a name or path with every combination of numbers, the last one fastest."""
    first, *others = name.split(NUMBER)
    return [
        first + "".join(f"{number}{part}" for number, part in zip(numbers, others, strict=True))
        for numbers in itertools.product(*map(range, lengths))
    ]


def _plain(path: str) -> str:
    """Return a path without numbers."""
    return re.sub(r"(^|/)\{\}(?=/|:|$)", "", path).lstrip("/")


def check_distinct(found: dict[str, str]) -> dict[str, str]:
    """Return the names of paths, unless two paths have the same."""
    shared = {}
    for path, name in found.items():
        shared.setdefault(name, []).append(path)
    if twice := {name: paths for name, paths in shared.items() if len(paths) > 1}:
        raise ValueError(f"names must differ from site to site; got {twice}.")
    return found
