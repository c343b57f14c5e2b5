"""Optimizers of `torch.optim` as optax transformations, with all their parameter groups."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import optax

from regjax import optim
from regjax._decay.paths import path_name
from regjax.interop._leaves import FROZEN, check_class, check_paths, number, read_recipe
from regjax.interop._schedules import (
    check_scheduler_options,
    momenta_from_torch,
    schedule_from_torch,
    with_momentum,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import PyTree

    from regjax.interop._leaves import Names, Part, Recipe
    from regjax.interop._schedules import Rate

    Make = Callable[..., optax.GradientTransformation]


def optimizer_from_torch(
    torch_optimizer: Any,
    names: Names,
    *,
    model: Any = None,
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
            in PyTorch, or to a `Leaf` if its axes have another order.
        model: The module that is trained. Not needed if the optimizer was created with
            `model.named_parameters()`.
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
            optimizer has hooks; it has a scheduler that was not passed, or vice versa; or Adafactor
            would factor axes that are not the last two in JAX.

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
    check_class("torch_optimizer", torch_optimizer, "torch.optim", _KINDS)
    check_scheduler_options(scheduler, steps, steps_per_epoch)
    _check_whole(torch_optimizer, scheduler)
    recipe = read_recipe(torch_optimizer, names, model)
    rates = momenta = None
    if scheduler is not None:
        rates = schedule_from_torch(scheduler, steps=steps)
        momenta = momenta_from_torch(scheduler)
    for index, group in enumerate(torch_optimizer.param_groups):
        _check_group(index, group, type(torch_optimizer).__name__, scheduler)
    chains = {}
    for part in recipe.parts:
        if part.kind == "Adafactor":
            _check_factored(part)
        moving = (
            None if by_group is None else _every(by_group[part.index], steps_per_epoch)
            for by_group in (rates, momenta)
        )
        chains[part.label] = _chain(part, *moving)
    return _over_tree(recipe, chains)


def _over_tree(
    recipe: Recipe, chains: dict[str, optax.GradientTransformation]
) -> optax.GradientTransformation:
    labels = recipe.labels

    def label(params: PyTree) -> PyTree:
        return jax.tree.map_with_path(lambda path, _: labels[path_name(path)], params)

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
    make, known = _KINDS[part.kind]
    options: dict[str, Any] = {name: _option(part, name) for name in known}
    if part.kind == "Muon":
        options["transposed"] = part.transposed
    learning_rate = rate or _option(part, "lr")
    if momentum is None:
        return make(learning_rate, **options)
    if "betas" in known:
        second = options["betas"][1]
        return with_momentum(
            lambda b1: make(learning_rate, **{**options, "betas": (b1, second)}), momentum
        )
    return with_momentum(lambda m: make(learning_rate, **{**options, "momentum": m}), momentum)


def _every(rate: Rate, steps_per_epoch: int) -> Rate:
    if steps_per_epoch == 1:
        return rate
    return lambda count: rate(count // steps_per_epoch)


def _option(part: Part, name: str) -> Any:
    value, where = part.group[name], f"{name} of group {part.index}"
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, tuple | list):
        return tuple(None if item is None else number(where, item) for item in value)
    return number(where, value)


def _check_whole(torch_optimizer: Any, scheduler: Any) -> None:
    """Reject an optimizer with hooks, and a scheduler of another optimizer or of Rprop."""
    for hooks in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
        if getattr(torch_optimizer, hooks, None):
            raise ValueError(
                "torch_optimizer must have no hooks, which are not carried over; got "
                f"{len(getattr(torch_optimizer, hooks))}. Remove them, and do in the JAX loop what "
                "they do."
            )
    if scheduler is None:
        return
    if getattr(scheduler, "optimizer", None) is not torch_optimizer:
        raise ValueError(
            "scheduler must move the rates of torch_optimizer; got one of another optimizer."
        )
    if type(torch_optimizer).__name__ == "Rprop":
        raise ValueError(
            "a scheduler has no effect on Rprop, whose lr is only the first step size: leave it "
            "out, and remove 'initial_lr' from the groups"
        )


def _check_group(index: int, group: dict[str, Any], kind: str, scheduler: Any) -> None:
    _, options = _KINDS[kind]
    missing = {"params", "lr", *options} - group.keys()
    if missing:
        raise ValueError(f"group {index} has no {', '.join(sorted(missing))}")
    if group.get("differentiable"):
        raise ValueError(
            f"group {index} has differentiable=True, which has no counterpart: optax updates can "
            "always be differentiated; pass differentiable=False"
        )
    if scheduler is None and "initial_lr" in group:
        raise ValueError(
            f"group {index} has 'initial_lr', so a scheduler moves its learning rate: pass "
            "scheduler=, or remove the entry if the scheduler is out of use"
        )
    known = {"params", "param_names", "lr", *options, *_NO_EFFECT}
    if scheduler is not None:
        known |= {"initial_lr", *_OF_SCHEDULER.get(type(scheduler).__name__, ())}
    unknown = group.keys() - known
    if unknown:
        raise ValueError(
            f"group {index} has {', '.join(sorted(unknown))}, which torch.optim.{kind} does not "
            "know: what it does is not carried over; remove it"
        )


def _check_factored(part: Part) -> None:
    for path, located in part.leaves.items():
        order = located.leaf.transpose or tuple(range(located.tensor.ndim))
        if set(order[-2:]) != set(range(located.tensor.ndim)[-2:]):
            raise ValueError(
                f"Adafactor factors the last two axes, but those of '{located.leaf.name}' are not "
                f"the last two of '{path}', whose transpose is {order}: keep the parameter in "
                "PyTorch's layout"
            )
    epsilon_of_first = part.group["eps"][0] is None
    dtypes = {str(located.tensor.dtype) for located in part.leaves.values()}
    if epsilon_of_first and len(dtypes) > 1:
        raise ValueError(
            f"group {part.index} mixes {', '.join(sorted(dtypes))}, and torch.optim.Adafactor "
            "takes the epsilon of the first for all: pass eps, or a group for each dtype"
        )


_ADAM = ("betas", "eps", "weight_decay", "amsgrad", "maximize", "decoupled_weight_decay")
# For each class, the function and the options that it takes under PyTorch's names.
_KINDS: dict[str, tuple[Make, tuple[str, ...]]] = {
    "SGD": (optim.sgd, ("momentum", "dampening", "weight_decay", "nesterov", "maximize")),
    "ASGD": (optim.asgd, ("lambd", "alpha", "t0", "weight_decay", "maximize")),
    "Rprop": (optim.rprop, ("etas", "step_sizes", "maximize")),
    "Adam": (optim.adam, _ADAM),
    # A group of torch.optim.AdamW has the decoupled_weight_decay flag too, which decides.
    "AdamW": (optim.adam, _ADAM),
    "NAdam": (
        optim.nadam,
        ("betas", "eps", "weight_decay", "momentum_decay", "decoupled_weight_decay", "maximize"),
    ),
    "RAdam": (
        optim.radam,
        ("betas", "eps", "weight_decay", "decoupled_weight_decay", "maximize"),
    ),
    "Adamax": (optim.adamax, ("betas", "eps", "weight_decay", "maximize")),
    "Adagrad": (
        optim.adagrad,
        ("lr_decay", "weight_decay", "initial_accumulator_value", "eps", "maximize"),
    ),
    "Adadelta": (optim.adadelta, ("rho", "eps", "weight_decay", "maximize")),
    "RMSprop": (
        optim.rmsprop,
        ("alpha", "eps", "weight_decay", "momentum", "centered", "maximize"),
    ),
    "Adafactor": (optim.adafactor, ("beta2_decay", "eps", "d", "weight_decay", "maximize")),
    "Muon": (
        optim.muon,
        (
            "weight_decay",
            "momentum",
            "nesterov",
            "ns_coefficients",
            "eps",
            "ns_steps",
            "adjust_lr_fn",
        ),
    ),
}
_NO_EFFECT = ("foreach", "fused", "capturable", "differentiable")
_OF_SCHEDULER = {"OneCycleLR": ("max_lr", "min_lr", "max_momentum", "base_momentum")}
