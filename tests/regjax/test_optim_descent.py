from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from regjax import optim
from regjax.optim._links import rounded_product
from tests.regjax.optimizers import (
    GRADIENT,
    NO_BIAS,
    PARAMS,
    assert_close,
    first_update,
    scalar_updates,
    walk,
)

# rounded_product: torch's kernels round a product before they add it, XLA's fusions do not.
SPECIAL = np.array(
    [
        *[0x7FC00000, 0xFFC00000, 0x7FC00123, 0x7F800000, 0xFF800000],  # NaNs, infinities
        # Zeros, and normal numbers from the largest to the smallest.
        *[0, 0x80000000, 0x7F7FFFFF, 0xFF7FFFFF, 0x3FC00000, 0xBFC00000, 0x00800000, 0x80800000],
    ],
    "uint32",
).view("float32")


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.vmap], ids=["eager", "jit", "vmap"])
def test_rounded_product_is_the_product(wrap):
    once = np.asarray(wrap(lambda x: rounded_product(x, 1.0))(jnp.asarray(SPECIAL)))
    np.testing.assert_array_equal(once.view("uint32"), SPECIAL.view("uint32"))
    numbers = jnp.asarray(np.random.default_rng(0).standard_normal(10_000), "float32")
    for factor in (0.9, 1.5, jnp.float32(0.9)):
        product = wrap(lambda x, factor=factor: rounded_product(x, factor))(numbers)
        np.testing.assert_array_equal(product, numbers * np.float32(factor))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "complex64"])
def test_rounded_product_keeps_other_dtypes(dtype):
    x = jnp.array([1.5, -0.0, 3.0]).astype(dtype)
    after = jax.jit(lambda x: rounded_product(x, 1.0))(x)
    assert after.dtype == x.dtype
    np.testing.assert_array_equal(after, x)


def _fused(product, dtype):
    """Return how many of 10,000 sums were rounded only once, in a step and in a scan of two."""
    x, y = np.random.default_rng(0).standard_normal((2, 10_000)).astype("float32")
    x, y = (np.asarray(jnp.asarray(leaf).astype(dtype)) for leaf in (x, y))
    expected = x.astype("float32") * np.float32(0.3) + y.astype("float32")

    def step(x, y):
        return product(x.astype(jnp.float32), 0.3) + y.astype(jnp.float32)

    def scanned(x, y):
        stacked = [jnp.stack([leaf, leaf]) for leaf in (x, y)]
        return jax.lax.scan(lambda carry, xs: (carry, step(*xs)), None, stacked)[1][1]

    return [np.count_nonzero(jax.jit(f)(x, y) != expected) for f in (step, scanned)]


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="XLA fuses so on CPUs only")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rounded_product_is_not_fused(dtype, contracts):
    assert _fused(rounded_product, dtype) == [0, 0]
    assert (min(_fused(lambda x, factor: x * factor, dtype)) > 1000) == contracts


def test_rounded_product_has_the_derivatives_of_the_product():
    square = lambda x: rounded_product(x, x) + 3 * x
    for x in (0.0, -2.0):
        for derivative in (jax.jacfwd, jax.jacrev):
            assert jax.jit(derivative(lambda x: rounded_product(x, 2.0)))(x) == 2
            assert derivative(square)(x) == 2 * x + 3
        assert jax.hessian(square)(x) == 2


# The first step from w = -2 with gradient 1, computed by hand.
@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        (optim.sgd(0.1), -0.1),
        (optim.sgd(0.1, weight_decay=0.25), -0.05),
        (optim.sgd(0.1, weight_decay=0.25, maximize=True), 0.15),
        (optim.sgd(0.1, 0.5, weight_decay=0.25), -0.05),
        (optim.sgd(0.1, 0.5, 0.5, weight_decay=0.25), -0.05),
        (optim.sgd(0.1, 0.5, weight_decay=0.25, nesterov=True), -0.075),
        (optim.sgd(0.1, weight_decay=lambda count: jnp.where(count == 0, 0.25, 0.0)), -0.05),
    ],
)
def test_first_step_of_sgd_by_hand(optimizer, expected):
    update = first_update(optimizer, jnp.array([-2.0]), jnp.array([1.0]))
    np.testing.assert_allclose(update, [expected], rtol=1e-6)


