"""Keys for the dropout of a model in Equinox."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax

from regjax._layers import FunctionLayer
from regjax.keyed.draws import drop
from regjax.keyed.keys import Keys, number_key
from regjax.keyed.names import is_changed
from regjax.keyed.stacks import Site, path_of, sites_of, stacked
from regshared.extras import needs

with needs("regjax.keyed", extra="equinox", package="equinox"):
    import equinox as eqx

if TYPE_CHECKING:
    from jax.typing import ArrayLike
    from jaxtyping import Array, Inexact

    from regjax._random.keys import KeyLike

_Dropout: Any = eqx.nn.Dropout


class KeyedDropout(_Dropout):
    """A dropout layer of a bound model, which ignores the key of its call."""

    root: Any
    step: Any
    number: Any
    site: Site = eqx.field(static=True)

    def __init__(self, layer: Any, root: KeyLike, step: ArrayLike, site: Site) -> None:
        self.p, self.inference = layer.p, layer.inference
        # Each array has the axes of a stacked layer, so that a scan or vmap over it slices them.
        self.root, self.step = stacked(root, site.lengths), stacked(step, site.lengths)
        self.number = number_key(site.lengths) if site.lengths else None
        self.site = site

    def __call__(
        self,
        x: Inexact[Array, "*shape"],
        *,
        key: KeyLike | None = None,
        inference: ArrayLike | None = None,
        deterministic: ArrayLike | None = None,
    ) -> Inexact[Array, "*shape"]:
        """Drop in training, with the key of the site."""
        del key
        given = inference if deterministic is None else deterministic
        flag = self.inference if given is None else given
        return drop(x, self.p, self._draw_key, flag)

    def _draw_key(self) -> KeyLike:
        # No field: each transformation that is passed the model counts from 0.
        count = self.__dict__.get("_calls", 0)
        self.__dict__["_calls"] = count + 1
        return self.site.key(self.root, self.step, count, self.number)


def _is_site(node: Any) -> bool:
    return isinstance(node, _Dropout | FunctionLayer)


def _found(model: Any) -> tuple[list[str], list[Any], list[Any], Any]:
    """Return the paths of sites, all nodes, their paths (None if no site), and the structure."""
    nodes, structure = jax.tree_util.tree_flatten_with_path(model, is_leaf=_is_site)
    attention = _attention_paths(model)
    paths, places = [], []
    for steps, node in nodes:
        path = path_of(steps) if _is_site(node) else None
        if path is not None:
            # The mask of attention is a draw of the module, as in PyTorch.
            owner = path.rpartition("/")[0]
            path = owner if owner in attention and path.endswith("dropout") else path
            paths.append(path)
        places.append(path)
    return paths, [node for _, node in nodes], places, structure


def _attention_paths(model: Any) -> set[str]:
    def is_attention(node: Any) -> bool:
        return isinstance(node, eqx.nn.MultiheadAttention)

    nodes, _ = jax.tree_util.tree_flatten_with_path(model, is_leaf=is_attention)
    return {path_of(steps) for steps, node in nodes if is_attention(node)}


def bind_equinox(
    model: Any, root: KeyLike, step: ArrayLike, names: Mapping[str, str] | None
) -> Any:
    """Return a copy of the model whose dropout layers draw from the keys of their sites."""
    outside = Keys(root, step).outside
    paths, nodes, places, structure = _found(model)
    unkeyed = [
        f"{path} ({type(node).__name__})"
        for path, node in zip(places, nodes, strict=True)
        if path is not None and (not isinstance(node, _Dropout) or is_changed(node))
    ]
    if unkeyed:
        raise TypeError(
            "model must not have subclasses of Dropout with their own call, or other layers of "
            f"regjax.equinox, whose masks jax.vmap would share; got {', '.join(unkeyed)}. Use "
            "equinox.nn.Dropout, or pass keys of regjax.site_key in the calls, without "
            "regjax.keyed."
        )
    found = sites_of(model, paths, names, outside)
    bound = [
        node if path is None else KeyedDropout(node, root, step, found[path])
        for path, node in zip(places, nodes, strict=True)
    ]
    return jax.tree_util.tree_unflatten(structure, bound)


def equinox_sites(model: Any, names: Mapping[str, str] | None) -> list[str]:
    """Return the names of the sites."""
    sites = sites_of(model, _found(model)[0], names)
    return [name for site in sites.values() for name in site.names()]
