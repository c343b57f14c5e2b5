"""Tests that only JAX needs: tracing, transforms, compilation, kinds of keys, layouts."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import regjax
import regshared
from tests.regjax.versions import debug_key_reuse, kinds_of_keys_of_jax_0_10

KEY = jax.random.key(0)
X = jnp.linspace(-2.0, 3.0, 48).reshape(6, 8)
RANDOM = ("threefry", "random_", "shift", "xor", "iota", "rng")


def apply(x, key=KEY, rate=0.3, **options):
    return regjax.dropout(x, rate, key=key, **options)


@pytest.mark.parametrize("options", [{"rate": 0.0}, {"deterministic": True}, {"rate": 1.0}])
def test_nothing_random_is_traced_where_nothing_is_random(options):
    jaxpr = str(jax.make_jaxpr(lambda x: apply(x, **options))(X))
    assert not any(name in jaxpr for name in RANDOM)


def test_random_operations_are_seen():
    """Test of the previous test."""
    assert any(name in str(jax.make_jaxpr(apply)(X)) for name in RANDOM)


def test_jit_changes_no_bit():
    chex.assert_trees_all_equal(jax.jit(apply)(X, KEY), apply(X))


def test_a_changing_rate_flag_and_key_cost_one_compilation():
    traces = []

    @jax.jit
    def step(x, key, rate, deterministic):
        traces.append(None)
        return apply(x, key, rate, deterministic=deterministic)

    for i, rate in enumerate([0.0, 0.1, 0.5, 1.0]):
        for deterministic in (False, True):
            y = step(X, jax.random.key(i), jnp.float32(rate), jnp.bool_(deterministic))
            expected = X if deterministic else apply(X, jax.random.key(i), rate)
            chex.assert_trees_all_close(y, expected, rtol=2e-7)
    assert len(traces) == 1


def test_a_traced_true_flag_spends_no_random_bits():
    """All random operations are inside a branch of the conditional."""
    jaxpr = jax.make_jaxpr(lambda flag: apply(X, deterministic=flag))(True).jaxpr
    outside = [eqn.primitive.name for eqn in jaxpr.eqns if eqn.primitive.name != "cond"]
    assert not any(name.startswith(RANDOM) for name in outside)
    assert any(eqn.primitive.name == "cond" for eqn in jaxpr.eqns)


def test_eager_calls_compile_once():
    before = regjax._dropout.core._drop_at_number._cache_size()
    x = jnp.ones((3, 5, 11))
    for seed in range(4):
        apply(x, jax.random.key(seed), 0.37)
    assert regjax._dropout.core._drop_at_number._cache_size() == before + 1


def calls_of_regjax(function):
    """Return the number of Python calls of a function inside regjax."""
    folders = tuple(str(Path(package.__path__[0])) for package in (regjax, regshared))
    calls = []

    def profile(frame, event, _):
        if event == "call" and frame.f_code.co_filename.startswith(folders):
            calls.append(frame.f_code.co_qualname)

    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
    return len(calls)


def test_an_eager_call_passes_through_few_functions():
    """The first call traces; before 0.2 there were 131 and 29."""
    x = jnp.ones((7, 13))
    assert calls_of_regjax(lambda: apply(x)) <= 65
    assert calls_of_regjax(lambda: apply(x)) <= 12


def test_the_gradient_is_the_mask_times_the_scale():
    gradient = jax.grad(lambda x: apply(x).sum())(X)
    chex.assert_trees_all_equal(gradient, apply(jnp.ones_like(X)))


def test_only_the_key_is_saved_for_the_backward_pass():
    _, pull_back = jax.vjp(apply, X)
    saved = [leaf for leaf in jax.tree.leaves(pull_back) if hasattr(leaf, "shape")]
    assert all(leaf.size <= 1 for leaf in saved)


def test_forward_mode_second_order_and_linearize():
    chex.assert_trees_all_equal(jax.jvp(apply, (X,), (X,)), (apply(X), apply(X)))
    _, linear = jax.linearize(apply, X)
    chex.assert_trees_all_equal(linear(X), apply(X))
    hessian = jax.hessian(lambda x: (apply(x) ** 2).sum())(X[0])
    chex.assert_trees_all_close(hessian, jnp.diag(2 * apply(jnp.ones(8)) ** 2), rtol=1e-6)


def test_vmap_over_keys_draws_a_mask_each():
    keys = jax.random.split(KEY, 6)
    rows = jax.vmap(apply)(X, keys)
    chex.assert_trees_all_equal(
        rows, jnp.stack([apply(x, key) for x, key in zip(X, keys, strict=True)])
    )


def test_vmap_over_inputs_shares_the_mask():
    rows = jax.vmap(lambda x: apply(x))(X)
    chex.assert_trees_all_equal(rows, jnp.stack([apply(x) for x in X]))


def test_vmap_over_the_flag():
    flags = jnp.arange(6) % 2 == 0
    rows = jax.vmap(lambda x, flag: apply(x, deterministic=flag))(X, flags)
    expected = [x if flag else apply(x) for x, flag in zip(X, flags, strict=True)]
    chex.assert_trees_all_equal(rows, jnp.stack(expected))


def test_scan_remat_and_a_loop_agree():
    keys = jax.random.split(KEY, 4)
    layer = lambda x, key: (apply(jnp.tanh(x), key), None)
    loop = lambda x: functools.reduce(lambda x, key: layer(x, key)[0], keys, x)
    scan = lambda x: jax.lax.scan(layer, x, keys)[0]
    remat = lambda x: jax.lax.scan(jax.checkpoint(layer), x, keys)[0]
    gradients = [jax.grad(lambda x, f=f: f(x).sum())(X) for f in (loop, scan, remat)]
    chex.assert_trees_all_close(*gradients, rtol=1e-6)
    chex.assert_trees_all_close(loop(X), scan(X), remat(X), rtol=1e-6)


def test_raw_and_typed_threefry_keys_draw_the_same_mask():
    chex.assert_trees_all_equal(apply(X, jax.random.PRNGKey(5)), apply(X, jax.random.key(5)))


@pytest.mark.parametrize(
    "impl",
    [
        *("rbg", "unsafe_rbg", "threefry2x32"),
        *(
            pytest.param(impl, marks=kinds_of_keys_of_jax_0_10)
            for impl in ("philox2x32", "philox4x32", "threefry4x32")
        ),
    ],
)
def test_keys_of_every_kind_draw_fair_masks(impl):
    masks = [regjax.bernoulli(jax.random.key(seed, impl=impl), 0.5, (20_000,)) for seed in range(2)]
    for mask in masks:
        assert abs(int(mask.sum()) - 10_000) < 5 * np.sqrt(5_000)
    assert abs(int((masks[0] == masks[1]).sum()) - 10_000) < 5 * np.sqrt(5_000)


@pytest.mark.parametrize("step", [3, 2**31 + 1])
def test_site_keys_of_a_traced_step(step):
    at = jax.jit(lambda step: regjax.site_key(KEY, step, "hidden"))(jnp.uint32(step))
    chex.assert_trees_all_equal(
        *map(jax.random.key_data, (at, regjax.site_key(KEY, step, "hidden")))
    )


def test_site_keys_of_a_64_bit_step():
    with jax.enable_x64(True):
        at = jax.jit(lambda step: regjax.site_key(KEY, step, "hidden"))(jnp.int64(2**40 + 5))
    expected = regjax.site_key(KEY, 2**40 + 5, "hidden")
    chex.assert_trees_all_equal(jax.random.key_data(at), jax.random.key_data(expected))


def test_a_site_key_of_a_raw_root_is_raw():
    raw = regjax.site_key(jax.random.PRNGKey(0), 1, "a")
    chex.assert_trees_all_equal(raw, jax.random.key_data(regjax.site_key(KEY, 1, "a")))


def test_key_reuse_is_still_seen():
    with debug_key_reuse():
        key = jax.random.key(1)
        apply(X, key)
        with pytest.raises(jax.errors.KeyReuseError):
            apply(X, key)
        root = jax.random.key(2)  # a root may be used repeatedly, since many sites derive from it
        apply(X, regjax.site_key(root, 0, "a"))
        apply(X, regjax.site_key(root, 0, "b"))


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("partitionable", [False, True])
def test_no_setting_changes_the_mask(x64, partitionable):
    expected = regjax.bernoulli(KEY, 0.3, (64, 33))
    with jax.enable_x64(x64), jax.threefry_partitionable(partitionable):
        chex.assert_trees_all_equal(regjax.bernoulli(KEY, 0.3, (64, 33)), expected)


@pytest.mark.parametrize("axis_type", [AxisType.Explicit, AxisType.Auto])
@pytest.mark.parametrize("spec", [P("a"), P(None, "a"), P("b", "a"), P(("a", "b"), None)], ids=str)
@pytest.mark.sample(3)
def test_a_mask_is_laid_out_as_what_it_masks(axis_type, spec):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(axis_type, axis_type))
    x = jnp.linspace(-1.0, 1.0, 8 * 16).reshape(8, 16)
    expected = apply(x, broadcast_dims=()), apply(x, broadcast_dims=(0,))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(x, NamedSharding(mesh, spec))
        for dims, wanted in zip([(), (0,)], expected, strict=True):
            run = jax.jit(lambda x, dims=dims: apply(x, broadcast_dims=dims))
            y = run(sharded)
            assert y.sharding.is_equivalent_to(sharded.sharding, 2)
            np.testing.assert_array_equal(np.asarray(y), np.asarray(wanted))
            compiled = run.lower(sharded).compile().as_text()
            assert not any(name in compiled for name in ("all-gather", "all-reduce", "permute("))


def draws_while_reading(f, x, key):
    """Return whether a loop over all elements of `x` draws bits in the program of XLA."""
    program = jax.jit(f).lower(x, key).compile().as_text()
    whole = f"f32[{','.join(map(str, x.shape))}]"
    return any("xor(" in loop and whole in loop for loop in program.split("\n\n"))


def shared(dims):
    return lambda x, key: regjax.dropout(x, 0.3, key=key, broadcast_dims=dims)


def mapped(dims):
    return jax.vmap(shared(dims))


def slope(dims):
    return jax.grad(lambda x, key: (shared(dims)(x, key) * x).sum())


@pytest.mark.parametrize("form", [shared, mapped, slope])
@pytest.mark.parametrize("dims", [(0,), (1,), (0, 1)], ids=str)
@pytest.mark.sample(6)
def test_a_shared_mask_is_drawn_once(form, dims):
    """By its cost model, XLA would draw it for each element."""
    x, key = jnp.ones((16, 32, 64)), KEY
    if form is mapped:
        x, key = jnp.ones((8, *x.shape)), jax.random.split(KEY, 8)
    assert draws_while_reading(form(()), x, key)
    assert not draws_while_reading(form(dims), x, key)
