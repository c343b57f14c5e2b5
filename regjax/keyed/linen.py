"""Keys for the dropout of a model in Flax Linen."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from regjax._layers import FlaxLayer
from regjax.keyed.draws import attention, drop, without_vmap
from regjax.keyed.keys import Keys, number_key
from regjax.keyed.masks import Masks
from regjax.keyed.names import (
    NUMBER,
    check_distinct,
    check_names,
    is_changed,
    module_of,
    name_in,
    numbered,
    site_names,
)
from regjax.keyed.scans import Scans
from regshared.extras import needs

with needs("regjax.keyed", extra="flax", package="flax"):
    from flax import linen
    from flax.errors import InvalidRngError

if TYPE_CHECKING:
    from jax.typing import ArrayLike

    from regjax._random.keys import KeyLike

_ATTENTION = linen.MultiHeadDotProductAttention
_WEIGHTS = linen.dot_product_attention_weights.__code__


class Sites:
    """The sites that were called, and their names, both with places for numbers.

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
        self._lengths: dict[str, Sequence[int]] = {}
        self._before_loops: set[str] = set()

    def name(self, path: str, lengths: Sequence[int] = ()) -> str:
        """Return the name of a path, and record it with the lengths of the loops around it."""
        self._lengths[path] = lengths
        module = "" if self._names is None else module_of(path, self._names)
        if module is None:
            self.unnamed[path] = None
            return path
        self.found[path] = name = name_in(module, path, self._names or {"": ""})
        if name.count(NUMBER) != path.count(NUMBER):
            raise ValueError(
                f"names[{module!r}] must have one {NUMBER} for each scan around {path!r}; got "
                f"{self._names and self._names[module]!r}."
            )
        return name

    def name_before_loop(self, path: str) -> str:
        """Return a name for a path that will be called again in its loop."""
        self._before_loops.add(path)
        return path

    def numbered(self) -> dict[str, str]:
        """Return the name of each path, for every number."""
        return {
            each: numbered_name
            for path, name in self.found.items()
            for each, numbered_name in zip(
                numbered(path, self._lengths[path]),
                numbered(name, self._lengths[path]),
                strict=True,
            )
        }

    def check(self, *, is_complete: bool) -> None:
        """Raise for paths without a name, equal names and, at the end, unused entries."""
        if unseen := self._before_loops - set(self._lengths):
            raise RuntimeError(
                f"module must be scanned by jax.lax.scan; got another loop around {sorted(unseen)}."
            )
        paths = (*self.found, *self.unnamed)
        if is_complete:
            site_names(paths, self._names)
        elif self.unnamed:
            site_names(paths, self._names or {})
        check_distinct(self.numbered())


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
                equal names; or a site is in a module that `vmap` or `jit` of Linen repeats, or that
                `scan` repeats without splitting the rngs.
            RuntimeError: A module draws from the scope of Linen, or from a collection without key.
        """
        if isinstance(rngs, Mapping) and "dropout" in rngs:
            raise ValueError("rngs must not have 'dropout', whose keys are bound; got it. Omit it.")
        if rngs is not None and not isinstance(rngs, Mapping):
            rngs = {"default": rngs}
        # Without "params", `make_rng("dropout")` fails instead of using its keys.
        others = {name: key for name, key in (rngs or {}).items() if name != "params"}
        others["dropout"] = number_key()
        keys, sites = Keys(self._root, self._step), Sites(self._names)
        try:
            with _keyed(keys, sites, self._broadcast):
                result = self.module.apply(variables, *args, rngs=others, **options)
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
    inputs: dict[int, Any] = {}  # the arrays of this call
    scans = Scans(keys, _number_key)

    def key_of(module: Any, draw: int = 0) -> KeyLike:
        return scans.key(module, sites, f":{draw}" if draw else "")

    def make_rng(module: Any, name: str = "params") -> KeyLike:
        if name != "dropout":
            return type(module).make_rng(module, name)
        draw = draws[id(module)]
        draws[id(module)] += 1
        return masks.own(key_of(module, draw), type(module).__name__, inputs[id(module)])

    def call_with_keys(module: Any, call: Any, args: Any, options: Any) -> Any:
        if id(module) in draws:  # a method that calls another
            return call(*args, **options)
        draws[id(module)] = 0
        leaves = jax.tree.leaves((args, options))
        inputs[id(module)] = [leaf for leaf in leaves if isinstance(leaf, jax.Array)]
        _set(module, {"make_rng": functools.partial(make_rng, module)})
        try:
            return call(*args, **options)
        finally:
            del draws[id(module)], inputs[id(module)], module.__dict__["make_rng"]

    def intercept(call: Any, args: Any, options: Any, context: Any) -> Any:
        with scans.entered(context.module):
            return keyed(call, args, options, context)

    def keyed(call: Any, args: Any, options: Any, context: Any) -> Any:
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
                    name = type(module).__name__
                    given["rng"] = without_vmap(key_of(module), given["inputs"], name)
                return call(*bound.args[1:], **bound.kwargs)
            return _attend(module, args, options, given, call, key_of, broadcast)
        finally:
            running.remove(id(module))

    return intercept


def _number_key(module: Any) -> Any:
    """Return the number key of a module, or None if the transformation around it has none."""
    try:
        return type(module).make_rng(module, "dropout")
    except InvalidRngError:
        return None


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
        changed["attention_fn"] = attention
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
            rngs = {"params": jax.random.key(0), "dropout": number_key()}
            return module.init_with_output(rngs, *args, **options)

    jax.eval_shape(run, *args)
    found.check(is_complete=True)
    return list(found.numbered().values())
