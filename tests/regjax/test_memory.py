"""Only the key is stored for the backward pass, by the memory of compiled steps."""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import regjax
from benchmarks import perceptron
from benchmarks.perceptron import LAYERS, scanned, unrolled

BATCH, WIDTH = 512, 256
BUFFER = BATCH * WIDTH * 4  # bytes of one layer's activations
KEY = jax.random.key(0)
SAMPLERS = {"exact": regjax.bernoulli, "packed": regjax.packed_bernoulli}

temporary_bytes = functools.partial(perceptron.temporary_bytes, batch=BATCH, width=WIDTH)


def dropout(sampler):
    return lambda x, key: regjax.dropout(x, 0.3, key=key, sampler=sampler)


def growth(dropout):
    """Return the memory that dropout adds to a scan of few layers, and of many."""
    return [
        temporary_bytes(scanned, dropout, layers=layers)
        - temporary_bytes(scanned, perceptron.none, layers=layers)
        for layers in (LAYERS, 4 * LAYERS)
    ]


def test_an_unrolled_perceptron_takes_no_more_memory_than_without_dropout():
    without = temporary_bytes(unrolled, perceptron.none)
    assert temporary_bytes(unrolled, dropout(regjax.bernoulli)) <= 1.01 * without


def test_an_unrolled_perceptron_with_packed_masks_takes_little_more():
    """Packed words (1/32 of a mask) may be stored: on CPUs, at most a buffer of one layer."""
    without = temporary_bytes(unrolled, perceptron.none)
    assert temporary_bytes(unrolled, dropout(regjax.packed_bernoulli)) <= 1.01 * without + BUFFER


@pytest.mark.parametrize("shape", [(4096, 512), (1000, 333)], ids=str)
def test_dropout_alone_takes_no_memory(shape):
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    compiled = jax.jit(dropout(regjax.bernoulli)).lower(x, KEY).compile()
    assert compiled.memory_analysis().temp_size_in_bytes == 0


@pytest.mark.parametrize(("name", "buffers"), [("exact", 1), ("packed", 2)])
@pytest.mark.sample(1)
def test_a_scan_stores_no_masks_however_many_layers_it_has(name, buffers):
    """On CPUs loops use buffers of one layer, independent of the depth."""
    few, many = growth(dropout(SAMPLERS[name]))
    assert few == many <= buffers * BUFFER


def test_a_stored_mask_is_seen():
    """Test of the tests: dropout that keeps its masks for the backward pass."""

    def storing(x, key):
        return jnp.where(jax.random.bernoulli(key, 0.7, x.shape), x / 0.7, 0)

    few, many = growth(storing)
    assert many - few >= 3 * LAYERS * BUFFER // 4  # one byte per element of a mask


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_an_exported_program_draws_the_same_mask_on_every_platform_it_is_for(sampler):
    x = jnp.linspace(0.5, 2.0, 64 * 128).reshape(64, 128)
    apply = jax.jit(lambda x, key: regjax.dropout(x, 0.3, key=key, sampler=sampler))
    exported = jax.export.export(apply, platforms=["cpu", "cuda", "tpu"])(x, KEY)
    chex.assert_trees_all_equal(exported.call(x, KEY), apply(x, KEY))


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_in_shard_map_each_shard_folds_its_index_into_the_key(sampler):
    """The shape is local there: without the recipe every shard would have the same mask."""
    mesh = jax.make_mesh((4,), ("rows",), axis_types=(AxisType.Explicit,))
    x = jax.device_put(jnp.ones((256, 64)), NamedSharding(mesh, P("rows")))

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(P("rows"), P()), out_specs=P("rows"))
    def local(x, key):
        key = jax.random.fold_in(key, jax.lax.axis_index("rows"))
        return regjax.dropout(x, 0.5, key=key, sampler=sampler)

    shards = np.asarray(jax.jit(local)(x, KEY)).reshape(4, 64, 64)
    for i in range(4):
        expected = regjax.dropout(
            jnp.ones((64, 64)), 0.5, key=jax.random.fold_in(KEY, i), sampler=sampler
        )
        np.testing.assert_array_equal(shards[i], expected)


@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_a_scan_of_attention_stores_one_matrix_of_weights_for_each_layer(rate):
    """The backward pass recomputes dropped weights and the softmax, which are not stored."""
    layers, length, heads = 8, 256, 2
    q, k, v = jnp.ones((3, 1, length, heads, 8))

    def loss(q, k, v):
        def layer(x, key):
            how = {"dropout_rng": key, "dropout_rate": rate}
            return jnp.tanh(regjax.dot_product_attention(x, k, v, **how)), None

        return jax.lax.scan(layer, q, jax.random.split(KEY, layers))[0].sum()

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, k, v).compile()
    matrix = heads * length**2 * 4
    # In addition to stored matrices, those of the current layer.
    assert compiled.memory_analysis().temp_size_in_bytes < (layers + 7) * matrix
