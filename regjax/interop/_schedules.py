"""Schedulers of PyTorch as optax schedules: by a formula, from a table, or from a function."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import regjax.interop._schedule_formulas as formulas
import regjax.interop._schedule_tables as tables
from regshared.checks import check_integer, describe

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from jaxtyping import Array, Int, PyTree

    from regjax.interop._schedule_formulas import Rate


def schedule_from_torch(
    scheduler: Any, *, steps: int | None = None, metrics: Sequence[float] | None = None
) -> list[optax.Schedule]:
    r"""Create one schedule per parameter group from the learning rates of a PyTorch scheduler.

    With $\eta$ the initial rate of a group, the rate after $t$ steps of the scheduler is

    $$\eta \gamma^{\lfloor t / s \rfloor} \text{ (StepLR)}, \qquad
      \eta_{\min} + (\eta - \eta_{\min}) \cos^2 \frac{\pi t}{2 T} \text{ (CosineAnnealingLR)}$$

    and so on: StepLR, MultiStepLR, ExponentialLR, CosineAnnealingLR, CosineAnnealingWarmRestarts,
    LinearLR, ConstantLR, PolynomialLR, OneCycleLR, LambdaLR and MultiplicativeLR have formulas, and
    so has SequentialLR of all but the last and OneCycleLR. Every other scheduler is tabulated: a
    copy of it takes `steps` steps, with a stand-in for its optimizer.

    Args:
        scheduler: A scheduler of `torch.optim`, timm or transformers, or any object with
            `optimizer`, `step()` and `last_epoch`, before its first step or anywhere in a run. It
            is not modified.
        steps: The number of steps to tabulate, from the beginning of the run; after that the rate
            is NaN. Required for LambdaLR and MultiplicativeLR, whose functions JAX cannot trace,
            and for schedulers without a formula. None for every other one.
        metrics: The argument of each step, from the beginning of the run, for a scheduler that
            follows a metric, such as ReduceLROnPlateau. `steps` is then `len(metrics) + 1` by
            default. None for every other scheduler.

    Returns:
        For each group a function of the number of scheduler steps since the beginning of the run: 0
        is the first step of training, wherever the scheduler is now. The table of a scheduler that
        has already taken steps is NaN before the current one.

    Raises:
        TypeError: `scheduler` is not a scheduler, or `steps` not an integer.
        ValueError: One of the scheduler's numbers is invalid; a learning rate is a tensor; `steps`
            or `metrics` is missing, too small, or given where it has no use; a group's `lr` differs
            from the scheduler's; or a scheduler without a formula cannot be copied, raises an
            error, draws from a global random generator, or moves something that is not a number.

    Note (PyTorch):
        Equal up to rounding: in float32 the rate agrees with PyTorch's doubles to a few units in
        the last place, even where it is a small difference of large numbers. Three details are
        often missed. The cosine rises again after `T_max` steps. The phases of OneCycleLR end at
        `pct_start * total_steps - 1` and `total_steps - 1`, not at the steps of
        `optax.cosine_onecycle_schedule`; after `total_steps`, where PyTorch raises, the rate is
        NaN. OneCycleLR and CyclicLR also move the momentum, which `optimizer_from_torch` follows.

        A step of a scheduler of timm is `step(epoch)` if its `t_in_epochs` is True, and otherwise
        `step_update(num_updates)`. The other of the two has no effect on the rate.

    Example:
        >>> import torch
        >>> weights = [torch.zeros(2, requires_grad=True)]
        >>> optimizer = torch.optim.SGD(weights, lr=0.5)
        >>> scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=10, gamma=0.5)
        >>> [schedule] = schedule_from_torch(scheduler)
        >>> [float(schedule(step)) for step in (0, 9, 10, 20)]
        [0.5, 0.5, 0.25, 0.125]
        >>> plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
        >>> [schedule] = schedule_from_torch(plateau, metrics=[3.0, 2.0, 2.0])
        >>> [float(schedule(step)) for step in range(5)]
        [0.5, 0.5, 0.5, 0.25, nan]
    """
    if not hasattr(scheduler, "optimizer"):
        raise TypeError(
            f"scheduler must be a scheduler of PyTorch; got {describe(scheduler)}. A function of "
            "the step needs no conversion: pass it to optimizer_from_torch."
        )
    if steps is not None:
        check_integer("steps", steps, minimum=1)
    return [group["lr"] for group in _by_group(scheduler, steps, metrics)]


@dataclasses.dataclass(frozen=True)
class Schedules:
    """The schedules of an optimizer's groups, and the scheduler that they replace.

    Attributes:
        scheduler: The scheduler of PyTorch, or the functions of the step that were given instead.
        groups: For each group the schedules of the options that move, by PyTorch's names: of a
            tuple, that of the first number. They count the steps of the scheduler.
        metrics: The arguments of the scheduler's steps, if it follows a metric.
    """

    scheduler: Any
    groups: list[dict[str, Rate]]
    metrics: Sequence[float] | None

    @property
    def name(self) -> str:
        """The name of the scheduler's class, for errors."""
        return type(self.scheduler).__name__

    @property
    def is_function(self) -> bool:
        """True if no scheduler exists."""
        return not hasattr(self.scheduler, "optimizer")

    @property
    def position(self) -> int | None:
        """The number of steps that the scheduler has taken; None if it does not count them."""
        return None if self.is_function else tables.position(self.scheduler)

    @property
    def entries(self) -> set[str]:
        """The entries of the scheduler in the groups of its optimizer."""
        return {"initial_lr"} if self.is_function else tables.entries_of(self.scheduler)

    def check_move(self, step: int) -> None:
        """Reject a step to which the scheduler cannot be moved."""
        if not self.is_function and not formulas.has_formula(self.scheduler):
            tables.check_move(self.scheduler, step)
        rates = [rate for by_option in self.groups for rate in by_option.values()]
        if any(math.isnan(in_double(rate, step)) for rate in rates):
            raise ValueError(
                f"scheduler must have a rate at its step {step}, where the state is; got NaN. Pass "
                f"steps={step + 1} or more if it is tabulated."
            )

    def move(self, param_groups: Sequence[dict[str, Any]], step: int) -> None:
        """Move the scheduler, and the options of these groups, to a step."""
        if not self.is_function and not formulas.has_formula(self.scheduler):
            tables.move(self.scheduler, step, self.metrics)
            return
        for group, rates in zip(param_groups, self.groups, strict=True):
            for option, rate in rates.items():
                group[option] = replace_first(group[option], in_double(rate, step))
        if not self.is_function:
            formulas.place(self.scheduler, step, [group["lr"] for group in param_groups])


