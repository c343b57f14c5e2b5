"""Attention in the modules of Flax, and with every argument of the functions of Flax."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import regjax
from tests.regjax.versions import causal_options

KEY = jax.random.key(3)
both_forms = pytest.mark.parametrize("block_size", [None, 3], ids=["whole", "blocks"])


def qkv(batch: int = 2, length: int = 7, heads: int = 2, depth: int = 4):
    return jax.random.normal(jax.random.key(0), (3, batch, length, heads, depth))


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "each"])
@pytest.mark.sample(1)
def test_in_linen_the_mask_is_that_of_linen_s_own_function(shared):
    """Float32 agrees within 1e-6, since sums have another order; masks would differ by 0.1."""
    x = jax.random.normal(jax.random.key(1), (2, 6, 8))
    make = functools.partial(
        linen.MultiHeadDotProductAttention, 2, dropout_rate=0.4, broadcast_dropout=shared
    )
    of_regjax = make(deterministic=False, attention_fn=regjax.dot_product_attention)
    of_flax = make(deterministic=False)
    mask = linen.make_causal_mask(x[..., 0])  # masks of float32, as in Flax
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        params = jax.jit(of_flax.init)(jax.random.key(2), x)
        run = lambda layer, key: layer.apply(params, x, mask=mask, rngs={"dropout": key})
        our, their = (jax.jit(functools.partial(run, layer)) for layer in (of_regjax, of_flax))
        y: Any = our(KEY)
        np.testing.assert_allclose(y, their(KEY), atol=1e-6)
        other = their(jax.random.key(9))
    assert abs(y - other).max() > 0.1


def test_in_nnx_the_mask_is_that_of_nnx_s_own_function():
    x = jax.random.normal(jax.random.key(1), (2, 6, 8))

    def layer(**how):
        return nnx.MultiHeadAttention(
            2, 8, dropout_rate=0.4, deterministic=False, decode=False, rngs=nnx.Rngs(0), **how
        )

    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        how = causal_options(x)
        of_regjax = layer(attention_fn=regjax.dot_product_attention)(x, **how)
        of_flax = layer()(x, **how)
    np.testing.assert_allclose(of_regjax, of_flax, atol=1e-6)


def test_in_decoding_layers_of_flax():
    """Decoding of one position at a time, with a mask of Flax, agrees with Flax's function."""
    x = jax.random.normal(jax.random.key(1), (2, 6, 8))
    results = []
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        for how in ({"attention_fn": regjax.dot_product_attention}, {}):
            layer = linen.MultiHeadDotProductAttention(2, decode=True, **how)
            variables = jax.jit(layer.init)(jax.random.key(2), x)
            step = jax.jit(functools.partial(layer.apply, mutable="cache"))
            _, cache = step(variables, x[:, :1])
            y, _ = step(variables | cache, x[:, 1:2])
            module = nnx.MultiHeadAttention(2, 8, decode=True, rngs=nnx.Rngs(0), **how)
            module.init_cache(x.shape)
            results.append((y, module(x[:, :1])))
    for of_regjax, of_flax in zip(*results, strict=True):
        np.testing.assert_allclose(of_regjax, of_flax, atol=1e-6)


@pytest.mark.parametrize("name", ["qk_attn_weights_einsum", "attn_weights_value_einsum"])
def test_einsums_of_linen_s_are_refused_and_not_left_out(name):
    layer: Any = linen.MultiHeadDotProductAttention(
        2, attention_fn=regjax.dot_product_attention, **{f"{name}_cls": lambda: jnp.einsum}
    )
    with pytest.raises(ValueError, match=f"{name}.* must be None"):
        layer.init(jax.random.key(0), jnp.ones((2, 6, 8)))


def test_weights_are_sown_where_flax_sows_them():
    x = jax.random.normal(jax.random.key(1), (2, 6, 8))
    attention = linen.MultiHeadDotProductAttention(2, attention_fn=regjax.dot_product_attention)
    with jax.numpy_rank_promotion("allow"):
        params = jax.jit(attention.init)(jax.random.key(0), x)
        _, sown = attention.apply(params, x, sow_weights=True, mutable="intermediates")
    weights: Any = sown["intermediates"]["attention_weights"][0]
    assert weights.shape == (2, 2, 6, 6)
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)


def test_weights_are_sown_where_nnx_captures_them():
    x = jax.random.normal(jax.random.key(1), (2, 6, 8))
    with jax.numpy_rank_promotion("allow"):
        module = nnx.MultiHeadAttention(
            2,
            8,
            decode=False,
            rngs=nnx.Rngs(0),
            attention_fn=regjax.dot_product_attention,
        )
        _, seen = nnx.capture(module, nnx.Intermediate)(x, sow_weights=True)
    assert jax.tree.leaves(seen)[0].shape == (2, 2, 6, 6)
    with pytest.raises(ValueError, match="module must be None with block_size=3"):
        regjax.dot_product_attention(*qkv(), module=module, block_size=3)


