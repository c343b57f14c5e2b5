"""Attention with dropout: does a program have an array of all queries and all keys?"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

import regjax
from benchmarks.probes.in_jax import keras

# 96 queries, 160 keys.
_Q, _K = np.ones((1, 96, 2, 8), np.float32), np.ones((1, 160, 2, 8), np.float32)


def materializes(attend: Callable[..., Any], *arrays: Any) -> bool:
    """Return whether a program has an array with all queries and all keys, or its gradient has."""

    def loss(*arrays: Any) -> Any:
        return attend(*arrays).sum()

    program = jax.make_jaxpr(jax.grad(loss))(*arrays)
    return any({96, 160} <= set(shape) for shape in _shapes(program.jaxpr))


def _shapes(jaxpr: Any) -> Iterator[tuple[int, ...]]:
    for eqn in jaxpr.eqns:
        yield from (var.aval.shape for var in eqn.outvars)
        for value in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _shapes(inner)


def regjax_attention() -> bool:
    """Return whether regjax has attention with dropout and no matrix of weights."""
    attend = functools.partial(
        regjax.dot_product_attention,
        dropout_rng=jax.random.key(0),
        dropout_rate=0.1,
        block_size=32,
    )
    return not materializes(attend, _Q, _K, _K)


def flax_attention() -> bool:
    """Return whether Linen has attention with dropout and no matrix of weights."""
    from flax import linen

    attend = functools.partial(
        linen.dot_product_attention,
        dropout_rng=jax.random.key(0),
        dropout_rate=0.1,
        deterministic=False,
    )
    return not materializes(attend, _Q, _K, _K)


def equinox_attention() -> bool:
    """Return whether Equinox has attention with dropout and no matrix of weights."""
    import equinox

    layer = equinox.nn.MultiheadAttention(2, 16, dropout_p=0.1, key=jax.random.key(0))
    attend = functools.partial(layer, key=jax.random.key(1))
    return not materializes(attend, _Q.reshape(96, 16), *(_K.reshape(160, 16),) * 2)


def haiku_attention() -> bool:
    """Return whether Haiku's attention has dropout."""
    import haiku

    return any("dropout" in n for n in inspect.signature(haiku.MultiHeadAttention).parameters)


def keras_attention() -> bool:
    """Return whether Keras has attention with dropout and no matrix of weights."""
    layer = keras().layers.MultiHeadAttention(2, 8, dropout=0.1)
    q, k = _Q.reshape(1, 96, 16), _K.reshape(1, 160, 16)
    layer(q, k)

    def attend(q: Any, k: Any) -> Any:
        variables = ([v.value for v in vs] for vs in _variables(layer))
        return layer.stateless_call(*variables, q, k, training=True)[0]

    return not materializes(attend, q, k)


def _variables(layer: Any) -> tuple[Sequence[Any], Sequence[Any]]:
    return layer.trainable_variables, layer.non_trainable_variables