def read_schedules(
    torch_optimizer: Any, scheduler: Any, steps: Any, steps_per_epoch: Any, metrics: Any
) -> Schedules | None:
    """Check a scheduler and its options; return its schedules, or None without a scheduler."""
    if steps is not None:
        check_integer("steps", steps, minimum=1)
    check_integer("steps_per_epoch", steps_per_epoch, minimum=1)
    for name, value, default in (
        ("steps", steps, None),
        ("metrics", metrics, None),
        ("steps_per_epoch", steps_per_epoch, 1),
    ):
        is_default = value is None if default is None else value == default
        if scheduler is None and not is_default:
            raise ValueError(
                f"{name} must be {default} without a scheduler; got {value}. Pass scheduler=, or "
                f"leave {name} out."
            )
    groups = torch_optimizer.param_groups
    if scheduler is None:
        for index, group in enumerate(groups):
            if "initial_lr" in group:
                raise ValueError(
                    f"scheduler must be given if group {index} has 'initial_lr'; got None. Pass "
                    "the scheduler, or remove the entry if the scheduler is out of use."
                )
        return None
    if not hasattr(scheduler, "optimizer"):
        rates = _from_functions(scheduler, len(groups), steps, metrics)
        return Schedules(scheduler, [{"lr": rate} for rate in rates], None)
    if scheduler.optimizer is not torch_optimizer:
        raise ValueError(
            "scheduler must move the rates of torch_optimizer; got one of another optimizer."
        )
    return Schedules(scheduler, _by_group(scheduler, steps, metrics), metrics)


def replace_first(option: Any, value: Any) -> Any:
    """Return the value of an option with another first number, such as "betas"; or that number."""
    return (value, *option[1:]) if isinstance(option, tuple | list) else value


def in_double(rate: Rate, step: int) -> float:
    """Return the value at one step in double, like PyTorch's, whatever JAX's precision."""
    with jax.enable_x64(True):
        return float(rate(jnp.asarray(step)))


