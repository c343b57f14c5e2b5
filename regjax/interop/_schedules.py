"""Learning rates of `torch.optim.lr_scheduler` as optax schedules.

PyTorch computes each rate in double precision from the previous one. Here a rate depends only on
the step, in JAX's precision, so every formula is one that loses no digits in float32: powers come
from tables computed in double, a cosine is a sum of two nonnegative weights, and the distances of a
step from the ends of its phase are counted in whole steps.

Formulas, checks and progress of the schedulers stay in one file: a new scheduler adds to each.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from regjax.interop._leaves import check_class, number
from regshared.checks import check_integer, describe

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from jax.typing import ArrayLike
    from jaxtyping import Array, Float, Int, Integer, PyTree

    Count = Integer[ArrayLike, ""]
    Rate = Callable[[Any], Any]


def schedule_from_torch(scheduler: Any, *, steps: int | None = None) -> list[optax.Schedule]:
    r"""Create one schedule per parameter group from the learning rates of a PyTorch scheduler.

    With $\eta$ the initial rate of a group, the rate after $t$ steps of the scheduler is

    $$\eta \gamma^{\lfloor t / s \rfloor} \text{ (StepLR)}, \qquad
      \eta_{\min} + (\eta - \eta_{\min}) \cos^2 \frac{\pi t}{2 T} \text{ (CosineAnnealingLR)}$$

    and so on: StepLR, MultiStepLR, ExponentialLR, CosineAnnealingLR, CosineAnnealingWarmRestarts,
    LinearLR, ConstantLR, PolynomialLR, OneCycleLR, LambdaLR and MultiplicativeLR, and SequentialLR
    of all but the last and OneCycleLR.

    Args:
        scheduler: A `torch.optim.lr_scheduler`, before its first step or anywhere in a run.
        steps: For LambdaLR and MultiplicativeLR, whose functions JAX cannot trace, the number of
            steps to tabulate. After that the rate is NaN. None for every other scheduler.

    Returns:
        For each group a function of the number of scheduler steps since the beginning of the run: 0
        is the first step of training, wherever the scheduler is now.

    Raises:
        TypeError: `scheduler` is not a scheduler, or `steps` not an integer.
        ValueError: The scheduler has another class, such as ReduceLROnPlateau, which follows the
            loss; one of its numbers is invalid; a learning rate is a tensor; `steps` is missing,
            too small, or given where nothing is tabulated; or a group's `lr` differs from the
            scheduler's.

    Note (PyTorch):
        Equal up to rounding: in float32 the rate agrees with PyTorch's doubles to a few units in
        the last place, even where it is a small difference of large numbers. Three details are
        often missed. The cosine rises again after `T_max` steps. The phases of OneCycleLR end at
        `pct_start * total_steps - 1` and `total_steps - 1`, not at the steps of
        `optax.cosine_onecycle_schedule`; after `total_steps`, where PyTorch raises, the rate is
        NaN. OneCycleLR also moves the momentum, which `optimizer_from_torch` follows.

    Example:
        >>> import torch
        >>> weights = [torch.zeros(2, requires_grad=True)]
        >>> optimizer = torch.optim.SGD(weights, lr=0.5)
        >>> scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=10, gamma=0.5)
        >>> [schedule] = schedule_from_torch(scheduler)
        >>> [float(schedule(step)) for step in (0, 9, 10, 20)]
        [0.5, 0.5, 0.25, 0.125]
    """
    _check_scheduler(scheduler)
    if steps is not None:
        check_integer("steps", steps, minimum=1)
    rates = _rates(scheduler, steps)
    if steps is not None and not _tabulates(scheduler):
        raise ValueError(
            f"steps must be None for {type(scheduler).__name__}, whose schedule has no last step; "
            f"got {steps}. It is only for LambdaLR and MultiplicativeLR, which are tabulated."
        )
    groups = zip(scheduler.optimizer.param_groups, rates, strict=True)
    for index, (group, rate) in enumerate(groups):
        _check_current(f"lr of group {index}", group["lr"], rate, scheduler)
    return rates


def read_rates(
    torch_optimizer: Any, scheduler: Any, steps: Any, steps_per_epoch: Any
) -> list[Rate] | None:
    """Check a scheduler and its options; return its schedules by group, or None without it."""
    if steps is not None:
        check_integer("steps", steps, minimum=1)
    check_integer("steps_per_epoch", steps_per_epoch, minimum=1)
    for name, value, default in (("steps", steps, None), ("steps_per_epoch", steps_per_epoch, 1)):
        if scheduler is None and value != default:
            raise ValueError(
                f"{name} must be {default} without a scheduler; got {value}. Pass scheduler=, or "
                f"leave {name} out."
            )
    if scheduler is None:
        for index, group in enumerate(torch_optimizer.param_groups):
            if "initial_lr" in group:
                raise ValueError(
                    f"scheduler must be given if group {index} has 'initial_lr'; got None. Pass "
                    "the scheduler, or remove the entry if the scheduler is out of use."
                )
        return None
    _check_scheduler(scheduler)
    if scheduler.optimizer is not torch_optimizer:
        raise ValueError(
            "scheduler must move the rates of torch_optimizer; got one of another optimizer."
        )
    return schedule_from_torch(scheduler, steps=steps)


def momenta_from_torch(scheduler: Any) -> list[Rate] | None:
    """Return OneCycleLR's schedules of momentum or the first beta by group; None without any."""
    if not getattr(scheduler, "cycle_momentum", False):
        return None
    option = "betas" if scheduler.use_beta1 else "momentum"
    momenta = []
    for index, group in enumerate(scheduler.optimizer.param_groups):
        momenta.append(_one_cycle(scheduler, group, "momentum"))
        current = group[option][0] if scheduler.use_beta1 else group[option]
        _check_current(f"{option} of group {index}", current, momenta[-1], scheduler)
    return momenta


