"""Behavior that the layers of all frameworks share: small masks, dimensions, and scales."""

from __future__ import annotations

import chex
import flax.nnx
import jax
import jax.numpy as jnp
import pytest

import regjax
from regjax import equinox, haiku, linen, nnx
from regjax._layers import wrapped_dims
from regjax._peers import FLAX, flax_dropout, uniform

KEY = jax.random.key(5)
KEYS = {
    "threefry": lambda: KEY,
    "raw": lambda: jax.random.PRNGKey(5),
    "rbg": lambda: jax.random.key(5, impl="rbg"),
    "raw rbg": lambda: jax.random.key_data(jax.random.key(5, impl="rbg")),
}
SETTINGS = {
    "defaults": jax.threefry_partitionable(True),
    "x64": jax.enable_x64(True),
    "not partitionable": jax.threefry_partitionable(False),
    "rbg": jax.default_prng_impl("rbg"),
}


@pytest.mark.parametrize(
    ("key", "setting"),
    [("threefry", setting) for setting in SETTINGS] + [(key, "rbg") for key in KEYS],
)
@pytest.mark.sample(4)
def test_no_setting_and_no_kind_of_key_changes_a_mask(key, setting):
    one = KEYS[key]()
    expected = regjax.bernoulli(one, 0.3, (65, 63))
    with SETTINGS[setting]:
        for shape in ((65, 63), (3, 7)):
            mask = FLAX(one, 0.3, shape)
            chex.assert_trees_all_equal(mask, expected.reshape(-1)[: mask.size].reshape(shape))


def test_small_masks_are_drawn_by_the_operations_of_flax():
    def operations(size):
        draw = lambda key: FLAX(key, 0.3, (size,))
        return f"random_bits[bit_width=32 shape=({size},)]" in str(jax.make_jaxpr(draw)(KEY))

    assert operations(4095)
    assert not operations(4096)


def test_another_sampler_is_left_alone():
    x, options = jnp.ones((64, 128)), {"key": KEY, "sampler": regjax.packed_bernoulli}
    dropped = flax_dropout(x, 0.3, **options)
    chex.assert_trees_all_equal(dropped, regjax.dropout(x, 0.3, **options))
    assert (dropped != regjax.dropout(x, 0.3, key=KEY)).any()


@pytest.mark.parametrize(("dims", "wrapped"), [((), ()), ([1], (1,)), ((-1, 2, -3), (0, 2))])
def test_dims_count_from_the_end(dims, wrapped):
    assert tuple(sorted(wrapped_dims(dims, 3))) == wrapped


@pytest.mark.parametrize("dim", [3, -4])
def test_a_dim_that_is_not_there_is_refused(dim):
    with pytest.raises(IndexError, match=r"broadcast_dims must be dimensions of inputs, .* has 3"):
        wrapped_dims((dim,), 3)


# A layer with a possibly traced rate, by framework.
LAYERS = {
    "linen": lambda x, rate: linen.Dropout(rate, deterministic=False).apply(
        {}, x, rngs={"dropout": KEY}
    ),
    "nnx": lambda x, rate: nnx.Dropout(rate, rngs=flax.nnx.Rngs(0))(x),
    "equinox": lambda x, rate: equinox.Dropout(rate)(x, key=KEY),
    "haiku": lambda x, rate: haiku.dropout(KEY, rate, x),
}


@pytest.mark.parametrize("traced", [False, True], ids=["number", "traced"])
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_only_the_key_and_the_rate_are_kept_for_the_backward_pass(layer, traced):
    def kept(x, rate):
        _, pull = jax.vjp(lambda x: layer(x, rate), x)
        return sum(leaf.size for leaf in jax.tree.leaves(pull))

    x = jnp.ones((64, 128))
    elements = jax.jit(kept)(x, jnp.float32(0.3)) if traced else kept(x, 0.3)
    assert elements <= 2


@pytest.mark.parametrize("traced", [False, True], ids=["number", "traced"])
@pytest.mark.parametrize("layer", ["equinox", "haiku"])
def test_key_reuse_is_still_seen(layer, traced):
    drop, x = LAYERS[layer], jnp.ones((64, 128))
    twice = lambda x, rate: drop(drop(x, rate), rate)
    with jax.debug_key_reuse(True), pytest.raises(jax.errors.KeyReuseError):
        jax.jit(twice, static_argnums=() if traced else 1)(x, 0.3)


@pytest.mark.parametrize("shape", [(8,), (64, 128)], ids=str)
def test_key_reuse_is_seen_outside_of_jit_too(shape):
    with jax.debug_key_reuse(True):
        key = jax.random.key(1)
        uniform(key, shape)
        with pytest.raises(jax.errors.KeyReuseError):
            uniform(key, shape)


def test_vmap_counts_what_all_keys_draw():
    """Small masks use the slow operations of `jax.random` only while their total size is small."""

    def counts(*keys):
        draw = lambda key: uniform(key, (8,))
        for _ in keys:
            draw = jax.vmap(draw)
        # The other implementation counts the elements.
        return "iota" in str(jax.make_jaxpr(draw)(jax.random.split(KEY, keys)))

    assert not counts(3)
    assert not counts(20, 20)
    assert counts(600)
    assert counts(24, 25)
