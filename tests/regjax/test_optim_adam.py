"""NAdam, RAdam and Adamax: what `test_optim` says about Adam, about its kin."""

from __future__ import annotations

import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from regjax import optim
from regjax.optim import _adam

OPTIMIZERS = {"nadam": optim.nadam, "radam": optim.radam, "adamax": optim.adamax}
PARAMS = {"kernel": jnp.array([[1.0, -2.0], [0.5, 3.0]]), "bias": jnp.array([1.0, 2.0])}
GRADIENT = {"kernel": jnp.array([[0.5, 1.0], [-1.0, 0.0]]), "bias": jnp.array([0.5, -1.0])}

each_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


def _matrices(tree):
    return jax.tree.map(lambda leaf: leaf.ndim > 1, tree)


def _first_update(optimizer, params=PARAMS, gradient=GRADIENT):
    return optimizer.update(gradient, optimizer.init(params), params)[0]


def _assert_close(ours, theirs, atol=0.0):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol), ours, theirs)


@pytest.mark.parametrize(
    ("make", "names", "defaults"),
    [
        (
            optim.nadam,
            "learning_rate betas eps weight_decay momentum_decay decoupled_weight_decay "
            "maximize mask",
            (2e-3, (0.9, 0.999), 1e-8, 0.0, 4e-3, False, False, None),
        ),
        (
            optim.radam,
            "learning_rate betas eps weight_decay decoupled_weight_decay maximize mask",
            (1e-3, (0.9, 0.999), 1e-8, 0.0, False, False, None),
        ),
        (
            optim.adamax,
            "learning_rate betas eps weight_decay maximize mask",
            (2e-3, (0.9, 0.999), 1e-8, 0.0, False, None),
        ),
    ],
)
def test_signature(make, names, defaults):
    parameters = inspect.signature(make).parameters
    assert " ".join(parameters) == names
    assert tuple(p.default for p in parameters.values()) == defaults
    assert parameters["maximize"].kind is inspect.Parameter.KEYWORD_ONLY


# The first step from w = -2 with gradient 1, worked out by hand. NAdam with betas (0.8, ...) and no
# momentum_decay has mu = 0.4 at each step: 0.4 * 0.2 / (1 - 0.16) + 0.6 / (1 - 0.4) = 1 + 2 / 21.
@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        (optim.nadam(0.1, (0.8, 0.9), momentum_decay=0.0), -0.1 * (1 + 2 / 21)),
        (optim.nadam(0.1, (0.8, 0.9), weight_decay=1.0, momentum_decay=0.0), 0.1 * (1 + 2 / 21)),
        (optim.nadam(0.1, (0.8, 0.9), 1.0, momentum_decay=0.0), -0.05 * (1 + 2 / 21)),
        # 0.96 ** 1e6 is nothing: mu is 0.8 from the first step on.
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
        (optim.adamax(0.1, weight_decay=1.0), 0.1),
        (optim.adamax(0.1, weight_decay=1.0, maximize=True), 0.1),
        (optim.adamax(lambda count: jnp.where(count == 0, 0.1, 0.0)), -0.1),
    ],
)
def test_first_step_by_hand(optimizer, expected):
    update = _first_update(optimizer, jnp.array([-2.0]), jnp.array([1.0]))
    np.testing.assert_allclose(update, [expected], rtol=1e-6)


def _steps(optimizer, steps, gradient=1.0):
    state, updates = optimizer.init(jnp.array(0.0)), []
    for _ in range(steps):
        update, state = optimizer.update(jnp.array(gradient), state)
        updates.append(float(update))
    return updates, state


def test_radam_divides_from_its_sixth_step_on():
    b2 = 0.999
    rho, limit = (1999.0 - 2 * 6 * b2**6 / (1 - b2**6)), 1999.0
    rectified = math.sqrt((rho - 4) * (rho - 2) * limit / ((limit - 4) * (limit - 2) * rho))
    for gradient in (1.0, 100.0):
        updates, _ = _steps(optim.radam(0.1), 6, gradient)
        np.testing.assert_allclose(updates[:5], -0.1 * gradient, rtol=1e-6)
        np.testing.assert_allclose(updates[5], -0.1 * rectified, rtol=1e-5)
    never, _ = _steps(optim.radam(0.1, (0.9, 0.6)), 30, 100.0)
    np.testing.assert_allclose(never, -10.0, rtol=1e-6)


