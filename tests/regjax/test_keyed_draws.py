"""Modules of Linen that draw masks themselves, with keys from `make_rng("dropout")`."""

from __future__ import annotations

import threading

import flax.errors
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen
from flax.linen.attention import dot_product_attention_weights

import regjax

ROOT = jax.random.key(0)
X = jnp.ones((4, 6))
ORIGINAL = jax.random.bernoulli


def mask(name, shape=X.shape, rate=0.5):
    return regjax.bernoulli(regjax.site_key(ROOT, 1, name), 1 - rate, shape)


def apply(module, *args, names=None, broadcast=None, variables=None, **options):
    bound = regjax.keyed.bind(module, ROOT, 1, names=names, broadcast_dropout=broadcast)
    return bound.apply(variables or {}, *args, **options)


class Draws(linen.Module):
    """Draws twice in a call, the second time in a method."""

    def __call__(self, x):
        keep = jax.random.bernoulli(self.make_rng("dropout"), 0.5, x.shape)
        return jnp.stack([keep, self.again(x)])

    def again(self, x):
        return jax.random.bernoulli(self.make_rng("dropout"), shape=x.shape)


class Twice(linen.Module):
    @linen.compact
    def __call__(self, x):
        draws = linen.remat(Draws)(name="a")
        return jnp.stack([draws(x), draws(x)])


EVERY = ("a", "a:1", "a#1", "a:1#1")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (None, EVERY),
        ({"": "model"}, [f"model.{name}" for name in EVERY]),
        ({"a": "b"}, [name.replace("a", "b") for name in EVERY]),
        ({"": "", "a:1": "c.d"}, ("a", "c.d", "a#1", "c.d#1")),
    ],
)
def test_each_draw_of_a_call_has_a_name(names, expected):
    found = jax.jit(lambda x: apply(Twice(), x, names=names))(X)
    for keep, name in zip(found.reshape(-1, *X.shape), expected, strict=True):
        np.testing.assert_array_equal(keep, mask(name))
    assert regjax.keyed.sites(Twice(), X, names=names) == list(expected[:2])
    first, second = apply(Draws(), X)
    np.testing.assert_array_equal(first, mask(""))
    np.testing.assert_array_equal(second, mask(":1"))


def test_the_masks_of_draws_are_those_of_regjax_under_every_configuration():
    with jax.enable_x64(True), jax.threefry_partitionable(False):
        np.testing.assert_array_equal(apply(Draws(), X)[0], mask(""))
        key = regjax.site_key(ROOT, 1, "")
        assert (jax.random.bernoulli(key, 0.5, X.shape) != mask("")).any()
    log = []
    with regjax.observing(log.append):
        apply(Draws(), X)
        jax.effects_barrier()
    events = [event for event in log if hasattr(event, "mask")]
    assert [(event.function, event.rate, event.mask.sum()) for event in events] == [
        ("bernoulli", 0.5, mask(name).sum()) for name in ("", ":1")
    ]


class Attention(linen.Module):
    """Calls Flax's function, which it has imported by name, with a key of its own."""

    own_key: bool = False

    @linen.compact
    def __call__(self, q):
        rng = jax.random.key(9) if self.own_key else self.make_rng("dropout")
        return dot_product_attention_weights(q, q, dropout_rng=rng, dropout_rate=0.3)


@pytest.mark.parametrize("broadcast", [None, True, False])
@pytest.mark.sample(2)
def test_attention_weights_share_their_mask_unless_told_otherwise(broadcast):
    q = jax.random.normal(ROOT, (3, 5, 2, 4))
    weights = dot_product_attention_weights(q, q, deterministic=True)
    keep = mask("", weights.shape if broadcast is False else (1, 1, 5, 5), rate=0.3)
    log = []
    with regjax.observing(log.append):
        dropped = jax.jit(lambda q: apply(Attention(), q, broadcast=broadcast))(q)
        jax.effects_barrier()
    kept = jnp.broadcast_to(keep, weights.shape)
    np.testing.assert_allclose(dropped, jnp.where(kept, weights / 0.7, 0), rtol=1e-6)
    (event,) = (event for event in log if hasattr(event, "mask"))
    np.testing.assert_array_equal(event.mask, keep)
    np.testing.assert_allclose(event.entering, weights, rtol=1e-6)
    assert (event.function, round(event.rate, 6)) == ("dot_product_attention", 0.3)


def test_other_keys_and_threads_draw_as_before():
    q = jax.random.normal(ROOT, (3, 5, 2, 4))
    given = dot_product_attention_weights(q, q, dropout_rng=jax.random.key(9), dropout_rate=0.3)
    np.testing.assert_array_equal(apply(Attention(own_key=True), q), given)
    found = []

    class Elsewhere(linen.Module):
        def __call__(self, x):
            key = self.make_rng("dropout")
            thread = threading.Thread(
                target=lambda: found.append(jax.random.bernoulli(key, 0.5, (3,), mode="high"))
            )
            thread.start()
            thread.join()
            other = jax.random.bernoulli(self.make_rng("other"), 0.5, x.shape)
            found.append(jax.random.bernoulli(key, jnp.full(3, 0.5)))
            return other

    np.testing.assert_array_equal(
        apply(Elsewhere(), X, rngs={"other": ROOT}),
        Elsewhere().apply({}, X, rngs={"other": ROOT, "dropout": ROOT}),
    )
    key = regjax.site_key(ROOT, 1, "")
    np.testing.assert_array_equal(found[0], ORIGINAL(key, 0.5, (3,), mode="high"))
    np.testing.assert_array_equal(found[1], ORIGINAL(key, jnp.full(3, 0.5)))
    assert jax.random.bernoulli is ORIGINAL
    with pytest.raises(ValueError, match=r"p must lie in \[0, 1\]"):
        apply(Bad(), X)
    assert jax.random.bernoulli is ORIGINAL
    with pytest.raises(flax.errors.InvalidRngError):
        Draws().apply({}, X)


class Bad(linen.Module):
    def __call__(self, x):
        return jax.random.bernoulli(self.make_rng("dropout"), 1.5, x.shape)


class Shares(linen.Module):
    """Uses a key in a loop."""

    def __call__(self, x):
        key = self.make_rng("dropout")
        return jax.lax.map(lambda x: jax.random.bernoulli(key, 0.5, x.shape), x)


def test_draws_that_would_share_a_mask_are_errors():
    with pytest.raises(ValueError, match=r"must not be called inside .* with a key of Shares"):
        apply(Shares(), X)
    with pytest.raises(ValueError, match=r"inputs of Draws must be the whole batch.*vmap"):
        jax.vmap(lambda x: apply(Draws(), x))(X)
    steps = jnp.arange(2)
    found = jax.vmap(lambda step: regjax.keyed.bind(Draws(), ROOT, step).apply({}, X))(steps)
    np.testing.assert_array_equal(found[1, 0], mask(""))