def replace_momentum(option: Any, momentum: Any) -> Any:
    """Return the value of a group's "momentum" or "betas" with another momentum or first beta."""
    return (momentum, *option[1:]) if isinstance(option, tuple | list) else momentum


def _check_current(option: str, current: Any, rate: Rate, scheduler: Any) -> None:
    """Reject a value that differs from the scheduler's, because it was changed by hand."""
    _check_number(option, current)
    expected, start = in_double(rate, scheduler.last_epoch), in_double(rate, 0)
    if math.isnan(expected):
        raise ValueError(
            "steps must cover the steps that the scheduler has already taken; got fewer than "
            f"{scheduler.last_epoch + 1}. Pass more."
        )
    # PyTorch's own rounding errors add up from step to step, relative to the initial value.
    if not abs(expected - current) <= 1e-6 * abs(expected) + 1e-9 * abs(start):
        raise ValueError(
            f"{option} must be {expected} after {scheduler.last_epoch} steps of the "
            f"{type(scheduler).__name__}; got {current}. Undo a change by hand, and use no second "
            "scheduler: neither is carried over."
        )


def _check_number(option: str, value: Any) -> None:
    if not isinstance(value, int | float):
        raise ValueError(
            f"{option} must be a number, since a scheduler rounds a tensor from step to step; got "
            f"{describe(value)}. Pass a number."
        )


def in_double(rate: Rate, step: int) -> float:
    """Return the value at one step in double, like PyTorch's, whatever JAX's precision."""
    with jax.enable_x64(True):
        return float(rate(jnp.asarray(step)))


def move_scheduler(scheduler: Any, rates: Sequence[Rate], step: int) -> None:
    """Move a PyTorch scheduler with these rates, and its optimizer's groups, to a step."""
    groups, momenta = scheduler.optimizer.param_groups, momenta_from_torch(scheduler)
    for index, (group, rate) in enumerate(zip(groups, rates, strict=True)):
        group["lr"] = in_double(rate, step)
        if momenta is not None:
            momentum = in_double(momenta[index], step)
            option = "betas" if scheduler.use_beta1 else "momentum"
            group[option] = replace_momentum(group[option], momentum)
    _place(scheduler, step, [group["lr"] for group in groups])


