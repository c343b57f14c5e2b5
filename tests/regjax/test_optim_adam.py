from __future__ import annotations

import decimal
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from regjax import optim
from regjax.optim import _adam, _adam_variants
from tests.regjax.optimizers import GRADIENT, PARAMS, first_update, scalar_updates

OPTIMIZERS = {
    "adam": optim.adam,
    "nadam": optim.nadam,
    "radam": optim.radam,
    "adamax": optim.adamax,
}

each_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


def _early(value):
    return lambda count: jnp.where(count == 0, value, 0.0)


# The first step from w = -2 with gradient 1, computed by hand. NAdam with betas (0.8, ...) and no
# momentum_decay has mu = 0.4 at each step: 0.4 * 0.2 / (1 - 0.16) + 0.6 / (1 - 0.4) = 1 + 2 / 21.
@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        (optim.adam(0.1), -0.1),
        (optim.adam(0.1, weight_decay=1.0), 0.1),
        (optim.adam(0.1, weight_decay=1.0, maximize=True), 0.1),
        (optim.adam(0.1, weight_decay=1.0, decoupled_weight_decay=True), 0.1),
        (optim.adam(0.1, eps=1.0), -0.05),
        (optim.adam(0.1, weight_decay=0.25, amsgrad=True), -0.1),
        (optim.adamw(0.1), -0.098),
        (optim.adamw(0.1, weight_decay=0.25), -0.05),
        (optim.adamw(0.1, weight_decay=0.25, maximize=True), 0.15),
        (optim.adamw(_early(0.1), weight_decay=0.25), -0.05),
        (optim.nadam(0.1, (0.8, 0.9), momentum_decay=0.0), -0.1 * (1 + 2 / 21)),
        (optim.nadam(0.1, (0.8, 0.9), weight_decay=1.0, momentum_decay=0.0), 0.1 * (1 + 2 / 21)),
        (optim.nadam(0.1, (0.8, 0.9), 1.0, momentum_decay=0.0), -0.05 * (1 + 2 / 21)),
        # 0.96 ** 1e6 is 0, so mu is 0.8 from the first step on.
        (optim.nadam(0.1, (0.8, 0.9), momentum_decay=1e6), -0.1 * (0.16 / 0.36 + 1)),
        # 0.96 ** psi is one half: mu is 0.6, then 0.7.
        (
            optim.nadam(0.1, (0.8, 0.9), momentum_decay=math.log(0.5) / math.log(0.96)),
            -0.1 * (0.14 / 0.58 + 1),
        ),
        (optim.nadam(0.1, (0.0, 0.9), weight_decay=1.0, decoupled_weight_decay=True), 0.1),
        (optim.nadam(0.1, (0.0, 0.9), weight_decay=0.25, maximize=True), 0.1),
        (optim.radam(0.1), -0.1),
        (optim.radam(0.1, eps=1.0), -0.1),
        (optim.radam(0.1, weight_decay=0.25), -0.05),
        (optim.radam(0.1, weight_decay=0.25, maximize=True), 0.15),
        (optim.radam(0.1, weight_decay=0.25, decoupled_weight_decay=True), -0.05),
        (optim.adamax(0.1), -0.1),
        (optim.adamax(0.1, eps=1.0), -0.05),
        (optim.adamax(0.1, weight_decay=2.0), 0.1),
        (optim.adamax(0.1, weight_decay=1.0, maximize=True), 0.1),
        (optim.adamax(_early(0.1)), -0.1),
    ],
)
def test_first_step_by_hand(optimizer, expected):
    update = first_update(optimizer, jnp.array([-2.0]), jnp.array([1.0]))
    # A decoupled decay is rounded as the parameter is.
    np.testing.assert_allclose(update, [expected], rtol=1e-6, atol=2**-24)


def test_radam_divides_from_its_sixth_step_on():
    b2 = 0.999
    rho, limit = (1999.0 - 2 * 6 * b2**6 / (1 - b2**6)), 1999.0
    rectified = math.sqrt((rho - 4) * (rho - 2) * limit / ((limit - 4) * (limit - 2) * rho))
    for gradient in (1.0, 100.0):
        updates, _ = scalar_updates(optim.radam(0.1), [gradient] * 6)
        np.testing.assert_allclose(updates[:5], -0.1 * gradient, rtol=1e-6)
        np.testing.assert_allclose(updates[5], -0.1 * rectified, rtol=1e-5)
    never, _ = scalar_updates(optim.radam(0.1, (0.9, 0.6)), [100.0] * 30)
    np.testing.assert_allclose(never, -10.0, rtol=1e-6)


