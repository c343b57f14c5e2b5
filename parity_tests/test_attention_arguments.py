"""Lengths, windows and residuals of attention: both packages agree with `jax.nn`.

Where a query may attend to no key, `jax.nn` returns the mean of all values, and a large negative
residual; here both packages return 0 and -inf.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import regjax
from parity_tests.frameworks import JAX, Framework
from parity_tests.tables import both_frameworks

QUERIES, KEYS, HEADS, DEPTH = 7, 5, 4, 8
RNG = np.random.default_rng(0)
SHORT, LONG = np.array([4, 0], np.int32), np.array([100, 3], np.int32)
CASES: dict[str, dict[str, Any]] = {
    "all": {
        "local_window_size": (3, 2),
        "is_causal": True,
        "query_seq_lengths": LONG,
        "key_value_seq_lengths": np.array([4, 5], np.int32),
        "mask": RNG.random((2, 1, QUERIES, KEYS)) < 0.8,
        "bias": RNG.normal(size=(1, HEADS, QUERIES, KEYS)).astype(np.float32),
        "scale": 0.7,
    },
    "nothing in some windows": {"local_window_size": (1, 0), "kv_heads": 2},
    "one number": {"local_window_size": 2},
    "wide": {"local_window_size": (10**6, 0)},
    "causal window": {"local_window_size": (1, 3), "is_causal": True},
    "queries": {"query_seq_lengths": LONG},
    "no queries": {"query_seq_lengths": SHORT},
    "keys": {"key_value_seq_lengths": LONG, "kv_heads": 1},
    "no keys": {"key_value_seq_lengths": SHORT},
    "below 0": {"key_value_seq_lengths": np.array([-3, 2], np.int32)},
    "no batch": {"batch": (), "query_seq_lengths": LONG[1:], "key_value_seq_lengths": LONG[1:]},
}
FAST = ("all", "nothing in some windows")
cases = pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in CASES]
)


def inputs(
    batch: tuple[int, ...] = (2,), kv_heads: int = HEADS, **options: Any
) -> tuple[list[np.ndarray], dict[str, Any]]:
    """Return query, key, value and a cotangent, and the other arguments."""
    shapes = [(QUERIES, HEADS), (KEYS, kv_heads), (KEYS, kv_heads), (QUERIES, HEADS)]
    rng = np.random.default_rng(1)
    arrays = [rng.normal(size=(*batch, *shape, DEPTH)).astype(np.float32) for shape in shapes]
    return arrays, options


def seen(batch: tuple[int, ...], options: dict[str, Any]) -> np.ndarray:
    """Return whether each query may attend to any key, of shape (batch, queries, 1, 1)."""
    row, column = np.arange(QUERIES)[:, None], np.arange(KEYS)
    permitted = np.broadcast_to(options.get("mask", True), (*(batch or (1,)), 1, QUERIES, KEYS))
    if options.get("is_causal"):
        permitted = permitted & (column <= row)
    if "local_window_size" in options:
        left, right = np.broadcast_to(np.int64(options["local_window_size"]), 2)
        permitted = permitted & (row - left <= column) & (column <= row + right)
    for name, place in (("query_seq_lengths", row), ("key_value_seq_lengths", column)):
        if name in options:
            permitted = permitted & (place < options[name][:, None, None, None])
    found = np.swapaxes(np.any(permitted, axis=-1, keepdims=True), -2, -3)
    return found if batch else found[0]


def with_gradients(framework: Framework, attend: Any, arrays: list[Any], ct: Any) -> list[Any]:
    """Return the result, the residual, and the gradients of the arrays."""
    if framework is JAX:

        @jax.jit
        def both(ct, *arrays):
            result, pull_back, residual = jax.vjp(attend, *arrays, has_aux=True)
            return result, residual, *pull_back(ct)

        return [np.asarray(x) for x in both(ct, *arrays)]
    leaves = [x.requires_grad_() for x in arrays]
    result, residual = attend(*leaves)
    assert not residual.requires_grad
    found = (result, residual, *torch.autograd.grad(result, leaves, ct))
    return [framework.numpy(x) for x in found]


@functools.cache
def expected(name: str) -> tuple[np.ndarray, ...]:
    """Return what `jax.nn` computes, with zeros and -inf for queries that attend to no key."""
    arrays, options = inputs(**CASES[name])
    attends = seen(arrays[0].shape[:-3], options)
    options = {n: jnp.asarray(x) if isinstance(x, np.ndarray) else x for n, x in options.items()}
    attend = functools.partial(jax.nn.dot_product_attention, return_residual=True, **options)
    *qkv, ct = map(jnp.asarray, arrays)
    result, residual, *gradients = with_gradients(JAX, attend, qkv, jnp.where(attends, ct, 0))
    return (
        np.where(attends, result, 0),
        np.where(attends[..., 0], residual, -np.inf),
        *gradients,
    )


@cases
@both_frameworks
@pytest.mark.parametrize("block_size", [None, 2])
@pytest.mark.sample(2)
def test_results_residuals_and_gradients_are_those_of_jax_nn(framework, name, block_size):
    arrays, options = inputs(**CASES[name])
    options = {
        n: framework.array(x) if isinstance(x, np.ndarray) else x for n, x in options.items()
    }
    attend = functools.partial(
        framework.library.dot_product_attention,
        return_residual=True,
        block_size=block_size,
        **options,
    )
    *qkv, ct = map(framework.array, arrays)
    found = with_gradients(framework, attend, qkv, ct)
    for x, y in zip(found, expected(name), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_allclose(x, y, atol=1e-5)  # float32, sums in another order


@both_frameworks
@pytest.mark.parametrize("block_size", [None, 2])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.sample(3)
def test_the_residual_precedes_dropout_and_has_the_dtype_of_the_arrays(
    framework: Framework, block_size, dtype
):
    arrays, _ = inputs()
    qkv = [framework.array(x.astype(jnp.dtype(dtype))) for x in arrays[:3]]
    attend = functools.partial(
        framework.library.dot_product_attention,
        dropout_rng=framework.key(0),
        return_residual=True,
        block_size=block_size,
    )
    plain = attend(*qkv)
    for rate in (0.5, 1.0):
        dropped = attend(*qkv, dropout_rate=rate)
        assert dropped[1].dtype == qkv[0].dtype
        np.testing.assert_array_equal(framework.numpy(dropped[1]), framework.numpy(plain[1]))
        assert np.abs(framework.numpy(dropped[0] - plain[0])).max() > 0.1


@pytest.mark.parametrize("block_size", [None, 2])
def test_no_gradient_flows_to_the_residual_in_jax(block_size):
    """For PyTorch, `with_gradients` asserts it."""
    q, k, v = map(jnp.asarray, inputs()[0][:3])
    residual = lambda q: regjax.dot_product_attention(
        q, k, v, return_residual=True, block_size=block_size
    )[1]
    assert not jax.grad(lambda q: residual(q).sum())(q).any()


@both_frameworks
def test_a_window_of_any_size_does_not_overflow(framework: Framework):
    """The indices of `jax.nn` overflow from 2**31 on."""
    qkv = [framework.array(x) for x in inputs()[0][:3]]
    attend = functools.partial(framework.library.dot_product_attention, *qkv)
    found = attend(local_window_size=(2**70, 2**31 - 1))
    np.testing.assert_array_equal(framework.numpy(found), framework.numpy(attend()))


@pytest.mark.parametrize("kind", [np.uint8, np.int64])
@both_frameworks
def test_lengths_of_every_integer_dtype(framework: Framework, kind):
    arrays, _ = inputs()
    qkv = [framework.array(x) for x in arrays[:3]]
    lengths = np.array([5, 3])
    attend = framework.library.dot_product_attention
    found, same = (
        framework.numpy(attend(*qkv, key_value_seq_lengths=framework.array(lengths.astype(dtype))))
        for dtype in (kind, np.int32)
    )
    np.testing.assert_array_equal(found, same)
