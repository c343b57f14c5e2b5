"""Tests of blocks, words and weights that only JAX needs: transforms, memory, layouts."""

from __future__ import annotations

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import regjax
from tests.regjax.training import assert_one_compilation
from tests.regjax.versions import debug_key_reuse

KEY = jax.random.key(0)
MAPS = jnp.linspace(-2.0, 3.0, 4 * 8 * 8 * 4).reshape(4, 8, 8, 4)
IDS = jnp.arange(32).reshape(4, 8) % 11
VECTORS = jnp.linspace(-2.0, 3.0, 4 * 8 * 6).reshape(4, 8, 6)

block = functools.partial(regjax.drop_block, block_size=3)
word = lambda x, rate, **options: regjax.embedding_dropout(x, IDS, rate, **options)
FAMILY = {
    "drop_block": (block, MAPS),
    "embedding_dropout": (word, VECTORS),
    "variational_dropout": (regjax.variational_dropout, VECTORS),
    "drop_connect": (regjax.drop_connect, VECTORS),
}
each = pytest.mark.parametrize(("drop", "x"), FAMILY.values(), ids=FAMILY)


@each
@pytest.mark.sample(2)
def test_jit_remat_and_both_modes_of_differentiation_draw_one_mask(drop, x):
    f = lambda x: drop(x, 0.3, key=KEY)
    y = f(x)
    chex.assert_trees_all_equal(jax.jit(f)(x), y)
    chex.assert_trees_all_equal(jax.jvp(f, (x,), (x,)), (y, y))
    ones = jnp.ones_like(x)
    chex.assert_trees_all_equal(jax.vjp(jax.checkpoint(f), x)[1](ones)[0], f(ones))
    chex.assert_trees_all_equal(jax.vjp(f, x)[1](ones)[0], f(ones))


@each
def test_only_keys_and_words_are_saved_for_the_backward_pass(drop, x):
    _, pull_back = jax.vjp(lambda x: drop(x, 0.3, key=KEY), x)
    saved = [leaf for leaf in jax.tree.leaves(pull_back) if hasattr(leaf, "shape")]
    assert all(leaf.size <= 1 or leaf.shape == IDS.shape for leaf in saved)


@each
def test_a_changing_rate_flag_and_key_cost_one_compilation(drop, x):
    assert_one_compilation(drop, x, [0.0, 0.25, 1.0], rtol=2e-7)
    gradient = jax.grad(lambda rate: drop(x, rate, key=KEY).sum())(0.3)
    assert gradient == 0


@each
def test_vmap_over_keys_draws_a_mask_each(drop, x):
    keys = jax.random.split(KEY, 3)
    rows = jax.vmap(lambda key: drop(x, 0.3, key=key))(keys)
    chex.assert_trees_all_equal(rows, jnp.stack([drop(x, 0.3, key=key) for key in keys]))


@each
def test_a_scan_and_a_loop_agree(drop, x):
    keys = jax.random.split(KEY, 3)
    layer = lambda x, key: (drop(jnp.tanh(x), 0.3, key=key), None)
    loop = functools.reduce(lambda x, key: layer(x, key)[0], keys, x)
    scan = jax.jit(lambda x: jax.lax.scan(layer, x, keys)[0])(x)
    chex.assert_trees_all_close(loop, scan, rtol=1e-6)


@each
def test_nothing_random_is_traced_where_nothing_is_random(drop, x):
    for options in ({"rate": 0}, {"rate": 1}, {"rate": 0.3, "deterministic": True}):
        jaxpr = str(jax.make_jaxpr(lambda x, options=options: drop(x, **options))(x))
        assert not any(name in jaxpr for name in ("threefry", "shift", "xor", "random_"))


@each
def test_key_reuse_is_still_seen(drop, x):
    with debug_key_reuse():
        key = jax.random.key(1)
        drop(x, 0.3, key=key)
        with pytest.raises(jax.errors.KeyReuseError):
            drop(x, 0.3, key=key)


