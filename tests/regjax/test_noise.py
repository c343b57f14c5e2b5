"""Tests of depth and noise that only JAX needs: transforms, memory, layouts, traced rates."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import regjax
from regjax._random.keys import key_words
from regjax._random.quantile import quantile
from regjax._random.threefry import threefry2x32
from regjax._random.xla import rounded
from tests.regjax.training import assert_one_compilation
from tests.regjax.versions import debug_key_reuse

KEY = jax.random.key(0)
X = jnp.linspace(-2.0, 3.0, 8 * 6 * 4).reshape(8, 6, 4)
FAMILY = {
    name: getattr(regjax, name) for name in ("drop_path", "gaussian_dropout", "gaussian_noise")
}
each = pytest.mark.parametrize("noise", FAMILY.values(), ids=FAMILY)
each_axis_type = pytest.mark.parametrize("axis_type", [AxisType.Explicit, AxisType.Auto], ids=str)


@each
@pytest.mark.sample(2)
def test_jit_remat_and_both_modes_of_differentiation_draw_the_same(noise):
    f = lambda x: noise(x, 0.3, key=KEY)
    y, ones = f(X), jnp.ones_like(X)
    chex.assert_trees_all_equal(jax.jit(f)(X), y)
    slope = ones if noise is regjax.gaussian_noise else f(ones)
    chex.assert_trees_all_equal(jax.jvp(f, (X,), (ones,)), (y, slope))
    for g in (f, jax.checkpoint(f), jax.jit(f)):
        chex.assert_trees_all_equal(jax.vjp(g, X)[1](ones)[0], slope)


@each
def test_the_second_derivative_is_zero(noise):
    f = lambda x: noise(x, 0.3, key=KEY).sum()
    chex.assert_trees_all_equal(jax.hessian(f)(X[0]), jnp.zeros((6, 4, 6, 4)))


@each
@pytest.mark.parametrize("rate", [0.3, np.float32(0.3)], ids=["number", "traced"])
def test_only_the_key_is_saved_for_the_backward_pass(noise, rate):
    def saved(rate):
        _, pull_back = jax.vjp(lambda x: noise(x, rate, key=KEY), X)
        return [leaf.size for leaf in jax.tree.leaves(pull_back) if hasattr(leaf, "shape")]

    if isinstance(rate, np.generic):
        sizes: list[int] = []
        jax.jit(lambda rate: sizes.extend(saved(rate)))(rate)
    else:
        sizes = saved(rate)
    assert all(size <= 1 for size in sizes)


@each
def test_a_changing_rate_flag_and_key_cost_one_compilation(noise):
    assert_one_compilation(noise, X, [0.0, 0.25, 0.75], rtol=1e-6)


@each
def test_vmap_over_keys_draws_for_each(noise):
    keys = jax.random.split(KEY, 3)
    rows = jax.vmap(lambda key: noise(X, 0.3, key=key))(keys)
    chex.assert_trees_all_equal(rows, jnp.stack([noise(X, 0.3, key=key) for key in keys]))


@each
def test_nothing_random_is_traced_where_nothing_is_random(noise):
    for options in ({}, {"deterministic": True}):
        amount = 0.3 if options else 0
        jaxpr = str(jax.make_jaxpr(lambda x, a=amount, o=options: noise(x, a, **o))(X))
        assert not any(name in jaxpr for name in ("threefry", "shift", "xor", "random_"))


@each
def test_key_reuse_is_still_seen(noise):
    with debug_key_reuse():
        key = jax.random.key(1)
        noise(X, 0.3, key=key)
        with pytest.raises(jax.errors.KeyReuseError):
            noise(X, 0.3, key=key)


@each
def test_raw_keys_draw_the_same(noise):
    raw = jax.random.key_data(KEY)
    chex.assert_trees_all_equal(noise(X, 0.3, key=raw), noise(X, 0.3, key=KEY))


@each
@each_axis_type
@pytest.mark.parametrize("spec", [P("a"), P(None, "b"), P("a", None, "b")], ids=str)
@pytest.mark.sample(4)
def test_it_is_the_same_on_every_mesh_and_nothing_is_sent(noise, axis_type, spec):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(axis_type,) * 2)
    run = jax.jit(lambda x: noise(x, 0.3, key=KEY))
    expected = np.asarray(run(X))
    with jax.set_mesh(mesh):
        x = jax.device_put(X, NamedSharding(mesh, spec))
        y = run(x)
        assert y.sharding.is_equivalent_to(x.sharding, 3)
        np.testing.assert_array_equal(np.asarray(y), expected)
        if axis_type is AxisType.Explicit:
            # All arrays of the whole shape are sharded, including noise.
            assert "[8,6,4]" not in str(jax.make_jaxpr(run)(x))
        compiled = run.lower(x).compile().as_text()
        assert not any(name in compiled for name in ("all-gather", "all-reduce", "permute("))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_variates_are_laid_out_as_asked(dtype):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
    with jax.enable_x64(dtype == "float64"):
        expected = np.asarray(regjax.normal(KEY, (8, 6), dtype))
        layout = NamedSharding(mesh, P("a", "b"))
        draw = lambda: regjax.normal(KEY, (8, 6), dtype, out_sharding=layout)
        with jax.set_mesh(mesh):
            for y in (draw(), jax.jit(draw)()):
                np.testing.assert_array_equal(np.asarray(y), expected)
                assert y.sharding.is_equivalent_to(layout, 2)


def test_variates_beyond_the_first_word_of_the_counter():
    """Compute a few elements of a shape of 2**33."""
    shape = (2**13, 2**20)
    few = jax.jit(lambda: regjax.normal(KEY, shape)[4096:4098, :3])()
    words = [divmod(row * 2**20 + column, 2**32) for row in (4096, 4097) for column in range(3)]
    high, low = (jnp.array(word, jnp.uint32) for word in zip(*words, strict=True))
    out0, out1 = threefry2x32(key_words(KEY), (high, low))
    bits = ((out0 ^ out1) >> 9).astype(jnp.float32)
    expected = quantile(bits * 2.0**-22 - (1 - 2.0**-24))
    chex.assert_trees_all_equal(few.ravel(), expected)


VALUES = [0.0, -0.0, 1.0, -1.0, 0.3, 1e-45, -1e-45, 6e4, np.inf, -np.inf, np.nan]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_rounding_is_the_identity_and_so_is_its_derivative(dtype):
    x = jnp.array(VALUES, dtype)
    for f in (rounded, jax.jit(rounded)):
        np.testing.assert_array_equal(f(x).astype(np.float32), x.astype(np.float32))
        np.testing.assert_array_equal(np.signbit(f(x))[:-1], np.signbit(x)[:-1])
        for slope in (jax.vjp(f, x)[1](x)[0], jax.jvp(f, (x,), (x,))[1]):
            np.testing.assert_array_equal(slope.astype(np.float32), x.astype(np.float32))


@pytest.mark.parametrize(
    "product",
    [
        lambda i, x: x * x,
        lambda i, x: x * 0.3,
        lambda i, x: i.astype(jnp.float32) * 0.3,
        lambda i, x: jnp.abs(x) * 0.3,
        lambda i, x: jnp.sin(x) * x,
    ],
    ids=["square", "product", "integer", "positive", "bounded"],
)
def test_no_product_is_joined_with_a_sum(product, contracts):
    i = jnp.arange(10_000)
    x = jnp.linspace(0.5, 3.0, 10_000)
    apart = np.asarray(jax.jit(product)(i, x)) + np.asarray(x)
    guarded = jax.jit(lambda i, x: rounded(product(i, x)) + x)(i, x)
    np.testing.assert_array_equal(np.asarray(guarded), apart)
    joined = jax.jit(lambda i, x: product(i, x) + x)(i, x)
    # Test of the test: XLA contracts them if the CPU has FMA.
    assert (np.asarray(joined) != apart).any() == contracts
