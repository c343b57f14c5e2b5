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
    "kernel": jnp.array([[1.0, -2.0, 0.5], [0.5, 3.0, -1.0]]),
    "bias": jnp.array([1.0, 2.0, -0.5]),
}
GRADIENT = {
    "kernel": jnp.array([[0.5, 1.0, -0.25], [-1.0, 0.0, 2.0]]),
    "bias": jnp.array([0.5, -1.0, 0.25]),
}


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


def test_signature():
    parameters = inspect.signature(optim.adafactor).parameters
    assert " ".join(parameters) == "learning_rate beta2_decay eps d weight_decay maximize mask"
    defaults = (1e-2, -0.8, (None, 1e-3), 1.0, 0.0, False, None)
    assert tuple(p.default for p in parameters.values()) == defaults
    assert parameters["maximize"].kind is inspect.Parameter.KEYWORD_ONLY


# The first step from w = -2 with gradient 1, worked out by hand: u = 1, RMS(w) = 2.
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, -0.2),
        ({"weight_decay": 0.25}, -0.15),
        ({"weight_decay": 0.25, "maximize": True}, 0.25),
        ({"eps": (2.0, 1e-3)}, -0.1),
        ({"eps": (None, 4.0)}, -0.4),
        # The step is capped at 1 / sqrt(1), the decay is not.
        ({"learning_rate": 3.0, "weight_decay": 0.25}, -0.5),
        ({"learning_rate": 0.0, "weight_decay": 0.25}, 0.0),
        ({"learning_rate": lambda count: jnp.where(count == 0, 0.1, 0.0)}, -0.2),
        ({"weight_decay": lambda count: jnp.where(count == 0, 0.25, 0.0)}, -0.15),
    ],
)
def test_first_step_by_hand(options, expected):
    optimizer = optim.adafactor(**{"learning_rate": 0.1, **options})
    update = _first_update(optimizer, jnp.array([-2.0]), jnp.array([1.0]))
    np.testing.assert_allclose(update, [expected], rtol=1e-6)


def test_first_step_of_a_matrix_by_hand():
    params, gradient = jnp.full((2, 2), 2.0), jnp.array([[3.0, 0.0], [0.0, 1.0]])
    # Rows and columns (9/2, 1/2), their mean 5/2: v = ((8.1, 0.9), (0.9, 0.1)), RMS(u) = 5/3.
    u = np.array([[3 / math.sqrt(8.1), 0.0], [0.0, 1 / math.sqrt(0.1)]])
    for d, divisor in ((1.0, 5 / 3), (1.25, 4 / 3), (math.inf, 1.0)):
        update = _first_update(optim.adafactor(0.1, d=d), params, gradient)
        np.testing.assert_allclose(update, -0.2 * u / divisor, rtol=1e-6)
    # Bounded by 5 from below, the mean makes v half as large; and no root is below 5.
    update = _first_update(optim.adafactor(0.1, d=math.inf, eps=(5.0, 1e-3)), params, gradient)
    np.testing.assert_allclose(update, -0.2 * gradient / 5, rtol=1e-6)


def test_the_second_moment_follows_the_step():
    optimizer = optim.adafactor(0.1, beta2_decay=-0.5)
    params = jnp.array([1.0])
    state = optimizer.init(params)
    for gradient, expected in ((1.0, 1.0), (2.0, 1 + 3 / math.sqrt(2))):
        _, state = optimizer.update(jnp.array([gradient]), state, params)
        np.testing.assert_allclose(state[1][0].v, [expected], rtol=1e-6)


def test_the_learning_rate_is_capped_by_the_root_of_the_step():
    params, gradient = jnp.array([1.0]), jnp.array([1.0])
    optimizer = optim.adafactor(0.6)
    state, visited = optimizer.init(params), []
    for _ in range(4):
        update, state = optimizer.update(gradient, state, params)
        visited.append(-float(update[0]))
    np.testing.assert_allclose(visited, [0.6, 0.6, 1 / math.sqrt(3), 0.5], rtol=1e-6)


