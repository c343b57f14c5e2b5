"""Schedulers without a formula: tables that agree with PyTorch, and originals that do not change.

`tests/zoo/test_schedulers.py` has those of timm and transformers.
"""

from __future__ import annotations

import random
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR

from parity_tests.moved_runs import NAMES, sgd
from parity_tests.trajectories import nested
from regjax.interop import (
    optimizer_from_torch,
    schedule_from_torch,
    state_from_torch,
    state_to_torch,
)

LENGTH, LATER = 40, 7
# The shapes have no effect here.
PARAMS = nested({path: jnp.ones(1) for path in NAMES})
METRICS = [abs(np.cos(0.4 * step)) + 0.01 * step for step in range(LENGTH)]


RATES: Any = [0.05, 0.01]  # which SWALR accepts, though not by its types


class Bumpy(lr_scheduler.StepLR):
    """A subclass with rates of its own."""

    def get_lr(self):
        """Return rates that depend on the ones before."""
        rates = zip(super().get_lr(), self.base_lrs, strict=True)
        return [0.9 * rate + 0.05 * base * (self.last_epoch % 3) for rate, base in rates]


class Ramp:
    """A scheduler that derives from nothing, and moves the weight decay, too."""

    def __init__(self, optimizer):
        self.optimizer, self.last_epoch = optimizer, 0

    def step(self):
        """Shrink the rates and raise the decay, from the second step on."""
        self.last_epoch += 1
        for group in self.optimizer.param_groups:
            if self.last_epoch > 1:
                group["lr"] *= 0.9
                group["weight_decay"] += 0.01


def sequence(*makes):
    """Return a function that creates a SequentialLR with a change every ten steps."""

    def make(optimizer):
        inner = [make(optimizer) for make in makes]
        return lr_scheduler.SequentialLR(optimizer, inner, [10 * i for i in range(1, len(inner))])

    return make


def constant(optimizer):
    return lr_scheduler.ConstantLR(optimizer, 0.5, 4)


def product(optimizer):
    return lr_scheduler.MultiplicativeLR(optimizer, lambda step: 0.9)


def cycle(optimizer, **options):
    up = {"step_size_up": 3, "step_size_down": 4, **options}
    return lr_scheduler.CyclicLR(optimizer, 0.01, 0.1, **up)


def chain(optimizer):
    exponential = lr_scheduler.ExponentialLR(optimizer, 0.9)
    return lr_scheduler.ChainedScheduler([constant(optimizer), exponential], optimizer)


def plateau(optimizer):
    return lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=2, cooldown=1)


