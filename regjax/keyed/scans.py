"""The loops that `flax.linen.scan` makes around the modules of a bound model."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import Any

from regjax.keyed.keys import Keys
from regjax.keyed.names import NUMBER

_SCAN = re.compile(r"\bscan\(")
# Transformations that run the traced body of a module several times, with one name.
_REPEATING = re.compile(r"\b(vmap|jit|while_loop)\(")


@dataclasses.dataclass(frozen=True)
class _Call:
    """A running method of a module.

    Attributes:
        depth: The number of scans around it.
        key: The key of its scope, before modules fold their paths into it.
        is_split: Whether all scans split this key.
    """

    depth: int = 0
    key: Any = None
    is_split: bool = True


class Scans:
    """The running methods of a model, and the loops around them.

    Args:
        keys: The keys of the model.
        number_key: Returns the number key that a module has received, or None.
    """

    def __init__(self, keys: Keys, number_key: Callable[[Any], Any]) -> None:
        self._keys, self._number_key = keys, number_key
        self._calls = [_Call()]

    @contextlib.contextmanager
    def entered(self, module: Any) -> Iterator[None]:
        """Record a running method."""
        if module.scope is None:  # not a part of the model yet
            yield
            return
        outer = self._calls[-1]
        depth = len(_SCAN.findall(_debug_path(module)))
        key = getattr(module.scope.rngs.get("dropout"), "rng", None)
        is_body = depth > outer.depth
        # A scan passes a key that it does not split as it is.
        is_split = outer.is_split and not (is_body and key is outer.key)
        self._calls.append(_Call(depth, key, is_split))
        counted = is_body and len(self._keys.loops()) == depth
        try:
            with self._keys.body("/".join(module.path)) if counted else _nothing():
                yield
        finally:
            self._calls.pop()

    def key(self, module: Any, sites: Any, draw: str = "") -> Any:
        """Return the key of the next draw of a module."""
        path = "/".join(module.path)
        if found := _REPEATING.search(_debug_path(module)):
            raise ValueError(
                f"module {path!r} must be called once for each of its names; got a module inside "
                f"linen.{found[1]}, where all repetitions would share a mask. Write the repetition "
                "as linen.scan or a Python loop over modules, and use jax.jit around apply."
            )
        call = self._calls[-1]
        source = self._number_key(module)
        if source is None or not call.is_split:
            raise ValueError(
                f"module {path!r} must be in a scan that splits the rngs 'dropout'; got one in "
                "which all iterations would share a mask. Pass "
                "split_rngs={'params': True, 'dropout': True} to linen.scan."
            )
        path = _numbered_path(module) + draw
        loops = self._keys.loops()
        if len(loops) < call.depth:
            # Flax traces the body once before the loop, and discards the result.
            return self._keys.unused(sites.name_before_loop(path))
        lengths = [loop.length for loop in loops if loop.length is not None]
        if not len(lengths) == len(loops) == call.depth:
            raise ValueError(
                f"site {path!r} must not be called inside jax.lax.scan, map or while_loop, where "
                "all iterations would share a mask; got such a call. Write linen.scan around "
                "layers. Bind a model inside a loop over steps or microbatches, with a step or "
                "root that differs in each iteration."
            )
        name = sites.name(path, lengths)
        if not call.depth:
            return self._keys.draw(name)
        return self._keys.draw_numbered(name, lengths, source)


def _nothing() -> Any:
    return contextlib.nullcontext()


def _debug_path(module: Any) -> str:
    return "/".join(module.scope.debug_path)


def _numbered_path(module: Any) -> str:
    """Return the path of a module, with a number after each module that is scanned."""
    parts = []
    # The path of a model that is scanned itself begins with "scan()".
    for shown in module.scope.debug_path:
        *_, part = re.split(r"[(]", shown.rstrip(")"))
        parts += [part, *[NUMBER] * len(_SCAN.findall(shown))]
    return "/".join(filter(None, parts))
