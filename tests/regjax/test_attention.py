"""Attention in JAX: under transforms, its memory, and sharding."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import regjax
from regjax._random.threefry import Span, part_index

KEY = jax.random.key(3)
both_forms = pytest.mark.parametrize("block_size", [None, 3], ids=["whole", "blocks"])


def qkv(batch: int = 2, length: int = 7, heads: int = 2, depth: int = 4):
    return jax.random.normal(jax.random.key(0), (3, batch, length, heads, depth))


def attend(q, k, v, key=KEY, rate=0.3, **how):
    return regjax.dot_product_attention(q, k, v, dropout_rng=key, dropout_rate=rate, **how)


@both_forms
def test_derivatives_of_every_kind(block_size):
    """Compare jvp with a difference quotient, and the second derivative with the first."""
    with jax.enable_x64(True):
        q, k, v = (x.astype(np.float64) for x in qkv(1, 5))

        def f(x):
            return attend(x, k + x, v * x, block_size=block_size).sum()

        @jax.jit
        def derivatives(x):
            value, slope = jax.jvp(f, (x,), (direction,))
            return value, slope, *jax.jvp(jax.grad(f), (x,), (direction,))

        direction, step = np.cos(q), 1e-6
        value, slope, gradient, second = derivatives(q)
        after, _, gradient_after, _ = derivatives(q + step * direction)
        before, _, gradient_before, _ = derivatives(q - step * direction)
        assert abs(slope - (after - before) / (2 * step)) < 1e-8 * abs(value)
        assert abs((gradient * direction).sum() - slope) < 1e-12 * abs(slope)
        assert abs(second - (gradient_after - gradient_before) / (2 * step)).max() < 1e-8


@both_forms
@pytest.mark.sample(1)
def test_vmap_scan_and_remat_change_nothing(block_size):
    q, k, v = qkv()
    run = functools.partial(attend, block_size=block_size)
    keys = jax.random.split(KEY, 2)
    mapped = jax.jit(jax.vmap(run))(q, k, v, keys)
    alone = jnp.stack([run(q[i], k[i], v[i], keys[i]) for i in range(2)])
    np.testing.assert_allclose(mapped, alone, atol=1e-6)

    def loss(q, wrap):
        def layer(x, key):
            return wrap(run)(x, k, v, key), None

        return (jax.lax.scan(layer, q, keys)[0] ** 2).sum()

    plain, remade = (
        jax.jit(jax.grad(loss), static_argnums=1)(q, wrap) for wrap in (lambda f: f, jax.checkpoint)
    )
    np.testing.assert_allclose(plain, remade, atol=1e-5)


@both_forms
def test_a_traced_flag_and_rate_compile_once(block_size):
    q, k, v = qkv()
    traces = []

    @jax.jit
    def run(rate, deterministic):
        traces.append(1)
        return attend(q, k, v, rate=rate, deterministic=deterministic, block_size=block_size)

    off = regjax.dot_product_attention(q, k, v)
    np.testing.assert_allclose(run(0.3, True), off, atol=1e-6)
    np.testing.assert_allclose(run(0.3, False), attend(q, k, v), atol=1e-6)
    np.testing.assert_allclose(run(0.5, False), attend(q, k, v, rate=0.5), atol=1e-6)
    assert len(traces) == 1


def test_evaluation_asks_for_no_key_and_draws_nothing():
    q, k, v = qkv()
    for block_size in (None, 3):
        for how in ({"deterministic": True, "dropout_rate": 0.5}, {"dropout_rate": 0.0}):
            run = functools.partial(regjax.dot_product_attention, block_size=block_size, **how)
            assert "xor" not in str(jax.make_jaxpr(run)(q, k, v))
    assert "xor" in str(jax.make_jaxpr(attend)(q, k, v))  # test of the test


def temporary_bytes(length: int, block_size: int | None) -> int:
    x = jax.ShapeDtypeStruct((1, length, 2, 16), np.float32)
    mask = jax.ShapeDtypeStruct((1, 1, 1, length), np.bool_)

    lengths = jax.ShapeDtypeStruct((1,), np.int32)

    def loss(q, k, v, mask, lengths):
        how: dict[str, Any] = {"mask": mask, "is_causal": True, "local_window_size": (length, 9)}
        how |= {"query_seq_lengths": lengths, "key_value_seq_lengths": lengths}
        return attend(q, k, v, block_size=block_size, **how).sum()

    step = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
    compiled: Any = step.lower(x, x, x, mask, lengths).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def whole_bytes(function: Any, **options: Any) -> int:
    """Return the temporary memory of attention with its gradients, by XLA's analysis.

    A cotangent of ones, as that of a sum, would give XLA another program.
    """
    x = jax.ShapeDtypeStruct((1, 1024, 4, 64), np.float32)
    loss = lambda q, k, v: (function(q, k, v, **options) * q).sum()
    compiled: Any = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).lower(x, x, x).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_the_whole_form_takes_less_memory_than_jax_nn_without_dropout():
    """It takes 0.75 times as much; without a rule for its derivative, 1.2 times."""
    assert whole_bytes(attend) < 0.9 * whole_bytes(jax.nn.dot_product_attention)


def test_memory_in_blocks_grows_with_the_length_and_not_with_its_square():
    """Memory of forward and backward passes, by XLA's analysis."""
    short, long = (temporary_bytes(length, 64) for length in (512, 2048))
    assert long < 4.2 * short
    assert temporary_bytes(2048, None) > 16 * long  # test of the test