def test_a_schedule_of_weight_decay_advances():
    """`add_decayed_weights` of Optax 0.2.6 evaluates a schedule at the first step only."""
    optimizer = optim.sgd(1.0, weight_decay=lambda count: jnp.asarray(count, float), mask=NO_BIAS)
    params = {"kernel": jnp.array([1.0]), "bias": jnp.array([1.0])}
    zeros = jax.tree.map(jnp.zeros_like, params)
    state = optimizer.init(params)
    for count in range(4):
        updates, state = optimizer.update(zeros, state, params)
        assert_close(updates, {"kernel": jnp.array([-1.0 * count]), "bias": zeros["bias"]})


def test_the_first_gradient_is_not_damped():
    optimizer = optim.sgd(1.0, momentum=0.5, dampening=0.75)
    assert scalar_updates(optimizer, [1.0] * 3)[0] == [-1.0, -0.75, -0.625]


def test_bfloat16_is_rounded_once():
    # Rounded to bfloat16 first, the coefficient would be 0.988.
    held, gradient = jnp.bfloat16(243 / 128), jnp.bfloat16(0.0)
    optimizer = optim.sgd(momentum=0.99)
    state = {**optimizer.init(held), "moments": optax.TraceState(held)}
    trace = optimizer.update(gradient, state)[1]["moments"].trace
    assert trace == jnp.bfloat16(0.99 * 243 / 128) != held * jnp.bfloat16(0.99)


def test_sgd_takes_complex_parameters():
    params = {"spectrum": jnp.array([1 + 2j, -1j])}
    for momentum in (0.0, 0.5):
        optimizer = optim.sgd(0.5, momentum, weight_decay=0.5)
        visited, _ = walk(optimizer, [params] * 2, params)
        first = 0.25 * params["spectrum"]
        assert_close(visited[0], {"spectrum": first})
        second = momentum * 1.5 * params["spectrum"] + params["spectrum"] + 0.5 * first
        assert_close(visited[1], {"spectrum": first - 0.5 * second})


# Two further steps.
@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        # The second step size is 0.5 / (1 + 1.0 * 0.5), or without alpha 0.5 again.
        (optim.asgd(0.5, lambd=1.0, alpha=1.0), [-1.5, -4 / 3]),
        (optim.asgd(0.5, lambd=1.0, alpha=0.0), [-1.5, -1.25]),
        (optim.asgd(0.5, lambd=0.0, weight_decay=0.25), [-2.25, -2.46875]),
        (optim.asgd(0.5, lambd=0.0, weight_decay=0.25, maximize=True), [-1.25, -0.59375]),
        (optim.rprop(0.5), [-2.5, -3.1]),
        (optim.rprop(0.5, maximize=True), [-1.5, -0.9]),
        (optim.rprop(0.5, etas=(0.5, 2.0)), [-2.5, -3.5]),
        (optim.rprop(0.5, step_sizes=(0.0, 0.25)), [-2.25, -2.5]),
        (optim.rprop(0.5, step_sizes=(1.0, 2.0)), [-3.0, -4.2]),
    ],
)
def test_first_steps_by_hand(optimizer, expected):
    visited, _ = walk(optimizer, jnp.ones((2, 1)), jnp.array([-2.0]))
    np.testing.assert_allclose(np.concatenate(visited), expected, rtol=1e-6)


def test_asgd_averages_from_t0_on():
    visited, states = [], []
    optimizer = optim.asgd(0.1, t0=2)
    params, state = PARAMS, optimizer.init(PARAMS)
    for _ in range(6):
        updates, state = optimizer.update(GRADIENT, state, params)
        params = optax.apply_updates(params, updates)
        visited.append(params)
        states.append(state["moments"].ax)
    for step in range(4):
        assert_close(states[step], visited[step], atol=1e-6)
    # The fourth step is the last that replaces the average: 1 / max(1, 3 - t0) is 1.
    for step in (4, 5):
        mean = jax.tree.map(lambda *leaves: jnp.stack(leaves).mean(0), *visited[3 : step + 1])
        assert_close(states[step], mean, atol=1e-6)


def test_asgd_uses_the_rate_of_the_step_before():
    rates = jnp.array([1.0, 0.5, 0.25])
    optimizer = optim.asgd(lambda count: rates[count], lambd=0.0)
    assert scalar_updates(optimizer, [1.0] * 3)[0] == [-1.0, -1.0, -0.5]


