from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from regjax import optim
from tests.regjax.optimizers import PARAMS, assert_close, first_update, in_dtype, scalar_updates

OPTIMIZERS = {"adagrad": optim.adagrad, "adadelta": optim.adadelta, "rmsprop": optim.rmsprop}

each_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


def _early(value):
    return lambda count: jnp.where(count == 0, value, 0.0)


# The first step from w = -2 with gradient 1, computed by hand.
@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        (optim.adagrad(), -0.01),
        (optim.adagrad(0.1), -0.1),
        (optim.adagrad(0.1, 0.5), -0.1),
        (optim.adagrad(0.1, weight_decay=0.25), -0.1),
        (optim.adagrad(0.1, weight_decay=1.0), 0.1),
        (optim.adagrad(0.1, weight_decay=0.25, maximize=True), 0.1),
        (optim.adagrad(0.1, initial_accumulator_value=3.0), -0.05),
        (optim.adagrad(0.1, eps=1.0), -0.05),
        (optim.adagrad(0.3, initial_accumulator_value=3.0, eps=1.0), -0.1),
        (optim.adagrad(_early(0.1)), -0.1),
        (optim.adagrad(_early(0.1), 0.5), -0.1),
        (optim.adagrad(0.1, weight_decay=_early(1.0)), 0.1),
        (optim.adadelta(), -0.0031622619),
        (optim.adadelta(1.0, 0.25, 0.25), -0.5),
        (optim.adadelta(0.1, 0.25, 0.25), -0.05),
        (optim.adadelta(1.0, 0.25, 0.25, weight_decay=1.0), 0.5),
        (optim.adadelta(1.0, 0.25, 0.25, weight_decay=1.0, maximize=True), 1.5 / 7**0.5),
        (optim.adadelta(_early(0.1), 0.25, 0.25), -0.05),
        (optim.adadelta(1.0, 0.25, 0.25, weight_decay=_early(1.0)), 0.5),
        (optim.rmsprop(), -0.1),
        (optim.rmsprop(0.1, 0.75), -0.2),
        (optim.rmsprop(0.1, 0.75, 0.5), -0.1),
        (optim.rmsprop(0.1, 0.75, weight_decay=0.25), -0.2),
        (optim.rmsprop(0.1, 0.75, weight_decay=0.25, maximize=True), 0.2),
        (optim.rmsprop(0.1, 0.75, momentum=0.5), -0.2),
        (optim.rmsprop(0.1, 0.5, centered=True), -0.2),
        (optim.rmsprop(0.1, 0.5, 0.5, centered=True), -0.1),
        (optim.rmsprop(_early(0.1), 0.75), -0.2),
        (optim.rmsprop(0.1, 0.75, weight_decay=_early(1.0)), 0.2),
    ],
)
def test_first_step_by_hand(optimizer, expected):
    update = first_update(optimizer, jnp.array([-2.0]), jnp.array([1.0]))
    np.testing.assert_allclose(update, [expected], rtol=1e-6)


RATES_OF_THREE_STEPS = jnp.array([1.0, 0.5, 0.25])


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        (optim.adagrad(1.0), [1.0, 2**-0.5, 3**-0.5]),
        (optim.adagrad(1.0, 0.5), [1.0, 2**-0.5 / 1.5, 3**-0.5 / 2.0]),
        (
            optim.adagrad(lambda count: RATES_OF_THREE_STEPS[count], 0.5),
            [1.0, 0.5 * 2**-0.5 / 1.5, 0.25 * 3**-0.5 / 2.0],
        ),
        # The learning rate does not enter the mean of squared steps.
        (optim.adadelta(0.1, 0.0, 1.0), [0.1 * 0.5**0.5, 0.1 * 0.75**0.5, 0.1 * 0.875**0.5]),
        (optim.rmsprop(1.0, 0.5), [2**0.5, (4 / 3) ** 0.5, (8 / 7) ** 0.5]),
        (optim.rmsprop(1.0, 0.0, momentum=0.5), [1.0, 1.5, 1.75]),
        # Neither does the momentum.
        (
            optim.rmsprop(lambda count: RATES_OF_THREE_STEPS[count], 0.0, momentum=0.5),
            [1.0, 0.75, 0.4375],
        ),
        (optim.rmsprop(1.0, 0.5, centered=True), [2.0, 4 / 3**0.5, 8 / 7**0.5]),
    ],
)
def test_three_steps_by_hand(optimizer, expected):
    updates, _ = scalar_updates(optimizer, [1.0] * 3)
    np.testing.assert_allclose(np.negative(updates), expected, rtol=1e-6)


def test_the_decay_of_the_learning_rate_in_late_steps():
    optimizer = optim.adagrad(1.0, 1e-3)
    state = optimizer.init(jnp.array(0.0))
    late = optax.ScaleByScheduleState(jnp.int32(10**6))
    update, _ = optimizer.update(jnp.array(1.0), {**state, "learning_rate": late})
    np.testing.assert_allclose(update, -1 / 1001, rtol=1e-6)


# After one step from w = -2 with gradient 1, by hand.
@pytest.mark.parametrize(
    ("optimizer", "fields"),
    [
        (optim.adagrad(initial_accumulator_value=3.0), {"sum_of_squares": 4.0}),
        (optim.adagrad(lr_decay=0.5), {"sum_of_squares": 1.0, "count": 1}),
        (optim.adadelta(0.1, 0.25, 0.25), {"e_g": 0.75, "e_x": 0.75 * 0.25}),
        (optim.rmsprop(0.1, 0.75), {"nu": 0.25}),
        (optim.rmsprop(0.1, 0.75, momentum=0.5), {"nu": 0.25, "trace": 2.0}),
        (
            optim.rmsprop(0.1, 0.5, momentum=0.5, centered=True),
            {"nu": 0.5, "mu": 0.5, "trace": 2.0},
        ),
    ],
)
def test_what_the_state_holds(optimizer, fields):
    params = jnp.array(-2.0)
    after = optimizer.update(jnp.array(1.0), optimizer.init(params), params)[1]
    for field, expected in fields.items():
        np.testing.assert_allclose(optax.tree.get(after, field), expected, rtol=1e-6)


def test_a_float32_learning_rate_decays_under_x64():
    with jax.enable_x64(True):
        optimizer = optim.adagrad(jnp.float32(0.5), jnp.float32(0.5))
        assert -scalar_updates(optimizer, [1.0] * 2)[0][1] == pytest.approx(
            0.5 * 2**-0.5 / 1.5, rel=1e-7
        )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@each_optimizer
def test_a_parameter_without_gradient_stays_where_it_is(make, dtype):
    # In float16 itself the default eps would be 0, and the step 0 / 0.
    zeros = jax.tree.map(lambda leaf: jnp.zeros_like(leaf, dtype), PARAMS)
    assert_close(first_update(make(), in_dtype(PARAMS, dtype), zeros), zeros)
