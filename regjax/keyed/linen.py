"""Keys for the dropout of a model in Flax Linen."""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from regjax._dropout.attention import dot_product_attention
from regjax._layers import FlaxLayer
from regjax.keyed.draws import Keys, drop
from regjax.keyed.masks import Masks
from regjax.keyed.names import (
    check_distinct,
    check_names,
    is_changed,
    module_of,
    name_in,
    site_names,
)
from regshared.extras import needs

with needs("regjax.keyed", extra="flax", package="flax"):
    from flax import linen
    from flax.errors import InvalidRngError

if TYPE_CHECKING:
    from jax.typing import ArrayLike

    from regjax._random.keys import KeyLike

# Transformations that run the traced body of a module several times, with one name.
_REPEATING = re.compile(r"\b(scan|vmap|jit|while_loop)\(")
_ATTENTION = linen.MultiHeadDotProductAttention
_WEIGHTS = linen.dot_product_attention_weights.__code__


class Sites:
    """The sites that were called, and their names.

    Attributes:
        found: The name of each path that drew.
        unnamed: The paths that drew without a name.
    """

    def __init__(self, names: Mapping[str, str] | None) -> None:
        if names is not None:
            check_names(names)
        self._names = names
        self.found: dict[str, str] = {}
        self.unnamed: dict[str, None] = {}

    def name(self, path: str) -> str:
        """Return the name of a path, and record it."""
        module = "" if self._names is None else module_of(path, self._names)
        if module is None:
            self.unnamed[path] = None
            return path
        self.found[path] = name = name_in(module, path, self._names or {"": ""})
        return name

    def check(self, *, is_complete: bool) -> None:
        """Raise for paths without a name, equal names and, at the end, unused entries."""
        paths = (*self.found, *self.unnamed)
        if is_complete:
            site_names(paths, self._names)
        elif self.unnamed:
            site_names(paths, self._names or {})
        else:
            check_distinct(self.found)


class BoundModule:
    """A Linen module with the keys of one step.

    Attributes:
        module: The module itself.
    """

    def __init__(
        self,
        module: Any,
        root: KeyLike,
        step: ArrayLike,
        names: Mapping[str, str] | None,
        broadcast_dropout: bool | None,
    ) -> None:
        self.module = module
        self._root, self._step, self._names = root, step, names
        self._broadcast = broadcast_dropout
        Keys(root, step)
        Sites(names)

    def __repr__(self) -> str:
        return f"BoundModule({type(self.module).__name__})"

    def apply(self, variables: Any, *args: Any, rngs: Any = None, **options: Any) -> Any:
        """Call `module.apply`, with the key of its site for each draw.

        Args:
            variables: As for `module.apply`.
            *args: The arguments of the module.
            rngs: The keys of other collections than `"dropout"`, a dict.
            **options: Further arguments of `module.apply`, such as `mutable` and `method`.

        Raises:
            ValueError: `rngs` has the collection `"dropout"`; `names` has no name for a site, or
                equal names; or a site is in a module that `scan`, `vmap` or `jit` of Linen repeats.
            RuntimeError: A module draws from the scope of Linen, or from a collection without key.
        """
        if isinstance(rngs, Mapping) and "dropout" in rngs:
            raise ValueError("rngs must not have 'dropout', whose keys are bound; got it. Omit it.")
        if rngs is not None and not isinstance(rngs, Mapping):
            rngs = {"default": rngs}
        # Without "params", `make_rng("dropout")` fails instead of using its keys.
        others = {name: key for name, key in (rngs or {}).items() if name != "params"}
        keys, sites = Keys(self._root, self._step), Sites(self._names)
        try:
            with _keyed(keys, sites, self._broadcast):
                result = self.module.apply(variables, *args, rngs=others or None, **options)
        except InvalidRngError as error:
            raise RuntimeError(
                f"module must draw from keyed sites; got another draw: {error} Draw from "
                "self.make_rng('dropout'), or pass the keys of other collections in rngs."
            ) from error
        sites.check(is_complete=False)
        return result


@contextlib.contextmanager
def _keyed(keys: Keys, sites: Sites, broadcast: bool | None) -> Iterator[None]:
    """Use the keys of sites in all modules that are called."""
    masks = Masks(_WEIGHTS, broadcast)
    with masks.active(), linen.intercept_methods(_interceptor(keys, sites, masks, broadcast)):
        yield


