"""Tests of the tests: a defect in one framework must make `test_optimizers` fail."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
import optax
import pytest

import regjax.optim
from parity_tests.compare import (
    BITWISE,
    FLOAT32,
    FLOAT64,
    Tier,
    assert_same_at_every_step,
    deviation,
)
from parity_tests.optimizers.case import Case, no_bias
from parity_tests.trajectories import synthetic, walk_jax, walk_torch

SGD = Case("sgd", "SGD", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1})
ADAM = Case("adam", "Adam", {"lr": 0.01, "weight_decay": 0.1})
ADAMW = Case("adamw", "AdamW", {"lr": 0.01, "weight_decay": 0.1})
SMALL = {dtype: synthetic(dtype) for dtype in ("float32", "float64")}


def _penalty_of(case: Case, penalty: float) -> Case:
    return replace(case, options={**case.options, "weight_decay": 0.0}, penalty=penalty)


def _damped_from_the_first_step(learning_rate, *, momentum, dampening, mask):
    del mask
    return optax.chain(
        optax.scale(1 - dampening), optax.trace(momentum), optax.scale(-learning_rate)
    )


def _late_schedule(learning_rate, *, mask):
    return regjax.optim.sgd(lambda count: learning_rate(count + 1), mask=mask)


def _without_amsgrad(learning_rate, *, amsgrad, mask):
    del amsgrad
    return regjax.optim.adam(learning_rate, mask=mask)


# What torch does, what JAX does instead, and with what.
PLANTED = {
    "factor 2 missing, SGD": (SGD, _penalty_of(SGD, 0.1), None),
    "factor 2 missing, Adam": (ADAM, _penalty_of(ADAM, 0.1), None),
    "factor 2 missing in torch": (_penalty_of(SGD, 0.1), SGD, None),
    "bias decayed on one side": (replace(SGD, mask=no_bias), SGD, None),
    "bias decayed on the other side": (ADAMW, replace(ADAMW, mask=no_bias), None),
    "decoupled for coupled": (ADAM, replace(ADAM, optimizer="AdamW"), None),
    "coupled for decoupled": (ADAMW, replace(ADAMW, optimizer="Adam"), None),
    "decay forgotten": (SGD, replace(SGD, options={"lr": 0.1, "momentum": 0.9}), None),
    "optax's default of AdamW": (
        replace(ADAMW, options={"lr": 0.01}),
        replace(ADAMW, options={"lr": 0.01, "weight_decay": 1e-4}),
        None,
    ),
    "first gradient damped": (
        *[Case("dampening", "SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.4})] * 2,
        _damped_from_the_first_step,
    ),
    "maximum not taken": (
        *[Case("amsgrad", "Adam", {"lr": 0.01, "amsgrad": True})] * 2,
        _without_amsgrad,
    ),
    "schedule one step late": (
        *[Case("schedule", "SGD", {"lr": 0.1}, half_life=30)] * 2,
        _late_schedule,
    ),
}


@pytest.mark.parametrize("defect", PLANTED)
def test_planted_defect_is_caught_by_the_loosest_tier(defect):
    right, wrong, make = PLANTED[defect]
    ours, theirs = walk_jax(wrong, SMALL["float32"], make), walk_torch(right, SMALL["float32"])
    with pytest.raises(AssertionError, match=r"regjax and torch part at step \d+ in 'dense/"):
        assert_same_at_every_step(ours, theirs, FLOAT32, names=("regjax", "torch"))


# Where optax's own optimizers part from torch: why regjax.optim has a link of its own.
OPTAX = {
    "maximum of corrected moments": (
        Case("amsgrad", "Adam", {"lr": 0.01, "amsgrad": True}),
        FLOAT64,
        lambda learning_rate, amsgrad, mask: optax.amsgrad(learning_rate),
    ),
    "bias correction in float32": (
        Case("betas", "Adam", {"lr": 0.01, "betas": (0.9, 0.99999)}),
        FLOAT32,
        lambda learning_rate, betas, mask: optax.adam(learning_rate, *betas),
    ),
}


@pytest.mark.parametrize(("case", "tier", "make"), OPTAX.values(), ids=OPTAX)
def test_optax_itself_is_caught(case, tier, make):
    # optax raises a float to the integer count, which strict promotion forbids.
    with jax.numpy_dtype_promotion("standard"):
        ours = walk_jax(case, SMALL[tier.dtype], make)
    with pytest.raises(AssertionError, match="part at step"):
        assert_same_at_every_step(ours, walk_torch(case, SMALL[tier.dtype]), tier)


def _leaf(*values: float, dtype: str = "float32") -> np.ndarray:
    return np.array(values, dtype)


def _run(*values: float) -> list[dict[str, np.ndarray]]:
    return [{"a": _leaf(1.0, 2.0), "b": _leaf(value)} for value in values]


def test_the_first_step_and_the_worst_parameter_are_named():
    right = [{"a": np.ones(2), "b": np.ones(2)} for _ in range(4)]
    wrong = [{name: leaf.copy() for name, leaf in step.items()} for step in right]
    wrong[2]["b"][1] += 1e-3
    wrong[2]["a"][0] += 1e-6
    wrong[3]["a"][0] += 1.0
    with pytest.raises(AssertionError, match="step 3 in 'b'"):
        assert_same_at_every_step(wrong, right, FLOAT64)


@pytest.mark.parametrize(
    ("tier", "passes", "fails"),
    [
        (BITWISE, 1.0, np.nextafter(np.float32(1), np.float32(2))),
        (BITWISE, np.nan, -np.nan),
        (FLOAT32, 1.0 + 9e-6, 1.0 + 2e-5),
        (FLOAT64, 1.0, np.nextafter(np.float32(1), np.float32(2))),
        (FLOAT32, 1.0, np.nan),
        (FLOAT64, 1.0, np.nan),
    ],
)
def test_each_tier_has_its_edge(tier, passes, fails):
    reference = _run(1.0, np.nan if np.isnan(passes) else 1.0)
    assert_same_at_every_step(_run(1.0, passes), reference, tier)
    with pytest.raises(AssertionError, match="part at step 2 in 'b'"):
        assert_same_at_every_step(_run(1.0, fails), reference, tier)


@pytest.mark.parametrize(
    ("left", "message"),
    [
        ([], "nothing to compare"),
        (_run(1.0, 1.0), "nothing to compare"),
        ([{"a": _leaf(1.0, 2.0)}], "other names"),
        ([{"a": _leaf(1.0, 2.0), "b": _leaf(1.0, dtype="float64")}], "differ in form in 'b'"),
        ([{"a": _leaf(1.0, 2.0), "b": _leaf(1.0, 1.0)}], "differ in form in 'b'"),
    ],
)
def test_runs_of_another_form_differ(left, message):
    with pytest.raises(AssertionError, match=message):
        assert_same_at_every_step(left, _run(1.0), FLOAT32)


def test_two_empty_runs_do_not_pass():
    with pytest.raises(AssertionError, match="nothing to compare"):
        assert_same_at_every_step([], [], Tier("float32", 1e-5))
    with pytest.raises(AssertionError, match="names, or none"):
        assert_same_at_every_step([{}], [{}], FLOAT32)


def test_deviation_is_of_the_last_step():
    assert deviation(_run(5.0, 1.0), _run(1.0, 2.0)) == 0.5
