"""Optimizers of timm that are registered: with the steps of a class of PyTorch, and with optax."""

from __future__ import annotations

from typing import Any

import optax
import pytest

from parity_tests.compare import FLOAT64, assert_same_at_every_step
from parity_tests.moved_runs import STEPS, Case, TorchRun
from parity_tests.test_interop import there_and_back
from regjax.interop import register_optimizer

pytestmark = pytest.mark.slow
ADAM = {"lr": 0.02, "betas": (0.8, 0.99), "weight_decay": 0.1}
SECOND = {"lr": 0.005, "betas": (0.9, 0.9), "weight_decay": 0.0}
CAUTION = {"caution": False, "corrected_weight_decay": False}
PLAIN = {"maximize": False, "decoupled_weight_decay": False}


def lion(learning_rate, betas, weight_decay):
    return optax.lion(learning_rate, *betas, weight_decay=weight_decay)


# By the name of a class: its registration.
REGISTRATIONS: dict[str, dict[str, Any]] = {
    "timm.optim.adamw.AdamWLegacy": {
        "like": "AdamW",
        "fixed": {**CAUTION, "clipping_threshold": None},
        "ignored": ["max_lr_snapshot"],
    },
    "timm.optim.nadam.NAdamLegacy": {
        "like": "NAdam",
        "options": {"schedule_decay": "momentum_decay"},
        "defaults": PLAIN,
        "state": {"m_schedule": "mu_product"},
        "python_numbers": True,
    },
    "timm.optim.lion.Lion": {
        "create": lion,
        "options": ["betas", "weight_decay"],
        "fixed": {**CAUTION, "maximize": False},
        "ignored": ["max_lr_snapshot"],
        "state": {"exp_avg": "mu"},
    },
}


@pytest.mark.parametrize("name", REGISTRATIONS)
def test_a_run_continues_in_jax_and_back(name):
    import timm.optim

    register_optimizer(name, **REGISTRATIONS[name])
    case = Case(getattr(timm.optim, name.rpartition(".")[2]), ADAM, SECOND)
    (_, visited), whole = there_and_back(case), TorchRun(case)
    assert_same_at_every_step(visited, whole.walk(0, 3 * STEPS), FLOAT64)
