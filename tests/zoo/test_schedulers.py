"""The schedulers of timm and transformers as schedules: PyTorch's rates over whole runs."""

from __future__ import annotations

import warnings
from typing import Any

import jax
import numpy as np
import pytest
import torch

from parity_tests.compare import FLOAT64, assert_same_at_every_step
from parity_tests.moved_runs import SGD, Case, TorchRun
from parity_tests.test_interop import STEPS, there_and_back
from regjax.interop import schedule_from_torch

pytestmark = pytest.mark.slow
LENGTH = 50
METRICS = tuple(abs(float(np.cos(0.4 * step))) + 0.01 * step for step in range(LENGTH))
NOISE = {"noise_range_t": (3, 30), "noise_pct": 0.3, "noise_std": 0.2, "noise_seed": 5}
WARM_UP = {"warmup_t": 4, "warmup_lr_init": 1e-3}

# By name: a class of timm, and its options.
OF_TIMM: dict[str, tuple[str, dict[str, Any]]] = {
    "cosine": ("CosineLRScheduler", {"t_initial": 20, "lr_min": 1e-3, **WARM_UP}),
    "cosine, cycles": (
        "CosineLRScheduler",
        {"t_initial": 8, "cycle_mul": 2.0, "cycle_decay": 0.5, "cycle_limit": 3},
    ),
    "cosine, noise": ("CosineLRScheduler", {"t_initial": 20, **NOISE}),
    "cosine, updates": (
        "CosineLRScheduler",
        {"t_initial": 20, "t_in_epochs": False, "warmup_prefix": True, **WARM_UP, **NOISE},
    ),
    "step": ("StepLRScheduler", {"decay_t": 6, "decay_rate": 0.5, **WARM_UP}),
    "multistep": ("MultiStepLRScheduler", {"decay_t": [6, 9], "decay_rate": 0.5}),
    "poly": ("PolyLRScheduler", {"t_initial": 20, "power": 0.5, "k_decay": 2.0, **WARM_UP}),
    "tanh": ("TanhLRScheduler", {"t_initial": 20, "warmup_prefix": True}),
    "wsd": ("WSDLRScheduler", {"t_initial": 30, "decay_t": 9, **WARM_UP}),
    "plateau": ("PlateauLRScheduler", {"patience_t": 2, "mode": "min", **WARM_UP, **NOISE}),
}
# By the name of transformers: the options of `get_scheduler`.
OF_TRANSFORMERS: dict[str, dict[str, Any]] = {
    "linear": {},
    "cosine": {},
    "cosine_with_restarts": {"num_cycles": 3},
    "polynomial": {"power": 2.0},
    "constant": {},
    "constant_with_warmup": {},
    "inverse_sqrt": {},
    "reduce_lr_on_plateau": {"patience": 2, "factor": 0.5},
    "cosine_with_min_lr": {"min_lr": 1e-4},
    "cosine_warmup_with_min_lr": {"min_lr": 1e-4, "warmup_lr_rate": 0.1},
    "warmup_stable_decay": {"num_decay_steps": 9, "min_lr_ratio": 0.1},
}


