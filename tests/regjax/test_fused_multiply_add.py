"""The fused multiply-add of regjax.torch_random, against exact fractions."""

from __future__ import annotations

from fractions import Fraction

import jax
import numpy as np
import pytest

from regjax.torch_random.fma import fused_multiply_add

# Near a number halfway between two of float32, and of float64: two roundings would differ from one.
HALFWAY = {
    np.float32: (1 + 2**-12, 1 + 2**-12, 2.0**-80),
    np.float64: (1 + 2**-26, 1 + 2**-27, 2.0**-200),
}


@pytest.mark.parametrize("dtype", HALFWAY)
def test_one_rounding(dtype):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 300)).astype(dtype)
    # Sums without, with some and with nearly full cancellation.
    c = (-(a * b) * np.repeat([1e-3, 0.4, 1], 100)).astype(dtype)
    one, other, tiny = HALFWAY[dtype]
    a, b, c = np.r_[a, one, one], np.r_[b, other, other], np.r_[c, tiny, -tiny]
    terms = zip(a.tolist(), b.tolist(), c.tolist(), strict=True)
    exact = [Fraction(x) * Fraction(y) + Fraction(z) for x, y, z in terms]
    with jax.enable_x64(dtype == np.float64):
        ours = np.asarray(jax.jit(fused_multiply_add)(*(v.astype(dtype) for v in (a, b, c))))
    for value, sum_ in zip(ours.tolist(), exact, strict=True):
        error = abs(Fraction(value) - sum_)
        for neighbor in np.nextafter(dtype(value), dtype([-np.inf, np.inf])).tolist():
            assert error <= abs(Fraction(neighbor) - sum_)
    assert ours[-2] > ours[-1]  # no tie here


@pytest.mark.parametrize("constant", [-0.1, 4.5])
def test_constants_are_not_cancelled(constant):
    a, b = np.random.default_rng(0).normal(size=(2, 1000)).astype(np.float32)
    c = np.float32(constant)
    traced = jax.jit(fused_multiply_add)(a, b, c)
    fixed = jax.jit(lambda a, b: fused_multiply_add(a, b, c))(a, b)
    np.testing.assert_array_equal(traced, fixed)
    with jax.enable_x64(True):
        a, b, c = a.astype(np.float64), b.astype(np.float64), np.float64(constant)
        traced = jax.jit(fused_multiply_add)(a, b, c)
        fixed = jax.jit(lambda a, b: fused_multiply_add(a, b, c))(a, b)
        np.testing.assert_array_equal(traced, fixed)