def test_state_of_a_matrix_is_its_rows_and_columns():
    params = {"conv": jnp.ones((2, 3, 4, 5)), "kernel": jnp.ones((6, 7)), "bias": jnp.ones(8)}
    optimizer = optim.adafactor(weight_decay=0.1, mask=_matrices)
    state = optimizer.init(params)
    assert len(state) == 4
    factored = state[1][0]
    assert isinstance(factored, optax.FactoredState)
    nothing = optax.MaskedNode()
    assert jax.tree.map(jnp.shape, factored._asdict(), is_leaf=lambda leaf: leaf is nothing) == {
        "count": (),
        "v_row": {"conv": (2, 3, 4, 1), "kernel": (6, 1), "bias": nothing},
        "v_col": {"conv": (2, 3, 1, 5), "kernel": (1, 7), "bias": nothing},
        "v": {"conv": nothing, "kernel": nothing, "bias": (8,)},
    }
    kernel_alone = optimizer.init({"kernel": params["kernel"]})
    assert sum(leaf.size for leaf in jax.tree.leaves(kernel_alone) if leaf.ndim) == 6 + 7
    after = optimizer.update(params, state, params)[1]
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
    mapped = optax.tree.map_params(optimizer, lambda leaf: leaf + 1, state)
    assert jax.tree.structure(mapped) == jax.tree.structure(state)
    assert mapped[1][0].v_row["kernel"][0, 0] == mapped[1][0].v["bias"][0] == 1


def test_the_layout_of_a_matrix_makes_no_difference():
    transposed = [jax.tree.map(jnp.transpose, tree) for tree in (PARAMS, GRADIENT)]
    ours = _walk(optim.adafactor(0.1))[0]
    theirs = _walk(optim.adafactor(0.1), 3, *transposed)[0]
    _assert_close(ours, jax.tree.map(jnp.transpose, theirs), atol=1e-6)


@pytest.mark.parametrize(
    "mask", [{"kernel": True, "bias": False}, _matrices, lambda params: _matrices(params)]
)
def test_mask(mask):
    masked = _first_update(optim.adafactor(0.1, weight_decay=0.5, mask=mask))
    full = _first_update(optim.adafactor(0.1, weight_decay=0.5))
    none = _first_update(optim.adafactor(0.1))
    _assert_close(masked, {"kernel": full["kernel"], "bias": none["bias"]})
    assert not jnp.array_equal(full["kernel"], none["kernel"])


def test_mask_that_does_not_fit_is_refused_by_init():
    optimizer = optim.adafactor(weight_decay=0.1, mask={"kernel": True})
    with pytest.raises(ValueError, match=r"at 'bias': the mask has nothing there"):
        optimizer.init(PARAMS)


def test_parameters_may_hold_none():
    params, gradient = {**PARAMS, "unused": None}, {**GRADIENT, "unused": None}
    for mask in (None, {"kernel": True, "bias": False, "unused": None}):
        updates = _first_update(optim.adafactor(0.1, weight_decay=0.5, mask=mask), params, gradient)
        assert updates["unused"] is None


def test_scalars_are_vectors():
    scalar = _first_update(optim.adafactor(0.1), jnp.array(-2.0), jnp.array(1.0))
    np.testing.assert_allclose(scalar, -0.2, rtol=1e-6)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_update_always_needs_parameters(weight_decay):
    optimizer = optim.adafactor(weight_decay=weight_decay)
    with pytest.raises(ValueError, match="params is None, but Adafactor's step is relative"):
        optimizer.update(GRADIENT, optimizer.init(PARAMS))


RATES = {
    "float": 0.125,
    "schedule": lambda count: jnp.float32(0.125),
    "array": jnp.float32(0.125),
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("rate", RATES.values(), ids=RATES)
def test_dtypes_are_kept(rate, dtype):
    params, gradient = jax.tree.map(lambda leaf: leaf.astype(dtype), (PARAMS, GRADIENT))
    optimizer = optim.adafactor(rate, weight_decay=0.1)
    state = optimizer.init(params)
    updates, after = jax.eval_shape(optimizer.update, gradient, state, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
    assert {leaf.dtype for leaf in jax.tree.leaves(after) if leaf.ndim} == {jnp.dtype(dtype)}
    kinds = [jax.tree.map(lambda leaf: leaf.dtype, tree) for tree in (state, after)]
    assert kinds[0] == kinds[1]


@pytest.mark.parametrize("rate", [0.125, RATES["schedule"]])
def test_float64_is_kept_under_x64(rate):
    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: np.asarray(leaf, "float64"), PARAMS)
        updates = _first_update(optim.adafactor(rate, weight_decay=0.1), params, params)
        assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype("float64")}


def test_the_machine_epsilon_is_that_of_each_leaf():
    # 2**-10 lies below the epsilon of bfloat16, 2**-7, and above that of float32.
    params = {"half": jnp.ones(1, "bfloat16"), "single": jnp.ones(1)}
    gradient = jax.tree.map(lambda p: p * 2**-10, params)
    updates = _first_update(optim.adafactor(0.5), params, gradient)
    _assert_close(updates, {"half": jnp.full(1, -0.5 / 8, "bfloat16"), "single": jnp.full(1, -0.5)})


