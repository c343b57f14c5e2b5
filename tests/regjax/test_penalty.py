from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from regjax._decay.penalty import elastic_net_penalty, l1_penalty, l2_penalty, l2_sp_penalty

PARAMS = {"kernel": jnp.array([[1.0, 2.0], [-3.0, 0.5]]), "bias": [jnp.array([2.0]), None]}
SUM = 1 + 4 + 9 + 0.25 + 4


def test_value_has_no_one_half():
    penalty = l2_penalty(PARAMS, 0.5)
    assert penalty == 0.5 * SUM
    assert penalty.shape == ()
    assert penalty.dtype == "float32"


def test_gradient_is_twice_the_coefficient_times_the_parameters():
    gradient = jax.grad(l2_penalty)(PARAMS, 0.5)
    assert jax.tree.all(jax.tree.map(lambda g, p: jnp.array_equal(g, p), gradient, PARAMS))


@pytest.mark.parametrize(
    "mask",
    [
        {"kernel": True, "bias": False},
        {"kernel": True, "bias": [False, None]},
        lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params),
    ],
)
def test_mask(mask):
    assert l2_penalty(PARAMS, 1.0, mask=mask) == SUM - 4
    gradient = jax.grad(l2_penalty)(PARAMS, 1.0, mask=mask)
    assert gradient["bias"][0] == 0
    assert gradient["kernel"][0, 0] == 2


@pytest.mark.parametrize(
    ("leaf", "dtype"),
    [
        (jnp.ones(2, jnp.bfloat16), "float32"),
        (jnp.ones(2, jnp.float16), "float32"),
        (jnp.ones(2, jnp.float8_e4m3fn), "float32"),
        (jnp.ones(2), "float32"),
        (jnp.ones(2, jnp.complex64), "float32"),
        (np.ones(2, np.float32), "float32"),
        (jnp.ones(()), "float32"),
    ],
)
@pytest.mark.parametrize("weight_decay", [1, 1.0, np.float64(1), jnp.float32(1), jnp.bfloat16(1)])
def test_dtype_of_the_result(leaf, dtype, weight_decay):
    penalty = jax.eval_shape(lambda: l2_penalty([leaf], weight_decay))
    assert (penalty.shape, penalty.dtype) == ((), dtype)


def test_dtype_under_x64():
    with jax.enable_x64(True):
        double, single = jnp.ones(2, jnp.float64), jnp.ones(2, jnp.float32)
        assert l2_penalty(single, 1.0).dtype == "float32"
        assert l2_penalty([single, double], jnp.float32(1)).dtype == "float64"
        assert l2_penalty(double.astype(jnp.complex128), 1.0).dtype == "float64"
        assert jax.grad(l2_penalty)([single, double], 1.0)[0].dtype == "float32"


def test_mixed_dtypes_keep_their_gradients():
    params = [jnp.full(2, 3, d) for d in (jnp.bfloat16, jnp.float16, jnp.float32)]
    assert l2_penalty(params, 1.0) == 54
    gradient = jax.grad(l2_penalty)(params, 0.5)
    assert [g.dtype for g in gradient] == [p.dtype for p in params]
    assert all(jnp.array_equal(g, p) for g, p in zip(gradient, params, strict=True))


def test_half_types_are_squared_and_summed_in_float32():
    assert l2_penalty(jnp.full(2, 300, jnp.float16), 1.0) == 180_000
    assert l2_penalty(jnp.ones(4097, jnp.bfloat16), 1.0) == 4097


def test_complex_parameters():
    params = jnp.array([3 + 4j, 0j])
    assert l2_penalty(params, 1.0) == 25
    assert jnp.array_equal(jax.grad(l2_penalty)(params, 1.0), 2 * params.conj())


@pytest.mark.parametrize("empty", [{}, [], None, {"a": None}, jnp.ones((0, 3))])
def test_nothing_to_sum_is_zero(empty):
    penalty = l2_penalty(empty, 0.5)
    assert penalty == 0.0
    assert penalty.dtype == "float32"
    assert penalty.shape == ()


def test_everything_masked_out_is_zero():
    assert l2_penalty(PARAMS, 0.5, mask=False) == 0.0