def _place(scheduler: Any, step: int, last: list[float]) -> None:
    if type(scheduler).__name__ == "SequentialLR":
        starts = [0, *scheduler._milestones]
        active = bisect_right(scheduler._milestones, step)
        for index, inner in enumerate(scheduler._schedulers):
            if index < active:
                _place(inner, max(starts[index + 1] - starts[index] - 1, 0), inner._last_lr)
            elif index > active:
                _place(inner, 0, inner._last_lr)
                inner.last_epoch = -1  # its value until the scheduler is active
        _place(scheduler._schedulers[active], step - starts[active], last)
    else:
        scheduler._step_count = step + 1
    if type(scheduler).__name__ == "CosineAnnealingWarmRestarts":
        starts, lengths = _restarts(scheduler.T_0, scheduler.T_mult, step)
        scheduler.T_cur, scheduler.T_i = step - starts[-1], lengths[-1]
    scheduler.last_epoch, scheduler._last_lr = step, list(last)


class ScheduledMomentumState(NamedTuple):
    """The number of steps taken, and the state of an optimizer whose momentum is scheduled."""

    count: Int[Array, ""]  # pyright: ignore[reportIncompatibleMethodOverride]  # not tuple.count
    inner_state: PyTree


def with_momentum(
    create: Callable[[Any], optax.GradientTransformation], momentum: Rate
) -> optax.GradientTransformation:
    """`optax.inject_hyperparams` of one number, in float32 for half types."""

    def value(count: Int[Array, ""], params: PyTree) -> Array:
        highest = jnp.finfo(optax.tree.dtype(params, "highest"))
        return momentum(count).astype(jnp.float32 if highest.bits < 32 else highest.dtype)

    def init(params: PyTree) -> ScheduledMomentumState:
        # Any value but a zero, which needs no buffer.
        count = jnp.zeros([], jnp.int32)
        return ScheduledMomentumState(count, create(jnp.asarray(0.5)).init(params))

    def update(updates: PyTree, state: Any, params: PyTree | None = None) -> tuple[PyTree, Any]:
        inner = create(value(state.count, updates))
        updates, inner_state = inner.update(updates, state.inner_state, params)
        count = jnp.asarray(optax.safe_increment(state.count))
        return updates, ScheduledMomentumState(count, inner_state)

    return optax.GradientTransformation(init, update)


def _rates(scheduler: Any, steps: int | None) -> list[Rate]:
    name = _check_scheduler(scheduler)
    groups = scheduler.optimizer.param_groups
    if name == "OneCycleLR":
        return [_one_cycle(scheduler, group, "lr") for group in groups]
    if name == "SequentialLR":
        return _sequence(scheduler, steps)
    for index, base in enumerate(scheduler.base_lrs):
        _check_number(f"initial_lr of group {index}", base)
    bases = map(float, scheduler.base_lrs)
    if name in _FORMS:
        return [_FORMS[name](scheduler, base) for base in bases]
    if steps is None:
        raise ValueError(
            f"steps must be an integer for {name}, whose function JAX cannot trace; got None. Pass "
            "for how many steps to tabulate it."
        )
    pairs = zip(scheduler.lr_lambdas, bases, strict=True)
    return [_table(_TABLES[name](factor, base, steps)) for factor, base in pairs]


def _check_scheduler(scheduler: Any) -> str:
    known = {*_FORMS, *_TABLES, "SequentialLR", "OneCycleLR"}
    return check_class("scheduler", scheduler, "torch.optim.lr_scheduler", known)


def _tabulates(scheduler: Any) -> bool:
    schedulers = getattr(scheduler, "_schedulers", [scheduler])
    return any(type(each).__name__ in _TABLES for each in schedulers)