def _by_group(scheduler: Any, steps: int | None, metrics: Any) -> list[dict[str, Rate]]:
    """Return the schedules of the options that a scheduler moves, by group."""
    name, groups = type(scheduler).__name__, scheduler.optimizer.param_groups
    for attribute in ("step", *(() if tables.is_timm(scheduler) else ("last_epoch",))):
        if not hasattr(scheduler, attribute) and not hasattr(scheduler, "_schedulers"):
            raise TypeError(
                f"scheduler must have {attribute}, as the schedulers of PyTorch have; got a {name} "
                f"without. Add it (last_epoch counts the steps), or pass a function of the step."
            )
    steps = _check_metrics(scheduler, steps, metrics)
    if formulas.has_formula(scheduler):
        rates = formulas.compute_rates(scheduler, steps)
        if steps is not None and not formulas.calls_functions(scheduler):
            raise ValueError(
                f"steps must be None for {name}, whose schedule has no last step; got {steps}. It "
                "is only for schedulers that are tabulated."
            )
        momenta = formulas.compute_momenta(scheduler)
        by_group = [{"lr": rate} | moved for rate, moved in zip(rates, momenta, strict=True)]
        _check_current(scheduler, by_group)
        return by_group
    if steps is None:
        raise ValueError(
            f"steps must be an integer for {name}, which has no formula; got None. Pass for how "
            "many steps to tabulate it."
        )
    for index, group in enumerate(groups):
        formulas.check_number(f"lr of group {index}", group["lr"])
    _check_last(scheduler)
    found = tables.tabulate(scheduler, steps, metrics)
    by_group = [
        {option: _series(option, index, name, values) for option, values in moved.items()}
        for index, moved in enumerate(found)
    ]
    if tables.is_timm(scheduler):
        _check_member(scheduler, [moved["lr"] for moved in found])
    return by_group


def _check_metrics(scheduler: Any, steps: int | None, metrics: Any) -> int | None:
    """Return the number of steps, which may follow from the metrics."""
    name, needed = type(scheduler).__name__, tables.takes_metrics(scheduler)
    if metrics is None and not needed:
        return steps
    if metrics is None:
        raise ValueError(
            f"metrics must be given for {name}, whose steps have an argument; got None. Pass the "
            "argument of each step."
        )
    if not needed:
        raise ValueError(
            f"metrics must be None for {name}, which follows no metric; got {describe(metrics)}. "
            "Leave it out."
        )
    steps = len(metrics) + 1 if steps is None else steps
    if len(metrics) < steps - 1:
        raise ValueError(
            f"metrics must have a number for each of {steps - 1} steps; got {len(metrics)}. Pass "
            f"all, from the beginning of the run, or steps={len(metrics) + 1}."
        )
    return steps


def _from_functions(scheduler: Any, count: int, steps: int | None, metrics: Any) -> list[Rate]:
    """Return the functions of the step for `count` groups, tabulated if `steps` are given."""
    functions = list(scheduler) if isinstance(scheduler, Sequence) else [scheduler] * count
    if not all(map(callable, functions)):
        raise TypeError(
            "scheduler must be a scheduler of PyTorch, or a function of the step, or one for each "
            f"group; got {describe(scheduler)}."
        )
    if metrics is not None:
        raise ValueError("metrics must be None for a function of the step; got some. Leave it out.")
    if len(functions) != count:
        raise ValueError(
            f"scheduler must have a function for each of {count} groups; got {len(functions)}."
        )
    if steps is not None:
        return [formulas.table([float(f(t)) for t in range(steps)]) for f in functions]
    for function in functions:
        try:
            rate = jax.eval_shape(function, jax.ShapeDtypeStruct((), jnp.int32))
        except Exception as error:
            first_line = str(error).partition("\n")[0].rstrip(".")
            raise ValueError(
                "scheduler must be a function that JAX can trace; got one that raises "
                f"{type(error).__name__}: {first_line}. Pass steps= to tabulate it."
            ) from error
        if getattr(rate, "shape", None) != () or not jnp.issubdtype(rate.dtype, jnp.floating):
            raise ValueError(f"scheduler must return a float; got {rate}.")
    return functions


def _series(option: str, group: int, name: str, values: Sequence[Any]) -> Rate:
    """Return the schedule of an option from its values; None before the first that is known."""
    known = [value for value in values if value is not None]
    rest = {value[1:] for value in known if isinstance(value, tuple)}
    firsts: list[Any] = [v[0] if isinstance(v, tuple) and v else v for v in known]
    is_number = [isinstance(v, int | float) and not isinstance(v, bool) for v in firsts]
    if len(rest) > 1 or not all(is_number):
        raise ValueError(
            f"scheduler must move numbers, and of betas only the first; got a {name} that moves "
            f"{option} of group {group} from {known[0]} to {known[-1]}, which is not carried over. "
            "Change it in the JAX loop."
        )
    return formulas.table([math.nan] * (len(values) - len(known)) + firsts)


