"""Tables of schedulers without a formula, from runs of copies of them.

A copy steps a stand-in for the optimizer, so the scheduler and its optimizer stay as they are.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
import pickle
import random
import sys
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    Metrics = Sequence[float] | None


def takes_metrics(scheduler: Any) -> bool:
    """Return whether the steps of a scheduler follow a metric."""
    if is_timm(scheduler):
        return hasattr(scheduler, "lr_scheduler")  # of PyTorch, that it wraps
    parameters = inspect.signature(scheduler.step).parameters.values()
    return any(p.default is p.empty or p.name in ("metric", "metrics") for p in parameters)


def is_timm(scheduler: Any) -> bool:
    """Return whether a scheduler is one of timm: a function of a step that it does not count."""
    return _derives(scheduler, "Scheduler", "timm.scheduler.")


def position(scheduler: Any) -> int | None:
    """Return the number of steps that a scheduler has taken; None if it does not count them."""
    if _derives(scheduler, "ChainedScheduler", "torch."):
        return position(scheduler._schedulers[0])
    return None if is_timm(scheduler) else scheduler.last_epoch


def entries_of(scheduler: Any) -> set[str]:
    """Return the entries that a scheduler adds to the groups of its optimizer, or reads there."""
    found = {"initial_lr"}
    for cls in type(scheduler).__mro__:
        found |= set(_ENTRIES.get(cls.__name__, ()))
    for inner in getattr(scheduler, "_schedulers", ()):
        found |= entries_of(inner)
    return found | ({"lr_scale"} if is_timm(scheduler) else set())


_ENTRIES = {
    "OneCycleLR": ("max_lr", "min_lr", "max_momentum", "base_momentum"),
    "CyclicLR": ("max_momentum", "base_momentum"),
    "SWALR": ("swa_lr",),
}


def tabulate(scheduler: Any, steps: int, metrics: Metrics) -> list[dict[str, list[Any]]]:
    """Return the values of each group's options that move, and of "lr", at each step.

    A scheduler in the middle of its run determines its next steps only: the values before are None.
    """
    name, first = type(scheduler).__name__, _first_row(scheduler)
    if first >= steps:
        raise ValueError(
            "steps must cover the steps that the scheduler has already taken; got fewer than "
            f"{first + 1}. Pass more."
        )
    with _unchanged(scheduler):
        copied = _copy(scheduler)
        groups = copied.optimizer.param_groups
        if is_timm(copied) and first == 0:
            _restart(copied)
        start = [_options(group) for group in groups]
        moved: list[dict[str, dict[int, Any]]] = [{"lr": {}} for _ in groups]
        for step in range(first + 1, steps):
            try:
                advance(copied, step, metrics)
            except Exception as error:  # a scheduler may raise any
                raise ValueError(
                    f"steps must be at most {step} for this {name}, whose step {step} raises "
                    f"{type(error).__name__}: {error}; got {steps}. Pass fewer, or a function of "
                    "the step as scheduler."
                ) from error
            for group, before, changes in zip(groups, start, moved, strict=True):
                for option, value in _options(group).items():
                    if option in changes or not _same(value, before.get(option)):
                        changes.setdefault(option, {})[step] = value
    absent = [None] * first
    # An option that begins to move later has its first value until then.
    return [
        {
            option: absent + [at.get(step, before.get(option)) for step in range(first, steps)]
            for option, at in changes.items()
        }
        for before, changes in zip(start, moved, strict=True)
    ]


def move(scheduler: Any, step: int, metrics: Metrics) -> None:
    """Move a scheduler and its optimizer forward to a step, by its own steps."""
    first = _first_row(scheduler)
    # PyTorch warns of a scheduler that steps before its optimizer, whose steps were taken in JAX.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*optimizer.step", UserWarning)
        if not is_timm(scheduler) or takes_metrics(scheduler):
            for each in range(first + 1, step + 1):
                advance(scheduler, each, metrics)
        elif step == 0:
            _restart(scheduler)
        else:
            advance(scheduler, step, metrics)


def check_move(scheduler: Any, step: int) -> None:
    """Reject a step that a scheduler has passed: it cannot go back."""
    first = _first_row(scheduler)
    if step < first:
        raise ValueError(
            f"scheduler must not have passed step {step}, where the state is; got a "
            f"{type(scheduler).__name__} at step {first}, which cannot go back. Pass a new one."
        )


def advance(scheduler: Any, step: int, metrics: Metrics = None) -> None:
    """Take the step after which a scheduler has taken `step` steps."""
    metric = () if metrics is None else (metrics[step - 1],)
    if not is_timm(scheduler):
        scheduler.step(*metric)
    elif scheduler.t_in_epochs:
        scheduler.step(step, *metric)
    else:
        scheduler.step_update(step, *metric)


def _first_row(scheduler: Any) -> int:
    """Return the first step whose values are known."""
    if not is_timm(scheduler):
        return position(scheduler) or 0
    # All but one of timm's depend on nothing but the step.
    inner = getattr(scheduler, "lr_scheduler", None)
    taken = 0 if inner is None else inner.last_epoch
    return scheduler.warmup_t + taken if taken else 0


def _restart(scheduler: Any) -> None:
    """Give the groups the rates that the constructor of a scheduler of timm gives them."""
    has_warm_up = getattr(scheduler, "warmup_t", 0)
    scheduler.update_groups(scheduler.warmup_lr_init if has_warm_up else scheduler.base_values)


def _copy(scheduler: Any) -> Any:
    """Return a copy of a scheduler, with a stand-in for its optimizer without its step."""
    original = scheduler.optimizer

    def step() -> None:
        """Do nothing."""

    step._wrapped_by_lr_sched = True  # pyright: ignore[reportFunctionMemberAccess]  # as by PyTorch
    stand_in: Any = object.__new__(type(original))
    memo: dict[int, Any] = {id(original): stand_in}
    # The parameters are not copied.
    memo |= {id(p): p for group in original.param_groups for p in group["params"]}
    try:
        stand_in.__dict__ |= original.__dict__ | {
            "param_groups": copy.deepcopy(original.param_groups, memo),
            "state": dict(original.state),
            "step": step,
            "_opt_called": True,
        }
        return copy.deepcopy(scheduler, memo)
    except Exception as error:
        raise ValueError(
            f"scheduler must be an object that copy.deepcopy copies; got a "
            f"{type(scheduler).__name__}, which raises {type(error).__name__}: {error}. Pass a "
            "function of the step."
        ) from error


@contextlib.contextmanager
def _unchanged(scheduler: Any) -> Iterator[None]:
    """Undo changes of the optimizer and of random states, and reject a scheduler that made any."""
    groups = scheduler.optimizer.param_groups
    before, states = [dict(group) for group in groups], _random_states()
    try:
        yield
    finally:
        has_drawn = [key for key, _ in _random_states()] != [key for key, _ in states]
        for _, restore in states:
            restore()
        has_changed = [*map(_options, groups)] != [*map(_options, before)]
        for group, old in zip(groups, before, strict=True):
            group.clear()
            group.update(old)
    name = type(scheduler).__name__
    if has_drawn:
        raise ValueError(
            f"scheduler must not draw from a global random generator; got a {name} that does, "
            "whose rates are not known in advance. Give it a generator of its own."
        )
    if has_changed:
        raise ValueError(
            f"scheduler must reach its optimizer by its attribute only; got a {name}, a copy of "
            "which changes the optimizer of the original. Pass a function of the step."
        )


def _random_states() -> list[tuple[bytes, Callable[[], None]]]:
    """Return the states of the global generators as bytes, and functions that restore them."""
    of_python, torch = random.getstate(), sys.modules.get("torch")
    of_numpy = np.random.get_state()  # noqa: NPY002  # the global generator is meant
    found: list[tuple[bytes, Callable[[], None]]] = [
        (pickle.dumps(of_python), lambda: random.setstate(of_python)),
        (pickle.dumps(of_numpy), lambda: np.random.set_state(of_numpy)),  # noqa: NPY002  # see above
    ]
    if torch is not None:
        of_torch = torch.get_rng_state()
        found.append((of_torch.numpy().tobytes(), lambda: torch.set_rng_state(of_torch)))
    return found


def _options(group: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a group, tensors of one element as numbers."""
    return {
        option: value.item() if getattr(value, "ndim", 1) == 0 else value
        for option, value in group.items()
        if option not in ("params", "param_names")
    }


def _same(value: Any, other: Any) -> bool:
    return value is other or bool(value == other) or (_is_nan(value) and _is_nan(other))


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _derives(scheduler: Any, name: str, home: str) -> bool:
    bases = type(scheduler).__mro__
    return any(base.__name__ == name and base.__module__.startswith(home) for base in bases)