def of_timm(optimizer, name):
    import timm.scheduler
    from timm.scheduler.wsd_lr import WSDLRScheduler

    cls, options = OF_TIMM[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # that of plateau will be removed
        if cls == "WSDLRScheduler":
            return WSDLRScheduler(optimizer, **options)
        return getattr(timm.scheduler, cls)(optimizer, **options)


def of_transformers(optimizer, name):
    import transformers

    return transformers.get_scheduler(
        name,
        optimizer,
        num_warmup_steps=4,
        num_training_steps=40,
        scheduler_specific_kwargs=OF_TRANSFORMERS[name],
    )


def optimizer_of_groups():
    """Return an optimizer with two groups."""
    groups = [{"params": [torch.zeros(1, requires_grad=True)], "lr": lr} for lr in (0.1, 0.03)]
    return torch.optim.AdamW(groups)


def walk(scheduler, first, given=None):
    """Yield the rates at each step, as timm's training script and transformers' trainer step."""
    from timm.scheduler.scheduler import Scheduler

    for step in range(first, LENGTH):
        yield [group["lr"] for group in scheduler.optimizer.param_groups]
        scheduler.optimizer.step()
        if isinstance(scheduler, Scheduler):
            # One batch per epoch.
            scheduler.step_update(num_updates=step + 1, metric=given and given[step])
            scheduler.step(step + 1, given and given[step])
        else:
            scheduler.step(*given[step : step + 1] if given else ())


def assert_same_rates(schedules, theirs, first=0):
    counts = np.arange(first, LENGTH, dtype=np.int32)
    with jax.enable_x64(True):
        ours = np.stack([schedule(counts) for schedule in schedules], axis=1)
    np.testing.assert_allclose(ours, theirs, rtol=1e-14)


@pytest.mark.parametrize("name", OF_TIMM)
@pytest.mark.parametrize("scale", [None, 0.5])
def test_timm(name, scale):
    optimizer = optimizer_of_groups()
    if scale is not None:
        optimizer.param_groups[1]["lr_scale"] = scale
    scheduler = of_timm(optimizer, name)
    keywords = {"metrics": METRICS} if name == "plateau" else {}
    first = schedule_from_torch(scheduler, steps=LENGTH, **keywords)
    run = walk(scheduler, 0, METRICS if keywords else None)
    theirs = [next(run) for _ in range(12)]
    later = schedule_from_torch(scheduler, steps=LENGTH, **keywords)
    theirs += run
    assert len({rates[0] for rates in theirs}) > 2
    assert_same_rates(first, theirs)
    start = 11 if keywords else 0  # that of plateau depends on the steps before
    assert_same_rates(later, theirs[start:], start)


@pytest.mark.parametrize("name", OF_TRANSFORMERS)
def test_transformers(name):
    scheduler = of_transformers(optimizer_of_groups(), name)
    keywords = {"metrics": METRICS} if name == "reduce_lr_on_plateau" else {}
    schedules = schedule_from_torch(scheduler, steps=LENGTH, **keywords)
    assert_same_rates(schedules, [*walk(scheduler, 0, METRICS if keywords else None)])


def test_every_scheduler_of_transformers_is_in_the_table():
    from transformers.trainer_utils import SchedulerType

    assert set(OF_TRANSFORMERS) == {kind.value for kind in SchedulerType}


def test_a_rate_that_no_step_has():
    optimizer = optimizer_of_groups()
    scheduler = of_timm(optimizer, "cosine")
    optimizer.param_groups[0]["lr"] *= 1.001
    with pytest.raises(ValueError, match=r"^lr of the groups must be those of a step"):
        schedule_from_torch(scheduler, steps=LENGTH)


CASES = {
    "adamw": Case("AdamW", {"lr": 0.01}, {"weight_decay": 0.0}, steps=LENGTH),
    "sgd": Case("SGD", SGD, {"lr": 0.02}, steps=LENGTH, gives_step=True),
    "plateau": Case("AdamW", {"lr": 0.01}, {}, steps=LENGTH, steps_per_epoch=2, metrics=METRICS),
}


@pytest.mark.parametrize("name", CASES)
def test_a_run_with_timm_continues_in_jax_and_back(name):
    from dataclasses import replace

    kind = "plateau" if name == "plateau" else "cosine, updates"
    case = replace(CASES[name], scheduler=lambda o: of_timm(o, kind))
    (last, visited), whole = there_and_back(case), TorchRun(case)
    assert_same_at_every_step(visited, whole.walk(0, 3 * STEPS), FLOAT64)
    assert [g["lr"] for g in last.optimizer.param_groups] == [
        g["lr"] for g in whole.optimizer.param_groups
    ]
