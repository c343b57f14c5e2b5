"""Every function and layer exports with a symbolic batch, and draws the mask of the actual size."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import regjax
from regjax import equinox, haiku, linen, nnx
from regjax._random.threefry import Span, part_index
from tests.regjax.family import FAMILY

KEY = jax.random.key_data(jax.random.key(3))


def attend(block_size, **options):
    def call(x, key):
        return regjax.dot_product_attention(
            x, x, x, dropout_rng=key, dropout_rate=0.4, block_size=block_size, **options
        )

    return call


ids = lambda x: (x[..., 0] > 0.5).astype(jnp.int32)
PACKED = {"sampler": regjax.packed_bernoulli}
FUNCTIONS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "bernoulli": (lambda x, key: jnp.where(regjax.bernoulli(key, 0.7, x.shape), x, 0), (5,)),
    "packed_bernoulli": (
        lambda x, key: jnp.where(regjax.packed_bernoulli(key, 0.7, x.shape), x, 0),
        (5,),
    ),
    "normal": (lambda x, key: x * regjax.normal(key, x.shape), (5,)),
    "dropout": (lambda x, key: regjax.dropout(x, 0.4, key=key), (3, 5)),
    "dropout-traced": (lambda x, key: regjax.dropout(x, x[0, 0] * 0.4, key=key), (5,)),
    "dropout-shared": (lambda x, key: regjax.dropout(x, 0.4, key=key, broadcast_dims=(0,)), (5,)),
    "feature_dropout": (lambda x, key: regjax.feature_dropout(x, 0.4, key=key), (4, 5)),
    "alpha_dropout": (lambda x, key: regjax.alpha_dropout(x, 0.4, key=key), (5,)),
    "feature_alpha": (lambda x, key: regjax.feature_alpha_dropout(x, 0.4, key=key), (4, 5)),
    "drop_path": (lambda x, key: regjax.drop_path(x, 0.4, key=key), (5,)),
    "drop_block": (lambda x, key: regjax.drop_block(x, 0.4, key=key, block_size=3), (6, 7, 2)),
    "variational": (lambda x, key: regjax.variational_dropout(x, 0.4, key=key), (4, 5)),
    "drop_connect": (lambda x, key: regjax.drop_connect(x, 0.4, key=key), (5,)),
    "embedding": (lambda x, key: regjax.embedding_dropout(x, ids(x), 0.4, key=key), (5,)),
    "gaussian_dropout": (lambda x, key: regjax.gaussian_dropout(x, 0.4, key=key), (5,)),
    "gaussian_noise": (lambda x, key: regjax.gaussian_noise(x, 0.4, key=key), (5,)),
}
ATTENTION = {
    "attention": (attend(None), (6, 2, 4)),
    "attention-shared": (attend(None, broadcast_dropout=True), (6, 2, 4)),
    "attention-blockwise": (attend(4, is_causal=True), (6, 2, 4)),
    "attention-blockwise-shared": (attend(4, broadcast_dropout=True), (6, 2, 4)),
}


def exported(function, shape):
    """Return the exported program of `function(x, key)`; `shape` has the symbolic sizes of x."""
    x = jax.ShapeDtypeStruct(export.symbolic_shape(shape), jnp.float32)
    return export.export(jax.jit(function))(x, KEY).call


def linen_layers(x, key):
    return {
        name: getattr(linen, name)(0.4, deterministic=False, **settings).apply(
            {}, *inputs_of(name, x), rngs={"dropout": key}
        )
        for name, (settings, _, _) in FAMILY.items()
    }


def nnx_layers(x, key):
    return {
        name: getattr(nnx, name)(0.4, **settings)(*inputs_of(name, x), rngs=key)
        for name, (settings, _, _) in FAMILY.items()
    }


def equinox_layers(x, key):
    return {
        name: getattr(equinox, name)(0.4)(*inputs_of(name, x), key=key)
        for name in FAMILY
        if name != "DropBlock"  # its spatial dimensions come first
    }


def haiku_functions(x, key):
    return {
        name: getattr(haiku, function.__name__)(key, 0.4, *inputs_of(name, x))
        for name, (_, _, function) in FAMILY.items()
    }


def inputs_of(name, x):
    """Return the inputs of a layer, with a symbolic batch."""
    if name == "EmbeddingDropout":
        return x, ids(x)
    return (x.reshape(x.shape[0], 8, 8, 2),) if "Block" in name else (x,)


def layers(x, key):
    frameworks = (linen_layers, nnx_layers, equinox_layers, haiku_functions)
    return {layers.__name__: layers(x, key) for layers in frameworks}


LAYERS = {"": (layers, (128,))}
PACKED_DROPOUT = {"packed": (lambda x, key: regjax.dropout(x, 0.4, key=key, **PACKED), (64, 3))}
GROUPS = {
    "functions": (FUNCTIONS, 32),
    "attention": (ATTENTION, 32),
    "packed": (PACKED_DROPOUT, 30, 64, 96),
    # Below and above 4,096 elements, where layers use different samplers.
    "layers": (LAYERS, 32),
    "layers, one row": (LAYERS, 1),
}


@pytest.mark.parametrize(
    "group", [pytest.param(g, marks=[pytest.mark.slow] * (g != "functions")) for g in GROUPS]
)
@pytest.mark.slow
def test_a_symbolic_batch_has_the_masks_of_the_actual_one(group):
    """A program of all functions of a group has the same zeros and values when exported."""
    functions, *batches = GROUPS[group]

    def run(xs, key):
        results = {}
        for name, (function, _) in functions.items():
            y, gradient_of = jax.vjp(lambda x, f=function: f(x, key), xs[name])
            results[name] = y, gradient_of(jax.tree.map(lambda y: 1 + y, y))
        return results

    def inputs(batch, make):
        return {name: make((batch, *features)) for name, (_, features) in functions.items()}

    (symbol,) = export.symbolic_shape("b")
    symbolic = inputs(symbol, lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32))
    program, plain = export.export(jax.jit(run))(symbolic, KEY), jax.jit(run)
    for batch in batches:
        xs = inputs(batch, lambda shape: jnp.linspace(0.5, 1.0, math.prod(shape)).reshape(shape))
        found = jax.tree.leaves_with_path(program.call(xs, KEY))
        for (path, array), expected in zip(found, jax.tree.leaves(plain(xs, KEY)), strict=True):
            name = jax.tree_util.keystr(path)
            np.testing.assert_array_equal(array == 0, expected == 0, name)
            np.testing.assert_allclose(array, expected, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_mc_dropout_exports_with_a_symbolic_batch(chunk_size):
    def mean(x, key):
        drop = lambda x, *, key: regjax.dropout(x, 0.4, key=key)
        options: Any = {"key": key, "outputs": "values", "samples": 4, "chunk_size": chunk_size}
        return regjax.mc_dropout(drop, x, **options).mean

    x = jnp.linspace(0.5, 1.0, 12).reshape(3, 4)
    np.testing.assert_allclose(exported(mean, "b, 4")(x, KEY), mean(x, KEY), rtol=1e-6)


def test_attention_exports_with_symbolic_lengths():
    for block_size in (None, 4):
        call = exported(attend(block_size), "b, s, 2, 4")
        x = jnp.linspace(0.5, 1.0, 3 * 9 * 8).reshape(3, 9, 2, 4)
        np.testing.assert_allclose(call(x, KEY), jax.jit(attend(block_size))(x, KEY), rtol=1e-5)


def test_counters_of_symbolic_sizes_carry_into_the_high_word():
    def last(x, _):
        whole = (x.shape[0],) * 4
        part = [Span(jnp.asarray(whole[0] - 2), 2)] * 4
        return [jnp.broadcast_to(word, (2,) * 4) for word in part_index(whole, part)]

    for size in (7, 60_000):  # 60,000 ** 4 is nearly 2 ** 64
        x = jnp.zeros(size)
        for word, expected in zip(exported(last, "b")(x, KEY), last(x, KEY), strict=True):
            np.testing.assert_array_equal(word, expected)


def test_a_symbolic_map_is_refused_where_the_mask_depends_on_it():
    drop = lambda x, key: regjax.drop_block(x, 0.4, key=key)
    with pytest.raises(
        ValueError, match=r"x must have spatial dimensions of known size.*Export one"
    ):
        exported(drop, "b, h, 8, 3")
