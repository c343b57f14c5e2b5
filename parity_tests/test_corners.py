"""Corner cases of dropout, each with a test, in both frameworks."""

from __future__ import annotations

import functools

import jax
import ml_dtypes
import numpy as np
import pytest
import torch

from parity_tests import reference
from parity_tests.frameworks import JAX, TORCH, Framework
from parity_tests.tables import RATES, assert_same_bits, both_frameworks, inputs, vjp

X = np.linspace(-2, 3, 60, dtype=np.float32).reshape(3, 4, 5)
SPECIAL = np.array([np.nan, np.inf, -np.inf, 1.0], np.float32)
OUT_OF_RANGE = (-0.1, 1.5, float("nan"), float("inf"), -1e-9)


@both_frameworks
@pytest.mark.parametrize("rate", OUT_OF_RANGE)
@pytest.mark.parametrize("deterministic", [False, True])
def test_a_number_out_of_range_is_refused_by_value(framework: Framework, rate, deterministic):
    with pytest.raises(ValueError, match=r"rate must lie in \[0, 1\]; got ") as error:
        framework.dropout(X, rate, deterministic=deterministic)
    assert str(rate) in str(error.value)


@both_frameworks
@pytest.mark.parametrize("rate", OUT_OF_RANGE)
def test_a_changing_rate_out_of_range_gives_nan(framework: Framework, rate):
    x, key = framework.array(X), framework.key(0)
    y = framework.traced(lambda rate: framework.library.dropout(x, rate, key=key))(np.float32(rate))
    assert np.isnan(framework.numpy(y)).all()


@both_frameworks
@pytest.mark.parametrize("rate", [True, "0.5", None, 0.5j])
def test_a_rate_that_is_no_real_number_is_refused(framework: Framework, rate):
    with pytest.raises(TypeError, match="rate must be a real number"):
        framework.dropout(X, rate)


@both_frameworks
def test_a_rate_with_dimensions_is_refused(framework: Framework):
    with pytest.raises(ValueError, match=r"rate must be a scalar in \[0, 1\]; got shape \(2,\)"):
        framework.dropout(X, framework.array(np.array([0.1, 0.2], np.float32)))


@both_frameworks
@pytest.mark.parametrize(("rate", "deterministic"), [(0.0, False), (0, False), (0.5, True)])
def test_rate_0_and_evaluation_return_the_input_itself(framework: Framework, rate, deterministic):
    x = framework.array(SPECIAL)
    assert framework.library.dropout(x, rate, deterministic=deterministic) is x


@both_frameworks
def test_a_changing_rate_of_0_keeps_every_bit(framework: Framework):
    x, key = framework.array(X), framework.key(0)
    y = framework.traced(lambda rate: framework.library.dropout(x, rate, key=key))(np.float32(0))
    np.testing.assert_array_equal(framework.numpy(y), X)


@both_frameworks
@pytest.mark.parametrize("traced", [False, True])
def test_rate_1_gives_zeros_and_zero_gradients(framework: Framework, traced):
    key = framework.key(0)

    def run(rate):
        x = framework.array(SPECIAL)
        return framework.vjp(
            lambda x: framework.library.dropout(x, rate, key=key), x, framework.array(SPECIAL)
        )

    y, gradient = framework.traced(run)(np.float32(1)) if traced else run(1.0)
    np.testing.assert_array_equal(framework.numpy(y), np.zeros(4))
    # A cotangent of NaN or infinity at a dropped element gives 0, too.
    np.testing.assert_array_equal(framework.numpy(gradient), np.zeros(4))


@both_frameworks
def test_rate_1_needs_no_key(framework: Framework):
    assert not framework.numpy(framework.library.dropout(framework.array(X), 1)).any()


@both_frameworks
@pytest.mark.parametrize("deterministic", [False, True])
def test_a_changing_flag_switches_between_training_and_evaluation(
    framework: Framework, deterministic
):
    x, key = framework.array(X), framework.key(3)

    def run(deterministic):
        return framework.library.dropout(x, 0.5, key=key, deterministic=deterministic)

    switched = framework.numpy(framework.traced(run)(deterministic))
    np.testing.assert_array_equal(switched, framework.numpy(run(deterministic)))


@both_frameworks
@pytest.mark.parametrize("flag", [0, 1, None, "no"])
def test_a_flag_that_is_no_boolean_is_refused(framework: Framework, flag):
    with pytest.raises(TypeError, match="deterministic must be a boolean"):
        framework.dropout(X, 0.5, deterministic=flag)


@both_frameworks
@pytest.mark.parametrize("dtype", [np.int32, np.uint8, np.bool_])
@pytest.mark.parametrize("deterministic", [False, True])
def test_integers_are_refused_with_the_cast_that_mends_it(
    framework: Framework, dtype, deterministic
):
    with pytest.raises(TypeError, match=r"x must be floating or complex; got dtype .*Cast it: x\."):
        framework.dropout(X.astype(dtype), 0.5, deterministic=deterministic)


@both_frameworks
def test_a_missing_key_lists_the_ways_out(framework: Framework):
    with pytest.raises(ValueError, match="key must be a random key in training") as error:
        framework.dropout(X, 0.5, key=None)
    assert all(way in str(error.value) for way in ("key(seed)", "site_key", "deterministic=True"))


@both_frameworks
@pytest.mark.parametrize("key", [0, "key", X])
def test_what_is_no_key_is_refused(framework: Framework, key):
    key = framework.array(key) if isinstance(key, np.ndarray) else key
    with pytest.raises(TypeError, match="key must be a"):
        framework.dropout(X, 0.5, key=key)