def _check_last(scheduler: Any) -> None:
    """Reject rates that are not those of a scheduler without a formula."""
    last = getattr(scheduler, "_last_lr", None)
    # To take over from another scheduler is the purpose of SWALR.
    if last is None or (type(scheduler).__name__ == "SWALR" and scheduler.last_epoch == 0):
        return
    for index, (group, rate) in enumerate(zip(scheduler.optimizer.param_groups, last, strict=True)):
        if group["lr"] != rate:
            raise _changed(f"lr of group {index}", rate, scheduler, group["lr"])


def _check_member(scheduler: Any, rates: Sequence[Sequence[float]]) -> None:
    """Reject rates that a scheduler of timm, which does not count, has at none of its steps."""
    current = [group["lr"] for group in scheduler.optimizer.param_groups]
    by_step = zip(*rates, strict=True)
    if not any(all(map(_close, at, current)) for at in by_step if None not in at):
        raise ValueError(
            f"lr of the groups must be those of a step of the {type(scheduler).__name__}; got "
            f"{current}. Undo a change by hand, use no second scheduler, and pass enough steps."
        )


def _close(value: float, other: float) -> bool:
    return math.isclose(value, other, rel_tol=1e-9)


def _check_current(scheduler: Any, by_group: Sequence[Mapping[str, Rate]]) -> None:
    """Reject an option that differs from the formula's, because it was changed by hand."""
    taken = scheduler.last_epoch
    for index, group in enumerate(scheduler.optimizer.param_groups):
        for option, rate in by_group[index].items():
            value = group[option]
            value = value[0] if isinstance(value, tuple | list) else value
            formulas.check_number(f"{option} of group {index}", value)
            expected, start = in_double(rate, taken), in_double(rate, 0)
            if math.isnan(expected):
                raise ValueError(
                    "steps must cover the steps that the scheduler has already taken; got fewer "
                    f"than {taken + 1}. Pass more."
                )
            # PyTorch's rounding errors add up from step to step, relative to the initial value.
            if not abs(expected - value) <= 1e-6 * abs(expected) + 1e-9 * abs(start):
                raise _changed(f"{option} of group {index}", expected, scheduler, value)


def _changed(option: str, expected: Any, scheduler: Any, value: Any) -> ValueError:
    return ValueError(
        f"{option} must be {expected} after {tables.position(scheduler)} steps of the "
        f"{type(scheduler).__name__}; got {value}. Undo a change by hand, and use no second "
        "scheduler: neither is carried over."
    )


class ScheduledMomentumState(NamedTuple):
    """The number of steps taken, and the state of an optimizer with a scheduled option.

    The option is the momentum, the first of the betas, or the weight decay.
    """

    count: Int[Array, ""]  # pyright: ignore[reportIncompatibleMethodOverride]  # not tuple.count
    inner_state: PyTree


def with_scheduled(
    create: Callable[[dict[str, Any]], optax.GradientTransformation], rates: Mapping[str, Rate]
) -> optax.GradientTransformation:
    """`optax.inject_hyperparams` of the options of `rates`, in float32 for half types."""

    def values(count: Int[Array, ""], params: PyTree) -> dict[str, Array]:
        highest = jnp.finfo(optax.tree.dtype(params, "highest"))
        dtype = jnp.float32 if highest.bits < 32 else highest.dtype
        return {option: rate(count).astype(dtype) for option, rate in rates.items()}

    def init(params: PyTree) -> ScheduledMomentumState:
        # Any value but a zero, which needs no buffer.
        count = jnp.zeros([], jnp.int32)
        return ScheduledMomentumState(
            count, create(dict.fromkeys(rates, jnp.asarray(0.5))).init(params)
        )

    def update(updates: PyTree, state: Any, params: PyTree | None = None) -> tuple[PyTree, Any]:
        inner = create(values(state.count, updates))
        updates, inner_state = inner.update(updates, state.inner_state, params)
        count = jnp.asarray(optax.safe_increment(state.count))
        return updates, ScheduledMomentumState(count, inner_state)

    return optax.GradientTransformation(init, update)
