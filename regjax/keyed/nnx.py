"""Keys for the dropout of a model in Flax NNX."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from regjax._layers import FlaxLayer
from regjax.keyed.draws import attention, drop, without_vmap
from regjax.keyed.keys import Keys, number_key
from regjax.keyed.names import is_changed
from regjax.keyed.stacks import Site, sites_of
from regshared.extras import needs

with needs("regjax.keyed", extra="flax", package="flax"):
    from flax import nnx

if TYPE_CHECKING:
    from jax.typing import ArrayLike
    from jaxtyping import Array, Inexact

    from regjax._random.keys import KeyLike

_Dropout: Any = nnx.Dropout


class Numbers(nnx.Variable):
    """The number key of each of several stacked layers."""


class Stream:
    """The keys of one site, for the module that `bind` made, and not for copies of it.

    Stacked layers are copied for each trace of a `scan` or `vmap`, and know their numbers.
    """

    def __init__(self, root: KeyLike, step: ArrayLike, path: str, site: Site, owner: Any) -> None:
        self._root, self._step, self._path, self._site = root, step, path, site
        self._owner = owner
        self._calls: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def __deepcopy__(self, memo: Any) -> Stream:
        return self  # a copy would have an owner that contains it

    def draw(self, module: Any) -> KeyLike:
        """Return the key of the next call."""
        if module is not self._owner and not self._site.lengths:
            raise ValueError(
                f"module {self._path!r} must be the one that bind returned; got a copy, as by "
                "nnx.jit, scan, vmap, remat or view, which could share a mask with others. Pass "
                "the model, root and step to nnx.jit and bind inside; call nnx.view before; use "
                "jax.checkpoint with a closure for remat; and for scan or vmap over stacked "
                'layers, put the number into their name, as in names={"layers": "layers.{}"}.'
            )
        self._calls[module] = count = self._calls.get(module, -1) + 1
        number = module._numbers[...] if self._site.lengths else None
        return self._site.key(self._root, self._step, count, number)


class KeyedDropout(_Dropout):
    """A dropout layer of a bound model, which ignores the `rngs` of its call."""

    def __call__(
        self,
        inputs: Inexact[Array, "*shape"],
        *,
        deterministic: ArrayLike | None = None,
        rngs: Any = None,
        rate: ArrayLike | None = None,
    ) -> Inexact[Array, "*shape"]:
        """Drop in training, with the key of the site."""
        del rngs
        flag = self.deterministic if deterministic is None else deterministic
        given = self.rate if rate is None else rate
        given = given[...] if isinstance(given, nnx.Variable) else given
        if flag is None:
            return super().__call__(inputs)  # for its error
        draw_key = functools.partial(self._stream.draw, self)
        return drop(inputs, given, draw_key, flag, self.broadcast_dims)


class KeyedAttention(nnx.MultiHeadAttention):
    """Attention of a bound model, which ignores the `rngs` of its call."""

    _stream: Any

    def __call__(self, *args: Any, rngs: Any = None, **options: Any) -> Any:
        """Attend, with the key of the site."""
        del rngs
        # Flax calls the source of its key if it draws.
        source: Any = functools.partial(self._stream.draw, self)
        return super().__call__(*args, rngs=source, **options)


@functools.cache
def _keyed_layer(kind: Any) -> type:
    """Return a subclass of a layer of regjax.nnx that draws from the key of its site."""

    def key(self: Any, source: Any) -> KeyLike:
        del source
        return self._stream.draw(self)

    def drop(self: Any, inputs: Any, *args: Any, key: Any, **options: Any) -> Any:
        key = None if key is None else without_vmap(key, inputs, kind.__name__)
        return kind._drop(self, inputs, *args, key=key, **options)

    members = {"_key": key, "_drop": drop, "__module__": __name__}
    return type(kind.__name__, (kind,), members)


def _found(model: Any) -> dict[str, Any]:
    """Return the modules that draw, by path."""
    return {
        "/".join(map(str, path)): module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, _Dropout)
        or (isinstance(module, nnx.MultiHeadAttention) and module.dropout_rate > 0)
        or isinstance(module, FlaxLayer)
    }


def _arrays(model: Any) -> Any:
    """Return all arrays but those of `rngs`, which stacked layers may share."""
    return nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.RngState)))


def bind_nnx(
    model: Any,
    root: KeyLike,
    step: ArrayLike,
    names: Mapping[str, str] | None,
    broadcast_dropout: bool | None,
) -> Any:
    """Return a view of the model, with its variables, that draws from the keys of its sites."""
    outside = Keys(root, step).outside
    modules = _found(model)
    found = sites_of(_arrays(model), modules, names, outside)
    if changed := [
        f"{path} ({type(module).__name__})"
        for path, module in modules.items()
        if is_changed(module)
    ]:
        raise TypeError(
            "model must have dropout and attention with the calls of Flax; got subclasses with "
            f"their own: {', '.join(changed)}. Set their rate to 0, or use the layers of Flax."
        )

    def bound(path: Any, node: Any) -> Any:
        place = "/".join(map(str, path))
        if place not in found or not isinstance(node, nnx.Module):
            return node
        module: Any = node
        module._stream = Stream(root, step, place, found[place], module)
        if lengths := found[place].lengths:
            module._numbers = Numbers(number_key(lengths))
        if isinstance(module, _Dropout):
            module.__class__ = KeyedDropout
        elif isinstance(module, nnx.MultiHeadAttention):
            module.__class__ = KeyedAttention
            if module.attention_fn is nnx.dot_product_attention:
                module.attention_fn = attention
            if broadcast_dropout is not None:
                module.broadcast_dropout = broadcast_dropout
        else:
            module.__class__ = _keyed_layer(type(module))
        return module

    return nnx.recursive_map(bound, model)


def nnx_sites(model: Any, names: Mapping[str, str] | None) -> list[str]:
    """Return the names of the sites."""
    sites = sites_of(_arrays(model), _found(model), names)
    return [name for site in sites.values() for name in site.names()]
