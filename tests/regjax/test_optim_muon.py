from __future__ import annotations

import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from regjax import optim

PARAMS = {
    "wide": jnp.array([[1.0, -2.0, 0.5], [0.5, 3.0, -1.0]]),
    "tall": jnp.array([[1.0], [2.0], [-0.5]]),
}
GRADIENT = {
    "wide": jnp.array([[0.5, 1.0, -0.25], [-1.0, 0.0, 2.0]]),
    "tall": jnp.array([[0.5], [-1.0], [0.25]]),
}
# Each step maps a singular value x to x * (3 - x * x) / 2, which converges to 1.
CONVERGING = {"ns_coefficients": (1.5, -0.5, 0.0), "ns_steps": 40, "ns_dtype": "float32"}


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


def test_signature():
    parameters = inspect.signature(optim.muon).parameters
    assert " ".join(parameters) == (
        "learning_rate weight_decay momentum nesterov ns_coefficients eps ns_steps adjust_lr_fn "
        "mask ns_dtype transposed"
    )
    coefficients = (3.4445, -4.7750, 2.0315)
    expected = (1e-3, 0.1, 0.95, True, coefficients, 1e-7, 5, None, None, "bfloat16", False)
    assert tuple(p.default for p in parameters.values()) == expected
    assert parameters["mask"].kind is inspect.Parameter.KEYWORD_ONLY


# The first step from ((3, 0), (0, -2)), whose gradient has the orthogonal factor ((0, 1), (1, 0)).
@pytest.mark.parametrize(
    ("options", "of_the_step", "of_the_decay"),
    [
        ({}, 1.0, 0.1),
        ({"weight_decay": 0.5}, 1.0, 0.5),
        ({"weight_decay": 0.0}, 1.0, 0.0),
        ({"nesterov": False, "momentum": 0.5}, 1.0, 0.1),
        ({"momentum": 0.0}, 1.0, 0.1),
        ({"adjust_lr_fn": "original"}, 1.0, 0.1),
        ({"adjust_lr_fn": "match_rms_adamw"}, 0.2 * math.sqrt(2), 0.1),
        ({"learning_rate": lambda count: jnp.where(count == 0, 0.1, 0.0)}, 1.0, 0.1),
        ({"weight_decay": lambda count: jnp.where(count == 0, 0.5, 0.0)}, 1.0, 0.5),
    ],
)
def test_first_step_by_hand(options, of_the_step, of_the_decay):
    params, factor = jnp.array([[3.0, 0.0], [0.0, -2.0]]), jnp.array([[0.0, 1.0], [1.0, 0.0]])
    optimizer = optim.muon(**{"learning_rate": 0.1, **CONVERGING, **options})
    update = _first_update(optimizer, params, jnp.array([[0.0, 5.0], [2.0, 0.0]]))
    expected = -0.1 * (of_the_step * factor + of_the_decay * params)
    np.testing.assert_allclose(update, expected, rtol=0, atol=1e-6)


def test_a_step_of_newton_and_schulz_by_hand():
    gradient = jnp.diag(jnp.array([3.0, 4.0]))
    for steps, expected in ((0, [0.6, 0.8]), (1, [2 * x - 3 * x**3 + x**5 for x in (0.6, 0.8)])):
        optimizer = optim.muon(
            1.0, 0.0, 0.0, ns_coefficients=(2, -3, 1), ns_steps=steps, ns_dtype="float32"
        )
        update = optimizer.update(gradient, optimizer.init(gradient))[0]
        np.testing.assert_allclose(-update, np.diag(expected), rtol=0, atol=1e-6)


def test_a_norm_below_eps_is_not_scaled_up():
    gradient = jnp.diag(jnp.array([3.0, 4.0]))
    for eps, expected in ((10.0, 0.4), (4.0, 0.8)):
        optimizer = optim.muon(1.0, 0.0, 0.0, eps=eps, ns_steps=0, ns_dtype="float32")
        update = optimizer.update(gradient, optimizer.init(gradient))[0]
        np.testing.assert_allclose(-update[1, 1], expected, rtol=1e-6)
    optimizer = optim.muon(weight_decay=0.0)
    zero = optimizer.update(0 * gradient, optimizer.init(gradient))[0]
    assert not zero.any()