def test_reuse_on_purpose_is_told_by_a_clone():
    """Return the states of a recurrence with dropout by one key at every step."""
    run = lambda of_step: jax.lax.scan(
        lambda h, x: (regjax.dropout(h, 0.3, key=of_step()) + x, None),
        jnp.ones(4),
        jnp.ones((3, 4)),
    )[0]
    with jax.debug_key_reuse(True):
        key = jax.random.key(1)
        with pytest.raises(jax.errors.KeyReuseError):
            run(lambda: key)
        clone = lambda: jax.random.clone(jax.random.key(1))
        chex.assert_trees_all_equal(run(clone), run(lambda: jax.random.clone(key)))


@pytest.mark.parametrize("axis_type", [AxisType.Explicit, AxisType.Auto], ids=str)
@pytest.mark.parametrize(
    "spec", [P("a"), P(None, "a"), P(None, None, None, "a"), P("a", None, "b")], ids=str
)
@pytest.mark.parametrize("share", [False, True], ids=["own", "shared"])
@pytest.mark.sample(5)
def test_blocks_are_the_same_on_every_mesh(axis_type, spec, share):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(axis_type,) * 2)
    run = jax.jit(lambda x: block(x, 0.3, key=KEY, share_channels=share))
    expected = np.asarray(run(MAPS))
    with jax.set_mesh(mesh):
        x = jax.device_put(MAPS, NamedSharding(mesh, spec))
        y = run(x)
        assert y.sharding.is_equivalent_to(x.sharding, 4)
        np.testing.assert_array_equal(np.asarray(y), expected)


def test_each_device_draws_the_blocks_of_its_own_rows():
    mesh = jax.make_mesh((4,), ("a",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        x = jax.device_put(MAPS, NamedSharding(mesh, P("a")))
        jaxpr = str(jax.make_jaxpr(lambda x: block(x, 0.3, key=KEY))(x))
    assert "bool[4@a,4,6,6]" in jaxpr
    assert "bool[4,4,6,6]" not in jaxpr


@pytest.mark.parametrize("axis_type", [AxisType.Explicit, AxisType.Auto], ids=str)
def test_words_are_the_same_on_every_mesh_and_nothing_is_sent(axis_type):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(axis_type,) * 2)
    run = jax.jit(lambda x, ids: regjax.embedding_dropout(x, ids, 0.3, key=KEY))
    expected = np.asarray(run(VECTORS, IDS))
    with jax.set_mesh(mesh):
        x = jax.device_put(VECTORS, NamedSharding(mesh, P("a", None, "b")))
        ids = jax.device_put(IDS, NamedSharding(mesh, P("a")))
        y = run(x, ids)
        assert y.sharding.is_equivalent_to(x.sharding, 3)
        np.testing.assert_array_equal(np.asarray(y), expected)
        compiled = run.lower(x, ids).compile().as_text()
        assert not any(name in compiled for name in ("all-gather", "all-reduce", "permute("))


def test_a_mask_too_large_to_count_is_refused():
    maps = jax.ShapeDtypeStruct((2**16, 64, 64, 16), jnp.float32)
    message = r"x must have fewer .* got 4294967296\. .* share_channels=True"
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda x: block(x, 0.3, key=KEY), maps)
    jax.eval_shape(lambda x: block(x, 0.3, key=KEY, share_channels=True), maps)


def test_a_tree_of_weights_under_jit_and_grad():
    """The gradient of a dropped weight is 0, and of a kept one the scale."""
    weights: Any = {"kernel": jnp.ones((8, 8)), "bias": jnp.ones(8), "steps": jnp.arange(3)}
    drop = functools.partial(regjax.drop_connect, rate=0.5, key=KEY)
    dropped = drop(weights)
    chex.assert_trees_all_equal(jax.jit(drop)(weights), dropped)
    assert dropped["steps"] is weights["steps"]
    loss = lambda kernel: drop({**weights, "kernel": kernel})["kernel"].sum()
    chex.assert_trees_all_equal(jax.grad(loss)(weights["kernel"]), dropped["kernel"])
