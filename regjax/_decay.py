"""Which parameters decay, and by how much: the checks that loss term and optimizers share."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from regjax._paths import path_name

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import PyTree

    from regjax._paths import KeyPath


def check_coefficient(name: str, value: Any, *, fix: str, below: float = math.inf) -> None:
    """Refuse a coefficient outside `0 <= value < below`; a traced one cannot be looked at.

    Args:
        name: What the caller calls the argument.
        value: A number or a 0-d array; of a tracer only shape and dtype are checked.
        fix: What to pass instead, as the end of the message.
        below: The least value that is too large. Infinity and NaN never pass.

    Raises:
        TypeError: `value` is a bool, or no real number.
        ValueError: `value` lies outside the range.

    Examples:
        >>> check_coefficient("weight_decay", 0.1, fix="pass 0.0 for none")
        >>> check_coefficient("weight_decay", -0.1, fix="pass 0.0 for none")
        Traceback (most recent call last):
        ValueError: weight_decay must be finite and not negative, but it is -0.1: pass 0.0 for none
    """
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        real = jnp.issubdtype(value.dtype, jnp.floating) or jnp.issubdtype(value.dtype, jnp.integer)
        is_number = real and value.shape == ()
    else:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number:
        raise TypeError(f"{name} must be a real number, but it is {value!r}: {fix}")
    if isinstance(value, Tracer):
        return
    if not 0.0 <= float(value) < below:
        wanted = "finite and not negative" if below == math.inf else f"in [0, {below:g})"
        raise ValueError(f"{name} must be {wanted}, but it is {value}: {fix}")


def resolve_mask(
    mask: PyTree[bool] | Callable[[PyTree], PyTree[bool]] | None, params: PyTree
) -> PyTree[bool]:
    """Say for each parameter whether it decays.

    Args:
        mask: `None` (every leaf), or a tree of bools that has the structure of `params` or is a
            prefix of it (one bool for a whole subtree), or a function from `params` to such a tree.
        params: The parameters. `None` in them is an empty subtree, as everywhere in JAX: a bool of
            the mask may stand over it, and a `None` of the mask must meet a `None`.

    Returns:
        A tree of Python bools with the structure of `params`. PyTorch says the same with parameter
        groups, each with its own `weight_decay`.

    Raises:
        ValueError: The mask has another structure; names the first place that differs.
        TypeError: A leaf of the mask is not a bool; names its place and value.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> params = {"dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
        >>> resolve_mask(lambda params: jax.tree.map(lambda p: p.ndim > 1, params), params)
        {'dense': {'bias': False, 'kernel': True}}
        >>> resolve_mask({"dense": False}, params)
        {'dense': {'bias': False, 'kernel': False}}
    """
    if mask is None:
        mask = True
    # An Equinox module that holds bools is callable too, but it is a tree and no leaf.
    elif callable(mask) and _is_leaf(mask):
        mask = mask(params)
    return _broadcast((), mask, params)


def _broadcast(path: KeyPath, mask: PyTree, params: PyTree) -> PyTree[bool]:
    if _is_leaf(mask):
        decays = _as_bool(path, mask)
        return jax.tree.map(lambda _: decays, params)
    mask_children, mask_structure = _children(mask)
    children, structure = _children(params)
    if mask_structure != structure:
        raise ValueError(_difference(path, mask, params))
    return structure.unflatten(
        _broadcast((*path, *key), submask, subtree)
        for (key, submask), (_, subtree) in zip(mask_children, children, strict=True)
    )


def _as_bool(path: KeyPath, leaf: Any) -> bool:
    is_array = isinstance(leaf, jax.Array | np.ndarray | np.generic)
    if is_array and leaf.dtype == bool and leaf.shape == ():
        if isinstance(leaf, Tracer):
            raise TypeError(
                f"mask{_at(path)} is traced: whether a parameter decays may depend on names, "
                "shapes and dtypes, never on values"
            )
        return bool(leaf)
    if not isinstance(leaf, bool):
        raise TypeError(
            f"mask{_at(path)} must be a bool, but it is {leaf!r}: a mask says whether a parameter "
            "decays; how strongly, weight_decay says"
        )
    return leaf


def _difference(path: KeyPath, mask: PyTree, params: PyTree) -> str:
    """Describe the first place at which `mask` is no prefix of `params`."""
    places = [(path, mask, params)]
    if type(mask) is type(params):
        ours, theirs = (dict(_children(tree)[0]) for tree in (mask, params))
        places = [
            ((*path, *key), ours.get(key, _NOTHING), theirs.get(key, _NOTHING))
            for key in (*theirs, *ours)
            if key not in ours or key not in theirs
        ] or places
    place, here, there = places[0]
    return (
        f"mask has another structure than the parameters{_at(place)}: the mask has "
        f"{_describe(here)} there, the parameters have {_describe(there)}"
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


def _is_leaf(tree: Any) -> bool:
    return jax.tree_util.all_leaves([tree])


def _children(tree: PyTree) -> tuple[list[tuple[KeyPath, Any]], Any]:
    """Flatten one level only: children with their keys, and the structure they leave."""
    return jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: node is not tree)