def test_jit_vmap_and_differentiation():
    traces = []

    def traced(params, weight_decay):
        traces.append(None)
        return l2_penalty(params, weight_decay)

    compiled = jax.jit(traced)
    assert compiled(PARAMS, 0.5) == 0.5 * SUM
    assert compiled(PARAMS, 0.25) == 0.25 * SUM
    assert len(traces) == 1
    assert jax.grad(l2_penalty, argnums=1)(PARAMS, 0.5) == SUM
    per_leaf = jax.jit(jax.vmap(l2_penalty, (0, None)))(jnp.arange(3.0), 0.5)
    assert per_leaf.tolist() == [0.0, 0.5, 2.0]
    rates = jnp.array([0.5, 1.0])
    per_rate = jax.jit(jax.vmap(l2_penalty, (None, 0)))(PARAMS, rates)
    assert jnp.array_equal(per_rate, rates * SUM)
    assert jnp.array_equal(jax.jit(jax.hessian(l2_penalty))(jnp.ones(2), 0.5), jnp.eye(2))


def test_sharded_parameters():
    with jax.set_mesh(
        jax.make_mesh(
            (jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Explicit,)
        )
    ):
        params = jax.device_put(jnp.ones((8, 2)), jax.P("data"))
        assert l2_penalty({"a": params, "b": jnp.ones(2)}, 1.0) == 18


@pytest.mark.parametrize(
    ("leaf", "found"),
    [
        (jnp.arange(3), "an array of int32"),
        (jnp.array(True), "an array of bool"),
        (jax.random.key(0), "an array of key<fry>"),
        (0.5, "0.5"),
        ("relu", "'relu'"),
    ],
)
def test_what_is_no_parameter_is_refused_unless_masked_out(leaf, found):
    params = {"layer": [jnp.ones(2), leaf]}
    with pytest.raises(
        TypeError, match=f"params at 'layer/1' must be .* got {found}. Set it to False in `mask`"
    ):
        l2_penalty(params, 0.5)
    assert l2_penalty(params, 0.5, mask={"layer": [True, False]}) == 1.0


def test_models_of_flax_and_equinox():
    linear = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    expected = jnp.sum(linear.kernel[...] ** 2)
    assert l2_penalty(nnx.state(linear, nnx.Param), 1.0) == expected
    model = eqx.nn.MLP(2, 3, 4, 1, key=jax.random.key(0))
    with pytest.raises(TypeError, match=r"params at 'activation' .*equinox\.filter"):
        l2_penalty(model, 0.5)
    assert l2_penalty(eqx.filter(model, eqx.is_inexact_array), 0.5) > 0


@pytest.mark.parametrize("weight_decay", [-0.1, float("nan"), float("inf"), jnp.float32(-1)])
def test_coefficient_out_of_range_is_refused(weight_decay):
    with pytest.raises(ValueError, match="weight_decay must be finite and not negative; got"):
        l2_penalty(PARAMS, weight_decay)


@pytest.mark.parametrize("weight_decay", [True, None, "0.1", 1j, jnp.ones(2), lambda step: 0.1])
def test_coefficient_that_is_no_number_is_refused(weight_decay):
    with pytest.raises(TypeError, match="weight_decay must be a real number; got"):
        l2_penalty(PARAMS, weight_decay)


def test_mask_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"mask must have the structure .* at 'bias'"):
        l2_penalty(PARAMS, 0.5, mask={"kernel": True})
    with pytest.raises(TypeError, match=r"mask at 'bias' must be a bool; got 0\.5"):
        l2_penalty(PARAMS, 0.5, mask={"kernel": True, "bias": 0.5})


REFERENCE = jax.tree.map(lambda leaf: leaf - 1, PARAMS)
# Each penalty of PARAMS with coefficients of 0.5, as a function of parameters and mask alone.
PENALTIES = {
    "l1": (lambda p, mask=None: l1_penalty(p, 0.5, mask=mask), 0.5 * 8.5),
    "elastic": (
        lambda p, mask=None: elastic_net_penalty(p, 0.5, 0.5, mask=mask),
        0.5 * (SUM + 8.5),
    ),
    "l2_sp": (lambda p, mask=None: l2_sp_penalty(p, REFERENCE, 0.5, mask=mask), 0.5 * 5),
}
each_penalty = pytest.mark.parametrize(("penalty", "value"), PENALTIES.values(), ids=PENALTIES)


@each_penalty
def test_value_by_hand(penalty, value):
    result = jax.jit(penalty)(PARAMS)
    assert (result, result.shape, result.dtype) == (value, (), "float32")