@both_forms
def test_a_call_outside_of_jit_compiles_once(caplog, block_size):
    q, k, v = qkv(length=5)
    gradient = lambda: jax.grad(lambda q: attend(q, k, v, block_size=block_size).sum())(q)
    for compiles in (True, False):
        caplog.clear()
        with jax.log_compiles():
            gradient()
        assert ("Compiling" in caplog.text) is compiles


@both_forms
def test_a_key_used_twice_is_seen_and_its_derivative_is_no_second_use(block_size):
    q, k, v = qkv()
    run = functools.partial(attend, block_size=block_size)

    @jax.jit
    def twice(key):
        return sum(run(q, k, v, key) for _ in range(2))

    with jax.debug_key_reuse(True):
        with pytest.raises(jax.errors.KeyReuseError):
            twice(jax.random.key(3))
        jax.jit(lambda key: jax.jvp(lambda q: run(q, k, v, key), (q,), (q,)))(jax.random.key(3))


@pytest.mark.parametrize("kind", ["threefry2x32", "rbg"])
@pytest.mark.parametrize("make", [jax.random.key, jax.random.PRNGKey], ids=["typed", "raw"])
def test_keys_of_every_kind(kind, make):
    key: Any = make(3, impl=kind)
    q, k, v = qkv()
    whole, blocks = (attend(q, k, v, key, block_size=size) for size in (None, 3))
    np.testing.assert_allclose(whole, blocks, atol=1e-6)


def test_places_beyond_32_bits():
    """Read a corner of a mask of 2**50 elements, whose index needs carries."""
    whole, shape = (2**10, 2**20, 2**20), (2, 3, 4)
    starts = (1000, 2**20 - 3, jnp.int32(2**20 - 4))
    high, low = part_index(whole, [Span(*span) for span in zip(starts, shape, strict=True)])
    a, b, c = np.meshgrid(
        *(np.arange(s, s + n) for s, n in zip((1000, 2**20 - 3, 2**20 - 4), shape, strict=True)),
        indexing="ij",
    )
    expected = (a * 2**20 + b) * 2**20 + c
    np.testing.assert_array_equal(np.broadcast_to(high, shape), expected >> 32)
    np.testing.assert_array_equal(np.broadcast_to(low, shape), expected & 0xFFFFFFFF)


@both_forms
def test_a_mask_of_zeros_and_ones_is_a_mask(block_size):
    q, k, v = qkv()
    mask = np.tri(7, dtype=np.float32)
    seen = attend(q, k, v, mask=mask, block_size=block_size)
    same = attend(q, k, v, mask=mask.astype(bool), block_size=block_size)
    np.testing.assert_array_equal(seen, same)
    causal = attend(q, k, v, is_causal=True, block_size=block_size)
    np.testing.assert_allclose(seen, causal, atol=1e-6)
    with pytest.raises(TypeError, match=r"mask must be boolean.*Pass numbers .* as bias"):
        attend(q, k, v, mask=np.where(mask, 0.0, -np.inf), block_size=block_size)


COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute")


LAYOUTS = {
    "rows and heads": [P("a", None, "b")] * 3,
    "rows and queries": [P("a", "b"), P("a"), P("a")],
}


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto], ids=str)
@pytest.mark.parametrize("specs", LAYOUTS.values(), ids=LAYOUTS)
@both_forms
@pytest.mark.sample(2)
def test_on_many_devices(specs, kind, block_size):
    """Sharded results equal those of one device, with no communication."""
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(kind,) * 2)
    arrays = qkv(batch=4, length=8)
    alone = attend(*arrays, block_size=block_size)
    with jax.set_mesh(mesh):
        layout, *_ = layouts = [NamedSharding(mesh, spec) for spec in specs]
        arrays = jax.device_put(tuple(arrays), tuple(layouts))
        run = jax.jit(functools.partial(attend, block_size=block_size))
        compiled: Any = run.lower(*arrays).compile()
        y = compiled(*arrays)
    np.testing.assert_allclose(y, alone, atol=1e-6)
    assert y.sharding.is_equivalent_to(layout, 4)
    assert not [word for word in COLLECTIVES if f"{word}(" in compiled.as_text()]


@pytest.mark.parametrize("block_size", [None, 3])
def test_at_rate_1_a_traced_flag_still_decides(block_size):
    q, k, v = qkv()
    run = jax.jit(lambda flag: attend(q, k, v, rate=1.0, deterministic=flag, block_size=block_size))
    expected = attend(q, k, v, deterministic=True)
    np.testing.assert_allclose(run(True), expected, rtol=1e-5, atol=1e-6)
    assert not run(False).any()


REJECTED = {
    "query_seq_lengths": (
        jnp.array([5]),
        "query_seq_lengths must be None with implementation='pallas'",
    ),
    "key_value_seq_lengths": (
        jnp.array([5]),
        r"key_value_seq_lengths must be None .*Pass a mask of shape \(1, 1, 1, 8\)",
    ),
    "local_window_size": (3, "local_window_size must be None"),
    "return_residual": (True, "return_residual must be False"),
    "einsum_dot_general": (jax.lax.dot_general, "einsum_dot_general must be None"),
}


@pytest.mark.parametrize("name", REJECTED)
def test_kernels_reject_what_they_do_not_support(name):
    value, message = REJECTED[name]
    x = jnp.ones((1, 8, 1, 64))
    with pytest.raises(ValueError, match=message):
        attend(x, x, x, implementation="pallas", **{name: value})
