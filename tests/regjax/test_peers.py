"""The same key gives the mask and the float32 values of the layers of other libraries."""

from __future__ import annotations

import equinox
import haiku
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import regjax
from tests.regjax.versions import assert_same_eagerly

KEY = jax.random.key(11)
RATES = [0.1, 0.15, 0.123, 0.45, 0.5, 0.9, 0.01, 0.3, 0.75, 0.999]
PEERS = {
    "nnx": lambda x, rate: nnx.Dropout(rate, deterministic=False)(x, rngs=KEY),
    "equinox": lambda x, rate: equinox.nn.Dropout(rate)(x, key=KEY),
    "haiku": lambda x, rate: haiku.dropout(KEY, rate, x),
}


@pytest.mark.parametrize("peer", PEERS.values(), ids=PEERS)
@pytest.mark.parametrize("rate", RATES)
@pytest.mark.sample(6)
def test_the_values_are_those_of_the_peer(peer, rate):
    x = jnp.linspace(-3.0, 3.0, 257 * 64).reshape(257, 64)
    with jax.numpy_dtype_promotion("standard"):  # the peers require promotion
        expected = peer(x, rate)
    assert_same_eagerly(regjax.dropout(x, rate, key=KEY), expected)


@pytest.mark.parametrize("shape", [(2**24,), (4096, 4096), (16, 64, 128, 128)], ids=str)
@pytest.mark.slow
def test_a_hundred_million_elements_equal_those_of_jax(shape):
    """Compare 10**8 elements: two rates and three shapes of 2**24, eager and jitted."""
    for rate, seed in ((0.9, 0), (0.123, 2**32 - 1)):
        key = jax.random.key(seed)
        expected = jax.random.bernoulli(key, rate, shape)
        assert bool((regjax.bernoulli(key, rate, shape) == expected).all())
        jitted = jax.jit(lambda key, rate=rate: regjax.bernoulli(key, rate, shape))
        assert bool((jitted(key) == expected).all())
