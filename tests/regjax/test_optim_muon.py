from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from regjax import optim
from tests.regjax.optimizers import assert_close, first_update

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
    update = first_update(optimizer, params, jnp.array([[0.0, 5.0], [2.0, 0.0]]))
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
        np.testing.assert_allclose(jnp.diag(state["moments"][0].ema), [0.1875, 0.25], rtol=1e-6)


@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (6, 6)])
@pytest.mark.parametrize("scale", [None, "match_rms_adamw"])
def test_the_step_is_the_orthogonal_factor_scaled_by_the_shape(shape, scale):
    gradient = jax.random.normal(jax.random.key(0), shape)
    optimizer = optim.muon(0.5, 0.0, adjust_lr_fn=scale, **CONVERGING)
    update = first_update(optimizer, gradient, gradient)
    left, _, right = np.linalg.svd(gradient, full_matrices=False)
    rows, columns = shape
    s = 0.2 * math.sqrt(max(shape)) if scale else math.sqrt(max(1, rows / columns))
    np.testing.assert_allclose(update, -0.5 * s * left @ right, rtol=0, atol=1e-5)


def test_the_layout_matters_to_the_original_scale_only():
    params, gradient = (jax.tree.map(jnp.transpose, tree) for tree in (PARAMS, GRADIENT))
    for options in ({"transposed": True}, {"adjust_lr_fn": "match_rms_adamw"}):
        same = {**options, "transposed": False}
        update = first_update(optim.muon(0.1, **options, **CONVERGING), params, gradient)
        expected = first_update(optim.muon(0.1, **same, **CONVERGING), PARAMS, GRADIENT)
        assert_close(jax.tree.map(jnp.transpose, update), expected, atol=1e-6)
    plain = first_update(optim.muon(0.1, **CONVERGING), params, gradient)
    assert not np.allclose(
        plain["wide"].T, first_update(optim.muon(0.1, **CONVERGING), PARAMS, GRADIENT)["wide"]
    )


def test_ns_dtype_is_what_the_iteration_is_rounded_to():
    gradient = jax.random.normal(jax.random.key(0), (16, 24))
    updates = {
        dtype: first_update(optim.muon(1.0, 0.0, ns_dtype=dtype), gradient, gradient)
        for dtype in ("bfloat16", "float32")
    }
    assert jnp.array_equal(updates["bfloat16"], jax.lax.reduce_precision(updates["bfloat16"], 8, 7))
    apart = jnp.linalg.norm(updates["bfloat16"] - updates["float32"])
    assert 1e-3 < apart / jnp.linalg.norm(updates["float32"]) < 0.05


@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (9, 9)])
def test_the_iteration_multiplies_along_the_longer_axis(shape):
    """The Gram matrix has the size of the shorter axis; float32 products have full precision."""
    for dtype in ("float32", "bfloat16"):
        optimizer = optim.muon(weight_decay=0.0, ns_dtype=dtype)
        gradient = jnp.ones(shape)
        text = str(jax.make_jaxpr(optimizer.update)(gradient, optimizer.init(gradient)))
        assert ("[9,9]" in text) == (shape == (9, 9))
        assert ("HIGHEST" in text) == (dtype == "float32")


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4)])
def test_other_parameters_than_matrices_are_refused_by_name(shape):
    params = {"hidden": {"kernel": jnp.ones((2, 3)), "other": jnp.ones(shape)}}
    with pytest.raises(ValueError, match=r"got shape \(.* at 'hidden/other'\. .*optax\.partition"):
        optim.muon().init(params)


def test_partition_sends_the_others_away():
    params = {**PARAMS, "bias": jnp.ones(3)}
    labels = jax.tree.map(lambda p: "muon" if p.ndim == 2 else "adamw", params)
    mask = {"wide": True, "tall": False, "bias": False}
    parts = {"muon": optim.muon(0.1, mask=mask), "adamw": optim.adamw(0.1, mask=mask)}
    gradient = {**GRADIENT, "bias": jnp.ones(3)}
    updates = first_update(optax.partition(parts, labels), params, gradient)
    matrices = first_update(optim.muon(0.1, mask={"wide": True, "tall": False}), PARAMS, GRADIENT)
    assert_close(updates, {**matrices, "bias": jnp.full(3, -0.1)}, atol=1e-6)


