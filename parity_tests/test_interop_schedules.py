"""PyTorch's schedulers as schedules in JAX: equal rates, and schedulers that are rejected."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest
import torch
from torch.optim import lr_scheduler

from parity_tests.moved_runs import NAMES, SCHEDULED, STEPS, TorchRun, entry, sgd, warm_up
from regjax.interop import optimizer_from_torch, schedule_from_torch

SCHEDULERS = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 7, 0.3),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [5, 5, 20], 0.3),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 25, 1e-3),
    "CosineAnnealingLR to 0": lambda o: lr_scheduler.CosineAnnealingLR(o, 25),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 7, 2),
    "CosineAnnealingWarmRestarts, one length": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(
        o, 10, eta_min=1e-3
    ),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, 0.9, 20),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.25, 20),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 50, 0.9),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, [0.1, 0.2, 0.3], total_steps=60),
    "OneCycleLR, linear": lambda o: lr_scheduler.OneCycleLR(
        o, [0.1, 0.2, 0.3], total_steps=60, anneal_strategy="linear", pct_start=0.37
    ),
    "OneCycleLR, three phases": lambda o: lr_scheduler.OneCycleLR(
        o, [0.1, 0.2, 0.3], total_steps=61, three_phase=True, pct_start=0.27
    ),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(
        o, [lambda t: 0.9**t, lambda t: 1 / (t + 1), lambda t: 1.0]
    ),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.95),
    "SequentialLR": warm_up,
}


def tabulated(name, steps):
    return steps if name in ("LambdaLR", "MultiplicativeLR") else None


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.sample(2)
def test_schedules(name):
    """Compare within 1e-14 of the largest rate of the group, which scales PyTorch's rounding."""
    rates = (0.1, 0.03, 0.7)
    groups = [{"params": [torch.zeros(1, requires_grad=True)], "lr": lr} for lr in rates]
    optimizer = torch.optim.SGD(groups, momentum=0.5)
    scheduler = SCHEDULERS[name](optimizer)
    schedules, theirs = schedule_from_torch(scheduler, steps=tabulated(name, 60)), []
    for _ in range(60):
        theirs.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    theirs, counts = np.array(theirs), np.arange(60, dtype=np.int32)
    single = np.stack([jax.jit(jax.vmap(s))(counts) for s in schedules], axis=1)
    with jax.enable_x64(True):
        double = np.stack([jax.jit(jax.vmap(s))(counts) for s in schedules], axis=1)
    assert (single.dtype, double.dtype) == (np.float32, np.float64)
    np.testing.assert_array_less(np.abs(double - theirs) / theirs.max(axis=0), 1e-14)
    # Within four units in the last place of each rate in float32.
    np.testing.assert_array_less(np.abs(single - double), 5e-7 * np.abs(double) + 1e-30)
    # The schedule covers the whole run, independent of the progress of the scheduler.
    if "Lambda" not in name and "Multiplicative" not in name:
        again = schedule_from_torch(scheduler)
        assert [np.asarray(s(7)) for s in again] == [np.asarray(s(7)) for s in schedules]


def test_steps_that_contradict_the_scheduler():
    run = TorchRun(SCHEDULED["adamw-per-epoch"])
    run.walk(0, STEPS)
    run.case = replace(run.case, steps_per_epoch=4)
    message = r"of group 0 are, at step 12; got epoch 2, which is step 8 with steps_per_epoch=4"
    with jax.enable_x64(True), pytest.raises(ValueError, match=message):
        run.to_jax()


def test_a_count_that_contradicts_the_scheduler():
    run = TorchRun(SCHEDULED["asgd-step"])
    run.walk(0, 2)
    run.scheduler.step()
    message = "of group 0 are, at step 2; got epoch 3"
    with jax.enable_x64(True), pytest.raises(ValueError, match=message):
        run.to_jax()


def overruled(optimizer):
    scheduler = lr_scheduler.StepLR(optimizer, 5)
    optimizer.param_groups[0]["lr"] *= 1.001
    return scheduler


HALF: Any = 2.5  # which lr_scheduler accepts, though not by its types


def in_sequence(inner):
    def make(optimizer):
        first = lr_scheduler.ConstantLR(optimizer)
        return lr_scheduler.SequentialLR(optimizer, [first, inner(optimizer)], [5])

    return make


SCHEDULERS_REFUSED = {
    "^steps must be an integer for LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: 1.0),
    r"^lr of group 0 must be 0\.1 after 0 steps of the StepLR; got 0\.1001": overruled,
    "another optimizer": lambda o: lr_scheduler.StepLR(sgd(), 5),
    "^initial_lr of group 0 must be a number": lambda o: (
        entry(lr=torch.tensor(0.1))(o) or lr_scheduler.StepLR(o, 5)
    ),
    "^total_iters must be .* at least 1; got 0": lambda o: lr_scheduler.ConstantLR(o, 0.5, 0),
    "^T_max must be .* at least 1; got 2.5": lambda o: lr_scheduler.CosineAnnealingLR(o, HALF),
    "^steps must be an integer for SequentialLR, which has no formula": in_sequence(
        lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.9)
    ),
}


@pytest.mark.parametrize(
    ("message", "make"), SCHEDULERS_REFUSED.items(), ids=range(len(SCHEDULERS_REFUSED))
)
def test_schedulers_that_cannot_be_converted(message, make):
    optimizer = sgd(lr=0.1, momentum=0.9)
    with pytest.raises(ValueError, match=message):
        optimizer_from_torch(optimizer, NAMES, scheduler=make(optimizer))


def test_a_momentum_changed_by_hand():
    optimizer = sgd(lr=0.1, momentum=0.9)
    scheduler = lr_scheduler.OneCycleLR(optimizer, 0.1, 10)
    optimizer.param_groups[0]["momentum"] = 0.9
    with pytest.raises(
        ValueError, match=r"^momentum of group 0 must be 0\.95.* after 0 steps .*got 0\.9\."
    ):
        optimizer_from_torch(optimizer, NAMES, scheduler=scheduler)


def test_a_table_that_is_too_short():
    optimizer = sgd(lr=0.1)
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda t: 1.0)
    for _ in range(3):
        optimizer.step()
        scheduler.step()
    with pytest.raises(ValueError, match=r"^steps must cover .* already taken; got fewer than 4"):
        schedule_from_torch(scheduler, steps=3)
    [schedule] = schedule_from_torch(scheduler, steps=4)
    assert np.asarray(schedule(3)) == np.float32(0.1)
    assert np.isnan(schedule(4))
