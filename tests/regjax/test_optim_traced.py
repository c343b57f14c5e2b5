"""Compiled steps, and hyperparameters that are traced or injected."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import regjax
from regjax import optim
from tests.regjax.optimizers import (
    VARIANTS,
    arrays,
    assert_close,
    dtypes,
    each_variant,
    first_update,
    walk,
)


@each_variant
@pytest.mark.sample(4)
def test_one_compilation_walks_as_a_loop_does(variant):
    params, gradient = variant.problem
    halved = lambda count: 0.1 / (1.0 + count.astype(float))
    optimizer = variant.make(halved if variant.has_schedule else 0.1)
    traces = []

    def train_step(carry, _):
        traces.append(None)
        params, state = carry
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), None

    start = (params, optimizer.init(params))
    compiled, carry = jax.jit(train_step), start
    for _ in range(4):
        carry, _ = compiled(carry, None)
    assert len(traces) == compiled._cache_size() == 1
    visited, state = walk(optimizer, [gradient] * 4, params)
    assert_close(carry, (visited[-1], state), atol=variant.close)
    scanned, _ = jax.eval_shape(lambda: jax.lax.scan(train_step, start, length=4))
    assert dtypes(scanned) == dtypes(start)


@each_variant
@pytest.mark.sample(9)
def test_a_traced_learning_rate(variant):
    # The root of the square of a zero gradient has no derivative.
    params, gradient = variant.problem
    gradient = jax.tree.map(lambda g: g + 0.375, gradient)

    def after(rate):
        return walk(variant.make(rate), [gradient] * 2, params)[0][-1]["kernel"]

    value_and_slope = jax.jit(lambda rate: jax.jvp(after, (rate,), (1.0,)))
    values = {rate: value_and_slope(rate) for rate in (0.0, 0.09, 0.1, 0.11)}
    assert_close(values[0.1][0], after(0.1), atol=variant.close)
    difference = (values[0.11][0] - values[0.09][0]) / 0.02
    np.testing.assert_allclose(values[0.1][1], difference, rtol=0.01, atol=2e-3)
    assert np.all(np.isfinite(values[0.0]))


# The others temporarily store a root or a decayed gradient, as in optax.
IN_PLACE = ("sgd", "asgd", "rprop", "adam", "amsgrad", "adamw", "nadam", "radam", "adamax")


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the sizes are those on a CPU")
@pytest.mark.parametrize("name", IN_PLACE)
def test_a_step_writes_over_what_it_is_given(name):
    shapes = {"kernel": (64, 128), "bias": ()}
    params = {leaf: jax.ShapeDtypeStruct(shape, "float32") for leaf, shape in shapes.items()}
    optimizer = VARIANTS[name].make(0.1)
    state = jax.eval_shape(optimizer.init, params)

    def train_step(params, state, gradient):
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(train_step, donate_argnums=(0, 1)).lower(params, state, params).compile()
    assert step.memory_analysis().temp_size_in_bytes < 1000  # a copy of the kernel has 32,768


# Every numeric hyperparameter can be traced. Tuples cannot, but their elements can.
RATE_AND_DECAY = {"learning_rate": 0.125, "weight_decay": 0.5}
MOMENTS = {**RATE_AND_DECAY, "b1": 0.75, "b2": 0.9, "eps": 0.5}


def _betas_apart(make, **options):
    def made(learning_rate, weight_decay, b1, b2, eps):
        return make(learning_rate, (b1, b2), eps, weight_decay, **options)

    return made


def _nadam(learning_rate, weight_decay, b1, b2, eps, momentum_decay):
    return optim.nadam(learning_rate, (b1, b2), eps, weight_decay, momentum_decay)


def _rprop(learning_rate, shrink, grow, smallest, largest):
    return optim.rprop(learning_rate, (shrink, grow), (smallest, largest))


def _adafactor(learning_rate, beta2_decay, eps1, eps2, d, weight_decay):
    return optim.adafactor(learning_rate, beta2_decay, (eps1, eps2), d, weight_decay)


def _muon(learning_rate, weight_decay, momentum, a, b, c, eps):
    options = {"eps": eps, "ns_dtype": "float32"}
    return optim.muon(learning_rate, weight_decay, momentum, True, (a, b, c), **options)


INJECTED = {
    "sgd": (optim.sgd, {**RATE_AND_DECAY, "momentum": 0.75, "dampening": 0.5}),
    "nesterov": (optim.sgd, {**RATE_AND_DECAY, "momentum": 0.75, "nesterov": True}),
    "asgd": (optim.asgd, {**RATE_AND_DECAY, "lambd": 0.5, "alpha": 0.5, "t0": 1.0}),
    "rprop": (optim.rprop, {"learning_rate": 0.125}),
    "rprop-apart": (
        _rprop,
        {"learning_rate": 0.5, "shrink": 0.5, "grow": 1.5, "smallest": 0.1, "largest": 1.0},
    ),
    "adam": (optim.adam, RATE_AND_DECAY),
    "adam-apart": (_betas_apart(optim.adam), MOMENTS),
    "amsgrad-apart": (_betas_apart(optim.adam, amsgrad=True), MOMENTS),
    "adamw": (optim.adamw, RATE_AND_DECAY),
    "adamw-apart": (_betas_apart(optim.adamw), MOMENTS),
    "nadam": (optim.nadam, RATE_AND_DECAY),
    "nadam-apart": (_nadam, {**MOMENTS, "momentum_decay": 0.5}),
    "radam": (optim.radam, RATE_AND_DECAY),
    "radam-apart": (_betas_apart(optim.radam), MOMENTS),
    "adamax": (optim.adamax, RATE_AND_DECAY),
    "adamax-apart": (_betas_apart(optim.adamax), MOMENTS),
    "adagrad": (
        optim.adagrad,
        {**RATE_AND_DECAY, "lr_decay": 0.5, "initial_accumulator_value": 0.5, "eps": 0.5},
    ),
    "adadelta": (optim.adadelta, {**RATE_AND_DECAY, "rho": 0.75, "eps": 0.5}),
    "rmsprop": (optim.rmsprop, {**RATE_AND_DECAY, "alpha": 0.75, "eps": 0.5, "momentum": 0.5}),
    "rmsprop-centered": (optim.rmsprop, {**RATE_AND_DECAY, "momentum": 0.9, "centered": True}),
    "adafactor": (optim.adafactor, RATE_AND_DECAY),
    "adafactor-apart": (
        _adafactor,
        {**RATE_AND_DECAY, "beta2_decay": -0.5, "eps1": 0.5, "eps2": 2.0, "d": 1.5},
    ),
    # Then the number of steps is an array, too.
    "muon": (optim.muon, {**RATE_AND_DECAY, "momentum": 0.5, "ns_steps": 3, "ns_dtype": "float32"}),
    "muon-apart": (
        _muon,
        {**RATE_AND_DECAY, "momentum": 0.5, "a": 1.5, "b": -0.5, "c": 0.125, "eps": 4.0},
    ),
}


@pytest.mark.parametrize(("name", "make", "given"), [(k, *v) for k, v in INJECTED.items()])
@pytest.mark.sample(5)
def test_injected_hyperparameters(name, make, given):
    params, gradient = VARIANTS[name.split("-")[0]].problem
    expected, expected_state = walk(make(**given), [gradient] * 3, params)
    injected = optax.inject_hyperparams(make)(**given)
    # A step count that is converted to float is float64 here; the parameters are float32.
    with jax.enable_x64(True):
        compiled = optax.GradientTransformation(injected.init, jax.jit(injected.update))
        visited, state = walk(compiled, [gradient] * 3, params)
        assert_close(visited, expected, atol=1e-5, rtol=1e-6)
        assert_close(arrays(state.inner_state), arrays(expected_state), atol=1e-5, rtol=1e-6)
        assert given.keys() - state.hyperparams.keys() <= {"nesterov", "centered", "ns_dtype"}
        state.hyperparams["learning_rate"] *= 0
        updates, after = compiled.update(gradient, state, params)
        assert dtypes((updates, after)) == dtypes((params, state))
    if make not in (optim.asgd, optim.rprop, _rprop):  # these read it a step early, or once
        assert_close(updates, jax.tree.map(jnp.zeros_like, params))


PARAMS = {"a": jnp.full((2, 3), 0.5), "b": jnp.full((2, 3), -0.25)}
GRADIENT = {"a": jnp.full((2, 3), 0.25), "b": jnp.full((2, 3), 2.0)}
BUFFERS = {
    "sgd": (optim.sgd, {}, 0),
    "sgd-passed": (optim.sgd, {"momentum": 0.0}, 1),
    "rmsprop": (optim.rmsprop, {}, 1),
    "rmsprop-passed": (optim.rmsprop, {"momentum": 0.0}, 2),
}


@pytest.mark.parametrize(("make", "options", "buffers"), BUFFERS.values(), ids=BUFFERS)
def test_an_injected_default_allocates_nothing(make, options, buffers):
    for optimizer in (
        optax.inject_hyperparams(make)(0.1, **options),
        optax.inject_hyperparams(make)(lambda count: 0.1, **options),
    ):
        for init in (optimizer.init, lambda p, o=optimizer: jax.eval_shape(o.init, p)):
            leaves = jax.tree.leaves(init(jnp.ones(100)))
            assert sum(leaf.shape == (100,) for leaf in leaves) == buffers
        updates, _ = optimizer.update(jnp.ones(100), optimizer.init(jnp.ones(100)), jnp.ones(100))
        assert_close(updates, first_update(make(0.1), jnp.ones(100), jnp.ones(100)), rtol=1e-6)


@pytest.mark.parametrize("name", ["adam", "adamw", "nadam", "radam", "adamax"])
@pytest.mark.sample(3)
def test_betas_can_be_injected(name):
    make, betas = getattr(optim, name), jnp.array([0.75, 0.875])
    expected = first_update(make(0.125, (0.75, 0.875)), PARAMS, GRADIENT)
    for given in (betas, np.array(betas), lambda count: betas):
        optimizer = optax.inject_hyperparams(make)(0.125, betas=given)
        state = optimizer.init(PARAMS)
        assert_close(state.hyperparams["betas"], betas)
        updates, _ = jax.jit(optimizer.update)(GRADIENT, state, PARAMS)
        assert_close(updates, expected, rtol=1e-6)


MASKS = {
    "rule": regjax.decay_mask,
    "one-bool": lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
    "one-true": lambda params: jax.tree.map(lambda p: True, params),
}
LAYER = {"dense": {"kernel": jnp.ones((2, 3)), "other": {"kernel": jnp.ones((2, 3))}}}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("make", [optim.adamw, optim.sgd])
def test_a_mask_that_is_taken_for_a_schedule_is_refused(make, mask):
    optimizer = optax.inject_hyperparams(make)(weight_decay=0.5, mask=mask)
    with pytest.raises((TypeError, ValueError), match=r"static_args=\('mask',\)"):
        optimizer.init(LAYER)
    fixed = optax.inject_hyperparams(make, static_args=("mask",))(weight_decay=0.5, mask=mask)
    jax.eval_shape(lambda: first_update(fixed, LAYER, LAYER))


def test_a_rule_of_a_step_count_is_refused():
    message = r"params must be a pytree of parameters; got int32\[\]\. .* static_args=\('mask',\)"
    with pytest.raises(TypeError, match=message):
        optax.inject_hyperparams(optax.adamw)(0.1, mask=regjax.decay_mask).init(LAYER)
    with pytest.raises(TypeError, match=message):
        jax.jit(regjax.decay_rates)(jnp.int32(0))
