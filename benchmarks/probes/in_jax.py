"""Properties of dropout in JAX libraries: each probe takes one library's dropout."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import regjax

Array = Any
# apply(x, key, rate, off): dropout of one library.
Apply = Callable[..., Array]


def _own(x: Array, key: Array, rate: Any, off: Any) -> Array:
    return regjax.dropout(x, rate, key=key, deterministic=off)


def _linen(x: Array, key: Array, rate: Any, off: Any) -> Array:
    from flax import linen

    return linen.Dropout(rate, deterministic=off).apply({}, x, rngs={"dropout": key})


def _nnx(x: Array, key: Array, rate: Any, off: Any) -> Array:
    from flax import nnx

    return nnx.Dropout(rate, deterministic=off)(x, rngs=nnx.Rngs(dropout=key))


def _equinox(x: Array, key: Array, rate: Any, off: Any) -> Array:
    import equinox

    return equinox.nn.Dropout(rate)(x, key=key, inference=off)


def _haiku(x: Array, key: Array, rate: Any, off: Any) -> Array:
    import haiku

    del off
    return haiku.dropout(key, rate, x)


def _keras(x: Array, key: Array, rate: Any, off: Any) -> Array:
    layer = keras().layers.Dropout(rate)
    layer.build((None,))
    seed = jax.random.key_data(key).astype(layer.non_trainable_variables[0].dtype)
    return layer.stateless_call([], [seed], x, training=not off)[0]


DROPOUTS: Mapping[str, tuple[Apply, ...]] = {
    "regjax": (_own,),
    "Flax": (_linen, _nnx),
    "Equinox": (_equinox,),
    "Haiku": (_haiku,),
    "Keras": (_keras,),
}


def keras() -> Any:
    """Import Keras for JAX."""
    os.environ["KERAS_BACKEND"] = "jax"
    import keras

    return keras


X = np.linspace(1, 2, 64 * 64, dtype=np.float32).reshape(64, 64)


def mask(apply: Apply, rate: float = 0.5) -> np.ndarray:
    """Return the mask of a call, or fail, which is a fault of this program."""
    keep = np.asarray(apply(jnp.asarray(X), jax.random.key(0), rate, False)) != 0
    if not rate - 0.05 < 1 - keep.mean() < rate + 0.05:
        raise RuntimeError(f"{apply.__name__} must drop {rate}; got {1 - keep.mean()}.")
    return keep


def holds(probe: Callable[[], Any]) -> bool:
    """Return whether a probe is true; a refused argument is False."""
    try:
        return bool(probe())
    except (TypeError, ValueError):
        return False


def ignores_configuration(apply: Apply) -> bool:
    """Return whether a key gives the same mask under other settings of JAX."""
    expected = mask(apply)
    with jax.enable_x64(True):
        wide = mask(apply)
    with jax.threefry_partitionable(False):
        unpartitioned = mask(apply)
    return np.array_equal(wide, expected) and np.array_equal(unpartitioned, expected)


def stores_no_mask(apply: Apply) -> bool:
    """Return whether the backward pass stores less than one byte for each element."""
    pull_back = jax.vjp(lambda x: apply(x, jax.random.key(0), 0.5, False), jnp.asarray(X))[1]
    return sum(leaf.nbytes for leaf in jax.tree.leaves(pull_back)) < X.size


def takes_traced_rate(apply: Apply) -> bool:
    """Return whether one compiled function serves several rates."""
    run = jax.jit(lambda rate: apply(jnp.asarray(X), jax.random.key(0), rate, False))

    def dropped(rate: float) -> float:
        return 1 - np.count_nonzero(run(jnp.float32(rate))) / X.size

    return all(abs(dropped(rate) - rate) < 0.05 for rate in (0.25, 0.75))


def takes_traced_mode(apply: Apply) -> bool:
    """Return whether one compiled function serves training and evaluation."""
    run = jax.jit(lambda off: apply(jnp.asarray(X), jax.random.key(0), 0.5, off))
    return bool((run(True) == X).all()) and bool((run(False) == 0).any())


def drops_nan(apply: Apply) -> bool:
    """Return whether a dropped NaN is 0."""
    x = jnp.full(X.shape, jnp.nan)
    return bool((apply(x, jax.random.key(0), 0.5, False) == 0).any())


def is_zero_at_one(apply: Apply) -> bool:
    """Return whether rate 1 gives zeros, with gradients of zero."""

    def run(x: Array) -> Array:
        return apply(x, jax.random.key(0), 1.0, False)

    gradient = jax.grad(lambda x: run(x).sum())(jnp.asarray(X))
    return bool((run(jnp.asarray(X)) == 0).all() and (gradient == 0).all())


def is_unbiased_in_bfloat16(apply: Apply) -> bool:
    """Return whether kept elements are, on average, within 0.02 % of x / (1 - rate)."""
    x = jnp.asarray(X, jnp.bfloat16)
    return has_mean(x, apply(x, jax.random.key(0), 0.1, False))


def has_mean(x: Any, y: Any) -> bool:
    """Return whether the kept elements of `y` have, on average, the scale of rate 0.1."""
    wide, result = np.asarray(x, np.float64), np.asarray(y, np.float64)
    kept = result != 0
    return abs((result[kept] / (wide[kept] / 0.9)).mean() - 1) < 2e-4
