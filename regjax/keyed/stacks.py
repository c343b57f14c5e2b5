"""The sites of models in NNX and Equinox, also inside stacked layers.

The arrays of stacked layers have an axis of the layers in front, which `scan` or `vmap` maps. Their
name has the number of the layer, `{}`, and a number key for each layer is one more such array.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from regjax._compat import enclosing_loops
from regjax.keyed.keys import is_first_loop, nth_key, numbered_key
from regjax.keyed.names import NUMBER, check_distinct, module_of, numbered, site_names

if TYPE_CHECKING:
    from jax.typing import ArrayLike

    from regjax._random.keys import KeyLike


@dataclasses.dataclass(frozen=True)
class Site:
    """A site of a bound model.

    Attributes:
        name: Its name, with a place for the number of each axis of stacked layers.
        lengths: The lengths of these axes.
        outside: The number of JAX loops around the site in which root or step varies.
    """

    name: str
    lengths: tuple[int, ...]
    outside: int
    _seen: dict[str, Any] = dataclasses.field(default_factory=dict, compare=False, repr=False)

    def key(self, root: KeyLike, step: ArrayLike, count: int, number: Any) -> KeyLike:
        """Return the key of a call, from the number key of the layer."""
        loops = enclosing_loops()[self.outside :]
        if len(loops) > len(self.lengths):
            raise ValueError(
                f"site {self.name!r} must not be called inside jax.lax.scan, map or while_loop, "
                "where all iterations would share a mask; got such a call. Scan over "
                "stacked layers with their number in names, as in names={'': '', 'layers': "
                "'layers.{}'}. Bind a model inside a loop over steps or microbatches, with a step "
                "or root that differs in each iteration."
            )
        if not self.lengths:
            return nth_key(root, step, self.name, count)
        if number.ndim:
            raise ValueError(
                f"site {self.name!r} must be called for one of its stacked layers; got all "
                f"{number.shape} of them. Scan or vmap over the layers, with axis 0 of all their "
                "arrays."
            )
        if loops and not is_first_loop(self._seen, self.name, loops[0]):
            raise ValueError(
                f"site {self.name!r} must be in one loop of each binding; got a second loop over "
                "its stacked layers, whose masks would be those of the first. Bind the model "
                "again for the second loop, with another root."
            )
        return numbered_key(root, step, self.name, count, self.lengths, number)

    def names(self) -> list[str]:
        """Return the name for every number."""
        return numbered(self.name, self.lengths)


def sites_of(
    model: Any, paths: Iterable[str], names: Mapping[str, str] | None, outside: int = 0
) -> dict[str, Site]:
    """Return the site of each path; `model` is a pytree of the arrays of all modules."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(model)
    shapes = {path_of(steps): leaf.shape for steps, leaf in leaves if hasattr(leaf, "shape")}
    sites = {
        path: Site(name, _lengths(path, name, names or {}, shapes), outside)
        for path, name in site_names(paths, names).items()
    }
    check_distinct(
        {f"{path}/{each}": each for path, site in sites.items() for each in site.names()}
    )
    return sites


def path_of(steps: Any) -> str:
    """Return the path of a node or leaf of a pytree."""
    return jax.tree_util.keystr(steps, simple=True, separator="/")


def stacked(value: Any, lengths: tuple[int, ...]) -> Any:
    """Return a key or step with the axes of stacked layers in front."""
    if not lengths or not isinstance(value, jax.Array | np.ndarray):
        return value
    return jnp.broadcast_to(value, (*lengths, *value.shape))


def _lengths(
    path: str, name: str, names: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[int, ...]:
    """Return the lengths of the axes that the numbers in the name of a path count."""
    axes = name.count(NUMBER)
    if not axes:
        return ()
    module = module_of(path, names)
    assert module is not None, "a name with numbers comes from names"
    prefix = f"{module}/" if module else ""
    found = {shape[:axes] for place, shape in shapes.items() if place.startswith(prefix)}
    if len(found) != 1 or len(min(found)) < axes:
        raise ValueError(
            f"names[{module!r}] must be the name of stacked layers if it has {NUMBER}, all of "
            f"whose arrays have the axis of the layers in front; got {names[module]!r}, and "
            f"arrays that begin with {sorted(found)}."
        )
    return min(found)
