"""Stacked layers in a scan, with remat, and in a pipeline have the masks of the unrolled ones."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import regjax
import regjax.nnx

ROOT, DEPTH, STEP = jax.random.key(3), 3, 7
X = jax.random.normal(jax.random.key(1), (8, 6, 10))
SHIFTS = jax.random.normal(jax.random.key(2), (DEPTH, 10))


def layer_key(i: int) -> Any:
    return regjax.site_key(ROOT, STEP, f"layers/{i}")


def layer_keys() -> jax.Array:
    return jnp.stack([layer_key(i) for i in range(DEPTH)])


def layer(x: Any, shift: Any, key: Any, rows: Any = None) -> Any:
    """Return the result of one layer, which has two sites; the rounding of a sum is the same."""
    sampler = regjax.bernoulli if rows is None else regjax.by_example(rows)
    x = regjax.dropout(x, 0.5, key=regjax.site_key(key, 0, "input"), sampler=sampler)
    x = x + shift[None, None]
    return regjax.dropout(x, 0.5, key=regjax.site_key(key, 0, "output"), sampler=sampler)


def unrolled(x: Any, shifts: Any, rows: Any = None) -> Any:
    for i in range(DEPTH):
        x = layer(x, shifts[i], layer_key(i), rows)
    return x


def scanned(x: Any, shifts: Any, rows: Any = None) -> Any:
    @jax.checkpoint
    def body(x, own):
        shift, key = own
        return layer(x, shift, key, rows), None

    return lax.scan(body, x, (shifts, layer_keys()))[0]


BY_EXAMPLE = pytest.param(np.arange(8), id="by_example", marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "rows", [pytest.param(None, id="batch", marks=pytest.mark.slow), BY_EXAMPLE]
)
def test_a_scan_with_remat_has_the_masks_and_gradients_of_the_unrolled_layers(rows):
    """The gradients of the shifts are sums, whose order differs."""

    def results(run):
        y, pull_back = jax.vjp(lambda *arrays: run(*arrays, rows), X, SHIFTS)
        return y, *pull_back(X)

    expected, found = (jax.jit(results, static_argnums=0)(run) for run in (unrolled, scanned))
    for one, other in zip(expected[:2], found[:2], strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_allclose(expected[2], found[2], rtol=1e-5)
    masks = jax.vmap(lambda key: regjax.bernoulli(key, 0.5, (99,)))(layer_keys())
    assert len({mask.tobytes() for mask in masks}) == DEPTH


class Block(nnx.Module):
    def __init__(self, shift: Any) -> None:
        self.shift = nnx.Param(shift)

    def __call__(self, x: Any, key: Any) -> Any:
        return layer(x, self.shift[...], key)


@pytest.mark.parametrize("remat", [False, True], ids=["plain", "remat"])
def test_in_the_scan_of_nnx_each_layer_takes_its_own_key(remat):
    make = nnx.vmap(Block, in_axes=0, out_axes=0)
    block = nnx.remat(Block.__call__) if remat else Block.__call__

    @nnx.jit
    def run(blocks, x, keys):
        body = lambda x, block_, key: block(block_, x, key)
        return nnx.scan(body, in_axes=(nnx.Carry, 0, 0), out_axes=nnx.Carry)(x, blocks, keys)

    np.testing.assert_array_equal(run(make(SHIFTS), X, layer_keys()), unrolled(X, SHIFTS))


def test_a_pipeline_has_the_masks_of_the_whole_batch():
    """Stage s has layer s; micro-batches of 2 rows travel from stage to stage."""
    stages = jax.devices()[:DEPTH]
    ring = [(i, (i + 1) % DEPTH) for i in range(DEPTH)]
    mesh = jax.make_mesh((DEPTH,), ("stage",), axis_types=(AxisType.Auto,), devices=stages)
    parts, rows = X.reshape(4, 2, 6, 10), jnp.arange(8).reshape(4, 2)

    def stage(parts, rows, shift, key):
        number, last = lax.axis_index("stage"), DEPTH - 1
        done = jnp.zeros_like(parts)
        moving = parts[0], rows[0]
        for time in range(len(parts) + last):
            entering = parts[min(time, 3)], rows[min(time, 3)]
            x, own = jax.tree.map(lambda a, b: jnp.where(number == 0, a, b), entering, moving)
            x = layer(x, shift[0], key[0], own)
            if time >= last:
                done = done.at[time - last].set(x)
            moving = lax.ppermute((x, own), "stage", ring)
        return done[None]  # the last stage has the results of all layers

    specs = {"in_specs": (P(), P(), P("stage"), P("stage")), "out_specs": P("stage")}
    run = jax.jit(jax.shard_map(stage, mesh=mesh, check_vma=False, **specs))
    own = NamedSharding(mesh, P("stage"))
    y = run(parts, rows, jax.device_put(SHIFTS, own), jax.device_put(layer_keys(), own))
    np.testing.assert_array_equal(np.asarray(y)[-1].reshape(X.shape), unrolled(X, SHIFTS))
