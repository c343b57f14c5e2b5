from __future__ import annotations

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from regjax import optim
from regjax.optim import _links

OPTIMIZERS = {"sgd": optim.sgd, "adam": optim.adam, "adamw": optim.adamw}
PARAMS = {"kernel": jnp.array([[1.0, -2.0], [0.5, 3.0]]), "bias": jnp.array([1.0, 2.0])}
GRADIENT = {"kernel": jnp.array([[0.5, 1.0], [-1.0, 0.0]]), "bias": jnp.array([0.5, -1.0])}

each_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


def _matrices(tree):
    return jax.tree.map(lambda leaf: leaf.ndim > 1, tree)


def _first_update(optimizer, params=PARAMS, gradient=GRADIENT):
    return optimizer.update(gradient, optimizer.init(params), params)[0]


def _walk(optimizer, steps=3, params=PARAMS, gradient=GRADIENT):
    state = optimizer.init(params)
    for _ in range(steps):
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def _assert_close(ours, theirs, atol=0.0):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol), ours, theirs)


@pytest.mark.parametrize(
    ("make", "names", "defaults"),
    [
        (
            optim.sgd,
            "learning_rate momentum dampening weight_decay nesterov maximize mask",
            (1e-3, 0.0, 0.0, 0.0, False, False, None),
        ),
        (
            optim.adam,
            "learning_rate betas eps weight_decay amsgrad maximize decoupled_weight_decay mask",
            (1e-3, (0.9, 0.999), 1e-8, 0.0, False, False, False, None),
        ),
        (
            optim.adamw,
            "learning_rate betas eps weight_decay amsgrad maximize mask",
            (1e-3, (0.9, 0.999), 1e-8, 1e-2, False, False, None),
        ),
    ],
)
def test_signature(make, names, defaults):
    parameters = inspect.signature(make).parameters
    assert " ".join(parameters) == names
    assert tuple(p.default for p in parameters.values()) == defaults
    assert parameters["maximize"].kind is inspect.Parameter.KEYWORD_ONLY


def _early(value):
    return lambda count: jnp.where(count == 0, value, 0.0)


# The first step from w = -2 with gradient 1, worked out by hand.
@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        (optim.sgd(0.1), -0.1),
        (optim.sgd(0.1, weight_decay=0.25), -0.05),
        (optim.sgd(0.1, weight_decay=0.25, maximize=True), 0.15),
        (optim.sgd(0.1, 0.5, weight_decay=0.25), -0.05),
        (optim.sgd(0.1, 0.5, 0.5, weight_decay=0.25), -0.05),
        (optim.sgd(0.1, 0.5, weight_decay=0.25, nesterov=True), -0.075),
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
        (optim.sgd(0.1, weight_decay=_early(0.25)), -0.05),
    ],
)
def test_first_step_by_hand(optimizer, expected):
    update = _first_update(optimizer, jnp.array([-2.0]), jnp.array([1.0]))
    np.testing.assert_allclose(update, [expected], rtol=1e-6)


def test_the_first_gradient_is_not_damped():
    optimizer = optim.sgd(1.0, momentum=0.5, dampening=0.75)
    params = jnp.array(0.0)
    state, visited = optimizer.init(params), []
    for _ in range(3):
        update, state = optimizer.update(jnp.array(1.0), state)
        visited.append(-float(update))
    assert visited == [1.0, 0.75, 0.625]


def test_a_schedule_is_asked_from_step_zero_on():
    rates = jnp.array([1.0, 0.5, 0.25])
    optimizer = optim.sgd(lambda count: rates[count])
    state, visited = optimizer.init(jnp.array(0.0)), []
    for _ in range(3):
        update, state = optimizer.update(jnp.array(1.0), state)
        visited.append(-float(update))
    assert visited == [1.0, 0.5, 0.25]


@pytest.mark.parametrize(
    "mask", [{"kernel": True, "bias": False}, _matrices, lambda params: _matrices(params)]
)
@each_optimizer
def test_mask(make, mask):
    masked = _first_update(make(0.1, weight_decay=0.5, mask=mask))
    full = _first_update(make(0.1, weight_decay=0.5))
    none = _first_update(make(0.1, weight_decay=0.0))
    _assert_close(masked, {"kernel": full["kernel"], "bias": none["bias"]})
    assert not jnp.array_equal(full["kernel"], none["kernel"])