SCHEDULERS = {
    "CyclicLR": cycle,
    "CyclicLR, triangular2": lambda o: cycle(o, mode="triangular2"),
    "CyclicLR, exp_range": lambda o: cycle(o, mode="exp_range", gamma=0.97),
    "CyclicLR, a function": lambda o: cycle(o, scale_fn=lambda x: 1 / x, cycle_momentum=False),
    "ChainedScheduler": chain,
    "ReduceLROnPlateau": plateau,
    "SWALR": lambda o: SWALR(o, RATES, 9),
    "SWALR, linear": lambda o: SWALR(o, 0.05, 9, "linear"),
    "SequentialLR of OneCycleLR": sequence(
        constant, lambda o: lr_scheduler.OneCycleLR(o, 0.1, LENGTH)
    ),
    "SequentialLR of MultiplicativeLR": sequence(constant, product),
    "ChainedScheduler of SequentialLR": lambda o: lr_scheduler.ChainedScheduler(
        [sequence(constant, product)(o), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "SequentialLR of CyclicLR": sequence(constant, lambda o: cycle(o, cycle_momentum=False)),
    "a subclass": lambda o: Bumpy(o, 7, 0.5),
    "LambdaLR, a subclass": lambda o: type("Mine", (lr_scheduler.LambdaLR,), {})(
        o, lambda t: 0.9**t
    ),
    "another class": Ramp,
}


def groups_of(kind=torch.optim.SGD, **options):
    rates = (0.1, 0.03)
    groups = [{"params": [torch.zeros(2, requires_grad=True)], "lr": rate} for rate in rates]
    return kind(groups, **options)


def options_of(optimizer):
    """Return the options of each group."""
    return [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]


def memory(thing):
    """Return what an object stores, down to the objects in it; two of them can be compared."""
    if isinstance(thing, dict):
        return {key: memory(value) for key, value in thing.items()}
    if isinstance(thing, list | tuple):
        return [memory(value) for value in thing]
    if isinstance(thing, torch.Tensor):
        return (id(thing), thing.tolist())
    is_scheduler = hasattr(thing, "optimizer")
    return (id(thing), memory(vars(thing)) if is_scheduler else None)


def walk(scheduler, first, last, given):
    """Yield the options of the groups at each step."""
    for step in range(first, last):
        yield options_of(scheduler.optimizer)
        scheduler.optimizer.step()
        scheduler.step(*given[step : step + 1])


@pytest.mark.parametrize("taken", [0, LATER])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_table_has_the_rates_of_pytorch(name, taken):
    optimizer = groups_of(momentum=0.5)
    scheduler = SCHEDULERS[name](optimizer)
    given = METRICS if name == "ReduceLROnPlateau" else []
    [*_] = walk(scheduler, 0, taken, given)
    before = memory([vars(optimizer), scheduler])
    keywords: Any = {"metrics": given} if given else {}
    schedules = schedule_from_torch(scheduler, steps=LENGTH, **keywords)
    assert memory([vars(optimizer), scheduler]) == before
    theirs = [[group["lr"] for group in at] for at in walk(scheduler, taken, LENGTH, given)]
    assert len({rates[0] for rates in theirs}) > 2
    counts = np.arange(LENGTH + 1, dtype=np.int32)
    single = np.stack([schedule(counts) for schedule in schedules], axis=1)
    with jax.enable_x64(True):
        double = np.stack([schedule(counts) for schedule in schedules], axis=1)
    np.testing.assert_array_equal(double[taken:LENGTH], theirs)
    np.testing.assert_array_equal(single, double.astype(np.float32))
    assert np.isnan(double[LENGTH:]).all()
    assert np.isnan(double[:taken]).all()


def test_swalr_takes_over_from_another_scheduler():
    optimizer = groups_of()
    first, averaged = product(optimizer), SWALR(optimizer, 0.05, 5)
    [*_] = walk(first, 0, LATER, [])
    [schedule, _] = schedule_from_torch(averaged, steps=10)
    theirs = [group["lr"] for group, _ in walk(averaged, 0, 10, [])]
    ours = np.stack([schedule(step) for step in range(10)])
    np.testing.assert_array_equal(ours, np.array(theirs, np.float32))


def overruled(optimizer):
    scheduler = plateau(optimizer)
    optimizer.param_groups[0]["lr"] *= 1.001
    return scheduler


def own(step):
    """Return a function that creates a scheduler with a step of its own."""

    def make(optimizer):
        cls = type("Own", (Ramp,), {"step": lambda self: step(self, optimizer)})
        return cls(optimizer)

    return make


def set_option(name, value):
    return lambda self, _: self.optimizer.param_groups[0].update({name: value})


def without_count(optimizer):
    scheduler = Ramp(optimizer)
    del scheduler.last_epoch
    return scheduler


# By the error, a scheduler and the options of its conversion.
REFUSED = {
    "^steps must be an integer for CyclicLR, which has no formula; got None": (cycle, {}),
    "^metrics must be given for ReduceLROnPlateau, whose steps have an argument": (plateau, {}),
    "^metrics must have a number for each of 5 steps; got 2": (
        plateau,
        {"metrics": [1.0, 2.0], "steps": 6},
    ),
    "^metrics must be None for CyclicLR, which follows no metric": (cycle, {"metrics": METRICS}),
    r"^lr of group 0 must be 0\.1 after 0 steps of the ReduceLROnPlateau; got 0\.1001": (
        overruled,
        {"metrics": METRICS},
    ),
    "^steps must be at most 5 for this SequentialLR, whose step 5 raises ValueError: Tried": (
        lambda o: lr_scheduler.SequentialLR(o, [lr_scheduler.OneCycleLR(o, 0.1, 4)], []),
        {"steps": 9},
    ),
    "^scheduler must have last_epoch.*; got a Ramp": (without_count, {"steps": 9}),
    "^scheduler must be an object that copy.deepcopy copies; got a Own, which raises TypeError": (
        lambda o: vars(s := own(None)(o)).update(lock=threading.Lock()) or s,
        {"steps": 9},
    ),
    "^scheduler must not draw from a global random generator; got a Own that does": (
        own(lambda self, _: random.random() and torch.rand(1)),
        {"steps": 9},
    ),
    "^scheduler must reach its optimizer by its attribute only; got a Own": (
        own(lambda _, optimizer: optimizer.param_groups[0].update(lr=1.0)),
        {"steps": 9},
    ),
    "^scheduler must move numbers, .* moves nesterov of group 0 from False to True": (
        own(set_option("nesterov", True)),
        {"steps": 9},
    ),
    r"^scheduler must move only lr, .* of torch\.optim\.SGD; got .* moves dampening of group 0": (
        own(set_option("dampening", 0.5)),
        {"steps": 9},
    ),
    "^scheduler must be a function that JAX can trace; .* TracerBool.* Pass steps= to tab": (
        lambda o: lambda step: 0.1 if step < 5 else 0.01,
        {},
    ),
    "^scheduler must return a float": (lambda o: lambda step: jnp.ones(2), {}),
    "^scheduler must have a function for each of 1 groups; got 2": (
        lambda o: [lambda step: 0.1] * 2,
        {},
    ),
    "^scheduler must be a scheduler of PyTorch, or a function": (lambda o: [0.1], {}),
    "^metrics must be None without a scheduler": (lambda o: None, {"metrics": METRICS}),
}


@pytest.mark.parametrize(("message", "case"), REFUSED.items(), ids=range(len(REFUSED)))
def test_schedulers_that_cannot_be_converted(message, case):
    make, keywords = case
    optimizer = sgd(lr=0.1, momentum=0.9)
    scheduler = make(optimizer)
    before, states = memory([vars(optimizer)]), (random.getstate(), torch.get_rng_state().tolist())
    with pytest.raises((ValueError, TypeError), match=message):
        optimizer_from_torch(optimizer, NAMES, scheduler=scheduler, **keywords)
    assert memory([vars(optimizer)]) == before
    assert (random.getstate(), torch.get_rng_state().tolist()) == states


def test_a_function_of_the_step_is_traced_or_tabulated():
    model = torch.nn.ParameterDict({name: torch.zeros(2) for name in "ab"})
    optimizer = torch.optim.SGD([{"params": [p]} for p in model.parameters()])
    names = {"a": "a", "b": "b"}
    cases: list[dict[str, Any]] = [
        {"scheduler": [optax.linear_schedule(0.5, 0.0, 4), lambda step: 0.25]},
        {"scheduler": [lambda step: 0.5 - 0.125 * step, lambda step: 0.25], "steps": 2},
    ]
    for keywords in cases:
        ours = optimizer_from_torch(optimizer, names, model=model, **keywords)
        params = {"a": jnp.ones(2), "b": jnp.ones(2)}
        state = state_from_torch(optimizer, names, params, ours, model=model, step=1, **keywords)
        updates, state = jax.jit(ours.update)(params, state, params)
        assert (updates["a"][0], updates["b"][0]) == (-0.375, -0.25)
        if "steps" in keywords:
            message = "^scheduler must have a rate at its step 2, .*; got NaN. Pass steps=3"
            with pytest.raises(ValueError, match=message):
                state_to_torch(state, optimizer, names, model=model, **keywords)
        else:
            state_to_torch(state, optimizer, names, model=model, **keywords)
            assert optimizer.param_groups[0]["lr"] == 0.25


def test_a_count_that_is_kept_nowhere_must_be_given():
    optimizer = sgd(lr=0.1)
    keywords: dict[str, Any] = {"scheduler": lambda step: 0.1}
    ours = optimizer_from_torch(optimizer, NAMES, **keywords)
    with pytest.raises(ValueError, match=r"^step must be given for SGD with .*, neither"):
        state_from_torch(optimizer, NAMES, PARAMS, ours, **keywords)


def test_a_scheduler_does_not_go_back():
    optimizer = sgd(lr=0.1)
    keywords: dict[str, Any] = {
        "scheduler": lr_scheduler.ChainedScheduler([product(optimizer)]),
        "steps": 9,
    }
    ours = optimizer_from_torch(optimizer, NAMES, **keywords)
    state = ours.init(PARAMS)
    optimizer.step()
    keywords["scheduler"].step()
    with pytest.raises(ValueError, match=r"^scheduler must not have passed step 0"):
        state_to_torch(state, optimizer, NAMES, **keywords)