BATCHES = {
    "typed": (JAX, lambda: jax.random.split(jax.random.key(0), 3)),
    "raw": (JAX, lambda: jax.random.split(jax.random.PRNGKey(0), 3)),
    "torch": (TORCH, lambda: TORCH.library.split(TORCH.key(0), 3)),
}


@pytest.mark.parametrize(("framework", "keys"), BATCHES.values(), ids=BATCHES)
def test_a_batch_of_keys_is_refused_and_vmap_named(framework: Framework, keys):
    with pytest.raises(ValueError, match=r"batch of keys.*vmap"):
        framework.dropout(X, 0.5, key=keys())


@both_frameworks
def test_what_was_not_finite_and_is_dropped_is_zero(framework: Framework):
    x = np.tile(SPECIAL, 50)
    keep = framework.bernoulli(1, 0.5, x.shape)
    y = framework.dropout(x, 0.5, seed=1)
    assert (y[~keep] == 0).all()
    np.testing.assert_array_equal(y[keep], (x * np.float32(2))[keep])
    assert 0 < keep.sum() < keep.size


@both_frameworks
@pytest.mark.parametrize("shape", [(0,), (3, 0, 2), (), (1,), (1, 1)])
def test_empty_and_tiny_arrays(framework: Framework, shape):
    x = np.ones(shape, np.float32)
    y = framework.dropout(x, 0.5, seed=2)
    assert y.shape == shape
    np.testing.assert_array_equal(y, reference.dropout(x, 0.5, (0, 2)))


@both_frameworks
@pytest.mark.parametrize(
    "dims", [(0,), (1, 2), (2, 0), (0, 1, 2), ()], ids=lambda dims: f"dims{dims}"
)
def test_dimensions_that_share_one_mask(framework: Framework, dims):
    y = framework.dropout(X, 0.5, seed=5, broadcast_dims=dims)
    expected = reference.dropout(X, 0.5, (0, 5), broadcast_dims=dims)
    np.testing.assert_array_equal(y, expected)


@both_frameworks
@pytest.mark.parametrize("dims", [(3,), (-1,), (1, 1)])
def test_wrong_dimensions_are_refused_by_value(framework: Framework, dims):
    with pytest.raises(ValueError, match="broadcast_dims must be distinct dimensions") as error:
        framework.dropout(X, 0.5, broadcast_dims=dims)
    assert str(dims) in str(error.value)


# The largest relative error of one rounding to each dtype.
DTYPES = {
    np.dtype(np.float16): 2.0**-11,
    np.dtype(ml_dtypes.bfloat16): 2.0**-8,
    np.dtype(np.float32): 2.0**-23,
    np.dtype(np.float64): 2.0**-52,
    np.dtype(np.complex64): 2.0**-23,
    np.dtype(np.complex128): 2.0**-52,
    np.dtype(ml_dtypes.float8_e4m3fn): 2.0**-4,
    np.dtype(ml_dtypes.float8_e5m2): 2.0**-3,
}


@both_frameworks
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.sample(17)
def test_the_dtype_is_kept_and_the_result_rounded_once(framework: Framework, dtype, traced):
    x = np.linspace(1, 2, 60).reshape(3, 4, 5).astype(dtype)
    if np.iscomplexobj(x):
        x = x + 1j * x[::-1].astype(dtype)
    with jax.enable_x64(dtype.itemsize >= 8 and dtype != np.complex64):
        key = framework.key(7)
        array = framework.array(x)
        run = lambda rate: framework.library.dropout(array, rate, key=key)
        y = framework.numpy(framework.traced(run)(np.float32(0.25)) if traced else run(0.25))
    assert y.dtype == dtype
    expected = reference.dropout(x, 0.25, (0, 7))
    wide = np.complex128 if np.iscomplexobj(x) else np.float64
    y, expected = y.astype(wide), expected.astype(wide)
    assert ((y == 0) == (expected == 0)).all()
    assert (np.abs(y - expected) <= 2 * DTYPES[dtype] * np.abs(expected)).all()


# The other types are scaled in one of these two, by factors that every rate tests here.
FACTORS = (np.dtype(np.float32), np.dtype(np.float64))
ROUNDED = [(dtype, rate) for dtype in FACTORS for rate in (*RATES, 0.45)]
ROUNDED += [(dtype, rate) for dtype in DTYPES if dtype not in FACTORS for rate in RATES[1::2]]


@pytest.mark.parametrize(("dtype", "rate"), ROUNDED, ids=str)
@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.sample(5)
def test_both_frameworks_agree_in_every_bit_forward_and_backward(dtype, rate, traced):
    x, cotangent = inputs((7, 33), dtype)

    def run(framework: Framework):
        drop = functools.partial(framework.library.dropout, key=framework.key(11))
        return vjp(framework, drop, np.float32(rate) if traced else rate, x, cotangent)

    with jax.enable_x64(dtype.itemsize >= 8 and dtype != np.complex64):
        assert_same_bits(dtype, run(JAX), run(TORCH))


def test_no_gradient_flows_to_the_rate():
    x, key = JAX.array(X), JAX.key(0)
    total = lambda rate: JAX.library.dropout(x, rate, key=key).sum()
    assert jax.grad(total)(0.5) == 0
    assert np.isfinite(total(0.5))
    rate = torch.tensor(0.5, requires_grad=True)
    y = TORCH.library.dropout(TORCH.array(X).requires_grad_(), rate, key=TORCH.key(0))
    (gradient,) = torch.autograd.grad(y.sum(), rate, allow_unused=True)
    assert gradient is None