def test_a_mask_of_a_whole_subtree():
    params, gradient = {"a": PARAMS, "b": PARAMS}, {"a": GRADIENT, "b": GRADIENT}
    updates = _first_update(
        optim.sgd(0.1, weight_decay=0.5, mask={"a": True, "b": False}), params, gradient
    )
    _assert_close(updates["a"], _first_update(optim.sgd(0.1, weight_decay=0.5)))
    _assert_close(updates["b"], _first_update(optim.sgd(0.1)))


def test_a_callable_mask_sees_parameters_at_every_update():
    seen = []

    def mask(params):
        seen.append(params)
        return True

    optimizer = optim.sgd(0.1, weight_decay=0.5, mask=mask)
    _first_update(optimizer)
    assert all(tree is PARAMS or tree["bias"] is PARAMS["bias"] for tree in seen)
    assert len(seen) >= 2


@each_optimizer
def test_parameters_may_hold_none(make):
    params, gradient = {**PARAMS, "unused": None}, {**GRADIENT, "unused": None}
    mask = {"kernel": True, "bias": False, "unused": None}
    for each in (None, mask, {**mask, "unused": True}):
        updates = _first_update(make(0.1, weight_decay=0.5, mask=each), params, gradient)
        assert updates["unused"] is None


@each_optimizer
def test_update_needs_parameters_only_to_decay(make):
    optimizer = make(weight_decay=0)
    optimizer.update(GRADIENT, optimizer.init(PARAMS))
    optimizer = make(weight_decay=0.1)
    state = optimizer.init(PARAMS)
    with pytest.raises(ValueError, match=r"params is None, but weight_decay=0\.1 needs .* call"):
        optimizer.update(GRADIENT, state)


STATES = {
    "sgd": (optim.sgd(weight_decay=0.1), 2, optax.EmptyState),
    "momentum": (optim.sgd(momentum=0.9), 2, optax.TraceState),
    "adam": (optim.adam(weight_decay=0.1), 2, optax.ScaleByAdamState),
    "amsgrad": (optim.adam(amsgrad=True), 2, optax.ScaleByAmsgradState),
    "adamw": (optim.adamw(mask=_matrices), 1, optax.ScaleByAdamState),
    "adamw-tree": (optim.adamw(mask={"kernel": True, "bias": False}), 1, optax.ScaleByAdamState),
    "adamw-amsgrad": (optim.adamw(0.1, amsgrad=True), 1, optax.ScaleByAmsgradState),
}


@pytest.mark.parametrize(("optimizer", "part", "kind"), STATES.values(), ids=STATES)
def test_state_is_what_optax_tools_know(optimizer, part, kind):
    state = optimizer.init(PARAMS)
    assert len(state) == 4
    assert isinstance(state[part], kind)
    after = optimizer.update(GRADIENT, state, PARAMS)[1]
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
    mapped = optax.tree.map_params(optimizer, lambda leaf: leaf + 1, state)
    assert jax.tree.structure(mapped) == jax.tree.structure(state)
    for field in {"trace", "mu", "nu", "nu_max"} & set(getattr(kind, "_fields", ())):
        assert getattr(mapped[part], field)["kernel"][0, 0] == 1


def test_dampened_state():
    state = optim.sgd(momentum=0.9, dampening=0.5).init(PARAMS)
    assert [type(part) for part in state[2]] == [optax.ScaleByScheduleState, optax.TraceState]


VARIANTS = {
    "sgd": lambda rate: optim.sgd(rate, 0.9, 0.1, weight_decay=0.1, mask=_matrices),
    "nesterov": lambda rate: optim.sgd(rate, 0.9, weight_decay=0.1, nesterov=True),
    "adam": lambda rate: optim.adam(rate, weight_decay=0.1, maximize=True),
    "amsgrad": lambda rate: optim.adam(rate, weight_decay=0.1, amsgrad=True),
    "adamw": lambda rate: optim.adamw(rate, mask=_matrices),
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
    assert {leaf.dtype for leaf in jax.tree.leaves(after) if leaf.ndim} == {jnp.dtype(dtype)}
    kinds = [jax.tree.map(lambda leaf: leaf.dtype, tree) for tree in (state, after)]
    assert kinds[0] == kinds[1]


def test_float64_is_kept_under_x64():
    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: np.asarray(leaf, "float64"), PARAMS)
        for make in OPTIMIZERS.values():
            updates = _first_update(make(0.1, weight_decay=0.1), params, params)
            assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype("float64")}