def test_radam_divides_by_no_length_that_was_rounded_up():
    # After 5 steps it is 5 - 4e-9.
    updates, _ = scalar_updates(optim.radam(0.1, (0.9, 1 - 1e-9)), [100.0] * 5)
    np.testing.assert_allclose(updates, -10.0, rtol=1e-6)
    # It is less than 5 for any number of steps.
    optimizer = optim.radam(0.1, (0.0, 2 / 3))
    state = optimizer.init(jnp.array(0.0))
    state = {**state, "moments": state["moments"]._replace(count=jnp.int32(99))}
    np.testing.assert_allclose(optimizer.update(jnp.array(100.0), state)[0], -10.0, rtol=1e-6)


def test_radam_adds_eps_to_the_root_that_is_not_corrected():
    (*_, update), _ = scalar_updates(optim.radam(0.1, eps=1.0), [1.0] * 6)
    (*_, without), _ = scalar_updates(optim.radam(0.1), [1.0] * 6)
    root = math.sqrt(1 - 0.999**6)
    np.testing.assert_allclose(update / without, root / (root + 1.0), rtol=1e-5)


# Where the subtraction in torch's formula would cost float32 most, by the sum that it stands for:
# rho = 2 * (mean of 1 ... t, weighted with b2 ** 0 ... b2 ** (t - 1)) - 1.
@pytest.mark.parametrize("b2", [0.5, 0.9, 0.99, 0.999, 0.99999])
@pytest.mark.parametrize("as_array", [False, True])
def test_radams_length_keeps_its_digits_in_float32(b2, as_array):
    for count in (1, 2, 5, 6, 50, 249, 251, 3000, 10**6):
        weights = b2 ** np.arange(count, dtype=np.float64)
        exact = 2 * np.sum(np.arange(1, count + 1) * weights) / weights.sum() - 1
        given = jnp.float32(b2) if as_array else b2
        length, limit = _adam_variants._average_lengths(given, jnp.int32(count))
        assert length.dtype == limit.dtype == "float32"
        # An array has been rounded to float32, which moves 1 - b2 by up to 3e-8 / (1 - b2).
        slack = 4e-8 / (1 - b2) if as_array else 0.0
        np.testing.assert_allclose(length, exact, rtol=2e-6 + slack)
        np.testing.assert_allclose(limit, 2 / (1 - b2) - 1, rtol=2e-6 + slack)


def test_radams_length_in_float64():
    with jax.enable_x64(True), decimal.localcontext(prec=40):
        for x in (1e-3, 0.1, 0.2, 0.24, 0.26, 1.0, 30.0):
            exact = 1 - decimal.Decimal(x) / (decimal.Decimal(x).exp() - 1)
            np.testing.assert_allclose(
                _adam_variants._shortfall(jnp.float64(x)), float(exact), rtol=2e-14
            )


def test_radams_rectification():
    for length, limit in ((5.1, 5.5), (5.98, 1999.0), (100.0, 1999.0)):
        squared = (length - 4) * (length - 2) * limit / ((limit - 4) * (limit - 2) * length)
        found = _adam_variants._rectification(jnp.float32(length), jnp.float32(limit))
        np.testing.assert_allclose(found, math.sqrt(squared), rtol=1e-6)


def test_radam_meets_no_nan_that_it_would_drop():
    # The root has no value below rho = 4, no slope at 4, and a pole at a limit of 4.
    def first_step(b2):
        return first_update(optim.radam(0.1, (0.9, b2)), jnp.ones(()), jnp.ones(()))

    with jax.debug_nans(True):
        for b2 in (0.999, 0.5):
            scalar_updates(optim.radam(0.1, (0.9, b2)), [1.0] * 4)
            assert jax.grad(first_step)(b2) == 0.0


