"""Parameters and statistics in the state of a JAX training run: read them, replace them.

A state is any pytree, such as a Flax TrainState, a dict or a tuple with an Equinox module, or a
tuple with an NNX module, which a step changes in place. One function from the state to its part
describes a view: the part consists of leaves of the state, which are found again by identity.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from regjax._decay.paths import named_leaves, path_name
from regjax.interop._params import settled
from regshared.checks import describe

if TYPE_CHECKING:
    from jaxtyping import PyTree

    Part = Callable[[Any], PyTree]
    Arrays = dict[str, Any]

_RECOGNIZED = (
    "a TrainState, a dict with 'params', an nnx.Module, an Equinox module, or a tuple with one of "
    "these"
)


def read_params(state: Any, part: Part | None, averages: Part | None = None) -> Arrays:
    """Return the parameters of a state by path; `part` selects them, None recognizes them.

    A module that `averages` selects is not taken for the one with the parameters.
    """
    if part is not None:
        return _arrays(part(state), "Param")
    for owner in _owners(state, averages):
        if isinstance(owner, Mapping):
            return _arrays(owner["params"], "Param")
        return _arrays(owner if _is_module(owner) else owner.params, "Param")
    raise ValueError(
        f"state must be {_RECOGNIZED}; got {describe(state)}. Pass params=, a function from the "
        "state to its parameters."
    )


def read_statistics(state: Any, part: Part | None, averages: Part | None = None) -> Arrays:
    """Return the running statistics of a state by path, as `read_params` returns parameters."""
    if part is not None:
        return _arrays(part(state), "BatchStat")
    for owner in _owners(state, averages):
        if isinstance(owner, Mapping):
            return _arrays(owner.get("batch_stats", {}), "BatchStat")
        if _is_a(owner, "equinox", "Module"):
            return _equinox_statistics(owner, state)
        if _is_module(owner):
            return _arrays(owner, "BatchStat")
        return _arrays(getattr(owner, "batch_stats", {}), "BatchStat")
    return {}


def read_all(state: Any) -> Arrays:
    """Return every array of a state by path, such as the moments of its optimizer."""
    nnx = sys.modules.get("flax.nnx")
    found: Arrays = {}
    for place, node in enumerate(_nodes(state)):
        if nnx is not None and isinstance(node, nnx.Module | nnx.Optimizer):
            tree = nnx.to_pure_dict(nnx.state(node))
        else:
            tree = node
        found |= {f"{place}/{path}": leaf for path, leaf in named_leaves(tree)}
    return found


def unshared(state: Any) -> Any:
    """Return the state with a copy of each array, so that each is one object, at one place."""
    return _mapped(lambda x: jnp.array(x) if isinstance(x, jax.Array) else x, state)


def replace(state: Any, old: Mapping[Any, Any], new: Mapping[Any, Any]) -> Any:
    """Return the state with new arrays for those that `read_params` or the others returned.

    NNX modules are changed in place. Statistics of Equinox are marked as settled.

    Raises:
        ValueError: An old array is not a leaf of the state.
    """
    places = {id(leaf): place for place, leaf in old.items()}
    found = set()

    def moved(leaf: Any) -> Any:
        place = places.get(id(leaf))
        if place is None:
            return leaf
        found.add(place)
        return jnp.asarray(new[place])

    state = _mapped(moved, _settled(state))
    if missing := sorted(set(old) - found):
        raise ValueError(
            "params, statistics and averages must select arrays of the state; got other arrays at "
            f"{', '.join(map(str, missing))}. Return parts of the state as they are."
        )
    return state


def _mapped(change: Callable[[Any], Any], state: Any) -> Any:
    """Return the state with each leaf changed; NNX modules are changed in place."""
    modules = [node for node in _nodes(state) if _is_a(node, "flax.nnx", "Module")]
    if not modules:
        return jax.tree.map(change, state)
    nnx = sys.modules["flax.nnx"]
    for module in modules:
        nnx.update(module, jax.tree.map(change, nnx.state(module)))
    return state


def _owners(state: Any, averages: Part | None) -> Iterator[Any]:
    """Yield the part of a recognized state that has the parameters, if there is exactly one."""
    averaged = None if averages is None else averages(state)
    owners = [
        node
        for node in _nodes(state)
        if node is not averaged
        and (
            _is_module(node)
            or hasattr(node, "params")
            or (isinstance(node, Mapping) and "params" in node)
        )
    ]
    if len(owners) > 1:
        raise ValueError(
            f"state must have one module or tree of parameters; got {len(owners)}. Pass params=, a "
            "function from the state to its parameters, such as `lambda state: state[0]`."
        )
    yield from owners


def _is_a(node: Any, library: str, name: str) -> bool:
    module = sys.modules.get(library)
    return module is not None and isinstance(node, getattr(module, name))


def _is_module(node: Any) -> bool:
    is_equinox = _is_a(node, "equinox", "Module") and not _is_a(node, "equinox.nn", "State")
    return is_equinox or _is_a(node, "flax.nnx", "Module")


def _arrays(part: PyTree, kind: str) -> Arrays:
    """Return the arrays of a part of a state; of an NNX module, the variables of one kind."""
    if _is_a(part, "flax.nnx", "Module"):
        nnx = sys.modules["flax.nnx"]
        part = nnx.to_pure_dict(nnx.state(part, getattr(nnx, kind)))
    return {
        path: leaf
        for path, leaf in named_leaves(part)
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jnp.inexact)
    }


def _equinox_statistics(model: Any, state: Any) -> Arrays:
    """Return the means and variances that an `equinox.nn.State` keeps for a model."""
    kept = next((node for node in _nodes(state) if _is_a(node, "equinox.nn", "State")), None)
    if kept is None:
        return {}
    # `init` is the place of these arrays before the state is split from its model.
    return _arrays({f"{path}/init": kept.get(index) for path, index in _indices(model)}, "")


def _settled(state: Any) -> Any:
    """Return the state with marks that the statistics of Equinox do not start at their next step.

    Otherwise a batch norm would ignore the statistics that it receives from PyTorch.
    """
    nodes = _nodes(state)
    indices = [pair for node in nodes if _is_module(node) for pair in _indices(node)]
    marks = {
        id(kept.get(index)): jnp.asarray(mark, kept.get(index).dtype)
        for kept in nodes
        if _is_a(kept, "equinox.nn", "State")
        for path, index in indices
        if (mark := settled(f"{path}/init")) is not None
    }
    return jax.tree.map(lambda leaf: marks.get(id(leaf), leaf), state) if marks else state


def _nodes(state: Any) -> tuple[Any, ...]:
    return state if type(state) is tuple else (state,)


def _indices(model: Any) -> list[tuple[str, Any]]:
    """Return the places in an Equinox model that refer to its state, by path."""
    nodes = jax.tree.leaves_with_path(model, is_leaf=_is_index)
    return [(path_name(path), node) for path, node in nodes if _is_index(node)]


def _is_index(node: Any) -> bool:
    return _is_a(node, "equinox.nn", "StateIndex")
