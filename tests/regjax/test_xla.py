"""The workarounds for XLA change no value and no derivative."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from regjax._random import xla

NUMBERS = np.float32([0.0, -0.0, 1.0, -1.0, 0.5, 1.5, 2.0, 2**-126, 3e38, np.inf, -np.inf, np.nan])

COMPLEX = np.stack([NUMBERS, NUMBERS[::-1]], axis=-1).view(np.complex64)


@pytest.mark.parametrize("x", [NUMBERS, COMPLEX], ids=["real", "complex"])
def test_rounded_is_the_identity(x):
    for function in (xla.rounded, jax.jit(xla.rounded)):
        np.testing.assert_array_equal(np.asarray(function(x)).view(np.uint32), x.view(np.uint32))


def test_the_derivative_of_rounded_is_one():
    x = jnp.asarray(NUMBERS)
    _, tangents = jax.jvp(xla.rounded, (x,), (jnp.arange(float(x.size)),))
    np.testing.assert_array_equal(tangents, np.arange(x.size))
    np.testing.assert_array_equal(jax.grad(lambda x: xla.rounded(x).sum())(x), np.ones(x.size))


@pytest.mark.parametrize("dtype", ["bool", "uint8", "uint32", "int32"])
def test_materialize_is_the_identity(dtype):
    x = jax.random.bits(jax.random.key(0), (999,), np.uint32).astype(dtype)
    np.testing.assert_array_equal(jax.jit(xla.materialize)(x), x)
