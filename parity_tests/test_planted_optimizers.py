"""Tests of the tests: a defect in one framework must make `test_optimizers` fail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
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
ADAGRAD = Case("adagrad", "Adagrad", {"lr": 0.1})
ADADELTA = Case("adadelta", "Adadelta", {"lr": 1.0})
RMSPROP = Case("rmsprop", "RMSprop", {"lr": 0.01})
SMALL = {dtype: synthetic(dtype) for dtype in ("float32", "float64")}


def _with(case: Case, **options) -> Case:
    return replace(case, options={**case.options, **options})


def _penalty_of(case: Case, penalty: float) -> Case:
    return replace(_with(case, weight_decay=0.0), penalty=penalty)


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


def _scaled_by(scale: Callable[[jax.Array], jax.Array]):
    """Return a constructor of Adagrad with another function of the sums of squares."""

    def make(learning_rate, *, mask, **options):
        del mask, options

        def init(params):
            return optax.tree.zeros_like(params)

        def update(updates, state, params=None):
            del params
            sums = jax.tree.map(lambda g, s: s + g * g, updates, state)
            updates = jax.tree.map(lambda g, s: -learning_rate * g * scale(s), updates, sums)
            return updates, sums

        return optax.GradientTransformation(init, update)

    return make


def _momentum_after_the_rate(learning_rate, *, momentum, mask):
    inner = regjax.optim.rmsprop(learning_rate, mask=mask)
    return optax.chain(inner, optax.trace(momentum))


def _decayed_from_the_first_step(learning_rate, *, lr_decay, mask):
    return regjax.optim.adagrad(
        lambda count: learning_rate / (1.0 + lr_decay * (jnp.asarray(count, float) + 1.0)),
        mask=mask,
    )


def _rate_in_the_mean_of_steps(learning_rate, *, mask):
    """Return Adadelta whose mean of squared steps includes the learning rate."""
    del mask

    def update(updates, state, params=None):
        del params
        e_g = optax.tree.update_moment(updates, state.e_g, 0.9, 2)
        updates = jax.tree.map(
            lambda g, v, u: learning_rate * jnp.sqrt(u + 1e-6) / jnp.sqrt(v + 1e-6) * g,
            updates,
            e_g,
            state.e_x,
        )
        e_x = optax.tree.update_moment(updates, state.e_x, 0.9, 2)
        return jax.tree.map(jnp.negative, updates), optax.ScaleByAdaDeltaState(e_g, e_x)

    return optax.GradientTransformation(optax.scale_by_adadelta().init, update)


def _uncentered(learning_rate, *, centered, mask):
    del centered
    return regjax.optim.rmsprop(learning_rate, mask=mask)


# The case in torch, the wrong case in JAX, and the wrong constructor in JAX, if any.
PLANTED = {
    "factor 2 missing, SGD": (SGD, _penalty_of(SGD, 0.1), None),
    "factor 2 missing, Adam": (ADAM, _penalty_of(ADAM, 0.1), None),
    "factor 2 missing in torch": (_penalty_of(SGD, 0.1), SGD, None),
    "bias decayed on one side": (replace(SGD, mask=no_bias), SGD, None),
    "bias decayed on the other side": (ADAMW, replace(ADAMW, mask=no_bias), None),
    "decoupled for coupled": (ADAM, replace(ADAM, optimizer="AdamW"), None),
    "coupled for decoupled": (ADAMW, replace(ADAMW, optimizer="Adam"), None),
    "decay forgotten": (SGD, _with(SGD, weight_decay=0.0), None),
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
    "Adagrad's eps inside the root": (
        *[_with(ADAGRAD, eps=1e-3)] * 2,
        _scaled_by(lambda s: 1.0 / jnp.sqrt(s + 1e-3)),
    ),
    "Adagrad's sums start at 0.1": (ADAGRAD, _with(ADAGRAD, initial_accumulator_value=0.1), None),
    "Adagrad's start forgotten": (_with(ADAGRAD, initial_accumulator_value=0.1), ADAGRAD, None),
    "lr_decay forgotten": (_with(ADAGRAD, lr_decay=0.01), ADAGRAD, None),
    "lr_decay one step early": (
        *[_with(ADAGRAD, lr_decay=0.01)] * 2,
        _decayed_from_the_first_step,
    ),
    "Adadelta's rate in the mean of steps": (
        *[_with(ADADELTA, lr=0.5)] * 2,
        _rate_in_the_mean_of_steps,
    ),
    "Adadelta's rho turned around": (
        _with(ADADELTA, rho=0.9),
        _with(ADADELTA, rho=0.1),
        None,
    ),
    "Adadelta's decay forgotten": (_with(ADADELTA, weight_decay=0.1), ADADELTA, None),
    "Adadelta's bias decayed": (
        replace(_with(ADADELTA, weight_decay=0.1), mask=no_bias),
        _with(ADADELTA, weight_decay=0.1),
        None,
    ),
    "RMSprop's momentum after the rate": (
        *[replace(_with(RMSPROP, momentum=0.9), half_life=30)] * 2,
        _momentum_after_the_rate,
    ),
    "RMSprop not centered": (*[_with(RMSPROP, centered=True)] * 2, _uncentered),
    "RMSprop's alpha of optax": (RMSPROP, _with(RMSPROP, alpha=0.9), None),
    "RMSprop's sign": (RMSPROP, _with(RMSPROP, maximize=True), None),
}


@pytest.mark.parametrize("defect", PLANTED)
@pytest.mark.sample(5)
def test_planted_defect_is_caught_by_the_loosest_tier(defect):
    right, wrong, make = PLANTED[defect]
    in_jax, in_torch = walk_jax(wrong, SMALL["float32"], make), walk_torch(right, SMALL["float32"])
    with pytest.raises(AssertionError, match=r"regjax and torch diverge at step \d+ in 'dense/"):
        assert_same_at_every_step(in_jax, in_torch, FLOAT32, names=("regjax", "torch"))


# Differences of optax's optimizers from torch, which regjax.optim avoids by other links or order.
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
    "adagrad's defaults": (
        ADAGRAD,
        FLOAT32,
        lambda learning_rate, mask: optax.adagrad(learning_rate),
    ),
    "adagrad's eps inside the root": (
        ADAGRAD,
        FLOAT64,
        lambda learning_rate, mask: optax.adagrad(learning_rate, 0.0, 1e-10),
    ),
    "adagrad's start": (
        ADAGRAD,
        FLOAT32,
        lambda learning_rate, mask: optax.adagrad(learning_rate, eps=1e-10),
    ),
    "adadelta without a rate ascends": (
        ADADELTA,
        FLOAT32,
        lambda learning_rate, mask: optax.adadelta(),
    ),
    "rmsprop's defaults": (
        RMSPROP,
        FLOAT32,
        lambda learning_rate, mask: optax.rmsprop(learning_rate),
    ),
    "rmsprop's eps inside the root": (
        RMSPROP,
        FLOAT64,
        lambda learning_rate, mask: optax.rmsprop(learning_rate, 0.99),
    ),
    "rmsprop's momentum after the rate": (
        replace(_with(RMSPROP, momentum=0.9), half_life=30),
        FLOAT32,
        lambda learning_rate, momentum, mask: optax.rmsprop(
            learning_rate, 0.99, eps_in_sqrt=False, momentum=momentum
        ),
    ),
}


@pytest.mark.parametrize(("case", "tier", "make"), OPTAX.values(), ids=OPTAX)
@pytest.mark.sample(6)
def test_optax_itself_is_caught(case, tier, make):
    # optax raises a float to the integer count, which strict promotion forbids.
    with jax.numpy_dtype_promotion("standard"):
        in_jax = walk_jax(case, SMALL[tier.dtype], make)
    with pytest.raises(AssertionError, match="diverge at step"):
        assert_same_at_every_step(in_jax, walk_torch(case, SMALL[tier.dtype]), tier)


# With options that match torch, the same optimizers agree.
TOLD = {
    "adadelta": (ADADELTA, lambda learning_rate, mask: optax.adadelta(learning_rate)),
    "rmsprop": (
        RMSPROP,
        lambda learning_rate, mask: optax.rmsprop(learning_rate, 0.99, eps_in_sqrt=False),
    ),
    "rmsprop-momentum": (
        _with(RMSPROP, momentum=0.9),
        lambda learning_rate, momentum, mask: optax.rmsprop(
            learning_rate, 0.99, eps_in_sqrt=False, momentum=momentum
        ),
    ),
}


@pytest.mark.parametrize(("case", "make"), TOLD.values(), ids=TOLD)
def test_optax_passes_where_it_can_be_told(case, make):
    in_jax, in_torch = walk_jax(case, SMALL["float64"], make), walk_torch(case, SMALL["float64"])
    assert_same_at_every_step(in_jax, in_torch, FLOAT64)


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
    with pytest.raises(AssertionError, match="diverge at step 2 in 'b'"):
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
