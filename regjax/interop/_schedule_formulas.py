"""Formulas of the schedulers of `torch.optim.lr_scheduler`.

PyTorch computes each rate in double precision from the previous one. Here a rate depends only on
the step, in JAX's precision, so every formula is one that loses no digits in float32: powers come
from tables computed in double, a cosine is a sum of two nonnegative weights, and the distances of a
step from the ends of its phase are counted in whole steps.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from regjax.interop._leaves import number
from regshared.checks import describe

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from jax.typing import ArrayLike
    from jaxtyping import Array, Float, Integer

    Count = Integer[ArrayLike, ""]
    Rate = Callable[[Any], Any]

_HOME = "torch.optim.lr_scheduler"


def has_formula(scheduler: Any) -> bool:
    """Return whether the rates of a scheduler follow from its settings, at every step."""
    if _name(scheduler) == "SequentialLR":
        # The others start from the last rate of the scheduler before them.
        return all(_name(inner) in {*_FORMS, "LambdaLR"} for inner in scheduler._schedulers)
    return _name(scheduler) in {*_FORMS, *_TABLES, "OneCycleLR"}


def calls_functions(scheduler: Any) -> bool:
    """Return whether a scheduler with a formula calls Python functions, which JAX cannot trace."""
    schedulers = getattr(scheduler, "_schedulers", [scheduler])
    return any(_name(each) in _TABLES for each in schedulers)


def compute_rates(scheduler: Any, steps: int | None) -> list[Rate]:
    """Return the schedule of each group's learning rate."""
    name, groups = _name(scheduler), scheduler.optimizer.param_groups
    if name == "OneCycleLR":
        return [_one_cycle(scheduler, group, "lr") for group in groups]
    if name == "SequentialLR":
        return _sequence(scheduler, steps)
    for index, base in enumerate(scheduler.base_lrs):
        check_number(f"initial_lr of group {index}", base)
    bases = map(float, scheduler.base_lrs)
    if name in _FORMS:
        return [_FORMS[name](scheduler, base) for base in bases]
    if steps is None:
        raise ValueError(
            f"steps must be an integer for {name}, whose function JAX cannot trace; got None. Pass "
            "for how many steps to tabulate it."
        )
    pairs = zip(scheduler.lr_lambdas, bases, strict=True)
    return [table(_TABLES[name](factor, base, steps)) for factor, base in pairs]


def compute_momenta(scheduler: Any) -> list[dict[str, Rate]]:
    """Return the schedule of each group's momentum or first beta, by option; empty without any."""
    groups = scheduler.optimizer.param_groups
    if not getattr(scheduler, "cycle_momentum", False):
        return [{} for _ in groups]
    option = "betas" if scheduler.use_beta1 else "momentum"
    return [{option: _one_cycle(scheduler, group, "momentum")} for group in groups]


def place(scheduler: Any, step: int, last: list[float]) -> None:
    """Move a scheduler with a formula to a step, with the rates of that step."""
    if _name(scheduler) == "SequentialLR":
        starts = [0, *scheduler._milestones]
        active = bisect_right(scheduler._milestones, step)
        for index, inner in enumerate(scheduler._schedulers):
            if index < active:
                place(inner, max(starts[index + 1] - starts[index] - 1, 0), inner._last_lr)
            elif index > active:
                place(inner, 0, inner._last_lr)
                inner.last_epoch = -1  # its value until the scheduler is active
        place(scheduler._schedulers[active], step - starts[active], last)
    else:
        scheduler._step_count = step + 1
    if _name(scheduler) == "CosineAnnealingWarmRestarts":
        starts, lengths = _restarts(scheduler.T_0, scheduler.T_mult, step)
        scheduler.T_cur, scheduler.T_i = step - starts[-1], lengths[-1]
    scheduler.last_epoch, scheduler._last_lr = step, list(last)


def check_number(option: str, value: Any) -> None:
    """Reject a tensor."""
    if not isinstance(value, int | float):
        raise ValueError(
            f"{option} must be a number, since a scheduler rounds a tensor from step to step; got "
            f"{describe(value)}. Pass a number."
        )


def table(values: Sequence[float]) -> Rate:
    """Return a schedule with one value per step, which is NaN after the last."""
    array = np.array(values, np.float64)
    return lambda count: jnp.asarray(array, float).at[jnp.asarray(count)].get(mode="fill")


def _name(scheduler: Any) -> str:
    """Return the name of a class of PyTorch; empty for any other class, such as a subclass."""
    return type(scheduler).__name__ if type(scheduler).__module__ == _HOME else ""


def _sequence(scheduler: Any, steps: int | None) -> list[Rate]:
    milestones = [_integer("milestones", m, 0) for m in scheduler._milestones]
    by_scheduler = [compute_rates(inner, steps) for inner in scheduler._schedulers]

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


def _integer(name: str, value: Any, minimum: int = 1) -> int:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not float(value).is_integer() or value < minimum:
        raise ValueError(f"{name} must be an integer of at least {minimum}; got {value!r}.")
    return int(value)
