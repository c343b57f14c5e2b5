"""Masks by example under the transforms of JAX, across devices, and in stacked layers."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import regjax
import regjax.linen
from regjax._dropout import core
from tests.regjax.test_layouts import COLLECTIVES
from tests.shared import found

KEY = jax.random.key(5)
X = jax.random.normal(jax.random.key(1), (32, 64, 72))
ROWS = np.random.default_rng(0).permutation(32)[:16].astype(np.int32)
SAMPLERS = {
    "exact": regjax.bernoulli,
    "packed": functools.partial(regjax.packed_bernoulli, bits=5),
    "custom": lambda key, share, shape, out_sharding=None: regjax.bernoulli(
        key, share, shape, out_sharding=out_sharding
    ),
}
samplers = pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)


def drop(x: Any, rows: Any, key: Any = KEY, sampler: Any = regjax.bernoulli) -> jax.Array:
    return regjax.dropout(x, 0.4, key=key, sampler=regjax.by_example(rows, sampler))


@pytest.mark.slow  # 25 s
@samplers
@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto], ids=str)
@pytest.mark.parametrize("spec", [P("a"), P(("a", "b")), P("a", "b"), P(None, None, "b")], ids=str)
def test_a_sharded_batch_is_drawn_without_communication(sampler, kind, spec):
    """The numbers are sharded like the rows, or whole on every device."""
    expected = drop(X[ROWS], ROWS, sampler=sampler)
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(kind,) * 2)
    with jax.set_mesh(mesh):
        x = jax.device_put(X[ROWS], NamedSharding(mesh, spec))
        for own in (spec[:1], ()):
            rows = jax.device_put(ROWS, NamedSharding(mesh, P(*own)))
            program = jax.jit(functools.partial(drop, sampler=sampler)).lower(x, rows).compile()
            y = program(x, rows)
            np.testing.assert_array_equal(np.asarray(y), np.asarray(expected))
            assert y.sharding.is_equivalent_to(x.sharding, 3)
            text = program.as_text() or ""
            assert not any(f"{word}(" in text for word in COLLECTIVES)


@samplers
@pytest.mark.sample(2)
def test_in_shard_map_each_device_draws_its_part_of_the_whole(sampler):
    """Without an index of the device folded into the key."""
    expected = drop(X[ROWS], ROWS, sampler=sampler)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    local = functools.partial(drop, sampler=sampler)
    specs = {"in_specs": (P("data"), P("data")), "out_specs": P("data")}
    with jax.set_mesh(mesh):
        x, rows = (jax.device_put(a, NamedSharding(mesh, P("data"))) for a in (X[ROWS], ROWS))
        y = jax.jit(jax.shard_map(local, mesh=mesh, **specs))(x, rows)
    np.testing.assert_array_equal(np.asarray(y), np.asarray(expected))


def test_transforms():
    expected = drop(X[ROWS], ROWS)
    loss = lambda x, rows: jnp.square(drop(x, rows)).sum()
    gradient = jax.grad(loss)(X[ROWS], ROWS)
    for name, y in {
        "jit": jax.jit(drop)(X[ROWS], ROWS),
        "vmap": jax.vmap(drop)(X[ROWS], ROWS),
        "vmap of micro-batches": jax.vmap(drop)(X[ROWS].reshape(4, 4, 64, 72), ROWS.reshape(4, 4)),
        "scan": lax.scan(lambda _, part: (None, drop(*part)), None, (X[ROWS], ROWS))[1],
        "remat": jax.jit(jax.checkpoint(drop))(X[ROWS], ROWS),
    }.items():
        np.testing.assert_array_equal(y.reshape(expected.shape), expected, err_msg=name)
    for name, dx in {
        "jit": jax.jit(jax.grad(loss))(X[ROWS], ROWS),
        "vmap": jax.vmap(jax.grad(loss))(X[ROWS], ROWS),
        "remat": jax.grad(jax.checkpoint(loss))(X[ROWS], ROWS),
        "forward mode": jax.vmap(
            lambda x, row: jax.jvp(lambda x: drop(x, row), [x], [drop(x, row)])[1] * 2
        )(X[ROWS], ROWS),
    }.items():
        np.testing.assert_array_equal(dx, gradient, err_msg=name)


def test_the_backward_pass_stores_key_and_numbers_only():
    """No residual has the size of x, except x itself where the loss needs it."""
    pull_back = jax.vjp(lambda x: drop(x, jnp.asarray(ROWS)), X[ROWS])[1]
    stored = [leaf for leaf in jax.tree.leaves(pull_back) if hasattr(leaf, "size")]
    assert sum(leaf.size for leaf in stored) <= 2 * len(ROWS) + 8


def test_new_numbers_trace_nothing():
    traced = []

    @jax.jit
    def step(x, rows):
        traced.append(rows.shape)
        return drop(x, rows)

    jitted: Any = core._drop_at_number
    before = jitted._cache_size()
    for shift in range(3):
        rows = jnp.asarray((ROWS + shift) % 32)
        np.testing.assert_array_equal(step(X[rows], rows), drop(X[rows], rows))
    assert traced == [(16,)]
    assert jitted._cache_size() <= before + 1


def test_in_a_loop_no_index_is_stored():
    """XLA would hoist an index that does not depend on the key, in memory as large as the mask."""
    x, rows = jnp.ones((64, 64, 64)), jnp.arange(64)

    def layers(x, keys):
        return lax.scan(lambda x, key: (drop(x, rows, key) + 1, None), x, keys)[0]

    def temporary(f):
        memory: Any = jax.jit(f).lower(x, jax.random.split(KEY, 4)).compile().memory_analysis()
        return memory.temp_size_in_bytes

    plain = lambda x, keys: lax.scan(
        lambda x, key: (regjax.dropout(x, 0.4, key=key) + 1, None), x, keys
    )[0]
    assert temporary(layers) <= temporary(plain) + 4096


@pytest.mark.parametrize("sampler", [regjax.bernoulli, SAMPLERS["packed"]], ids=["exact", "packed"])
def test_linen_s_layer_takes_the_sampler_where_it_is_constructed(sampler):
    class Model(linen.Module):
        @linen.compact
        def __call__(self, x, rows):
            sampler_of_rows = regjax.by_example(rows, sampler)
            return regjax.linen.Dropout(0.4, deterministic=False, sampler=sampler_of_rows)(x)

    run = jax.jit(lambda x, rows: Model().apply({}, x, rows, rngs={"dropout": KEY}))
    rows = np.arange(32)
    np.testing.assert_array_equal(run(X[ROWS], ROWS), run(X, rows)[ROWS])


def test_the_key_is_consumed():
    with jax.debug_key_reuse(True), pytest.raises(jax.errors.KeyReuseError):
        jax.jit(lambda key: drop(X[:2], ROWS[:2], key) + drop(X[2:4], ROWS[2:4], key))(KEY)


@pytest.mark.parametrize("loop", ["scan", "unrolled", "attention in blocks"])
@pytest.mark.sample(1)
def test_the_guard_knows_parts_of_one_batch(loop):
    """One key for all parts is no repeated mask; the same examples twice are one."""
    x = jax.random.normal(jax.random.key(8), (6, 5, 2, 4))

    def part(x, rows, key):
        if "attention" not in loop:
            return regjax.dropout(x, 0.5, key=key, sampler=regjax.by_example(rows)).sum()
        how: Any = {"dropout_rng": key, "dropout_rate": 0.5, "block_size": 2}
        return regjax.dot_product_attention(x, x, x, sampler=regjax.by_example(rows), **how).sum()

    def step(numbers, step):
        key = regjax.site_key(KEY, step, "hidden")
        if loop == "unrolled":
            return sum(part(x[i : i + 2], numbers[i : i + 2], key) for i in (0, 2, 4))
        parts = x.reshape(3, 2, 5, 2, 4), numbers.reshape(3, 2)
        return lax.scan(lambda total, own: (total + part(*own, key), None), 0.0, parts)[0]

    reports = [
        regjax.check_dropout(jax.jit(functools.partial(step, jnp.array(numbers))))
        for numbers in ([0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 0, 1])
    ]
    assert found(reports[0]) == []
    assert [problem.name for problem, _ in found(reports[1])] == ["REPEATED_MASK"]


@pytest.mark.parametrize(
    ("sampler", "bits"), [(regjax.bernoulli, 64), (regjax.packed_bernoulli, 60)]
)
def test_indices_that_wrap_are_an_error(sampler, bits):
    """Otherwise two examples would have the same mask."""

    def drop(example):
        rows = regjax.by_example(np.array([3, example]), sampler)
        return regjax.dropout(jnp.ones((2, 64, 32)), 0.5, key=jax.random.key(0), sampler=rows)

    drop(2 ** (bits - 11) - 1)
    with pytest.raises(
        ValueError, match=rf"examples must be below 2\*\*{bits} / 2048, .* got \d+\. C"
    ):
        drop(2 ** (bits - 11))
