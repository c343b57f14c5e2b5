"""Keys for the dropout of a model in Flax NNX."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from regjax._dropout.attention import dot_product_attention
from regjax._layers import FlaxLayer
from regjax.keyed.draws import drop
from regjax.keyed.keys import Keys
from regjax.keyed.names import is_changed, site_names
from regshared.extras import needs

with needs("regjax.keyed", extra="flax", package="flax"):
    from flax import nnx

if TYPE_CHECKING:
    from jax.typing import ArrayLike
    from jaxtyping import Array, Inexact

    from regjax._random.keys import KeyLike

_Dropout: Any = nnx.Dropout


class Stream:
    """The keys of one site, for the module that `bind` made, and not for copies of it."""

    def __init__(self, keys: Keys, path: str, name: str, owner: Any) -> None:
        self._keys, self._path, self._name, self._owner = keys, path, name, owner

    def draw(self, module: Any) -> KeyLike:
        """Return the key of the next call."""
        if module is not self._owner:
            raise ValueError(
                f"module {self._path!r} must be the one that bind returned; got a copy, as by "
                "nnx.jit, scan, vmap, remat or view, which could share a mask with others. Pass "
                "the model, root and step to nnx.jit and bind inside; call nnx.view before; use a "
                "Python loop for scan, and jax.checkpoint with a closure for remat."
            )
        return self._keys.draw(self._name)


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
def _keyed_layer(kind: type) -> type:
    """Return a subclass of a layer of regjax.nnx that draws from the key of its site."""

    def key(self: Any, source: Any) -> KeyLike:
        del source
        return self._stream.draw(self)

    return type(kind.__name__, (kind,), {"_key": key, "__module__": __name__})


def _found(model: Any) -> dict[str, Any]:
    """Return the modules that draw, by path."""
    return {
        "/".join(map(str, path)): module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, _Dropout)
        or (isinstance(module, nnx.MultiHeadAttention) and module.dropout_rate > 0)
        or isinstance(module, FlaxLayer)
    }


def bind_nnx(
    model: Any,
    root: KeyLike,
    step: ArrayLike,
    names: Mapping[str, str] | None,
    broadcast_dropout: bool | None,
) -> Any:
    """Return a view of the model, with its variables, that draws from the keys of its sites."""
    modules = _found(model)
    found = site_names(modules, names)
    if changed := [
        f"{path} ({type(module).__name__})"
        for path, module in modules.items()
        if is_changed(module)
    ]:
        raise TypeError(
            "model must have dropout and attention with the calls of Flax; got subclasses with "
            f"their own: {', '.join(changed)}. Set their rate to 0, or use the layers of Flax."
        )
    keys = Keys(root, step)

    def bound(path: Any, node: Any) -> Any:
        place = "/".join(map(str, path))
        if place not in found or not isinstance(node, nnx.Module):
            return node
        module: Any = node
        module._stream = Stream(keys, place, found[place], module)
        if isinstance(module, _Dropout):
            module.__class__ = KeyedDropout
        elif isinstance(module, nnx.MultiHeadAttention):
            module.__class__ = KeyedAttention
            if module.attention_fn is nnx.dot_product_attention:
                module.attention_fn = dot_product_attention
            if broadcast_dropout is not None:
                module.broadcast_dropout = broadcast_dropout
        else:
            module.__class__ = _keyed_layer(type(module))
        return module

    return nnx.recursive_map(bound, model)


def nnx_sites(model: Any, names: Mapping[str, str] | None) -> list[str]:
    """Return the names of the sites."""
    return list(site_names(_found(model), names).values())