def test_bfloat16_is_rounded_once():
    # Rounded to bfloat16 first, the momentum would be 0.949 and its complement 0.0498.
    held, gradient = jnp.full((1, 1), 1.0, "bfloat16"), jnp.full((1, 1), 3.015625, "bfloat16")
    optimizer = optim.muon(weight_decay=0.0)
    state = optimizer.init(held)
    average, *rest = state["moments"]
    state = {**state, "moments": (average._replace(ema=held), *rest)}
    ema = optimizer.update(gradient, state)[1]["moments"][0].ema
    assert ema == jnp.bfloat16(0.95 + 0.05 * 3.015625)


@pytest.mark.parametrize("value", [0.5, 5.0, True, None, "5", jnp.ones(2, int)])
def test_the_number_of_steps_is_an_integer(value):
    with pytest.raises(TypeError, match=r"^ns_steps must be an integer; got"):
        optim.muon(ns_steps=value)


def test_arguments_at_the_ends_of_their_ranges_pass():
    optim.muon(ns_steps=99)
    optim.muon(ns_steps=0, eps=0.0, momentum=0.0)
    apart = lambda a, b=1.0: optim.muon(ns_coefficients=(a, b, 1.0)) and a
    assert jax.jit(apart)(2.0) == 2.0
    with pytest.raises(ValueError, match="ns_coefficients must be finite"):
        jax.jit(lambda a: apart(a, math.inf))(2.0)


def test_no_steps_scale_to_norm_1_as_in_torch():
    """torch.optim.Muon accepts 0 steps, and then only normalizes."""
    torch = pytest.importorskip("torch")
    weight = torch.nn.Parameter(torch.tensor([[3.0, 0.0], [0.0, 4.0]]))
    weight.grad = weight.detach().clone()
    options = {"weight_decay": 0.0, "momentum": 0.0, "ns_steps": 0}
    torch.optim.Muon([weight], 1.0, **options).step()
    params = jnp.array([[3.0, 0.0], [0.0, 4.0]])
    updates = first_update(optim.muon(1.0, **options), params, params)
    np.testing.assert_array_equal(params + updates, weight.detach())
    assert float(jnp.linalg.norm(updates)) == pytest.approx(1.0, rel=1e-2)


def test_the_number_of_steps_can_be_injected():
    """The dtype of a traced value is checked."""
    params = jnp.array([[3.0, 0.0], [0.0, 4.0]])
    optimizer = optax.inject_hyperparams(optim.muon)(1.0, ns_steps=2)
    updates, _ = jax.jit(optimizer.update)(params, optimizer.init(params), params)
    expected = first_update(optim.muon(1.0, ns_steps=2), params, params)
    np.testing.assert_allclose(updates, expected, rtol=1e-2)
    wrong = optax.inject_hyperparams(optim.muon)(1.0, ns_steps=lambda count: 2.0)
    with pytest.raises(TypeError, match=r"^ns_steps must be an integer; got"):
        jax.eval_shape(wrong.init, params)


@pytest.mark.parametrize("shape", [(4, 8), (8, 4)])
@pytest.mark.parametrize("spec", [jax.P("x", None), jax.P(None, "x"), jax.P("x", "y")], ids=str)
@pytest.mark.sample(4)
def test_under_an_explicit_mesh_the_numbers_are_the_same(spec, shape):
    optimizer = optim.muon(0.1, ns_dtype="float32")
    params = {"w": jnp.arange(32.0).reshape(shape) / 7 - 1}
    expected = first_update(optimizer, params, params)
    kinds = (jax.sharding.AxisType.Explicit,) * 2
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=kinds)
    with jax.set_mesh(mesh):
        params = jax.device_put(params, jax.NamedSharding(mesh, spec))
        updates, _ = jax.jit(optimizer.update)(params, optimizer.init(params), params)
        assert jax.typeof(updates["w"]).sharding.spec == spec
    np.testing.assert_allclose(np.array(updates["w"]), np.array(expected["w"]), atol=5e-6)


def test_the_longer_axis_stays_sharded():
    """The iteration has no all-gather: it sums small Gram matrices over devices."""
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    optimizer = optim.muon(0.1, ns_dtype="float32")
    with jax.set_mesh(mesh):
        layout = jax.NamedSharding(mesh, jax.P(None, "x"))
        params = jax.device_put({"w": jnp.ones((4, 64))}, layout)
        update = jax.jit(optimizer.update)
        text = update.lower(params, optimizer.init(params), params).compile().as_text()
    assert "all-reduce" in text
    assert "all-gather" not in text
    assert "collective-permute" not in text