def test_radam_adds_eps_to_the_root_that_is_not_corrected():
    (*_, update), _ = _steps(optim.radam(0.1, eps=1.0), 6)
    (*_, without), _ = _steps(optim.radam(0.1), 6)
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
        length, limit = _adam._average_lengths(given, jnp.int32(count))
        assert length.dtype == limit.dtype == "float32"
        # An array has been rounded to float32, which moves 1 - b2 by up to 3e-8 / (1 - b2).
        slack = 4e-8 / (1 - b2) if as_array else 0.0
        np.testing.assert_allclose(length, exact, rtol=2e-6 + slack)
        np.testing.assert_allclose(limit, 2 / (1 - b2) - 1, rtol=2e-6 + slack)


def test_radam_meets_no_nan_that_it_would_drop():
    # Below rho = 4 a root of a negative number lies, at a limit of 4 a pole.
    with jax.debug_nans(True):
        for b2 in (0.999, 0.6):
            _steps(optim.radam(0.1, (0.9, b2)), 4)


@each_optimizer
def test_a_small_gradient_after_a_large_one_keeps_its_digits(make):
    optimizer = make(betas=(0.0, 0.9))
    state = optimizer.init(jnp.array(0.0))
    for gradient in (1e8, 1.0):
        _, state = optimizer.update(jnp.array(gradient), state)
    assert state[2].mu == 1.0


def test_nadams_product_is_of_all_momenta():
    _, state = _steps(optim.nadam(betas=(0.9, 0.999), momentum_decay=0.5), 20)
    momenta = 0.9 * (1 - 0.5 * 0.96 ** (0.5 * np.arange(1, 21)))
    np.testing.assert_allclose(state[2].mu_product, momenta.prod(), rtol=1e-5)
    assert state[2].mu_product.dtype == "float32"


@each_optimizer
def test_a_state_is_good_for_any_number_of_steps(make):
    optimizer = make(0.1)
    state = optimizer.init(PARAMS)
    far = state[2]._replace(count=jnp.int32(2**31 - 2))
    if make is optim.nadam:
        far = far._replace(mu_product=jnp.float32(0.0))
    state = (*state[:2], far, *state[3:])
    for _ in range(3):
        updates, state = optimizer.update(GRADIENT, state)
        assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(updates))
    assert state[2].count == 2**31 - 1


@each_optimizer
def test_betas_may_be_zero(make):
    updates = _first_update(make(0.1, (0.0, 0.0)))
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(updates))


STATES = {
    "nadam": (optim.nadam(weight_decay=0.1), 2, optim.ScaleByNadamState),
    "nadamw": (
        optim.nadam(weight_decay=0.1, decoupled_weight_decay=True),
        1,
        optim.ScaleByNadamState,
    ),
    "radam": (optim.radam(mask=_matrices), 2, optax.ScaleByAdamState),
    "radamw": (
        optim.radam(weight_decay=0.1, decoupled_weight_decay=True),
        1,
        optax.ScaleByAdamState,
    ),
    "adamax": (optim.adamax(0.1), 2, optax.ScaleByAdamState),
}


@pytest.mark.parametrize(("optimizer", "part", "kind"), STATES.values(), ids=STATES)
def test_state_is_what_optax_tools_know(optimizer, part, kind):
    state = optimizer.init(PARAMS)
    assert len(state) == 4
    assert isinstance(state[part], kind)
    mapped = optax.tree.map_params(optimizer, lambda leaf: leaf + 1, state)
    assert jax.tree.structure(mapped) == jax.tree.structure(state)
    for field in ("mu", "nu"):
        assert getattr(mapped[part], field)["kernel"][0, 0] == 1
    assert mapped[part].count == 0


