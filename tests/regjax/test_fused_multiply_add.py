"""The fused multiply-add of regjax.torch_random, against exact fractions."""

from __future__ import annotations

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from regjax.torch_random import fma

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
        ours = np.asarray(jax.jit(fma.fused_multiply_add)(*(v.astype(dtype) for v in (a, b, c))))
    for value, sum_ in zip(ours.tolist(), exact, strict=True):
        error = abs(Fraction(value) - sum_)
        for neighbor in np.nextafter(dtype(value), dtype([-np.inf, np.inf])).tolist():
            assert error <= abs(Fraction(neighbor) - sum_)
    assert ours[-2] > ours[-1]  # no tie here


@pytest.mark.parametrize("dtype", HALFWAY)
def test_constants_are_not_cancelled(dtype):
    x = np.random.default_rng(0).normal(size=1000).astype(dtype) * dtype(1e-3)
    constant = np.full_like(x, -0.1)
    with jax.enable_x64(dtype == np.float64):
        of_constant = jax.jit(lambda x: fma._exact_sum(jnp.asarray(constant), x))(x)
        of_argument = jax.jit(fma._exact_sum)(constant, x)
    np.testing.assert_array_equal(of_constant, of_argument)