def test_the_average_and_nesterov():
    g1, g2 = jnp.diag(jnp.array([1.0, 0.0])), jnp.diag(jnp.array([0.0, 1.0]))
    for nesterov, expected in ((False, [0.1875, 0.25]), (True, [0.140625, 0.4375])):
        optimizer = optim.muon(1.0, 0.0, 0.75, nesterov, ns_steps=0, eps=1.0, ns_dtype="float32")
        state = optimizer.init(g1)
        _, state = optimizer.update(g1, state)
        update, state = optimizer.update(g2, state)
        np.testing.assert_allclose(-jnp.diag(update), expected, rtol=1e-6)
        np.testing.assert_allclose(jnp.diag(state[1][0].ema), [0.1875, 0.25], rtol=1e-6)


@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (6, 6)])
@pytest.mark.parametrize("scale", [None, "match_rms_adamw"])
def test_the_step_is_the_orthogonal_factor_scaled_by_the_shape(shape, scale):
    gradient = jax.random.normal(jax.random.key(0), shape)
    optimizer = optim.muon(0.5, 0.0, adjust_lr_fn=scale, **CONVERGING)
    update = _first_update(optimizer, gradient, gradient)
    left, _, right = np.linalg.svd(gradient, full_matrices=False)
    rows, columns = shape
    s = 0.2 * math.sqrt(max(shape)) if scale else math.sqrt(max(1, rows / columns))
    np.testing.assert_allclose(update, -0.5 * s * left @ right, rtol=0, atol=1e-5)


def test_the_layout_matters_to_the_original_scale_only():
    params, gradient = (jax.tree.map(jnp.transpose, tree) for tree in (PARAMS, GRADIENT))
    for options in ({"transposed": True}, {"adjust_lr_fn": "match_rms_adamw"}):
        same = {**options, "transposed": False}
        ours = _first_update(optim.muon(0.1, **options, **CONVERGING), params, gradient)
        theirs = _first_update(optim.muon(0.1, **same, **CONVERGING))
        _assert_close(jax.tree.map(jnp.transpose, ours), theirs, atol=1e-6)
    plain = _first_update(optim.muon(0.1, **CONVERGING), params, gradient)
    assert not np.allclose(plain["wide"].T, _first_update(optim.muon(0.1, **CONVERGING))["wide"])


def test_ns_dtype_is_what_the_iteration_is_rounded_to():
    gradient = jax.random.normal(jax.random.key(0), (16, 24))
    updates = {
        dtype: _first_update(optim.muon(1.0, 0.0, ns_dtype=dtype), gradient, gradient)
        for dtype in ("bfloat16", "float32")
    }
    assert jnp.array_equal(updates["bfloat16"], jax.lax.reduce_precision(updates["bfloat16"], 8, 7))
    apart = jnp.linalg.norm(updates["bfloat16"] - updates["float32"])
    assert 1e-3 < apart / jnp.linalg.norm(updates["float32"]) < 0.05


def test_state():
    optimizer = optim.muon(mask={"wide": True, "tall": False})
    state = optimizer.init(PARAMS)
    assert len(state) == 4
    assert isinstance(state[1][0], optax.EmaState)
    after = optimizer.update(GRADIENT, state, PARAMS)[1]
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
    assert jax.tree.map(jnp.shape, after[1][0].ema) == jax.tree.map(jnp.shape, PARAMS)
    mapped = optax.tree.map_params(optimizer, lambda leaf: leaf + 1, state)
    assert jax.tree.structure(mapped) == jax.tree.structure(state)
    assert mapped[1][0].ema["wide"][0, 0] == 1


MASKS = [{"wide": True, "tall": False}, lambda params: {"wide": True, "tall": False}]