VARIANTS = {
    "nadam": lambda rate: optim.nadam(rate, weight_decay=0.1, maximize=True),
    "nadamw": lambda rate: optim.nadam(
        rate, weight_decay=0.1, decoupled_weight_decay=True, mask=_matrices
    ),
    "radam": lambda rate: optim.radam(rate, (0.9, 0.9), weight_decay=0.1),
    "radamw": lambda rate: optim.radam(
        rate, weight_decay=0.1, decoupled_weight_decay=True, mask=_matrices
    ),
    "adamax": lambda rate: optim.adamax(rate, weight_decay=0.1, mask=_matrices),
}
RATES = {
    "float": 0.125,
    "schedule": lambda count: jnp.float32(0.125),
    "array": jnp.float32(0.125),
}

each_variant = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("rate", RATES.values(), ids=RATES)
@each_variant
def test_dtypes_are_kept(variant, rate, dtype):
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), PARAMS)
    gradient = jax.tree.map(lambda leaf: leaf.astype(dtype), GRADIENT)
    optimizer = variant(rate)
    state = optimizer.init(params)
    updates, after = jax.eval_shape(optimizer.update, gradient, state, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
    kinds = [jax.tree.map(lambda leaf: leaf.dtype, tree) for tree in (state, after)]
    assert kinds[0] == kinds[1]


@each_variant
def test_bfloat16_is_rounded_once(variant):
    params, gradient = (
        jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tree) for tree in (PARAMS, GRADIENT)
    )
    wide = [jax.tree.map(lambda leaf: leaf.astype(jnp.float32), t) for t in (params, gradient)]
    expected = jax.tree.map(
        lambda leaf: leaf.astype(jnp.bfloat16), _first_update(variant(0.125), *wide)
    )
    _assert_close(_first_update(variant(0.125), params, gradient), expected)


@each_variant
def test_float64_is_kept_under_x64(variant):
    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: np.asarray(leaf, "float64"), PARAMS)
        optimizer = variant(0.1)
        state = optimizer.init(params)
        updates, after = optimizer.update(params, state, params)
        assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype("float64")}
        kinds = [jax.tree.map(lambda leaf: leaf.dtype, tree) for tree in (state, after)]
        assert kinds[0] == kinds[1]


@each_variant
def test_scan_walks_as_a_loop_does_and_compiles_once(variant):
    optimizer, traces = variant(lambda count: 0.1 / (1.0 + count.astype(float))), []

    def train_step(carry, _):
        traces.append(None)
        params, state = carry
        updates, state = optimizer.update(GRADIENT, state, params)
        return (optax.apply_updates(params, updates), state), None

    start = (PARAMS, optimizer.init(PARAMS))
    scanned, _ = jax.lax.scan(train_step, start, length=8)
    traces.clear()
    compiled, carry = jax.jit(train_step), start
    for _ in range(8):
        carry, _ = compiled(carry, None)
    assert len(traces) == 1
    assert jax.tree.structure(carry) == jax.tree.structure(start)
    _assert_close(scanned, carry, atol=1e-6)


@each_variant
def test_a_traced_learning_rate(variant):
    def after(rate):
        optimizer, params = variant(rate), PARAMS
        state = optimizer.init(params)
        for _ in range(2):
            updates, state = optimizer.update(GRADIENT, state, params)
            params = optax.apply_updates(params, updates)
        return params["kernel"]

    compiled, step = jax.jit(after), 1e-2
    _assert_close(compiled(0.1), after(0.1), atol=1e-6)
    slope = jax.jit(jax.jacfwd(after))(0.1)
    difference = (compiled(0.1 + step) - compiled(0.1 - step)) / (2 * step)
    _assert_close(slope, difference, atol=0.02)


@each_optimizer
def test_mask(make):
    mask = {"kernel": True, "bias": False}
    masked = _first_update(make(0.1, weight_decay=2.0, mask=mask))
    full = _first_update(make(0.1, weight_decay=2.0))
    none = _first_update(make(0.1, weight_decay=0.0))
    _assert_close(masked, {"kernel": full["kernel"], "bias": none["bias"]})
    assert not jnp.array_equal(full["kernel"], none["kernel"])