def _sequence(scheduler: Any, steps: int | None) -> list[Rate]:
    milestones = [_integer("milestones", m, 0) for m in scheduler._milestones]
    for inner in scheduler._schedulers:
        if type(inner).__name__ not in {*_FORMS, "LambdaLR"}:
            raise ValueError(
                "schedulers of SequentialLR must not start from the last rate of the one before, "
                f"which is not carried over; got {type(inner).__name__}. Use another scheduler."
            )
    by_scheduler = [_rates(inner, steps) for inner in scheduler._schedulers]

    def joined(rates: Sequence[Rate]) -> Rate:
        def rate(count: Count) -> Float[Array, ""]:
            count = jnp.asarray(count)
            value = rates[0](count)
            for start, later in zip(milestones, rates[1:], strict=True):
                value = jnp.where(count < start, value, later(jnp.maximum(count - start, 0)))
            return value

        return rate

    return [joined(rates) for rates in zip(*by_scheduler, strict=True)]


def _step(scheduler: Any, base: float) -> Rate:
    size = _integer("step_size", scheduler.step_size)
    power = _powers(base, number("gamma", scheduler.gamma))
    return lambda count: power(jnp.asarray(count) // size)


def _exponential(scheduler: Any, base: float) -> Rate:
    return _powers(base, number("gamma", scheduler.gamma))


def _multi_step(scheduler: Any, base: float) -> Rate:
    milestones = [_integer("milestones", m, 0) for m in sorted(scheduler.milestones.elements())]
    gamma = number("gamma", scheduler.gamma)
    table = np.array([base * gamma**passed for passed in range(len(milestones) + 1)])
    starts = np.array(milestones, np.int32)

    def rate(count: Count) -> Float[Array, ""]:
        passed = jnp.searchsorted(starts, jnp.asarray(count, jnp.int32), side="right")
        return jnp.asarray(table, float)[passed]

    return rate


def _constant(scheduler: Any, base: float) -> Rate:
    total = _integer("total_iters", scheduler.total_iters)
    first = base * number("factor", scheduler.factor)
    return lambda count: jnp.where(
        jnp.asarray(count) < total, jnp.asarray(first, float), jnp.asarray(base, float)
    )


def _linear(scheduler: Any, base: float) -> Rate:
    total = _integer("total_iters", scheduler.total_iters)
    start = base * number("start_factor", scheduler.start_factor)
    end = base * number("end_factor", scheduler.end_factor)

    def rate(count: Count) -> Float[Array, ""]:
        passed = jnp.minimum(jnp.asarray(count), total)
        return _between(start, end, passed, total - passed, total, cosine=False)

    return rate


def _polynomial(scheduler: Any, base: float) -> Rate:
    total = _integer("total_iters", scheduler.total_iters)
    power = float(number("power", scheduler.power))

    def rate(count: Count) -> Float[Array, ""]:
        left = jnp.asarray(jnp.maximum(total - jnp.asarray(count), 0), float) / total
        return jnp.asarray(base, float) * left**power

    return rate


def _cosine(scheduler: Any, base: float) -> Rate:
    half, least = _integer("T_max", scheduler.T_max), number("eta_min", scheduler.eta_min)

    def rate(count: Count) -> Float[Array, ""]:
        phase = jnp.asarray(count) % (2 * half)
        passed = jnp.minimum(phase, 2 * half - phase)
        return _between(base, least, passed, half - passed, half, cosine=True)

    return rate


def _warm_restarts(scheduler: Any, base: float) -> Rate:
    first, factor = scheduler.T_0, scheduler.T_mult
    least = number("eta_min", scheduler.eta_min)
    starts, lengths = (np.array(x, np.int32) for x in _restarts(first, factor, 2**29))

    def rate(count: Count) -> Float[Array, ""]:
        count = jnp.asarray(count, jnp.int32)
        if factor == 1:
            passed, length = count % first, jnp.asarray(first)
        else:
            cycle = jnp.searchsorted(starts, count, side="right") - 1
            passed, length = count - jnp.asarray(starts)[cycle], jnp.asarray(lengths)[cycle]
        whole = jnp.asarray(length, float)
        return _between(base, least, passed, length - passed, whole, cosine=True)

    return rate


def _restarts(first: int, factor: int, step: int) -> tuple[list[int], list[int]]:
    """Return the starts and the lengths of the cycles up to a step."""
    if factor == 1:
        return [step - step % first], [first]
    starts, lengths = [0], [first]
    while starts[-1] + lengths[-1] <= step:
        starts.append(starts[-1] + lengths[-1])
        lengths.append(lengths[-1] * factor)
    # A cycle too long for 32 bits ends after any step that can be counted.
    return starts, [min(length, 2**31 - 1) for length in lengths]


def _products(factor: Callable[[int], float], base: float, steps: int) -> list[float]:
    values = [base]
    for step in range(1, steps):
        values.append(values[-1] * float(factor(step)))
    return values


_FORMS: dict[str, Callable[[Any, float], Rate]] = {
    "StepLR": _step,
    "MultiStepLR": _multi_step,
    "ExponentialLR": _exponential,
    "CosineAnnealingLR": _cosine,
    "CosineAnnealingWarmRestarts": _warm_restarts,
    "LinearLR": _linear,
    "ConstantLR": _constant,
    "PolynomialLR": _polynomial,
}
# From the function, the initial rate and the number of steps.
_TABLES: dict[str, Callable[[Callable[[int], float], float, int], list[float]]] = {
    "LambdaLR": lambda factor, base, steps: [base * float(factor(step)) for step in range(steps)],
    "MultiplicativeLR": _products,
}


def _one_cycle(scheduler: Any, group: dict[str, Any], what: str) -> Rate:
    """Return OneCycleLR's schedule of "lr" or "momentum"."""
    cosine, total = scheduler._anneal_func_type == "cos", scheduler.total_steps
    phases, start = [], 0.0
    for phase in scheduler._schedule_phases:
        ends = (group[phase[f"{end}_{what}"]] for end in ("start", "end"))
        first, last = (float(number(f"{what} of OneCycleLR", value)) for value in ends)
        phases.append((start, phase["end_step"], first, last))
        start = phase["end_step"]

    def rate(count: Count) -> Float[Array, ""]:
        count = jnp.asarray(count)
        at, value = jnp.asarray(count, float), jnp.asarray(math.nan, float)
        for index, (begin, end, first, last) in reversed(list(enumerate(phases))):
            if end == begin:  # no step lies in it
                continue
            inside = _between(first, last, at - begin, end - at, end - begin, cosine=cosine)
            until = total if index == len(phases) - 1 else math.floor(end)
            value = jnp.where(count <= until, inside, value)
        return value

    return rate


def _between(
    start: float, end: float, passed: Any, left: Any, length: Any, *, cosine: bool
) -> Float[Array, ""]:
    """Return the value of a phase between its ends, as a sum of two shares."""
    # Each share is computed from its own distance: as one minus the other, a small one would lose
    # its digits, and so would the small rates at the end of a run.
    shares = (jnp.asarray(steps, float) / length for steps in (left, passed))
    of_start, of_end = (
        jnp.square(jnp.sin(0.5 * math.pi * share)) if cosine else share for share in shares
    )
    return jnp.asarray(start, float) * of_start + jnp.asarray(end, float) * of_end


def _powers(base: float, gamma: float) -> Rate:
    """Compute `base * gamma**n` as a product over the four bytes of n, each from a table."""
    with np.errstate(over="ignore", under="ignore"):
        tables = [np.power(gamma, 256.0**place * np.arange(256)) for place in range(4)]
        tables[0] = base * tables[0]

    def rate(count: Count) -> Float[Array, ""]:
        count, value = jnp.asarray(count), jnp.asarray(1.0, float)
        for place, table in enumerate(tables):
            value = value * jnp.asarray(table, float)[(count >> 8 * place) & 255]
        return value

    return rate


def _table(values: Sequence[float]) -> Rate:
    table = np.array(values, np.float64)
    return lambda count: jnp.asarray(table, float).at[jnp.asarray(count)].get(mode="fill")


def _integer(name: str, value: Any, minimum: int = 1) -> int:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not float(value).is_integer() or value < minimum:
        raise ValueError(f"{name} must be an integer of at least {minimum}; got {value!r}.")
    return int(value)
