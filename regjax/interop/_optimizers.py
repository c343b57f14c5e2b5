"""Optimizers of `torch.optim` as optax transformations, with all their parameter groups."""

from __future__ import annotations

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
from regjax.interop._registry import record_of
from regjax.interop._schedules import read_schedules, replace_first, with_scheduled
from regjax.optim._links import named_links

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from jaxtyping import PyTree

    from regjax.interop._leaves import Names, Part, Recipe
    from regjax.interop._schedules import Rate, Schedules
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
    metrics: Sequence[float] | None = None,
) -> optax.GradientTransformation:
    """Create an optimizer from a PyTorch optimizer, with its parameter groups and its scheduler.

    Supports every class with a function of the same name in `regjax.optim`: SGD, ASGD, Rprop, Adam,
    AdamW, NAdam, RAdam, Adamax, Adagrad, Adadelta, RMSprop, Adafactor and Muon, with every option
    of every group, and classes of `register_optimizer`. Nothing is converted partially: an option
    without a counterpart is an error.

    Args:
        torch_optimizer: A `torch.optim` optimizer; it is not modified.
        names: A mapping from the path of each JAX parameter, such as `"dense/kernel"`, to its name
            in PyTorch, or to a `Leaf` if its axes have another order or PyTorch fuses it with
            others; `leaves_from_torch` returns one. With `model` and `params` it may also be the
            shorter form of `params_from_torch`, with modules for their leaves.
        model: The module that is trained. Not needed if the optimizer was created with
            `model.named_parameters()`.
        params: The JAX parameters or their shapes, if `names` does not have all of them.
        scheduler: The learning rate scheduler, if any; see `schedule_from_torch`. What else it
            moves is followed, too: the momentum or the first beta, and the weight decay. For rates
            that no scheduler describes, a function from the step to the rate of all groups, or a
            list with one for each group.
        steps: The number of scheduler steps to tabulate, for schedulers without a formula, and for
            functions that JAX cannot trace; see `schedule_from_torch`. Otherwise None.
        steps_per_epoch: The number of optimizer steps per scheduler step: 1 if `scheduler.step()`
            follows each `optimizer.step()`, the number of batches if it is called once per epoch. 1
            without a scheduler.
        metrics: The arguments of the scheduler's steps, if it follows a metric; see
            `schedule_from_torch`.

    Returns:
        An optax transformation: the chain of `regjax.optim` for one group, otherwise
        `optax.partition` of one chain per group, labeled "group0", "group1" and so on. (Muon's step
        depends on the layout, so a group with both has a second chain, "group0_transposed", for the
        matrices that JAX holds transposed.) Parameters that PyTorch does not train, because of
        `requires_grad=False` or because they are in no group, are "frozen": their updates are zero.
        If an option other than the learning rate moves, a `ScheduledMomentumState` wraps the state
        of the chain. The state starts anew; `state_from_torch` fills it in.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: The optimizer has another class; the scheduler is invalid, or moves another
            option; the parameters have no names; `names` does not match the parameters (from
            `init`, those of JAX); a group has an unknown option, `differentiable=True`, or a value
            that JAX cannot represent; the optimizer has hooks; it has a scheduler that was not
            passed, or vice versa; Adafactor would factor axes that are not the last two in JAX; or
            Muon or Adafactor would train a section of a fused tensor.

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
    schedules = read_schedules(torch_optimizer, scheduler, steps, steps_per_epoch, metrics)
    _check_hooks(torch_optimizer)
    record = record_of(torch_optimizer)
    for index, group in enumerate(torch_optimizer.param_groups):
        _check_group(index, group, record, schedules)
    chains = {}
    for part in recipe.parts:
        if record.is_factored:
            _check_factored(part)
        chains[part.label] = _chain(part, _scheduled(part, schedules, steps_per_epoch))
    return _over_tree(recipe, chains, record.title)


def _over_tree(
    recipe: Recipe, chains: dict[str, optax.GradientTransformation], title: str
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

    # Adam's state has the fields of Adamax's: the name tells them apart in `state_from_torch`.
    vars(init)["torch_class"] = title
    # An optimizer of regjax.optim and a partition both take extra arguments.
    return optax.GradientTransformationExtraArgs(init, optax.with_extra_args_support(inner).update)


def _chain(part: Part, rates: dict[str, Rate]) -> optax.GradientTransformation:
    record = part.record
    options = {name: _option(part, name) for name in record.options}
    if record.depends_on_layout:
        options["transposed"] = part.transposed
    others = {name: rate for name, rate in rates.items() if name != "lr"}
    learning_rate = rates.get("lr") or _option(part, "lr")
    function = record.function
    if isinstance(function, str):
        function = getattr(optim, function)

    def create(values: Mapping[str, Any]) -> optax.GradientTransformation:
        moved = {name: replace_first(options[name], value) for name, value in values.items()}
        created = function(learning_rate, **options | moved)
        # With the link, the state of any transformation is a dict, as that of regjax.optim.
        return named_links(maximize=False, created=created) if record.is_created else created

    return with_scheduled(create, others) if others else create({})


def _scheduled(part: Part, schedules: Schedules | None, steps_per_epoch: int) -> dict[str, Rate]:
    """Return the schedules of a group's options, as functions of the optimizer's step."""
    if schedules is None:
        return {}
    record, found = part.record, {}
    for name, rate in schedules.groups[part.index].items():
        option = record.renamed_options.get(name, name)
        if option != "lr" and option not in {record.momentum, "weight_decay"} & {*record.options}:
            raise ValueError(
                f"scheduler must move only lr, {record.momentum} and weight_decay of "
                f"{record.title}; got a {schedules.name} that moves {name} of group {part.index}. "
                "Change it in the JAX loop."
            )
        found[option] = rate if steps_per_epoch == 1 else _per_epoch(rate, steps_per_epoch)
    return found


def _per_epoch(rate: Rate, steps_per_epoch: int) -> Rate:
    return lambda count: rate(count // steps_per_epoch)


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


def _check_group(
    index: int, group: dict[str, Any], record: Record, schedules: Schedules | None
) -> None:
    if schedules is not None and not record.has_schedule:
        raise ValueError(
            f"scheduler must be None for {record.torch_name}, whose lr is only the first step "
            f"size; got {schedules.name}. Leave it out, and remove 'initial_lr' from the groups."
        )
    if group.get("differentiable"):
        raise ValueError(
            f"differentiable of group {index} must be False; got True. Leave it out: updates of "
            "optax can always be differentiated."
        )
    for name, value in record.fixed.items():
        if name in group and group[name] != value:
            raise ValueError(
                f"{name} of group {index} must be {value} for {record.title}, as it was "
                f"registered; got {group[name]}."
            )
    options = record.read_options(group)
    required = {"params", "lr", *record.options}
    known = {*required, "param_names", *_NO_EFFECT}
    known |= set() if schedules is None else schedules.entries
    for verb, names in (("have", required - options.keys()), ("not have", options.keys() - known)):
        if names:
            raise ValueError(
                f"group {index} must {verb} {', '.join(sorted(names))}; got the entries "
                f"{', '.join(sorted(options))}. Pass the options of {record.title}, and no others, "
                "which are not carried over."
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


# Entries of a group that have no effect on the result.
_NO_EFFECT = ("foreach", "fused", "capturable", "differentiable")
