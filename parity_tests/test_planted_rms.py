"""Tests of the tests of Adagrad, Adadelta and RMSprop: planted defects, and optax, are caught."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
import optax
import pytest

import regjax.optim
from parity_tests.compare import FLOAT32, FLOAT64, assert_same_at_every_step
from parity_tests.optimizers.case import Case, no_bias
from parity_tests.trajectories import synthetic, walk_jax, walk_torch

ADAGRAD = Case("adagrad", "Adagrad", {"lr": 0.1})
ADADELTA = Case("adadelta", "Adadelta", {"lr": 1.0})
RMSPROP = Case("rmsprop", "RMSprop", {"lr": 0.01})
SMALL = {dtype: synthetic(dtype) for dtype in ("float32", "float64")}


def _with(case: Case, **options) -> Case:
    return replace(case, options={**case.options, **options})


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
def test_planted_defect_is_caught_by_the_loosest_tier(defect):
    right, wrong, make = PLANTED[defect]
    in_jax, in_torch = walk_jax(wrong, SMALL["float32"], make), walk_torch(right, SMALL["float32"])
    with pytest.raises(AssertionError, match=r"regjax and torch diverge at step \d+ in 'dense/"):
        assert_same_at_every_step(in_jax, in_torch, FLOAT32, names=("regjax", "torch"))


# Differences of optax's optimizers from torch, which regjax.optim avoids by other links or order.
OPTAX = {
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
def test_optax_itself_is_caught(case, tier, make):
    in_jax, in_torch = walk_jax(case, SMALL[tier.dtype], make), walk_torch(case, SMALL[tier.dtype])
    with pytest.raises(AssertionError, match="diverge at step"):
        assert_same_at_every_step(in_jax, in_torch, tier)


# With options that match torch, the same optimizers agree.
CONFIGURED = {
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


@pytest.mark.parametrize(("case", "make"), CONFIGURED.values(), ids=CONFIGURED)
def test_optax_passes_with_matching_options(case, make):
    in_jax, in_torch = walk_jax(case, SMALL["float64"], make), walk_torch(case, SMALL["float64"])
    assert_same_at_every_step(in_jax, in_torch, FLOAT64)