@pytest.mark.parametrize("mask", MASKS)
def test_mask(mask):
    masked = _first_update(optim.muon(0.1, 0.5, mask=mask))
    full, none = _first_update(optim.muon(0.1, 0.5)), _first_update(optim.muon(0.1, 0.0))
    _assert_close(masked, {"wide": full["wide"], "tall": none["tall"]})
    assert not jnp.array_equal(full["wide"], none["wide"])


def test_mask_that_does_not_fit_is_refused_by_init():
    with pytest.raises(ValueError, match=r"at 'tall': the mask has nothing there"):
        optim.muon(mask={"wide": True}).init(PARAMS)


def test_parameters_may_hold_none():
    params, gradient = {**PARAMS, "unused": None}, {**GRADIENT, "unused": None}
    for mask in (None, {"wide": True, "tall": False, "unused": None}):
        assert _first_update(optim.muon(mask=mask), params, gradient)["unused"] is None


def test_update_needs_parameters_only_to_decay():
    optimizer = optim.muon(weight_decay=0)
    optimizer.update(GRADIENT, optimizer.init(PARAMS))
    optimizer = optim.muon()
    with pytest.raises(ValueError, match=r"params is None, but weight_decay=0\.1 needs"):
        optimizer.update(GRADIENT, optimizer.init(PARAMS))


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4)])
def test_other_parameters_than_matrices_are_refused_by_name(shape):
    params = {"hidden": {"kernel": jnp.ones((2, 3)), "other": jnp.ones(shape)}}
    with pytest.raises(ValueError, match=r"'hidden/other' has shape \(.*optax\.partition"):
        optim.muon().init(params)


def test_partition_sends_the_others_away():
    params = {**PARAMS, "bias": jnp.ones(3)}
    labels = jax.tree.map(lambda p: "muon" if p.ndim == 2 else "adamw", params)
    mask = {"wide": True, "tall": False, "bias": False}
    parts = {"muon": optim.muon(0.1, mask=mask), "adamw": optim.adamw(0.1, mask=mask)}
    gradient = {**GRADIENT, "bias": jnp.ones(3)}
    updates = _first_update(optax.partition(parts, labels), params, gradient)
    matrices = _first_update(optim.muon(0.1, mask={"wide": True, "tall": False}))
    _assert_close(updates, {**matrices, "bias": jnp.full(3, -0.1)}, atol=1e-6)


RATES = {
    "float": 0.125,
    "schedule": lambda count: jnp.float32(0.125),
    "array": jnp.float32(0.125),
}


@pytest.mark.parametrize("ns_dtype", ["bfloat16", jnp.float32])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("rate", RATES.values(), ids=RATES)
def test_dtypes_are_kept(rate, dtype, ns_dtype):
    params, gradient = jax.tree.map(lambda leaf: leaf.astype(dtype), (PARAMS, GRADIENT))
    optimizer = optim.muon(rate, ns_dtype=ns_dtype)
    state = optimizer.init(params)
    updates, after = jax.eval_shape(optimizer.update, gradient, state, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
    assert {leaf.dtype for leaf in jax.tree.leaves(after) if leaf.ndim} == {jnp.dtype(dtype)}
    kinds = [jax.tree.map(lambda leaf: leaf.dtype, tree) for tree in (state, after)]
    assert kinds[0] == kinds[1]


@pytest.mark.parametrize("ns_dtype", ["bfloat16", "float32", "float64"])
def test_float64_is_kept_under_x64(ns_dtype):
    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: np.asarray(leaf, "float64"), PARAMS)
        updates = _first_update(optim.muon(0.1, ns_dtype=ns_dtype), params, params)
        assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype("float64")}


def test_bfloat16_is_rounded_once():
    # Rounded to bfloat16 first, the momentum would be 0.949 and its complement 0.0498.
    held, gradient = jnp.full((1, 1), 1.0, "bfloat16"), jnp.full((1, 1), 3.015625, "bfloat16")
    optimizer = optim.muon(weight_decay=0.0)
    state = optimizer.init(held)
    state = (state[0], (state[1][0]._replace(ema=held), state[1][1]), *state[2:])
    ema = optimizer.update(gradient, state)[1][1][0].ema
    assert ema == jnp.bfloat16(0.95 + 0.05 * 3.015625)


