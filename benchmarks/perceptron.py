"""Training steps whose memory is asked of compilers: a deep perceptron, a dropout in each layer."""

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
    """No dropout: what a step takes without it."""
    del key
    return x


def layer(x: jax.Array, weight: jax.Array, key: jax.Array, dropout: Dropout) -> jax.Array:
    """One layer.

    Not tanh: its gradient needs its own output beside what dropout makes of it, so that autodiff
    would store two arrays a layer where it stored one.
    """
    return dropout(jax.nn.relu(x @ weight), key)


def unrolled(weights: jax.Array, x: jax.Array, keys: jax.Array, dropout: Dropout) -> jax.Array:
    """A loss, its layers written out one after the other."""
    for i in range(len(weights)):
        x = layer(x, weights[i], keys[i], dropout)
    return (x**2).sum()


def scanned(weights: jax.Array, x: jax.Array, keys: jax.Array, dropout: Dropout) -> jax.Array:
    """The same loss, its layers in a loop."""
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
    """Memory that the compiled gradient needs beside its arguments and its result.

    Args:
        loss: one of `LOSSES`.
        dropout: applied in each layer.
        batch: how many examples there are.
        width: how many neurons a layer has.
        layers: how many layers there are.
        sharding: which devices compute, and how; without it, the default one.
    """
    step = jax.jit(jax.grad(functools.partial(loss, dropout=dropout)), in_shardings=sharding)
    weights = jax.ShapeDtypeStruct((layers, width, width), jnp.float32)
    x = jax.ShapeDtypeStruct((batch, width), jnp.float32)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), layers))
    memory = step.lower(weights, x, keys).compile().memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes
