"""The names that code in docstrings and pages denotes.

Docstrings have Markdown's single backticks, and pages have code spans. Their code is a link in two
cases:

- It is a dotted name, or a call of one, that begins with a known package. The name must exist.
- In a docstring, it is the name of an object of the same module, and not that of an argument, such
  as `key`. With parentheses, as in `key(0)`, it always denotes the function.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent.parent
OWN = ("parity_tests", "regjax", "regtorch")
FOREIGN = ("equinox", "flax", "haiku", "jax", "numpy", "optax", "torch")
ALIASES = {
    "eqx": "equinox",
    "hk": "haiku",
    "interop": "regjax.interop",
    "jnp": "jax.numpy",
    "np": "numpy",
    "nnx": "flax.nnx",
}


def modules() -> list[str]:
    """Return the modules with a page in the reference."""
    pages = (DOCS / "api").glob("*.*.md")
    return sorted(page.stem for page in (*pages, Path("regjax.md"), Path("regtorch.md")))


def members(module: str) -> Iterator[Any]:
    """Yield the public objects of a module, and the methods of its classes."""
    target = importlib.import_module(module)
    for value in (getattr(target, name) for name in target.__all__):
        yield value
        if inspect.isclass(value):
            yield from vars(value).values()


@functools.cache
def argument_names() -> set[str]:
    """Return the names of all arguments of public functions and methods."""
    names: set[str] = set()
    for value in (value for module in modules() for value in members(module)):
        try:
            names.update(inspect.signature(value).parameters)
        except (TypeError, ValueError):  # neither a function nor a class, or a built-in one
            continue
    return names


def target(code: str, arguments: Collection[str] = ()) -> str | None:
    """Return the name that code links to, or None if it is not a name or that of an argument."""
    try:
        node: Any = ast.parse(code.replace("…", "..."), mode="eval").body
    except SyntaxError:
        return None
    parts: list[str] = []
    is_call = False
    while not isinstance(node, ast.Name):
        match node:
            case ast.Call(func=function):  # the link is to the first function of a chain of calls
                node, parts, is_call = function, [], True
            case ast.Subscript(value=value):
                node, parts = value, []
            case ast.Attribute(value=value, attr=attribute):
                node, parts = value, [attribute, *parts]
            case _:
                return None
    if not parts and node.id in arguments and not is_call:
        return None
    return ".".join([ALIASES.get(node.id, node.id) if parts else node.id, *parts])
