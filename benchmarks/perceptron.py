"""Training steps to measure memory: a deep perceptron with dropout in each layer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

Dropout: TypeAlias = Callable[[jax.Array, jax.Array], Any]
Loss: TypeAlias = Callable[..., jax.Array]

LAYERS = 8


def none(x: jax.Array, key: jax.Array) -> jax.Array:
    """Return `x`, for a step without dropout."""
    del key
    return x


def layer(x: jax.Array, weight: jax.Array, key: jax.Array, dropout: Dropout) -> jax.Array:
    """Apply one layer with ReLU and dropout.

    The gradient of tanh would need its output in addition to that of dropout, so that autodiff
    would store two arrays per layer.
    """
    return dropout(jax.nn.relu(x @ weight), key)


def unrolled(weights: jax.Array, x: jax.Array, keys: jax.Array, dropout: Dropout) -> jax.Array:
    """Return a loss whose layers are written out one after the other."""
    for i in range(len(weights)):
        x = layer(x, weights[i], keys[i], dropout)
    return (x**2).sum()


def scanned(weights: jax.Array, x: jax.Array, keys: jax.Array, dropout: Dropout) -> jax.Array:
    """Return the same loss with its layers in a scan."""
    x, _ = jax.lax.scan(lambda x, at: (layer(x, *at, dropout), None), x, (weights, keys))
    return (x**2).sum()


LOSSES: dict[str, Loss] = {"unrolled": unrolled, "scanned": scanned}


def temporary_bytes(
    loss: Loss,
    dropout: Dropout,
    *,
    batch: int,
    width: int,
    layers: int = LAYERS,
    sharding: jax.sharding.Sharding | None = None,
) -> int:
    """Return the memory of the compiled gradient beyond its arguments and its result.

    Args:
        loss: One of `LOSSES`.
        dropout: The dropout of each layer.
        batch: The number of examples.
        width: The number of neurons per layer.
        layers: The number of layers.
        sharding: The sharding of the arguments; None for the default device.
    """
    step = jax.jit(jax.grad(functools.partial(loss, dropout=dropout)), in_shardings=sharding)
    weights = jax.ShapeDtypeStruct((layers, width, width), jnp.float32)
    x = jax.ShapeDtypeStruct((batch, width), jnp.float32)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), layers))
    memory = step.lower(weights, x, keys).compile().memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes
