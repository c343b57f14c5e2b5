"""Apply the decay rules of `regshared.decay_rules` to the parameters of a pytree."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from regjax._decay.paths import path_name
from regshared.checks import check_strings
from regshared.decay_rules import (
    Parameter,
    Place,
    bools,
    kind_of_attribute,
    kind_of_class,
    listed,
    rates,
)
from regshared.decay_table import DecayTable, table_of
from regshared.globs import components, matches, words

if TYPE_CHECKING:
    from jaxtyping import PyTree, ScalarLike

    from regshared.decay_rules import Rule


def decay_mask(
    params: PyTree, rule: Rule = "default", *, frozen: str | Sequence[str] = ()
) -> PyTree[bool]:
    """Return a mask of the parameters that receive weight decay.

    Pass it as the `mask` of `regjax.optim`, optax or `regjax.l2_penalty`; the function itself,
    `mask=regjax.decay_mask`, also works. Under `optax.inject_hyperparams` add
    `static_args=("mask",)`.

    Args:
        params: Plain containers, dataclasses, Flax variables, an `nnx.State` or module, an Equinox
            module or Haiku parameters, holding arrays, tracers or `jax.ShapeDtypeStruct`s.
        rule: `"default"`, `"huggingface"`, `"timm"`, a glob, a function `(path, leaf, kind)`, or
            pairs of glob and decision; see `regshared.decay_rules`. Paths are joined by slashes,
            without the `value` inside a Flax variable. `kind` is 'linear', 'conv', 'embedding',
            'norm', 'attention', 'recurrent', 'activation' or empty; it comes from the class of an
            Equinox or nnx module, otherwise from its name.
        frozen: Globs of parameters that get no gradient. PyTorch skips these, while optax decays
            every parameter: name them here, and a zero gradient leaves them unchanged.

    Returns:
        A pytree of bools with the structure of `params`. It is False for leaves that are not float
        or complex arrays, for Flax's `batch_stats`, `cache`, `intermediates` and `perturbations`
        beside `params`, for nnx variables other than `Param`, and for Equinox states.

    Raises:
        TypeError: `params` is a single leaf that is not a parameter, such as a step count; `rule`
            has another form; or a decision is not a bool (for rates, see `decay_rates`).
        ValueError: A glob decides nothing; no pair covers a parameter; the default rule does not
            know parameters; or a function returns False for all. The message names the glob, the
            paths, and a rule for unknown parameters.

    Note (PyTorch):
        In `regtorch.decay_mask(module, rule)`, parameters that require no gradient are frozen.

    Example:
        >>> import jax.numpy as jnp
        >>> norm = {"scale": jnp.ones(3), "bias": jnp.ones(3)}
        >>> params = {"dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}, "norm": norm}
        >>> decay_mask(params)
        {'dense': {'bias': False, 'kernel': True}, 'norm': {'bias': False, 'scale': False}}
        >>> decay_mask(params, [("bias", True), ("**", "default")])
        {'dense': {'bias': True, 'kernel': True}, 'norm': {'bias': True, 'scale': False}}
    """
    parameters = _parameters(params, frozen)
    return _tree(params, parameters, bools(_present(parameters), rule), False)


def decay_rates(
    params: PyTree,
    weight_decay: ScalarLike = 1.0,
    rule: Rule = "default",
    *,
    frozen: str | Sequence[str] = (),
) -> PyTree[ScalarLike]:
    """Return the weight decay rate of each parameter, for `regjax.optim.add_decay_by_leaf`.

    Under a schedule, keep the default `weight_decay` here and pass the schedule there. The other
    errors are those of `decay_mask`.

    Args:
        params: See `decay_mask`.
        weight_decay: The rate of the parameters for which the rule is True.
        rule: See `decay_mask`; a decision may also be a rate, which is used as given.
        frozen: See `decay_mask`.

    Returns:
        A pytree of numbers with the structure of `params`, 0.0 where nothing decays.

    Raises:
        TypeError: A rate is not a number.
        ValueError: A rate is negative, infinite or NaN.

    Note (PyTorch):
        `regtorch.decay_rates(module, weight_decay, rule)`, or `regtorch.decay_groups` for the
        parameter groups of an optimizer.

    Example:
        >>> import jax.numpy as jnp, optax, regjax
        >>> params = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}
        >>> rates = decay_rates(params, 0.1, [("bias", 0.5), ("**", "default")])
        >>> rates
        {'bias': 0.5, 'kernel': 0.1}
        >>> decay = regjax.optim.add_decay_by_leaf(rates)
        >>> adamw = optax.chain(optax.scale_by_adam(), decay, optax.scale_by_learning_rate(1e-3))
    """
    parameters = _parameters(params, frozen)
    found = [rate for rate, _ in rates(_present(parameters), weight_decay, rule)]
    return _tree(params, parameters, found, 0.0)


def decay_table(
    params: PyTree,
    weight_decay: float = 1.0,
    rule: Rule = "default",
    *,
    frozen: str | Sequence[str] = (),
) -> DecayTable:
    """Return a table of the parameters with their decay rates and the rules that decided them.

    It can be printed and iterated over; its rows have the fields of `DecayRow`. Leaves that are not
    parameters are omitted. The arguments and errors are those of `decay_rates`; in PyTorch,
    `regtorch.decay_table(module, weight_decay, rule)`.

    Example:
        >>> import jax.numpy as jnp
        >>> norm = {"scale": jnp.ones(3), "bias": jnp.ones(3)}
        >>> print(decay_table({"Dense_0": {"kernel": jnp.ones((2, 3))}, "LayerNorm_0": norm}, 0.01))
        path               shape   dtype    size  kind    rule    weight_decay
        Dense_0/kernel     (2, 3)  float32     6  linear  kernel          0.01
        LayerNorm_0/bias   (3,)    float32     3  norm    bias               -
        LayerNorm_0/scale  (3,)    float32     3  norm    norm               -
        decay: 1 of 3 leaves, 6 of 12 parameters
    """
    parameters = _present(_parameters(params, frozen))
    return table_of(parameters, rates(parameters, weight_decay, rule))


def _parameters(params: PyTree, frozen: str | Sequence[str]) -> list[Parameter | None]:
    """Return the leaves as `jax.tree.leaves` orders them, None for those that are no parameters."""
    if jax.tree_util.all_leaves([params]) and not _is_inexact(params):
        found = f"{params.dtype}{list(params.shape)}" if hasattr(params, "dtype") else repr(params)
        raise TypeError(
            f"params must be a pytree of parameters; got {found}. Pass static_args=('mask',) if "
            "this is the mask of an optimizer under optax.inject_hyperparams, which treats a "
            "function as a schedule."
        )
    leaves = list(_leaves(params, _Node()))
    patterns = [frozen] if isinstance(frozen, str) else check_strings("frozen", frozen)
    present = _present(leaves)
    for pattern in patterns:
        if present and not any(matches(pattern, leaf.path) for leaf in present):
            raise ValueError(
                f"frozen must match a parameter with each glob; got '{pattern}', which matches "
                f"none of {listed(present)}."
            )
    return [
        leaf and leaf._replace(frozen=any(matches(pattern, leaf.path) for pattern in patterns))
        for leaf in leaves
    ]


def _present(leaves: Sequence[Parameter | None]) -> list[Parameter]:
    return [leaf for leaf in leaves if leaf is not None]


def _tree(
    params: PyTree, parameters: Sequence[Parameter | None], answers: Iterable[Any], otherwise: Any
) -> PyTree:
    """Return a pytree with answers in place of parameters and `otherwise` everywhere else."""
    rest = iter(answers)
    leaves = [otherwise if parameter is None else next(rest) for parameter in parameters]
    return jax.tree.structure(params).unflatten(leaves)


# Flax's collections beside the parameters.
_COLLECTIONS = {"batch_stats", "cache", "intermediates", "params_axes", "perturbations"}


class _Node(NamedTuple):
    """The position of a walk through a pytree."""

    path: tuple[str, ...] = ()
    owner: type = object  # class of the innermost node with attributes, if no dict is inside
    is_parameter: bool = True  # whether a float array here is a parameter


def _leaves(tree: PyTree, node: _Node) -> Iterator[Parameter | None]:
    if jax.tree_util.all_leaves([tree]):
        yield _parameter(tree, node) if node.is_parameter and _is_inexact(tree) else None
        return
    children, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: x is not tree)
    for path, child in children:
        if path:  # not the child of a None, which has none
            yield from _leaves(child, _step(tree, node, path))


def _is_inexact(leaf: Any) -> bool:
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jnp.inexact)


def _step(tree: PyTree, node: _Node, path: tuple[Any, ...]) -> _Node:
    name = path_name(path)
    ancestors = {f"{cls.__module__.split('.')[0]}.{cls.__name__}" for cls in type(tree).__mro__}
    if "flax.Variable" in ancestors or (name == "value" and "flax.AxisMetadata" in ancestors):
        # A box around the array; the array takes the name of the box.
        is_variable = "flax.Variable" in ancestors
        is_parameter = node.is_parameter and (not is_variable or "flax.Param" in ancestors)
        return node._replace(is_parameter=is_parameter)
    owner = node.owner
    if isinstance(tree, Mapping):
        owner = object
    elif not name.isdigit():
        owner = type(tree)
    is_parameter = node.is_parameter and type(tree).__name__ != "StateIndex"
    if not node.path and isinstance(tree, Mapping) and "params" in tree:
        is_parameter = name not in _COLLECTIONS
    return _Node((*node.path, name), owner, is_parameter)


def _parameter(leaf: Any, node: _Node) -> Parameter:
    path = "/".join(node.path)
    # List indices and Haiku's ~ are not names.
    names = [part for part in components(path) if words(part)]
    name, holder = names[-1] if names else "", names[-2] if len(names) > 1 else ""
    kind, certain = _kind(node.owner, holder)
    return Parameter(path, (Place(path, name, kind, certain, node.owner),), leaf, frozen=False)


def _kind(owner: type, holder: str) -> tuple[str, bool]:
    """Return the kind of a parameter's owner, from its class or else from its name."""
    kind, certain = kind_of_class(owner)
    return (kind, certain) if kind else kind_of_attribute(holder)
