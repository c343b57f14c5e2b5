"""Dropout of each library, as a function `apply(x, key) -> y`.

A library that is not installed is skipped with a message.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

import regjax

Apply = Callable[[jax.Array, jax.Array], Any]
Dims = tuple[int, ...]

COPY = "copy"
EXACT = "regjax"
PACKED = "regjax, packed"
OWN = (EXACT, PACKED)


def copy(x: jax.Array, key: jax.Array) -> jax.Array:
    """Read and write each element once, a lower bound for any dropout."""
    del key
    return x * jnp.asarray(1.5, x.dtype)


def own(rate: float, dims: Dims = ()) -> dict[str, Apply]:
    """Return the dropout of regjax with each sampler."""
    drop = functools.partial(regjax.dropout, rate=rate, broadcast_dims=dims)
    return {
        EXACT: lambda x, key: drop(x, key=key),
        PACKED: lambda x, key: drop(x, key=key, sampler=regjax.packed_bernoulli),
    }


def _flax_linen(rate: float, dims: Dims) -> Apply:
    from flax import linen

    layer = linen.Dropout(rate, broadcast_dims=dims, deterministic=False)
    return lambda x, key: layer.apply({}, x, rngs={"dropout": key})


def _flax_nnx(rate: float, dims: Dims) -> Apply:
    from flax import nnx

    layer = nnx.Dropout(rate, broadcast_dims=dims, deterministic=False)
    return lambda x, key: layer(x, rngs=nnx.Rngs(dropout=key))


def _equinox(rate: float, _: Dims) -> Apply:
    import equinox

    layer = equinox.nn.Dropout(rate)
    return lambda x, key: layer(x, key=key)


def _haiku(rate: float, dims: Dims) -> Apply:
    import haiku

    return lambda x, key: haiku.dropout(key, rate, x, broadcast_dims=dims)


def _keras(rate: float, _: Dims) -> Apply:
    os.environ.setdefault("KERAS_BACKEND", "jax")
    import keras

    layer = keras.layers.Dropout(rate)
    layer.build((None,))

    def apply(x: jax.Array, key: jax.Array) -> jax.Array:
        seed = jax.random.key_data(key).astype(layer.non_trainable_variables[0].dtype)
        return layer.stateless_call([], [seed], x, training=True)[0]

    return apply


PEERS = {
    "Flax Linen": _flax_linen,
    "Flax NNX": _flax_nnx,
    "Equinox": _equinox,
    "Haiku": _haiku,
    "Keras": _keras,
}
# The libraries whose masks can be shared along dimensions.
SHARING = ("Flax Linen", "Flax NNX", "Haiku")


def peers(rate: float, log: Callable[[str], None], dims: Dims = ()) -> dict[str, Apply]:
    """Return the installed JAX libraries that can share masks along `dims`.

    `log` receives a message about each library that is not installed.
    """
    found = {}
    for name in SHARING if dims else PEERS:
        try:
            found[name] = PEERS[name](rate, dims)
        except ImportError as error:
            log(f"skipped: {name} ({error})")
    return found


def in_jax(
    applies: Mapping[str, Apply], x: jax.Array, key: jax.Array, *, backward: bool
) -> dict[str, Callable[[], object]]:
    """Return jitted functions without arguments; with `backward` they include the gradient."""
    runs = {}
    for name, apply in applies.items():
        run = jax.jit(with_backward(apply) if backward else apply)
        runs[name] = functools.partial(lambda run: jax.block_until_ready(run(x, key)), run)
    return runs


def with_backward(apply: Apply) -> Callable[[jax.Array, jax.Array], Any]:
    """Return a function of the result and its gradient."""

    def run(x: jax.Array, key: jax.Array) -> Any:
        y, pull_back = jax.vjp(lambda x: apply(x, key), x)
        return y, pull_back(x)  # any cotangent of this size gives the same time

    return run


def in_torch(
    rate: float, size: int, dtype: str, *, backward: bool, log: Callable[[str], None]
) -> dict[str, Callable[[], object]]:
    """Return PyTorch's own function, eager and, where compilation works, compiled."""
    try:
        import torch
    except ImportError as error:
        log(f"skipped: PyTorch ({error})")
        return {}
    x = torch.ones(size, dtype=getattr(torch, dtype), requires_grad=backward)
    dropout = functools.partial(torch.nn.functional.dropout, p=rate)

    def bound(apply: Callable[[Any], Any]) -> Callable[[], object]:
        def run() -> object:
            y = apply(x)
            return torch.autograd.grad(y, x, x.detach()) if backward else y

        return run

    runs = {"PyTorch": bound(dropout)}
    try:
        compiled = torch.compile(dropout)
        compiled(x)
        runs["PyTorch, compiled"] = bound(compiled)
    except Exception as error:  # errors of the compiler have no common class
        log(f"skipped: PyTorch, compiled ({str(error).strip().splitlines()[0]})")
    return runs