@pytest.mark.parametrize(
    ("function", "positional"),
    [
        (linen.dot_product_attention, 12),
        (nnx.dot_product_attention, 12),
        (jax.nn.dot_product_attention, 5),
    ],
    ids=["linen", "nnx", "jax"],
)
def test_every_argument_is_accepted_in_the_same_order(function, positional):
    own = inspect.signature(regjax.dot_product_attention).parameters
    reference = inspect.signature(function).parameters
    assert reference.keys() <= own.keys()
    assert list(own)[:positional] == list(reference)[:positional]
    assert all(own[name].kind == own[name].POSITIONAL_OR_KEYWORD for name in list(own)[:12])


def test_positional_arguments_are_those_of_flax():
    q, k, v = qkv()
    mask = np.tri(7, dtype=bool)
    options = (None, mask, True, KEY, 0.4, False, jnp.float32, "highest", None)
    with jax.numpy_rank_promotion("allow"):
        of_linen = linen.dot_product_attention(q, k, v, *options)
        of_nnx = nnx.dot_product_attention(q, k, v, *options)
    for of_flax in (of_linen, of_nnx):
        found = regjax.dot_product_attention(q, k, v, *options)
        np.testing.assert_allclose(found, of_flax, atol=1e-6)


def sown_by_linen(dtype: Any, force: bool, attention_fn: Any) -> Any:
    """Return the weights that a layer sows, with dropout on."""
    x = jax.random.normal(jax.random.key(1), (2, 6, 8)).astype(dtype)
    layer = linen.MultiHeadDotProductAttention(
        2,
        dtype=dtype,
        dropout_rate=0.4,
        deterministic=False,
        force_fp32_for_softmax=force,
        attention_fn=attention_fn,
    )
    params = layer.init(jax.random.key(0), x)
    how = {"sow_weights": True, "mutable": "intermediates", "rngs": {"dropout": KEY}}
    y, sown = layer.apply(params, x, **how)
    return y, sown["intermediates"]["attention_weights"][0]


def sown_by_nnx(dtype: Any, _: bool, attention_fn: Any) -> Any:
    x = jax.random.normal(jax.random.key(1), (2, 6, 8)).astype(dtype)
    how: Any = {"dropout_rate": 0.4, "deterministic": False, "decode": False, "dtype": dtype}
    layer = nnx.MultiHeadAttention(2, 8, rngs=nnx.Rngs(0), attention_fn=attention_fn, **how)
    y, seen = nnx.capture(layer, nnx.Intermediate)(x, sow_weights=True)
    return y, jax.tree.leaves(seen)[0]


SOWN = {
    "linen float32": (sown_by_linen, linen, "float32", False),
    "linen bfloat16": (sown_by_linen, linen, "bfloat16", False),
    "linen bfloat16, forced": (sown_by_linen, linen, "bfloat16", True),
    "linen float16, forced": (sown_by_linen, linen, "float16", True),
    "nnx float32": (sown_by_nnx, nnx, "float32", False),
    "nnx bfloat16": (sown_by_nnx, nnx, "bfloat16", False),
}


FAST = ("linen bfloat16, forced", "nnx bfloat16")


@pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in SOWN]
)
def test_sown_weights_are_those_that_flax_sows(name):
    """Before dropout, and in the same dtype; half types are rounded by Flax before the softmax."""
    sown_by, flax, dtype, force = SOWN[name]
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        y, found = sown_by(dtype, force, regjax.dot_product_attention)
        z, expected = sown_by(dtype, force, flax.dot_product_attention)
    assert found.dtype == expected.dtype == jnp.dtype("float32" if force else dtype)
    assert y.dtype == z.dtype == jnp.dtype(dtype)
    bound = 4 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (found, expected)), atol=bound)


@both_forms
def test_promote_dtype_is_called_as_in_nnx(block_size):
    q, k, v = qkv()
    mixed = q.astype(jnp.bfloat16), k, v
    how = {"block_size": block_size, "promote_dtype": nnx.nn.dtypes.promote_dtype}
    with jax.numpy_dtype_promotion("standard"):
        y = regjax.dot_product_attention(*mixed, **how)
        half = regjax.dot_product_attention(*mixed, dtype=jnp.bfloat16, **how)
    assert (y.dtype, half.dtype) == (jnp.float32, jnp.bfloat16)
    same = regjax.dot_product_attention(*(x.astype(jnp.float32) for x in mixed))
    np.testing.assert_allclose(y, same, atol=1e-6)
    with pytest.raises(TypeError, match="promote_dtype must return a tuple of query, key and"):
        regjax.dot_product_attention(q, k, v, promote_dtype=lambda arrays, dtype: arrays[0])


@both_forms
@pytest.mark.sample(1)
def test_einsum_dot_general_computes_both_products(block_size):
    """A function that doubles every product, as in Linen, with gradients."""

    def doubled(*args, **options):
        return 2 * jax.lax.dot_general(*args, **options)

    q, k, v = qkv()
    how = {"dropout_rng": KEY, "dropout_rate": 0.4, "broadcast_dropout": False}
    how["einsum_dot_general"] = doubled

    def both(attend):
        return jax.value_and_grad(lambda q: attend(q, k, v, **how).sum())(q)

    found = both(functools.partial(regjax.dot_product_attention, block_size=block_size))
    with jax.numpy_rank_promotion("allow"):
        expected = both(linen.dot_product_attention)
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)
    plain = jax.value_and_grad(lambda q: regjax.dot_product_attention(q, k, v).sum())(q)
    assert abs(found[1] - plain[1]).max() > 0.1