def test_trees_of_mixed_dtypes():
    dtypes = {"kernel": jnp.bfloat16, "bias": jnp.float32}
    params = {name: leaf.astype(dtypes[name]) for name, leaf in PARAMS.items()}
    for variant in VARIANTS.values():
        updates = _first_update(variant(lambda count: jnp.float32(0.1)), params, params)
        assert {name: leaf.dtype for name, leaf in updates.items()} == dtypes


def test_bfloat16_is_rounded_once():
    # Rounded to bfloat16 first, the coefficients would be 0.988 and 1.
    held, gradient = jnp.bfloat16(243 / 128), jnp.bfloat16(0.0)
    optimizer = optim.sgd(momentum=0.99)
    state = (*optimizer.init(held)[:2], optax.TraceState(held), optax.EmptyState())
    trace = optimizer.update(gradient, state)[1][2].trace
    assert trace == jnp.bfloat16(0.99 * 243 / 128) != held * jnp.bfloat16(0.99)
    held, gradient = jnp.bfloat16(1.0), jnp.bfloat16(2.125)
    optimizer = optim.adam(betas=(0.9, 0.999))
    state = optimizer.init(held)
    state = (*state[:2], state[2]._replace(nu=held), state[3])
    nu = optimizer.update(gradient, state)[1][2].nu
    assert nu == jnp.bfloat16(0.999 + 0.001 * 2.125**2) != held + jnp.bfloat16(0.001 * 2.125**2)


@pytest.mark.parametrize("b2", [0.9, 0.999, 0.99999, 0.0])
def test_bias_correction_is_exact_in_float32(b2):
    for count in (1, 2, 10, 1000, 10**6):
        ours = _links.bias_correction(b2, jnp.int32(count))
        assert ours.dtype == "float32"
        np.testing.assert_allclose(ours, -np.expm1(count * np.log(b2 or 1e-300)), rtol=4e-7)


@each_variant
def test_one_compilation_for_all_steps(variant):
    optimizer = variant(lambda count: 0.1 / (1.0 + count.astype(float)))
    traces = []

    @jax.jit
    def train_step(params, state):
        traces.append(None)
        updates, state = optimizer.update(GRADIENT, state, params)
        return optax.apply_updates(params, updates), state

    params, state = PARAMS, optimizer.init(PARAMS)
    for _ in range(4):
        params, state = train_step(params, state)
    assert len(traces) == 1
    assert train_step._cache_size() == 1


@each_variant
def test_scan_walks_as_a_loop_does(variant):
    optimizer = variant(0.1)

    def train_step(carry, _):
        params, state = carry
        updates, state = optimizer.update(GRADIENT, state, params)
        return (optax.apply_updates(params, updates), state), None

    scanned, _ = jax.lax.scan(train_step, (PARAMS, optimizer.init(PARAMS)), length=3)
    _assert_close(scanned, _walk(optimizer), atol=1e-6)


@each_variant
def test_a_traced_learning_rate(variant):
    def after(rate):
        return _walk(variant(rate), steps=2)[0]["kernel"]

    compiled, step = jax.jit(after), 1e-2
    _assert_close(compiled(0.1), after(0.1), atol=1e-6)
    slope = jax.jit(jax.jacfwd(after))(0.1)
    difference = (compiled(0.1 + step) - compiled(0.1 - step)) / (2 * step)
    _assert_close(slope, difference, atol=0.02)


@pytest.mark.parametrize("make", [optim.sgd, optim.adam, optim.adamw])
def test_injected_hyperparameters(make):
    injected = optax.inject_hyperparams(make)(learning_rate=0.1, weight_decay=0.5)
    state = injected.init(PARAMS)
    updates, after = jax.jit(injected.update)(GRADIENT, state, PARAMS)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    _assert_close(updates, _first_update(make(0.1, weight_decay=0.5)), atol=1e-7)
    after.hyperparams["learning_rate"] = jnp.float32(0.0)
    _assert_close(injected.update(GRADIENT, after, PARAMS)[0], jax.tree.map(jnp.zeros_like, PARAMS))


