"""The moments in the state of an optimizer: their dtype and their sharding."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
import pytest

from regjax import optim
from tests.regjax.optimizers import MAKE, assert_close, dtypes, first_update

OPTIMIZERS = {name: make(0.1) for name, make in MAKE.items()}
each_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
PARAMS = {"a": jnp.full((2, 3), 0.5), "b": jnp.full((2, 3), -0.25)}
GRADIENT = {"a": jnp.full((2, 3), 0.25), "b": jnp.full((2, 3), 2.0)}
DTYPES = {
    "sgd": (optim.sgd, "accumulator_dtype", {"momentum": 0.9, "nesterov": True}, "trace"),
    "adam": (optim.adam, "mu_dtype", {"amsgrad": True}, "mu"),
    "adamw": (optim.adamw, "mu_dtype", {}, "mu"),
    "nadam": (optim.nadam, "mu_dtype", {}, "mu"),
    "muon": (optim.muon, "mu_dtype", {"ns_dtype": "float32"}, "ema"),
}


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [("float32", "bfloat16"), ("bfloat16", "float64"), ("float32", "float32")],
)
@pytest.mark.parametrize(("make", "option", "options", "field"), DTYPES.values(), ids=DTYPES)
def test_the_dtype_of_a_moment(make, option, options, field, dtype, stored):
    with jax.enable_x64(True):
        params, gradient = (optax.tree.cast(tree, dtype) for tree in (PARAMS, GRADIENT))
        optimizer = make(0.1, **options, **{option: stored})
        state = optimizer.init(params)
        for _ in range(2):
            updates, after = optimizer.update(gradient, state, params)
            assert set(jax.tree.leaves(dtypes(updates))) == {jnp.dtype(dtype)}
            assert dtypes(after) == dtypes(state)
            state = after
        [moment] = {leaf.dtype for leaf in jax.tree.leaves(optax.tree.get(state, field))}
        assert moment == jnp.dtype(stored)
        if stored == dtype:
            plain = make(0.1, **options)
            [expected] = [plain.update(gradient, plain.init(params), params)]
            assert_close(optimizer.update(gradient, optimizer.init(params), params), expected)


def test_a_step_uses_the_moment_unrounded_and_stores_it_rounded():
    gradient, dtype = {"a": jnp.full((2, 3), jnp.float32(1 / 3))}, jnp.bfloat16
    optimizer = optim.sgd(1.0, 0.875, accumulator_dtype=dtype)
    state, stored = optimizer.init(gradient), jnp.zeros([], dtype)
    for _ in range(3):
        updates, state = optimizer.update(gradient, state)
        trace = 0.875 * stored.astype("float32") + gradient["a"][0, 0]
        stored = trace.astype(dtype)
        assert_close(updates["a"], jnp.full((2, 3), -trace), rtol=1e-6)
        assert_close(state["moments"].trace["a"], jnp.full((2, 3), stored))
    with jax.numpy_dtype_promotion("standard"):
        optimizer = optax.sgd(1.0, 0.875, accumulator_dtype=dtype)
        reference = optimizer.init(gradient)
        for _ in range(3):
            expected, reference = optimizer.update(gradient, reference)
    assert_close(updates, expected, rtol=4e-3)
    assert dtypes((updates, state["moments"].trace)) == dtypes((expected, reference[0].trace))


def test_a_narrow_moment_rounds_no_gradient():
    with jax.enable_x64(True):
        gradient = jnp.array([1 / 3], "float64")
        updates = first_update(optim.sgd(1.0, 0.5, accumulator_dtype="float32"), gradient, gradient)
        assert_close(updates, -gradient)


@pytest.mark.parametrize("dtype", ["int32", "no dtype", 3.0])
@pytest.mark.parametrize(("make", "option", "options", "field"), DTYPES.values(), ids=DTYPES)
def test_a_moment_needs_a_float_dtype(make, option, options, field, dtype):
    del options, field
    with pytest.raises(TypeError, match=f"^{option} must be a float dtype or None; got"):
        make(**{option: dtype})


@pytest.mark.parametrize("kind", [jax.sharding.AxisType.Explicit, jax.sharding.AxisType.Auto])
@each_optimizer
@pytest.mark.sample(15)
def test_the_state_is_sharded_as_the_parameters(optimizer, kind):
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(kind,) * 2)
    spec = jax.P("x", None)
    with jax.set_mesh(mesh):
        params, gradient = (
            jax.device_put({"w": jnp.ones((4, 6))}, jax.NamedSharding(mesh, spec)) for _ in range(2)
        )
        state = optimizer.init(params)
        factor = {"v_row": jax.P("x", None), "v_col": jax.P(None, None)}
        for path, leaf in jax.tree.leaves_with_path(state):
            if leaf.ndim:
                wanted = factor.get(path[-2].name, spec)
                assert leaf.sharding.is_equivalent_to(jax.NamedSharding(mesh, wanted), leaf.ndim)
        if kind == jax.sharding.AxisType.Auto:
            return

        def step(carry, _):
            params, state = carry
            updates, state = optimizer.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, after), _ = jax.jit(lambda c: jax.lax.scan(step, c, length=2))((params, state))
        typeof = lambda tree: jax.tree.map(lambda leaf: jax.typeof(leaf).sharding.spec, tree)
        assert typeof(after) == typeof(state)
        assert params["w"].sharding.spec == spec