@pytest.mark.parametrize("b1", [0.0, jnp.float32(0.0)], ids=["number", "array"])
@each_optimizer
def test_a_small_gradient_after_a_large_one_keeps_its_digits(make, b1):
    _, state = scalar_updates(make(betas=(b1, 0.9)), [1e8, 1.0])
    assert state["moments"].mu == 1.0


# As torch.lerp, from the nearer end, and at one half from the gradient.
@pytest.mark.parametrize(
    ("b1", "moment", "gradient", "expected"),
    [
        (0.75, 3.0, 2.0**26, 2.0**24 + 2),
        (0.25, 2.0**26, 3.0, 2.0**24 + 2),
        (0.5, 2.0**24, -1.0, 2.0**23 - 1),
        (0, 2.0**24, -1.0, -1.0),
    ],
)
def test_a_moment_is_averaged_from_the_nearer_end(b1, moment, gradient, expected):
    def average(b1):
        return _adam.first_moment({"w": jnp.float32(moment)}, {"w": jnp.float32(gradient)}, b1)

    for found in (average(b1), average(jnp.float32(b1)), jax.vmap(average)(jnp.array([b1], float))):
        assert found["w"] == expected


@each_optimizer
def test_the_second_moment_fades_by_the_second_beta(make):
    # The first step does not depend on it, since the bias correction cancels the factor.
    _, state = scalar_updates(make(betas=(0.5, 0.75)), [2.0, 1.0])
    assert state["moments"].nu == (1.5 if make is optim.adamax else 1.0)


def test_only_nadam_adds_two_terms():
    for name, make in OPTIMIZERS.items():
        last = make().init(PARAMS)["learning_rate"]
        assert last == ((optax.EmptyState(),) * 2 if name == "nadam" else optax.EmptyState())


def test_nadams_product_is_of_all_momenta():
    _, state = scalar_updates(optim.nadam(betas=(0.9, 0.999), momentum_decay=0.5), [1.0] * 20)
    momenta = 0.9 * (1 - 0.5 * 0.96 ** (0.5 * np.arange(1, 21)))
    np.testing.assert_allclose(state["moments"].mu_product, momenta.prod(), rtol=1e-5)
    assert state["moments"].mu_product.dtype == "float32"


# Each term is less than half a unit in the last place of 1, but not their sum; torch loses both.
@pytest.mark.parametrize("decoupled", [False, True])
def test_nadam_rounds_between_its_terms(decoupled):
    optimizer = optim.nadam(
        0.96 * 2**-24, (0.8, 0.9), momentum_decay=0.0, decoupled_weight_decay=decoupled
    )
    params, gradient = jnp.array([1.0]), jnp.array([-1.0])
    state = optimizer.init(params)
    step, _ = optimizer.update(gradient, state, params)
    assert optax.apply_updates(params, step) == 1.0
    whole, _ = optimizer.update(gradient, state)
    assert optax.apply_updates(params, whole) == 1.0 + 2**-23


@each_optimizer
def test_a_state_is_good_for_any_number_of_steps(make):
    optimizer = make(0.1)
    state = optimizer.init(PARAMS)
    far = state["moments"]._replace(count=jnp.int32(2**31 - 2))
    if make is optim.nadam:
        far = far._replace(mu_product=jnp.float32(0.0))
    state = {**state, "moments": far}
    for _ in range(3):
        updates, state = optimizer.update(GRADIENT, state)
        assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(updates))
    assert state["moments"].count == 2**31 - 1


@each_optimizer
def test_betas_may_be_zero(make):
    updates = first_update(make(0.1, (0.0, 0.0)))
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(updates))


def test_bfloat16_is_rounded_once():
    # Rounded to bfloat16 first, the coefficient would be 1.
    held, gradient = jnp.bfloat16(1.0), jnp.bfloat16(2.125)
    optimizer = optim.adam(betas=(0.9, 0.999))
    state = optimizer.init(held)
    state = {**state, "moments": state["moments"]._replace(nu=held)}
    nu = optimizer.update(gradient, state)[1]["moments"].nu
    assert nu == jnp.bfloat16(0.999 + 0.001 * 2.125**2) != held + jnp.bfloat16(0.001 * 2.125**2)