@each_optimizer
def test_parameters_may_hold_none(make):
    params, gradient = {**PARAMS, "unused": None}, {**GRADIENT, "unused": None}
    updates = _first_update(make(0.1, weight_decay=0.5), params, gradient)
    assert updates["unused"] is None


@each_optimizer
def test_update_needs_parameters_only_to_decay(make):
    optimizer = make(weight_decay=0)
    optimizer.update(GRADIENT, optimizer.init(PARAMS))
    optimizer = make(weight_decay=0.1)
    state = optimizer.init(PARAMS)
    with pytest.raises(ValueError, match=r"params is None, but weight_decay=0\.1 needs .* call"):
        optimizer.update(GRADIENT, state)


@each_optimizer
def test_injected_hyperparameters(make):
    injected = optax.inject_hyperparams(make)(learning_rate=0.1, weight_decay=0.5)
    state = injected.init(PARAMS)
    updates, after = jax.jit(injected.update)(GRADIENT, state, PARAMS)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    _assert_close(updates, _first_update(make(0.1, weight_decay=0.5)), atol=1e-7)
    after.hyperparams["learning_rate"] = jnp.float32(0.0)
    _assert_close(injected.update(GRADIENT, after, PARAMS)[0], jax.tree.map(jnp.zeros_like, PARAMS))


@each_optimizer
def test_traced_betas(make):
    def first(b1, b2):
        return _first_update(make(0.1, (b1, b2)))

    _assert_close(jax.jit(first)(0.9, 0.99), first(0.9, 0.99), atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"learning_rate": -0.1}, r"learning_rate must be .* is -0\.1: .*maximize=True"),
        ({"weight_decay": -0.1}, r"weight_decay must be .* is -0\.1: pass 0\.0"),
        ({"weight_decay": float("nan")}, "weight_decay must be .* is nan"),
        ({"eps": -1e-8}, r"eps must be .* is -1e-08"),
        ({"eps": float("nan")}, "eps must be .* is nan"),
        ({"betas": (1.0, 0.999)}, r"betas\[0\] must be in \[0, 1\), but it is 1\.0"),
        ({"betas": (float("nan"), 0.999)}, r"betas\[0\] must be in \[0, 1\), but it is nan"),
        ({"betas": (0.9, -0.1)}, r"betas\[1\] must be in \[0, 1\), but it is -0\.1"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\] must be in \[0, 1\), but it is 1\.0"),
    ],
)
@each_optimizer
def test_argument_out_of_range_is_refused(make, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**arguments)


@pytest.mark.parametrize("value", [-4e-3, float("nan"), float("inf")])
def test_momentum_decay_out_of_range_is_refused(value):
    with pytest.raises(ValueError, match=f"momentum_decay must be finite .* it is {value}: pass"):
        optim.nadam(momentum_decay=value)


@pytest.mark.parametrize("value", [True, None, "0.1"])
def test_momentum_decay_that_is_no_number_is_refused(value):
    with pytest.raises(TypeError, match="momentum_decay must be a real number, but it is"):
        optim.nadam(momentum_decay=value)


@each_optimizer
def test_complex_parameters(make):
    params = {"spectrum": jnp.array([1 + 2j, -1j])}
    with pytest.raises(TypeError, match=r"complex parameter 'spectrum': .*split_real_and_imag"):
        make().init(params)
    split = optax.contrib.split_real_and_imaginary(make(0.5))
    with jax.numpy_dtype_promotion("standard"):
        update = _first_update(split, params, params)["spectrum"]
    real, imaginary = (
        _first_update(make(0.5), part(params["spectrum"]), part(params["spectrum"]))
        for part in (jnp.real, jnp.imag)
    )
    np.testing.assert_allclose(update, np.asarray(real) + 1j * np.asarray(imaginary), rtol=1e-6)