def test_inside_other_transformations():
    clipped = optax.chain(optax.clip_by_global_norm(1e-3), optim.sgd(0.1, weight_decay=0.5))
    scale = 1e-3 / optax.tree.norm(GRADIENT)
    expected = jax.tree.map(lambda g, p: -0.1 * (scale * g + 0.5 * p), GRADIENT, PARAMS)
    _assert_close(_first_update(clipped), expected, atol=1e-7)
    parts = {"kernel": optim.adamw(0.1, mask=_matrices), "bias": optim.sgd(0.1)}
    split = optax.partition(parts, {"kernel": "kernel", "bias": "bias"})
    updates = _first_update(split)
    _assert_close(updates["bias"], -0.1 * GRADIENT["bias"], atol=1e-7)
    _assert_close(updates["kernel"], _first_update(optim.adamw(0.1))["kernel"], atol=1e-7)


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (optim.sgd, {"learning_rate": -0.1}, r"learning_rate must be .* is -0\.1: .*maximize=True"),
        (optim.adam, {"learning_rate": float("nan")}, "learning_rate must be .* is nan"),
        (optim.adamw, {"learning_rate": float("inf")}, "learning_rate must be .* is inf"),
        (optim.sgd, {"weight_decay": -0.1}, r"weight_decay must be .* is -0\.1: pass 0\.0"),
        (optim.adam, {"weight_decay": float("nan")}, "weight_decay must be .* is nan"),
        (optim.adamw, {"weight_decay": jnp.float32(-1)}, r"weight_decay must be .* is -1\.0"),
        (optim.sgd, {"momentum": -0.5}, r"momentum must be .* is -0\.5"),
        (optim.sgd, {"nesterov": True}, r"nesterov=True needs .* momentum=0\.0 and dampening=0\.0"),
        (
            optim.sgd,
            {"nesterov": True, "momentum": 0.9, "dampening": 0.1},
            r"nesterov=True needs .* momentum=0\.9 and dampening=0\.1",
        ),
        (optim.adam, {"eps": -1e-8}, r"eps must be .* is -1e-08"),
        (optim.adam, {"betas": (1.0, 0.999)}, r"betas\[0\] must be in \[0, 1\), but it is 1\.0"),
        (optim.adamw, {"betas": (0.9, -0.1)}, r"betas\[1\] must be in \[0, 1\), but it is -0\.1"),
        (optim.adam, {"betas": (0.9, 1.0)}, r"betas\[1\] must be in \[0, 1\), but it is 1\.0"),
    ],
)
def test_argument_out_of_range_is_refused(make, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**arguments)


@pytest.mark.parametrize("value", [True, None, "0.1", jnp.ones(2)])
@pytest.mark.parametrize("argument", ["learning_rate", "weight_decay"])
@each_optimizer
def test_argument_that_is_no_number_is_refused(make, argument, value):
    with pytest.raises(TypeError, match=f"{argument} must be a real number, but it is"):
        make(**{argument: value})


@each_optimizer
def test_mask_that_does_not_fit_is_refused_by_init(make):
    optimizer = make(weight_decay=0.1, mask={"kernel": True})
    with pytest.raises(ValueError, match=r"at 'bias': the mask has nothing there"):
        optimizer.init(PARAMS)
    optimizer = make(weight_decay=0.1, mask={"kernel": True, "bias": 0.5})
    with pytest.raises(TypeError, match=r"mask at 'bias' must be a bool, but it is 0\.5"):
        optimizer.init(PARAMS)


def test_complex_parameters():
    params = {"spectrum": jnp.array([1 + 2j, -1j])}
    update = _first_update(optim.sgd(0.5, weight_decay=0.5), params, params)
    _assert_close(update, {"spectrum": -0.75 * params["spectrum"]})
    with pytest.raises(TypeError, match=r"complex parameter 'spectrum': .*split_real_and_imag"):
        optim.adam().init(params)
    split = optax.contrib.split_real_and_imaginary(optim.adam(0.5))
    with jax.numpy_dtype_promotion("standard"):
        update = _first_update(split, params, params)
    np.testing.assert_allclose(update["spectrum"], [-0.5 - 0.5j, 0.5j], rtol=1e-6)
