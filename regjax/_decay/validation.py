"""Masks, scales and references of weight decay, checked and expanded to the parameters' structure.

Where one of them has another structure, the error names the first path that differs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from regjax._decay.paths import path_name
from regshared.checks import check_coefficient

if TYPE_CHECKING:
    from collections.abc import Callable

    from jax.typing import ArrayLike
    from jaxtyping import Array, Bool, PyTree, ScalarLike

    from regjax._decay.paths import KeyPath

    Mask = PyTree[Bool[ArrayLike, ""]] | Callable[[PyTree], PyTree] | None


def resolve_mask(mask: Mask, params: PyTree) -> PyTree[bool]:
    """Return a pytree of Python bools with the structure of `params`: True where a leaf decays.

    Args:
        mask: `None` (every leaf), or a pytree of bools with the structure of `params` or a prefix
            of it (one bool for a whole subtree), or a function from `params` to such a pytree. A
            Flax variable and its bare value match each other: `flax.nnx.Optimizer` passes the one
            to `init` and the other to `update`.
        params: The parameters. `None` is an empty subtree, as everywhere in JAX: a bool of the mask
            may cover it, and a `None` of the mask must meet a `None`.

    Raises:
        ValueError: The mask has another structure.
        TypeError: A leaf of the mask is not a bool; the message gives its path and value.
    """
    if mask is None:
        mask = True
    # An Equinox module of bools may be callable too, but it is a pytree and not a leaf.
    elif callable(mask) and _is_leaf(mask):
        mask = mask(params)
    return _broadcast("mask", _as_bool, (), mask, params)


def resolve_scale(scale: PyTree[ScalarLike], params: PyTree) -> PyTree[ScalarLike]:
    """Return the scale of each parameter, from a pytree of their structure or a prefix of it."""
    return _broadcast("scale", _as_number, (), scale, params)


def resolve_reference(reference: PyTree, params: PyTree) -> PyTree:
    """Return the reference unchanged if it has the structure of `params`; a prefix is an error."""
    return _broadcast("reference", _as_it_is, (), reference, params)


def check_reference(name: str, leaf: Array, reference: Any) -> None:
    """Raise an error if the parameter `name` cannot decay toward this leaf of the reference."""
    is_array = isinstance(reference, jax.Array | np.ndarray | np.generic)
    if not is_array or not jnp.issubdtype(reference.dtype, jnp.inexact):
        found = f"an array of {reference.dtype}" if is_array else repr(reference)
        raise TypeError(
            f"reference at '{name}' must be a float or complex array; got {found}. Pass the "
            "parameters to decay toward, or set it to False in `mask`."
        )
    if jnp.iscomplexobj(reference) and not jnp.iscomplexobj(leaf):
        raise TypeError(
            f"reference at '{name}' must be real, as the parameter is; got a complex one. Pass its "
            "real part."
        )
    if reference.shape != leaf.shape:
        raise ValueError(
            f"reference at '{name}' must have the parameter's shape {leaf.shape}; got "
            f"{reference.shape}."
        )


def _broadcast(
    name: str,
    convert: Callable[[KeyPath, Any, PyTree], Any],
    path: KeyPath,
    tree: PyTree,
    params: PyTree,
) -> PyTree:
    """Expand a prefix pytree to the structure of `params`; call `convert` once per leaf of it."""
    if _is_leaf(tree):
        decision = convert(path, tree, params)
        return jax.tree.map(lambda _: decision, params)
    children, structure = _children(params)
    tree_children, tree_structure = _children(tree)
    if tree_structure != structure:
        if _is_box(tree):
            return _broadcast(name, convert, path, _content(tree), params)
        raise ValueError(_difference(name, path, tree, params))
    return structure.unflatten(
        _broadcast(name, convert, (*path, *key), subtree, subparams)
        for (key, subtree), (_, subparams) in zip(tree_children, children, strict=True)
    )


def _as_bool(path: KeyPath, leaf: Any, params: PyTree) -> bool:
    del params
    is_array = isinstance(leaf, jax.Array | np.ndarray | np.generic)
    if is_array and leaf.dtype == bool and leaf.shape == ():
        if isinstance(leaf, Tracer):
            raise TypeError(
                f"mask{_at(path)} must be known before tracing; got a traced bool. Compute it from "
                "names, shapes and dtypes, never from values."
            )
        return bool(leaf)
    if not isinstance(leaf, bool):
        raise TypeError(
            f"mask{_at(path)} must be a bool; got {leaf!r}. Set the rate with weight_decay."
        )
    return leaf


def _as_number(path: KeyPath, leaf: Any, params: PyTree) -> Any:
    del params
    check_coefficient(f"scale{_at(path)}", leaf, fix="Pass 1.0 for no change.")
    return leaf


def _as_it_is(path: KeyPath, leaf: Any, params: PyTree) -> Any:
    # A parameter that is None, such as one without a gradient, needs no reference.
    if params is not None and not _is_leaf(_content(params) if _is_box(params) else params):
        raise ValueError(_difference("reference", path, leaf, params))
    return leaf


def _difference(name: str, path: KeyPath, tree: PyTree, params: PyTree) -> str:
    """Describe the first path at which a pytree is not a prefix of `params`."""
    places = [(path, tree, params)]
    if type(tree) is type(params):
        have, expected = (dict(_children(t)[0]) for t in (tree, params))
        places = [
            ((*path, *key), have.get(key, _NOTHING), expected.get(key, _NOTHING))
            for key in (*expected, *have)
            if key not in have or key not in expected
        ] or places
    place, here, there = places[0]
    return (
        f"{name} must have the structure of the parameters; got {_describe(here)}{_at(place)}, "
        f"where the parameters have {_describe(there)}."
    )


_NOTHING = object()


def _describe(tree: Any) -> str:
    if tree is _NOTHING:
        return "nothing"
    if tree is None:
        return "None"
    if not _is_leaf(tree):
        names = ", ".join(path_name(key) for key, _ in _children(tree)[0])
        return f"a {type(tree).__name__} of ({names})"
    if hasattr(tree, "dtype"):
        return f"an array {tree.dtype}{list(tree.shape)}"
    return repr(tree)


def _at(path: KeyPath) -> str:
    return f" at '{path_name(path)}'" if path else " at the root"


def _is_box(tree: Any) -> bool:
    """Recognize a Flax variable, or metadata around an array, without importing Flax."""
    ancestors = {f"{cls.__module__.split('.')[0]}.{cls.__name__}" for cls in type(tree).__mro__}
    is_of_flax = bool(ancestors & {"flax.Variable", "flax.AxisMetadata"})
    return is_of_flax and len(_children(tree)[0]) == 1


def _content(box: Any) -> Any:
    [(_, content)] = _children(box)[0]
    return content


def _is_leaf(tree: Any) -> bool:
    return jax.tree_util.all_leaves([tree])


def _children(tree: PyTree) -> tuple[list[tuple[KeyPath, Any]], Any]:
    """Flatten one level: return the children with their keys, and the structure around them."""
    return jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: node is not tree)
