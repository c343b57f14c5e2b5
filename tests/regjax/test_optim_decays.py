from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from regjax import optim
from tests.regjax.optimizers import assert_close
from tests.shared import WRONG_LAYERS

PARAMS = {"kernel": jnp.array([[1.0, -2.0], [0.5, 0.0]]), "bias": jnp.array([1.0, 2.0])}
GRADIENT = {"kernel": jnp.array([[0.5, 1.0], [0.0, 0.0]]), "bias": jnp.array([0.5, -1.0])}
REFERENCE = jax.tree.map(jnp.ones_like, PARAMS)
SCALE = {"kernel": 0.5, "bias": 2.0}

# Each link with a coefficient of 0.25, and its effect on an update u of a weight w.
LINKS = {
    "l1": (optim.add_l1_decay, lambda u, w, s: u + 0.25 * jnp.sign(w)),
    "l2_sp": (
        lambda rate, mask=None: optim.add_l2_sp_decay(REFERENCE, rate, mask),
        lambda u, w, s: u + 0.25 * (w - 1.0),
    ),
    "independent": (optim.add_independent_weight_decay, lambda u, w, s: u - 0.25 * w),
    "cautious": (
        optim.add_cautious_weight_decay,
        lambda u, w, s: jnp.where(u * w >= 0, u + 0.25 * w, u),
    ),
    "by_leaf": (
        lambda rate, mask=None: optim.add_decay_by_leaf(SCALE, rate, mask),
        lambda u, w, s: u + 0.25 * s * w,
    ),
}
each_link = pytest.mark.parametrize(("make", "rule"), LINKS.values(), ids=LINKS)
each_make = pytest.mark.parametrize("make", [make for make, _ in LINKS.values()], ids=LINKS)


def _update(link, params=PARAMS, gradient=GRADIENT):
    return link.update(gradient, link.init(params), params)[0]


@each_link
def test_rule(make, rule):
    expected = jax.tree.map(rule, GRADIENT, PARAMS, SCALE)
    assert_close(_update(make(0.25)), expected)
    compiled = jax.jit(make(0.25).update)(GRADIENT, make(0.25).init(PARAMS), PARAMS)[0]
    assert_close(compiled, expected)


def test_a_decay_by_leaf_is_not_scaled_unless_asked():
    assert_close(
        _update(optim.add_decay_by_leaf(SCALE)), _update(optim.add_decay_by_leaf(SCALE, 1.0))
    )
    assert not jnp.array_equal(_update(optim.add_decay_by_leaf(SCALE))["bias"], GRADIENT["bias"])


@pytest.mark.parametrize(
    "mask",
    [{"kernel": True, "bias": False}, lambda p: jax.tree.map(lambda leaf: leaf.ndim > 1, p)],
)
@each_link
def test_mask(make, rule, mask):
    updates = _update(make(0.25, mask))
    assert_close(updates["bias"], GRADIENT["bias"])
    expected = rule(GRADIENT["kernel"], PARAMS["kernel"], SCALE["kernel"])
    assert_close(updates["kernel"], expected)


@each_make
def test_a_schedule_counts_from_zero(make):
    link = make(lambda count: jnp.array([0.0, 0.25, 0.5])[count])
    state = link.init(PARAMS)
    assert isinstance(state, optax.ScaleByScheduleState)
    for rate in (0.0, 0.25, 0.5):
        updates, state = link.update(GRADIENT, state, PARAMS)
        assert_close(updates, _update(make(rate)))
    assert state.count == 3


@each_make
def test_scan_under_jit(make):
    optimizer = optax.chain(make(lambda count: 0.1 / (1.0 + count.astype(float))), optax.sgd(0.1))

    def train_step(carry, _):
        params, state = carry
        updates, state = optimizer.update(GRADIENT, state, params)
        return (optax.apply_updates(params, updates), state), None

    carry = (PARAMS, optimizer.init(PARAMS))
    scanned, _ = jax.jit(lambda carry: jax.lax.scan(train_step, carry, length=3))(carry)
    for _ in range(3):
        carry, _ = train_step(carry, None)
    assert_close(scanned, carry, atol=1e-6)


@each_make
def test_a_traced_coefficient_and_an_injected_one(make):
    traced = jax.jit(lambda rate: _update(make(rate)))
    assert_close(traced(0.25), _update(make(0.25)))
    assert traced._cache_size() == 1
    injected = optax.inject_hyperparams(lambda weight_decay: make(weight_decay))(weight_decay=0.25)
    assert_close(_update(injected), _update(make(0.25)))


