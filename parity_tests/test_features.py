"""Dropout of channels and alpha dropout: equal bits in both frameworks."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
import pytest

from parity_tests import tables
from parity_tests.frameworks import FRAMEWORKS, JAX, TORCH, Framework
from parity_tests.tables import FLOATS, RATES, assert_same_bits, both_frameworks, inputs

NAMES = ("feature_dropout", "alpha_dropout", "feature_alpha_dropout")


def vjp(framework: Framework, name: str, rate: Any, dtype: Any = np.float32, **options: Any):
    function = functools.partial(getattr(framework.library, name), key=framework.key(11), **options)
    return tables.vjp(framework, function, rate, *inputs((7, 33, 5), dtype))


# Half types are scaled in float32, where every rate is tested; two rates test their own rounding.
ROUNDED = [(dtype, rate) for dtype in FLOATS for rate in RATES if dtype.itemsize > 2]
ROUNDED += [(dtype, rate) for dtype in FLOATS for rate in RATES[1::2] if dtype.itemsize == 2]


@pytest.mark.parametrize(("dtype", "rate"), ROUNDED, ids=str)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.sample(5)
def test_forward_and_backward_agree_in_every_bit(name, dtype, rate):
    options = {"channel_axis": 1} if "feature" in name else {}
    with jax.enable_x64(dtype.itemsize == 8):
        runs = (vjp(framework, name, rate, dtype, **options) for framework in FRAMEWORKS)
        assert_same_bits(dtype, *runs)


@pytest.mark.parametrize("rate", RATES)
def test_inside_a_larger_computation(rate):
    """Bits are equal unless arithmetic precedes the call, which XLA may contract with its sum."""
    x, _ = inputs((7, 33, 5))

    def run(framework: Framework, before):
        whole = lambda x: framework.library.alpha_dropout(before(x), rate, key=framework.key(3))
        return framework.numpy((jax.jit(whole) if framework is JAX else whole)(framework.array(x)))

    np.testing.assert_array_equal(run(JAX, abs), run(TORCH, abs))
    for before in (lambda x: x * x, lambda x: 1 - x):
        np.testing.assert_allclose(run(JAX, before), run(TORCH, before), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rate", RATES)
def test_a_traced_rate_agrees_to_the_last_bits(rate):
    in_jax, in_torch = (
        vjp(framework, "alpha_dropout", np.float32(rate)) for framework in FRAMEWORKS
    )
    number = vjp(TORCH, "alpha_dropout", rate)
    for array, twin, fixed in zip(in_jax, in_torch, number, strict=True):
        np.testing.assert_allclose(array, twin, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(twin, fixed, rtol=1e-6, atol=1e-6)


@both_frameworks
@pytest.mark.parametrize("name", ["feature_dropout", "feature_alpha_dropout"])
def test_channels_first_and_channels_last_draw_the_same_mask(framework: Framework, name):
    x = np.random.default_rng(0).normal(size=(5, 8, 3, 4)).astype(np.float32)
    function = functools.partial(getattr(framework.library, name), key=framework.key(2))
    first = framework.numpy(function(framework.array(x), 0.5, channel_axis=1))
    last = framework.numpy(function(framework.array(x.transpose(0, 2, 3, 1)), 0.5, channel_axis=-1))
    np.testing.assert_array_equal(first, last.transpose(0, 3, 1, 2))
    keep = framework.bernoulli(2, 0.5, (5, 8))
    assert 0 < keep.sum() < keep.size
    if name == "feature_dropout":
        np.testing.assert_array_equal((first != 0).all((2, 3)), keep)


def test_default_axes_follow_the_convention_of_each_framework():
    x = np.ones((5, 8, 3, 4), np.float32)
    torch_y = TORCH.library.feature_dropout(TORCH.array(x), 0.5, key=TORCH.key(2))
    jax_y = JAX.library.feature_dropout(x.transpose(0, 2, 3, 1), 0.5, key=JAX.key(2))
    np.testing.assert_array_equal(TORCH.numpy(torch_y), JAX.numpy(jax_y).transpose(0, 3, 1, 2))


@both_frameworks
@pytest.mark.parametrize("name", NAMES)
def test_the_corners_are_those_of_dropout(framework: Framework, name):
    x = framework.array(np.array([[np.nan, np.inf, -np.inf, 1.0]] * 30, np.float32))
    function = getattr(framework.library, name)
    assert function(x, 0) is x
    assert function(x, 0.5, deterministic=True) is x
    np.testing.assert_array_equal(framework.numpy(function(x, 1)), np.zeros((30, 4)))
    with pytest.raises(ValueError, match="key must be a random key in training"):
        function(x, 0.5)
    with pytest.raises(ValueError, match=r"rate must lie in \[0, 1\]; got 2"):
        function(x, 2, key=framework.key(0))
    with pytest.raises(TypeError, match="x must be floating"):
        function(framework.array(np.ones((2, 2), np.int32)), 0.5, key=framework.key(0))
    y = framework.numpy(function(x, 0.5, key=framework.key(0)))
    keep = framework.bernoulli(0, 0.5, (30, 4))  # two dimensions: row and channel
    dropped = y[~keep]
    assert (dropped == dropped[0]).all()
    assert np.isfinite(dropped).all()
    assert not np.isfinite(y[keep & ~np.isfinite(framework.numpy(x))]).any()


@both_frameworks
def test_the_packed_sampler_reaches_the_constants(framework: Framework):
    x = framework.array(np.zeros((64, 64), np.float32))
    sampler = functools.partial(framework.library.packed_bernoulli, bits=4)
    y = framework.library.alpha_dropout(x, 0.1, key=framework.key(0), sampler=sampler)
    alpha, keep = 1.7580993408473766, 14 / 16
    scale = ((1 + alpha**2 * (1 - keep)) * keep) ** -0.5
    expected = [-alpha * keep * scale, alpha * (1 - keep) * scale]
    np.testing.assert_allclose(np.unique(framework.numpy(y)), expected, rtol=1e-6)