@each_penalty
def test_each_penalty_heeds_its_mask(penalty, value):
    mask = {"kernel": False, "bias": True}
    assert 0 < penalty(PARAMS, mask) < value
    gradient = jax.grad(penalty)(PARAMS, mask)
    assert not gradient["kernel"].any()
    assert gradient["bias"][0].any()


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16", "complex64"])
@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_l1_has_slope_0_at_0(zero, dtype):
    params = jnp.array([zero, 2, -2], dtype)
    assert jax.grad(l1_penalty)(params, 0.5).tolist() == [0, 0.5, -0.5]
    assert not jnp.isnan(
        jax.jit(jax.jacfwd(jax.grad(lambda w: l1_penalty(w, 0.5))))(jnp.zeros(2))
    ).any()


def test_l1_and_elastic_net_are_consistent():
    assert elastic_net_penalty(PARAMS, 0.5, 0.0) == l1_penalty(PARAMS, 0.5)
    assert elastic_net_penalty(PARAMS, 0.0, 0.5) == l2_penalty(PARAMS, 0.5)


def test_half_types_of_the_other_penalties_are_summed_in_float32():
    ones, zeros = jnp.ones(4097, jnp.bfloat16), jnp.zeros(4097, jnp.bfloat16)
    assert l1_penalty(ones, 1.0) == 4097
    assert l2_sp_penalty(ones, zeros, 1.0) == 4097
    # The difference is computed in float32: in bfloat16 the reference would be 1.
    assert l2_sp_penalty(ones[:1], jnp.float32([1 + 2**-9]), 1.0) == 2**-18


def test_no_gradient_reaches_the_reference():
    gradient = jax.grad(lambda reference: l2_sp_penalty(PARAMS, reference, 0.5))(REFERENCE)
    assert not any(leaf.any() for leaf in jax.tree.leaves(gradient))


def test_a_wider_reference_is_cast():
    with jax.enable_x64(True):
        penalty = l2_sp_penalty(jnp.ones(2, jnp.float32), np.zeros(2), 1.0)
        assert (penalty, penalty.dtype) == (2.0, "float32")


@pytest.mark.parametrize(
    ("reference", "error", "message"),
    [
        (
            None,
            ValueError,
            "reference must have the structure of the parameters; got None at the root",
        ),
        ({"kernel": 0.0}, ValueError, "reference must have .* got nothing at 'bias'"),
        ({**REFERENCE, "x": 0.0}, ValueError, "at 'x', where the parameters have nothing"),
        (
            {**REFERENCE, "bias": 0.0},
            ValueError,
            "the structure of the parameters; got 0.0 at 'bias'",
        ),
        (
            {**REFERENCE, "bias": [jnp.zeros(2), jnp.zeros(2)]},
            ValueError,
            r"reference at 'bias/0' must have .* got \(2,\)",
        ),
        (
            {**REFERENCE, "kernel": jnp.ones(2)},
            ValueError,
            r"reference at 'kernel' must have .* got \(2,\)",
        ),
        ({**REFERENCE, "kernel": 0.0}, TypeError, r"'kernel' must be a float .*; got 0\.0"),
        (
            {**REFERENCE, "kernel": jnp.ones((2, 2), int)},
            TypeError,
            "'kernel' must be a float .*; got an array of int32",
        ),
        (
            {**REFERENCE, "kernel": jnp.ones((2, 2), complex)},
            TypeError,
            "reference at 'kernel' must be real",
        ),
    ],
)
def test_reference_that_does_not_fit_is_refused(reference, error, message):
    with pytest.raises(error, match=message):
        l2_sp_penalty(PARAMS, reference, 0.5)


def test_a_reference_masked_out_may_be_anything():
    reference = {**REFERENCE, "kernel": "not yet"}
    assert l2_sp_penalty(PARAMS, reference, 0.5, mask={"kernel": False, "bias": True}) == 0.5


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_coefficients_of_the_other_penalties_are_checked(value):
    with pytest.raises(ValueError, match="weight_decay must be finite"):
        l1_penalty(PARAMS, value)
    with pytest.raises(ValueError, match="weight_decay must be finite"):
        l2_sp_penalty(PARAMS, REFERENCE, value)
    with pytest.raises(ValueError, match="l1 must be finite"):
        elastic_net_penalty(PARAMS, value, 0.1)
    with pytest.raises(ValueError, match="l2 must be finite"):
        elastic_net_penalty(PARAMS, 0.1, value)