@pytest.mark.parametrize("rate", [0.125, jnp.float32(0.125), lambda count: jnp.float32(0.125)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@each_make
def test_dtypes_are_kept(make, dtype, rate):
    params, gradient = (
        jax.tree.map(lambda leaf: leaf.astype(dtype), tree) for tree in (PARAMS, GRADIENT)
    )
    updates = jax.eval_shape(lambda: _update(make(rate), params, gradient))
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}


@each_make
def test_float64_and_mixed_dtypes(make):
    with jax.enable_x64(True):
        double = jax.tree.map(lambda leaf: np.asarray(leaf, "float64"), PARAMS)
        for params, gradient in ((double, double), (PARAMS, double), (double, GRADIENT)):
            updates = _update(make(0.1), params, gradient)
            dtypes = [jax.tree.map(lambda leaf: leaf.dtype, t) for t in (updates, gradient)]
            assert dtypes[0] == dtypes[1]


def test_bfloat16_is_rounded_once():
    # Rounded to bfloat16 first, the coefficient 0.1 would be 0.10009765625.
    weight, gradient = jnp.bfloat16(243 / 128), jnp.bfloat16(0.0)
    update = _update(optim.add_independent_weight_decay(0.1), weight, gradient)
    assert update == -jnp.bfloat16(0.1 * 243 / 128)
    update = _update(optim.add_l2_sp_decay(jnp.float32(1 + 2**-9), 1.0), jnp.bfloat16(1), gradient)
    assert update == -jnp.bfloat16(2**-9)
    gradient = jnp.bfloat16(131 / 128)
    update = _update(optim.scale_by_leaf(0.3), weight, gradient)
    assert update == jnp.bfloat16(0.3 * 131 / 128) != gradient * jnp.bfloat16(0.3)


@each_make
def test_none_leaves(make):
    assert _update(make(0.25), PARAMS, {**GRADIENT, "bias": None})["bias"] is None


def test_none_leaves_of_parameters():
    params = {"kernel": jnp.ones(2), "unused": None}
    for link in (
        optim.add_l1_decay(0.25),
        optim.add_independent_weight_decay(0.25, {"kernel": True, "unused": None}),
        optim.add_cautious_weight_decay(0.25, {"kernel": True, "unused": True}),
        optim.add_l2_sp_decay(params, 0.25),
        optim.add_decay_by_leaf({"kernel": 0.5, "unused": None}),
        optim.scale_by_leaf({"kernel": 0.5, "unused": 1.0}),
        optim.scale_by_leaf(0.5),
    ):
        assert _update(link, params, params)["unused"] is None


@each_make
def test_state_is_what_optax_tools_know(make):
    optimizer = optax.chain(make(lambda count: 0.1), optim.adam())
    state = optimizer.init(PARAMS)
    mapped = optax.tree.map_params(optimizer, lambda leaf: leaf + 1, state)
    assert jax.tree.structure(mapped) == jax.tree.structure(state)
    parts = {"kernel": optax.chain(optim.add_l1_decay(0.1), optim.sgd(0.1)), "bias": optim.sgd(0.1)}
    updates = _update(optax.partition(parts, {"kernel": "kernel", "bias": "bias"}))
    assert_close(updates["bias"], -0.1 * GRADIENT["bias"], atol=1e-7)


def test_l1_keeps_zeros():
    assert _update(optim.add_l1_decay(0.25), jnp.zeros(2), jnp.zeros(2)).tolist() == [0, 0]
    spectrum = jnp.array([3 + 4j, 0])
    update = _update(optim.add_l1_decay(1.0), spectrum, jnp.zeros_like(spectrum))
    np.testing.assert_allclose(update, [0.6 + 0.8j, 0], rtol=1e-6)


def test_cautious_decay_is_not_fooled_by_underflow():
    tiny = jnp.float32(1e-30)
    assert _update(optim.add_cautious_weight_decay(1.0), -tiny, tiny) == tiny
    assert _update(optim.add_cautious_weight_decay(1.0), tiny, tiny) == 2 * tiny


def test_cautious_decay_needs_real_parameters():
    params = {"spectrum": jnp.array([1j]), "bias": jnp.ones(2)}
    with pytest.raises(
        TypeError, match=r"^params must be real for cautious decay, .*; got complex64 at 'spectrum'"
    ):
        optim.add_cautious_weight_decay(0.1).init(params)
    optim.add_cautious_weight_decay(0.1, {"spectrum": False, "bias": True}).init(params)


def test_the_reference_can_be_an_argument_of_a_compiled_step():
    step = jax.jit(lambda reference: _update(optim.add_l2_sp_decay(reference, 0.25)))
    assert_close(step(REFERENCE), _update(optim.add_l2_sp_decay(REFERENCE, 0.25)))


def test_layerwise_scale():
    params = {"embed": jnp.ones(2), "block": [jnp.ones(2), None], "head": jnp.ones(2)}
    layer_of = lambda name: {"embed": 0, "block/0": 1, "head": 2}[name]
    scale = optim.layerwise_scale(params, layer_of, 0.5)
    assert scale == {"embed": 0.25, "block": [0.5, None], "head": 1.0}
    assert optim.layerwise_scale(params, layer_of, 0.5, depth=2) == scale
    assert optim.layerwise_scale(params["head"], lambda name: 0, 0.5, depth=0) == 1.0
    deeper = optim.layerwise_scale(params, layer_of, 0.5, depth=3)
    assert deeper == {"embed": 0.125, "block": [0.25, None], "head": 0.5}
    assert optim.layerwise_scale({}, layer_of, 0.5) == {}
    updates = _update(optim.scale_by_leaf(scale), params, params)
    assert updates["embed"].tolist() == [0.25, 0.25]


@pytest.mark.parametrize(("layer", "depth", "error", "message"), WRONG_LAYERS)
def test_layer_that_is_none_is_refused(layer, depth, error, message):
    layer_of = lambda name: layer if name == "kernel" else 0
    with pytest.raises(error, match=message):
        optim.layerwise_scale(PARAMS, layer_of, 0.5, depth=depth)


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf"), jnp.float32(-1)])
@each_make
def test_coefficient_out_of_range_is_refused(make, value):
    with pytest.raises(ValueError, match="weight_decay must be finite and not negative"):
        make(value)


@pytest.mark.parametrize("value", [True, None, "0.1", jnp.ones(2)])
@each_make
def test_coefficient_that_is_no_number_is_refused(make, value):
    with pytest.raises(TypeError, match="weight_decay must be a real number"):
        make(value)


@each_make
def test_update_needs_parameters(make):
    link = make(0.1)
    with pytest.raises(
        ValueError, match=r"^params must be given, since a decay needs them; got None"
    ):
        link.update(GRADIENT, link.init(PARAMS))


@each_make
def test_mask_that_does_not_fit_is_refused_by_init(make):
    with pytest.raises(ValueError, match=r"mask must have .* got nothing at 'bias'"):
        make(0.1, {"kernel": True}).init(PARAMS)
    with pytest.raises(TypeError, match=r"mask at 'bias' must be a bool; got 0\.5"):
        make(0.1, {"kernel": True, "bias": 0.5}).init(PARAMS)


@pytest.mark.parametrize(
    ("reference", "error", "message"),
    [
        ({"kernel": 0.0}, ValueError, "reference must have .* got nothing at 'bias'"),
        ({**REFERENCE, "bias": jnp.ones(3)}, ValueError, r"'bias' must have .* got \(3,\)"),
        ({**REFERENCE, "bias": 0.0}, TypeError, "reference at 'bias' must be a float"),
    ],
)
def test_reference_that_does_not_fit_is_refused_by_init(reference, error, message):
    with pytest.raises(error, match=message):
        optim.add_l2_sp_decay(reference, 0.1).init(PARAMS)
    mask = {"kernel": True, "bias": False}
    if "bias" in reference:
        optim.add_l2_sp_decay(reference, 0.1, mask).init(PARAMS)


@pytest.mark.parametrize("make", [optim.scale_by_leaf, optim.add_decay_by_leaf])
@pytest.mark.parametrize(
    ("scale", "error", "message"),
    [
        ({"kernel": 0.5}, ValueError, "scale must have .* got nothing at 'bias'"),
        ({**SCALE, "x": 0.5}, ValueError, "at 'x', where the parameters have nothing"),
        ({**SCALE, "bias": -1.0}, ValueError, r"scale at 'bias' must be finite .* got -1\.0"),
        ({**SCALE, "bias": float("nan")}, ValueError, "scale at 'bias' must be finite .* nan"),
        ({**SCALE, "bias": True}, TypeError, "scale at 'bias' must be a real number"),
        ({**SCALE, "bias": jnp.ones(2)}, TypeError, "scale at 'bias' must be a real number"),
    ],
)
def test_scale_that_does_not_fit_is_refused_by_init(make, scale, error, message):
    with pytest.raises(error, match=message):
        make(scale).init(PARAMS)
