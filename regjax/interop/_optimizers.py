"""Optimizers of `torch.optim` as optax transformations, with all their parameter groups."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import jax
import optax

from regjax import optim
from regjax._decay.paths import path_name
from regjax.interop._leaves import (
    FROZEN,
    check_paths,
    number,
    read_recipe,
    spelled_as_in,
)
from regjax.interop._params import expand_names
from regjax.interop._schedules import (
    momenta_from_torch,
    read_rates,
    replace_momentum,
    with_momentum,
)
from regjax.optim._records import RECORDS

if TYPE_CHECKING:
    from jaxtyping import PyTree

    from regjax.interop._leaves import Names, Part, Recipe
    from regjax.interop._schedules import Rate
    from regjax.optim._records import Record


def optimizer_from_torch(
    torch_optimizer: Any,
    names: Names,
    *,
    model: Any = None,
    params: PyTree = None,
    scheduler: Any = None,
    steps: int | None = None,
    steps_per_epoch: int = 1,
) -> optax.GradientTransformation:
    """Create an optimizer from a PyTorch optimizer, with its parameter groups and its scheduler.

    Supports every class with a function of the same name in `regjax.optim`: SGD, ASGD, Rprop, Adam,
    AdamW, NAdam, RAdam, Adamax, Adagrad, Adadelta, RMSprop, Adafactor and Muon, with every option
    of every group. Nothing is converted partially: an option without a counterpart is an error.

    Args:
        torch_optimizer: A `torch.optim` optimizer; it is not modified.
        names: A mapping from the path of each JAX parameter, such as `"dense/kernel"`, to its name
            in PyTorch, or to a `Leaf` if its axes have another order or PyTorch fuses it with
            others; `leaves_from_torch` returns one. With `model` and `params` it may also be the
            shorter form of `params_from_torch`, with modules for their leaves.
        model: The module that is trained. Not needed if the optimizer was created with
            `model.named_parameters()`.
        params: The JAX parameters or their shapes, if `names` does not have all of them.
        scheduler: The learning rate scheduler, if any; see `schedule_from_torch`. OneCycleLR also
            moves the momentum or the first beta.
        steps: For LambdaLR and MultiplicativeLR, the number of scheduler steps to tabulate;
            otherwise None.
        steps_per_epoch: The number of optimizer steps per scheduler step: 1 if `scheduler.step()`
            follows each `optimizer.step()`, the number of batches if it is called once per epoch. 1
            without a scheduler.

    Returns:
        An optax transformation: the chain of `regjax.optim` for one group, otherwise
        `optax.partition` of one chain per group, labeled "group0", "group1" and so on. (Muon's step
        depends on the layout, so a group with both has a second chain, "group0_transposed", for the
        matrices that JAX holds transposed.) Parameters that PyTorch does not train, because of
        `requires_grad=False` or because they are in no group, are "frozen": their updates are zero.
        If the momentum moves, a `ScheduledMomentumState` wraps the state of the chain. The state
        starts anew; `state_from_torch` fills it in.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: The optimizer or scheduler has another class; the parameters have no names;
            `names` does not match the parameters (from `init`, those of JAX); a group has an
            unknown option, `differentiable=True`, or a value that JAX cannot represent; the
            optimizer has hooks; it has a scheduler that was not passed, or vice versa; Adafactor
            would factor axes that are not the last two in JAX; or Muon or Adafactor would train a
            section of a fused tensor.

    Note (PyTorch):
        `foreach`, `fused` and `capturable` determine how a step is computed, not its result, and
        have no effect. PyTorch skips a parameter without a gradient; in JAX its gradient is zero,
        and it still decays.

    Example:
        >>> import torch, jax.numpy as jnp
        >>> from regjax.interop import Leaf
        >>> layer = torch.nn.Linear(3, 2)
        >>> groups = [
        ...     {"params": [("weight", layer.weight)], "weight_decay": 0.1},
        ...     {"params": [("bias", layer.bias)], "lr": 0.5},
        ... ]
        >>> recipe = torch.optim.SGD(groups, lr=0.1)
        >>> names = {"kernel": Leaf("weight", (1, 0)), "bias": "bias"}
        >>> optimizer = optimizer_from_torch(recipe, names)
        >>> params = {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}
        >>> updates, state = optimizer.update(params, optimizer.init(params), params)
        >>> updates["bias"], updates["kernel"][0].round(2)
        (Array([-0.5, -0.5], dtype=float32), Array([-0.11, -0.11], dtype=float32))
    """
    recipe = read_recipe(torch_optimizer, expand_names(names, params, model), model)
    rates = read_rates(torch_optimizer, scheduler, steps, steps_per_epoch)
    momenta = None if scheduler is None else momenta_from_torch(scheduler)
    _check_hooks(torch_optimizer)
    record = RECORDS[type(torch_optimizer).__name__]
    for index, group in enumerate(torch_optimizer.param_groups):
        _check_group(index, group, record, scheduler)
    chains = {}
    for part in recipe.parts:
        if record.is_factored:
            _check_factored(part)
        rate, momentum = (_of_group(x, part.index, steps_per_epoch) for x in (rates, momenta))
        chains[part.label] = _chain(part, rate, momentum)
    return _over_tree(recipe, chains)


def _over_tree(
    recipe: Recipe, chains: dict[str, optax.GradientTransformation]
) -> optax.GradientTransformation:
    labels = recipe.labels

    def label(params: PyTree) -> PyTree:
        return jax.tree.map_with_path(
            lambda path, _: labels[spelled_as_in(labels, path_name(path))], params
        )

    if recipe.is_single:
        [inner] = chains.values()
    else:
        inner = optax.partition({**chains, FROZEN: optax.set_to_zero()}, label)

    def init(params: PyTree) -> PyTree:
        # Nothing to check without leaves: optax.tree.map_params passes a placeholder.
        if jax.tree.leaves(params):
            check_paths(labels, params)
        return inner.init(params)

    # An optimizer of regjax.optim and a partition both take extra arguments.
    return optax.GradientTransformationExtraArgs(init, optax.with_extra_args_support(inner).update)


def _chain(part: Part, rate: Rate | None, momentum: Rate | None) -> optax.GradientTransformation:
    record = part.record
    options = {name: _option(part, name) for name in record.options}
    if record.depends_on_layout:
        options["transposed"] = part.transposed
    create = functools.partial(getattr(optim, record.function), rate or _option(part, "lr"))
    if momentum is None:
        return create(**options)
    name = record.momentum

    def create_with(value: Any) -> optax.GradientTransformation:
        return create(**options | {name: replace_momentum(options[name], value)})

    return with_momentum(create_with, momentum)


def _of_group(rates: list[Rate] | None, index: int, steps_per_epoch: int) -> Rate | None:
    if rates is None:
        return None
    rate = rates[index]
    return rate if steps_per_epoch == 1 else lambda count: rate(count // steps_per_epoch)


def _option(part: Part, name: str) -> Any:
    value, where = part.group[name], f"{name} of group {part.index}"
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, tuple | list):
        return tuple(None if item is None else number(where, item) for item in value)
    return number(where, value)


def _check_hooks(torch_optimizer: Any) -> None:
    for hooks in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
        if getattr(torch_optimizer, hooks, None):
            raise ValueError(
                "torch_optimizer must have no hooks, which are not carried over; got "
                f"{len(getattr(torch_optimizer, hooks))}. Remove them, and do in the JAX loop what "
                "they do."
            )


def _check_group(index: int, group: dict[str, Any], record: Record, scheduler: Any) -> None:
    if scheduler is not None and not record.has_schedule:
        raise ValueError(
            f"scheduler must be None for {record.torch_name}, whose lr is only the first step "
            f"size; got {type(scheduler).__name__}. Leave it out, and remove 'initial_lr' from the "
            "groups."
        )
    if group.get("differentiable"):
        raise ValueError(
            f"differentiable of group {index} must be False; got True. Leave it out: updates of "
            "optax can always be differentiated."
        )
    required = {"params", "lr", *record.options}
    known = {*required, "param_names", *_NO_EFFECT}
    if scheduler is not None:
        known |= {"initial_lr", *_OF_SCHEDULER.get(type(scheduler).__name__, ())}
    for verb, names in (("have", required - group.keys()), ("not have", group.keys() - known)):
        if names:
            raise ValueError(
                f"group {index} must {verb} {', '.join(sorted(names))}; got the entries "
                f"{', '.join(sorted(group))}. Pass the options of torch.optim.{record.torch_name}, "
                "and no others, which are not carried over."
            )


def _check_factored(part: Part) -> None:
    for path, located in part.leaves.items():
        order = located.leaf.transpose or tuple(range(located.tensor.ndim))
        if set(order[-2:]) != set(range(located.tensor.ndim)[-2:]):
            raise ValueError(
                f"transpose of '{located.leaf.name}' must keep the last two axes last, which "
                f"Adafactor factors; got {order} at '{path}'. Keep PyTorch's layout."
            )
    epsilon_of_first = part.group["eps"][0] is None
    dtypes = {str(located.tensor.dtype) for located in part.leaves.values()}
    if epsilon_of_first and len(dtypes) > 1:
        raise ValueError(
            f"eps[0] of group {part.index} must be a number if dtypes are mixed, since "
            "torch.optim.Adafactor takes the epsilon of the first for all; got None and "
            f"{', '.join(sorted(dtypes))}. Pass eps, or a group for each dtype."
        )


# Entries of a group that have no effect on the result, and those that a scheduler adds.
_NO_EFFECT = ("foreach", "fused", "capturable", "differentiable")
_OF_SCHEDULER = {"OneCycleLR": ("max_lr", "min_lr", "max_momentum", "base_momentum")}