def test_bfloat16_is_rounded_once():
    params = jnp.full(1, 1.0, "bfloat16")
    optimizer = optim.adafactor(0.1, eps=(1e-3, 1e-3))
    state = optimizer.init(params)
    held, gradient = jnp.bfloat16(1.0), jnp.bfloat16(1.6171875)
    count = jnp.int32(9)
    factored = state[1][0]._replace(count=count, v=held[None])
    state = (state[0], (factored, *state[1][1:]), *state[2:])
    v = optimizer.update(gradient[None], state, params)[1][1][0].v[0]
    share = 10**-0.8
    assert v == jnp.bfloat16(1 + share * (1.6171875**2 - 1))
    squared = gradient * gradient
    assert v != held + jnp.bfloat16(share) * (squared - held)


def _variant(rate):
    return optim.adafactor(rate, weight_decay=0.1, maximize=True, mask=_matrices)


def test_one_compilation_for_all_steps():
    optimizer = _variant(lambda count: 0.1 / (1.0 + count.astype(float)))
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
    optimizer = _variant(0.1)

    def train_step(carry, _):
        params, state = carry
        updates, state = optimizer.update(GRADIENT, state, params)
        return (optax.apply_updates(params, updates), state), None

    scanned, _ = jax.lax.scan(train_step, (PARAMS, optimizer.init(PARAMS)), length=3)
    _assert_close(scanned, _walk(optimizer), atol=1e-6)


def test_a_traced_learning_rate():
    def after(rate):
        return _walk(_variant(rate), steps=2)[0]["kernel"]

    compiled, step = jax.jit(after), 1e-2
    _assert_close(compiled(0.1), after(0.1), atol=1e-6)
    slope = jax.jit(jax.jacfwd(after))(0.1)
    difference = (compiled(0.1 + step) - compiled(0.1 - step)) / (2 * step)
    _assert_close(slope, difference, atol=0.02)
    assert np.all(np.isfinite(jax.jacfwd(after)(0.0)))


def test_injected_hyperparameters():
    injected = optax.inject_hyperparams(optim.adafactor)(learning_rate=0.1, weight_decay=0.5)
    state = injected.init(PARAMS)
    updates, after = jax.jit(injected.update)(GRADIENT, state, PARAMS)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    _assert_close(updates, _first_update(optim.adafactor(0.1, weight_decay=0.5)), atol=1e-6)
    after.hyperparams["learning_rate"] = jnp.float32(0.0)
    _assert_close(injected.update(GRADIENT, after, PARAMS)[0], jax.tree.map(jnp.zeros_like, PARAMS))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"learning_rate": -0.1}, r"learning_rate must be .* is -0\.1: .*maximize=True"),
        ({"learning_rate": math.nan}, "learning_rate must be .* is nan"),
        ({"weight_decay": -0.1}, r"weight_decay must be .* is -0\.1: pass 0\.0"),
        ({"weight_decay": math.nan}, "weight_decay must be .* is nan"),
        ({"beta2_decay": 0.8}, r"beta2_decay must lie in \[-inf, 0\], .* is 0\.8: pass -0\.8"),
        ({"beta2_decay": math.nan}, "beta2_decay must lie in .* is nan"),
        ({"eps": (-1e-8, 1e-3)}, r"eps\[0\] must be .* is -1e-08: pass None"),
        ({"eps": (math.nan, 1e-3)}, r"eps\[0\] must be .* is nan"),
        ({"eps": (None, -1e-3)}, r"eps\[1\] must be .* is -0\.001: pass 1e-3"),
        ({"eps": (None, math.nan)}, r"eps\[1\] must be .* is nan"),
        ({"d": 0.5}, r"d must lie in \[1, inf\], but it is 0\.5: pass 1\.0"),
        ({"d": jnp.float32(-1)}, r"d must lie in .* is -1\.0"),
        ({"d": math.nan}, "d must lie in .* is nan"),
    ],
)
def test_argument_out_of_range_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        optim.adafactor(**arguments)


@pytest.mark.parametrize("value", [True, None, "0.1", jnp.ones(2)])
@pytest.mark.parametrize("argument", ["learning_rate", "weight_decay", "beta2_decay", "d"])
def test_argument_that_is_no_number_is_refused(argument, value):
    with pytest.raises(TypeError, match=f"{argument} must be a real number, but it is"):
        optim.adafactor(**{argument: value})


def test_complex_parameters_are_refused():
    with pytest.raises(TypeError, match="complex parameter 'spectrum'"):
        optim.adafactor().init({"spectrum": jnp.array([1 + 2j])})