def test_one_compilation_for_all_steps():
    optimizer = optim.muon(lambda count: 0.1 / (1.0 + count.astype(float)))
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


def test_scan_walks_as_a_loop_does():
    optimizer = optim.muon(0.1, ns_dtype="float32")

    def train_step(carry, _):
        params, state = carry
        updates, state = optimizer.update(GRADIENT, state, params)
        return (optax.apply_updates(params, updates), state), None

    scanned, _ = jax.lax.scan(train_step, (PARAMS, optimizer.init(PARAMS)), length=3)
    _assert_close(scanned, _walk(optimizer), atol=1e-5)


def test_a_traced_learning_rate():
    def after(rate):
        return _walk(optim.muon(rate, ns_dtype="float32"), steps=2)[0]["wide"]

    compiled, step = jax.jit(after), 1e-2
    _assert_close(compiled(0.1), after(0.1), atol=1e-5)
    slope = jax.jit(jax.jacfwd(after))(0.1)
    difference = (compiled(0.1 + step) - compiled(0.1 - step)) / (2 * step)
    _assert_close(slope, difference, atol=0.02)


def test_injected_hyperparameters():
    # Even the number of steps becomes an array then.
    injected = optax.inject_hyperparams(optim.muon)(learning_rate=0.1, ns_dtype="float32")
    state = injected.init(PARAMS)
    assert "ns_steps" in state.hyperparams
    updates, after = jax.jit(injected.update)(GRADIENT, state, PARAMS)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    _assert_close(updates, _first_update(optim.muon(0.1, ns_dtype="float32")), atol=1e-5)
    after.hyperparams["learning_rate"] = jnp.float32(0.0)
    _assert_close(injected.update(GRADIENT, after, PARAMS)[0], jax.tree.map(jnp.zeros_like, PARAMS))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"learning_rate": -0.1}, r"learning_rate must be .* is -0\.1"),
        ({"learning_rate": math.nan}, "learning_rate must be .* is nan"),
        ({"weight_decay": -0.1}, r"weight_decay must be .* is -0\.1: pass 0\.0"),
        ({"weight_decay": math.nan}, "weight_decay must be .* is nan"),
        ({"momentum": -0.5}, r"momentum must be .* is -0\.5: pass 0\.95"),
        ({"momentum": math.nan}, "momentum must be .* is nan"),
        ({"eps": -1e-7}, "eps must be .* is -1e-07"),
        ({"eps": math.nan}, "eps must be .* is nan"),
        ({"ns_steps": -1}, r"ns_steps must be in \[0, 100\), but it is -1: pass 5"),
        ({"ns_steps": 100}, r"ns_steps must be in \[0, 100\), but it is 100"),
        ({"ns_coefficients": (1.0, 2.0)}, r"must be three numbers, but they are \(1\.0, 2\.0\)"),
        ({"ns_coefficients": (1.0, 2.0, math.nan)}, r"must be finite, but they are .*nan"),
        ({"adjust_lr_fn": "adamw"}, r"adjust_lr_fn must be None, .* but it is 'adamw'"),
        ({"ns_dtype": "int32"}, "ns_dtype must be a dtype of floats, but it is 'int32'"),
    ],
)
def test_argument_out_of_range_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        optim.muon(**arguments)


@pytest.mark.parametrize("value", [True, None, "0.1", jnp.ones(2)])
@pytest.mark.parametrize("argument", ["learning_rate", "weight_decay", "momentum", "eps"])
def test_argument_that_is_no_number_is_refused(argument, value):
    with pytest.raises(TypeError, match=f"{argument} must be a real number, but it is"):
        optim.muon(**{argument: value})


def test_complex_parameters_are_refused():
    with pytest.raises(TypeError, match=r"complex parameters, .* 'spectrum' is complex64"):
        optim.muon().init({"spectrum": jnp.array([[1 + 2j]])})