def test_rprop_waits_a_step_where_a_sign_turns():
    gradients = jnp.array([1.0, 1.0, -1.0, -1.0, -1.0])[:, None]
    visited, state = walk(optim.rprop(1.0, etas=(0.5, 2.0)), gradients, jnp.zeros(1))
    # Sizes 1, 2, 1 (but no step), 1, 2.
    assert np.concatenate(visited).tolist() == [-1.0, -3.0, -3.0, -2.0, 0.0]
    assert state["moments"].step_size == 2.0


def test_rprop_keeps_its_step_sizes_in_bounds():
    gradients = jnp.array([1.0, 1.0, -1.0, -1.0, -1.0])[:, None]
    optimizer = optim.rprop(1.0, etas=(0.5, 2.0), step_sizes=(1.0, 1.5))
    visited, _ = walk(optimizer, gradients, jnp.zeros(1))
    # Sizes 1, 1.5, 1 (but no step), 1, 1.5.
    assert np.concatenate(visited).tolist() == [-1.0, -2.5, -2.5, -1.5, 0.0]


def test_rprop_takes_the_sign_of_small_gradients():
    gradients = jnp.array([1e-30, 1e-30])[:, None]
    visited, _ = walk(optim.rprop(1.0, etas=(0.5, 2.0)), gradients, jnp.zeros(1))
    assert np.concatenate(visited).tolist() == [-1.0, -3.0]


def test_optax_rprop_is_a_step_late():
    gradients = jnp.array([1.0, -1.0])[:, None]
    with jax.numpy_dtype_promotion("standard"):
        visited, _ = walk(optax.rprop(1.0), gradients, jnp.zeros(1))
    # If this fails, optax has fixed it, and the docstring must be updated.
    assert visited[0] == 0.0
    assert walk(optim.rprop(1.0), gradients, jnp.zeros(1))[0][0] == -1.0


VARIANTS = {
    "sgd": lambda rate: optim.sgd(rate, 0.9, 0.1, weight_decay=0.1, maximize=True, mask=NO_BIAS),
    "nesterov": lambda rate: optim.sgd(rate, 0.9, weight_decay=0.1, nesterov=True),
    "asgd": lambda rate: optim.asgd(rate, 0.1, 0.5, 1.0, 0.1, maximize=True, mask=NO_BIAS),
    "rprop": lambda rate: optim.rprop(rate),
}
each_variant = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)


def test_states_are_read_by_name():
    assert optim.asgd().init(PARAMS)["moments"].ax.keys() == PARAMS.keys()
    assert optim.asgd(0.5).init(PARAMS)["learning_rate"].eta == 0.5
    assert optim.rprop(0.5).init(PARAMS)["moments"].step_size["bias"].tolist() == [0.5] * 3


@each_variant
@pytest.mark.sample(2)
def test_a_step_and_a_scan_have_the_same_bits(variant):
    optimizer = variant(0.1)
    rng = np.random.default_rng(0)
    params = {"kernel": rng.standard_normal((7, 37)), "bias": rng.standard_normal(37)}
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    gradients = [jax.tree.map(lambda p, s=s: jnp.sin(9 * s * p), params) for s in range(1, 31)]

    def train_step(carry, gradient):
        params, state = carry
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), None

    carry = (params, optimizer.init(params))
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *gradients)
    scanned = jax.jit(lambda carry: jax.lax.scan(train_step, carry, stacked)[0])(carry)
    stepped, step = carry, jax.jit(train_step)
    for gradient in gradients:
        stepped, _ = step(stepped, gradient)
    assert step._cache_size() == 1
    jax.tree.map(np.testing.assert_array_equal, stepped, scanned)
    eager, _ = walk(optimizer, gradients, params)
    assert_close(eager[-1], scanned[0], atol=1e-5, rtol=1e-6)


def test_rprop_may_have_one_step_size_but_no_schedule():
    state = optim.rprop(step_sizes=(1.0, 1.0)).init(PARAMS)
    assert state["moments"].step_size.keys() == PARAMS.keys()
    with pytest.raises(TypeError, match=r"learning_rate must be a real number; .* first step size"):
        optim.rprop(lambda count: 0.1)