def _interceptor(
    keys: Keys, sites: Sites, masks: Masks, broadcast: bool | None
) -> Callable[..., Any]:
    running: set[int] = set()
    draws: dict[int, int] = {}  # within the running call of each module

    def key_of(module: Any, draw: int = 0) -> KeyLike:
        path = "/".join(module.path)
        if found := _REPEATING.search("/".join(module.scope.debug_path)):
            raise ValueError(
                f"module {path!r} must be called once for each of its names; got a module inside "
                f"linen.{found[1]}, where all repetitions would share a mask. Write the repetition "
                "as a Python loop over modules, and use jax.jit around apply."
            )
        return keys.draw(sites.name(f"{path}:{draw}" if draw else path))

    def make_rng(module: Any, name: str = "params") -> KeyLike:
        if name != "dropout":
            return type(module).make_rng(module, name)
        draw = draws[id(module)]
        draws[id(module)] += 1
        return masks.own(key_of(module, draw))

    def call_with_keys(module: Any, call: Any, args: Any, options: Any) -> Any:
        if id(module) in draws:  # a method that calls another
            return call(*args, **options)
        draws[id(module)] = 0
        _set(module, {"make_rng": functools.partial(make_rng, module)})
        try:
            return call(*args, **options)
        finally:
            del draws[id(module)], module.__dict__["make_rng"]

    def intercept(call: Any, args: Any, options: Any, context: Any) -> Any:
        module = context.module
        is_layer = isinstance(context.module, FlaxLayer)
        is_dropout = isinstance(module, linen.Dropout)
        is_site = is_dropout or is_layer or isinstance(module, _ATTENTION)
        # Attention calls the method of its base class too.
        if context.method_name != "__call__" or not is_site or id(module) in running:
            return call_with_keys(module, call, args, options)
        if is_changed(module):
            raise TypeError(
                f"module {'/'.join(module.path)!r} must have the call of Flax's layer; got "
                f"{type(module).__name__}, which has its own. Use the layer of Flax, or its rate 0."
            )
        signature = inspect.signature(type(module).__call__)
        bound = signature.bind(module, *args, **options)
        given = bound.arguments
        running.add(id(module))
        try:
            if is_dropout:
                return _drop(module, given, key_of)
            if is_layer:
                if _flag(module, given) is not True:
                    given["rng"] = key_of(module)
                return call(*bound.args[1:], **bound.kwargs)
            return _attend(module, args, options, given, call, key_of, broadcast)
        finally:
            running.remove(id(module))

    return intercept


def _flag(module: Any, given: dict[str, Any]) -> Any:
    return linen.merge_param("deterministic", module.deterministic, given.get("deterministic"))


def _drop(module: Any, given: dict[str, Any], key_of: Any) -> Any:
    rate = given.get("rate")
    rate = module.rate if rate is None else rate
    draw_key = functools.partial(key_of, module)
    return drop(given["inputs"], rate, draw_key, _flag(module, given), module.broadcast_dims)


def _attend(
    module: Any,
    args: Any,
    options: Any,
    given: dict[str, Any],
    call: Any,
    key_of: Any,
    broadcast: bool | None,
) -> Any:
    if module.dropout_rate == 0 or _flag(module, given) is True:
        return call(*args, **options)
    kept = {name: getattr(module, name) for name in ("attention_fn", "broadcast_dropout")}
    changed = dict(kept)
    if module.attention_fn is linen.dot_product_attention:
        changed["attention_fn"] = dot_product_attention
    if broadcast is not None:
        changed["broadcast_dropout"] = broadcast
    try:
        _set(module, changed)
        return call(*args, **{**options, "dropout_rng": key_of(module)})
    finally:
        _set(module, kept)


def _set(module: Any, values: dict[str, Any]) -> None:
    for name, value in values.items():
        object.__setattr__(module, name, value)


def linen_sites(
    module: Any, names: Mapping[str, str] | None, args: tuple[Any, ...], options: dict[str, Any]
) -> list[str]:
    """Return the names of the sites that a call of the module reaches, without computing it."""
    found = Sites(names)
    root = np.zeros(2, np.uint32)

    def run(*args: Any) -> Any:
        keys = Keys(root, 0)
        with _keyed(keys, found, None):
            rngs = dict.fromkeys(("params", "dropout"), jax.random.key(0))
            return module.init_with_output(rngs, *args, **options)

    jax.eval_shape(run, *args)
    found.check(is_complete=True)
    return list(found.found.values())
