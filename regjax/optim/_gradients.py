"""Checks of parameters and gradients, and handling of parameters without a gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeGuard

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import GetAttrKey

from regjax._decay.paths import named_leaves, path_name
from regjax.optim._records import RECORDS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from jaxtyping import PyTree

    from regjax._decay.paths import KeyPath

    # By path in the parameters, the update of a parameter without a gradient.
    Gaps = Mapping[KeyPath, Any]


# The fields of a state that hold an array for each parameter ...
_FIELDS = {array.field for record in RECORDS.values() for array in record.arrays}
# ... and those where it always has the parameter's shape.
_FACTORED = [record for record in RECORDS.values() if record.is_factored]
_WHOLE = _FIELDS - {array.field for record in _FACTORED for array in record.arrays}


def check_arrays(params: PyTree) -> None:
    """Reject leaves that are not arrays, such as functions and strings: they have no moments."""
    for name, leaf in named_leaves(params):
        if not is_array(leaf):
            raise TypeError(
                f"params must hold only arrays; got {leaf!r}{_at(name)}. Pass "
                "eqx.filter(model, eqx.is_array), or leave the leaf out with optax.masked."
            )


def check_real(params: PyTree, owner: str, fix: str) -> None:
    """Reject leaves that are not arrays, and complex arrays, for an optimizer."""
    check_arrays(params)
    for name, leaf in named_leaves(params):
        if jnp.iscomplexobj(leaf):
            raise TypeError(f"params must be real for {owner}; got {leaf.dtype}{_at(name)}. {fix}")


# Fixes of complex parameters: the one where PyTorch takes them, and the one where it does not.
SPLIT = (
    "Wrap the optimizer in optax.contrib.split_real_and_imaginary, which trains both parts as "
    "PyTorch does."
)
PARTITION = "Send it to another optimizer with optax.partition."


def check_given(params: PyTree | None, reason: str, fix: str = "") -> None:
    """Reject an update without parameters."""
    if params is None:
        raise ValueError(
            f"params must be given, since {reason}; got None. Call update(updates, state, params)"
            f"{fix}."
        )


def check_gradients(updates: PyTree, state: PyTree, params: PyTree | None) -> Gaps:
    """Check the gradients against the parameters and the state, and return the missing ones.

    By path, the result holds the update of each parameter without a gradient: None for None, and
    zeros for the `float0` that JAX returns for an integer.
    """
    # Only structure, shapes and dtypes are compared, so nothing is computed under jit.
    gaps: dict[KeyPath, Any] = {}
    for what, tree in (("parameter", params), ("optimizer state", _moments(state))):
        if tree is not None:
            gaps = {**_compare(what, updates, tree), **gaps}  # a parameter keeps its own dtype
    return gaps


def fill(gaps: Gaps, updates: PyTree, params: PyTree | None) -> tuple[PyTree, Gaps]:
    """Give float parameters without a gradient a zero gradient, so that a mask function sees them.

    Returns the gradients, and the remaining gaps, whose parameters no mask function sees.
    """
    floats = {
        path: leaf
        for path, leaf in ({} if params is None else _by_path(params)).items()
        if path in gaps and is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.inexact)
    }
    removed = {path: update for path, update in gaps.items() if path not in floats}

    def filled(path: KeyPath, gradient: Any) -> Any:
        return jnp.zeros_like(floats[path]) if path in floats else gradient

    return jax.tree.map_with_path(filled, updates, is_leaf=_is_none), removed


def without(gaps: Gaps, tree: PyTree) -> PyTree:
    """Replace the leaves of parameters without a gradient with None."""
    return jax.tree.map_with_path(lambda path, leaf: None if path in gaps else leaf, tree)


def state_without(gaps: Gaps, state: PyTree) -> PyTree:
    """Replace the state of parameters without a gradient with None."""

    def keep(path: KeyPath, leaf: Any) -> Any:
        return None if _of_parameter(path) in gaps else leaf

    return jax.tree.map_with_path(keep, state, is_leaf=_is_masked)


def put_back(gaps: Gaps, removed: Gaps, updates: PyTree, new_updates: PyTree) -> PyTree:
    """Insert the updates of parameters without a gradient."""
    rest = iter(jax.tree.leaves(new_updates))
    leaves, structure = jax.tree_util.tree_flatten_with_path(updates, is_leaf=_is_none)

    def update(path: KeyPath, leaf: Any) -> Any:
        is_missing = path in removed or (leaf is None and path not in gaps)
        computed = None if is_missing else next(rest)
        return gaps.get(path, computed)

    return structure.unflatten([update(path, leaf) for path, leaf in leaves])


def put_state_back(gaps: Gaps, removed: Gaps, state: PyTree, new_state: PyTree) -> PyTree:
    """Insert the unchanged state of parameters without a gradient."""
    rest = iter(jax.tree.leaves(new_state))
    leaves, structure = jax.tree_util.tree_flatten_with_path(state, is_leaf=_is_masked)

    def part(path: KeyPath, leaf: Any) -> Any:
        parameter = _of_parameter(path)
        if parameter in removed or _is_masked(leaf):
            return leaf
        computed = next(rest)
        return leaf if parameter in gaps else computed

    return structure.unflatten([part(path, leaf) for path, leaf in leaves])


def _compare(what: str, updates: PyTree, tree: PyTree) -> Gaps:
    gradients, leaves = _by_path(updates), _by_path(tree)
    if gradients.keys() != leaves.keys():
        path = next(p for p in (*leaves, *gradients) if p not in gradients or p not in leaves)
        raise ValueError(
            f"updates must have the structure of the parameters; got "
            f"{_describe(gradients.get(path, _NOTHING))}{_at(path_name(path))}, where the {what} "
            f"is {_describe(leaves.get(path, _NOTHING))}. {_FIX}"
        )
    gaps = {}
    gradient: Any
    for path, gradient in gradients.items():
        leaf: Any = leaves[path]
        if leaf is None and gradient is None:
            continue
        if gradient is None:
            gaps[path] = None
            continue

        def where(gradient: Any = gradient, path: KeyPath = path) -> str:
            return f"{_describe(gradient)}{_at(path_name(path))}, where the {what} is "

        if not is_array(leaf) or not is_array(gradient):
            kind = ValueError if leaf is None else TypeError
            raise kind(
                f"updates must be arrays where the parameters are; got {where()}{_describe(leaf)}. "
                "Pass None as the gradient of a leaf that is not trained."
            )
        if jnp.shape(gradient) != jnp.shape(leaf):
            raise ValueError(
                f"updates must have the shapes of the parameters; got {where()}{_describe(leaf)}. "
                f"{_FIX}"
            )
        if gradient.dtype == jax.dtypes.float0:
            gaps[path] = jnp.zeros_like(leaf)
        elif not jnp.issubdtype(leaf.dtype, jnp.inexact):
            raise TypeError(
                f"params must be float or complex to be trained; got {_describe(leaf)}"
                f"{_at(path_name(path))}. Pass None as its gradient, which leaves it as it is, or "
                "send it to optax.set_to_zero() with optax.partition."
            )
        elif jnp.iscomplexobj(gradient) and not jnp.iscomplexobj(leaf):
            raise TypeError(
                f"updates must be real where the parameters are; got {where()}{_describe(leaf)}. "
                "Pass the real part."
            )
    return gaps


_FIX = "Pass the gradient of these parameters, jax.grad(loss)(params)."
_NOTHING = object()


def _by_path(tree: PyTree) -> dict[KeyPath, Any]:
    return dict(jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_none)[0])


def _moments(state: PyTree) -> PyTree | None:
    """Return a pytree in the state that has the shapes of the parameters, or None."""

    def fields(node: Any) -> list[str]:
        return [field for field in getattr(node, "_fields", ()) if field in _WHOLE]

    for node in jax.tree.leaves(state, is_leaf=lambda node: bool(fields(node))):
        for field in fields(node):
            return getattr(node, field)
    return None


def _of_parameter(path: KeyPath) -> KeyPath | None:
    """Return the path in the parameters of a leaf of the state, or None if the leaf is shared."""
    for place, key in enumerate(path):
        if isinstance(key, GetAttrKey) and key.name in _FIELDS:
            return path[place + 1 :]
    return None


def _is_masked(leaf: Any) -> bool:
    return isinstance(leaf, optax.MaskedNode)


def _is_none(leaf: Any) -> bool:
    return leaf is None


def is_array(leaf: Any) -> TypeGuard[Any]:
    return hasattr(leaf, "dtype") and hasattr(leaf, "shape")


def _describe(leaf: Any) -> str:
    if leaf is _NOTHING:
        return "nothing"
    if is_array(leaf):
        return f"{leaf.dtype}{list(leaf.shape)}"
    return repr(leaf)


def _at(name: str) -> str:
    return f" at '{name}'" if name else ""
