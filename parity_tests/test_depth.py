"""Stochastic depth: equal bits in both frameworks, as timm and torchvision document."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
import pytest

from parity_tests import tables
from parity_tests.frameworks import FRAMEWORKS, JAX, Framework
from parity_tests.statistics import FIVE_SIGMA, keep_rate_z
from parity_tests.tables import FLOATS, assert_same_bits, both_frameworks, inputs

DTYPES = [*FLOATS, np.dtype(np.complex64)]
OPTIONS = [{}, {"mode": "batch"}, {"scale_by_keep": False}]
each_option = pytest.mark.parametrize("options", OPTIONS, ids=str)


def vjp(framework: Framework, x: np.ndarray, cotangent: np.ndarray, rate: Any, **options: Any):
    key = framework.key(options.pop("seed", 11))
    function = functools.partial(framework.library.drop_path, key=key, **options)
    return tables.vjp(framework, function, rate, x, cotangent)


@each_option
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.sample(3)
def test_forward_and_backward_agree_in_every_bit(dtype, options):
    x, cotangent = inputs((33, 5, 3), dtype)
    for rate in (0.15, np.float32(0.15)):
        with jax.enable_x64(dtype == np.float64):
            runs = (vjp(framework, x, cotangent, rate, **options) for framework in FRAMEWORKS)
            assert_same_bits(dtype, *runs)


@both_frameworks
@each_option
@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
@pytest.mark.sample(10)
def test_the_formula_of_timm_and_torchvision(framework: Framework, rate, options):
    """A row or the batch is multiplied by Bernoulli(keep) / keep; timm's division is optional."""
    x = np.random.default_rng(0).normal(size=(64, 3, 2)).astype(np.float32)
    y, gradient = vjp(framework, x, np.ones_like(x), rate, **options)
    keep = framework.bernoulli(11, 1 - rate, (1 if options.get("mode") == "batch" else 64,))
    scale = np.float32(1) / np.float32(1 - rate) if options.get("scale_by_keep", True) else 1
    factor = np.broadcast_to((keep * np.float32(scale)).reshape(-1, 1, 1), x.shape)
    np.testing.assert_array_equal(y, x * factor)
    np.testing.assert_array_equal(gradient, factor)


@both_frameworks
def test_batches_are_dropped_as_often_as_rows(framework: Framework):
    """A test at 5 sigma: one false alarm in 860,000 runs, and none with fixed seeds."""
    x = framework.array(np.ones((4096, 1), np.float32))
    rows = framework.numpy(framework.library.drop_path(x, 0.2, key=framework.key(0)))
    assert abs(keep_rate_z(rows != 0, 0.8)) < FIVE_SIGMA
    one, keep = framework.array(np.ones((2, 1), np.float32)), []
    for step in range(256):
        key = framework.library.site_key(framework.key(0), step, "block")
        y = framework.numpy(framework.library.drop_path(one, 0.2, key=key, mode="batch"))
        assert y[0] == y[1]
        keep.append(y[0, 0] != 0)
    assert abs(keep_rate_z(np.array(keep), 0.8)) < FIVE_SIGMA


@both_frameworks
@each_option
def test_the_corners_are_those_of_dropout(framework: Framework, options):
    drop_path = functools.partial(framework.library.drop_path, **options)
    x = framework.array(np.array([[np.nan, np.inf, -np.inf, 1.0]] * 30, np.float32))
    assert drop_path(x, 0) is x
    assert drop_path(x, 0.5, deterministic=True) is x
    np.testing.assert_array_equal(framework.numpy(drop_path(x, 1)), np.zeros((30, 4)))
    with pytest.raises(ValueError, match="key must be a random key in training"):
        drop_path(x, 0.5)
    with pytest.raises(ValueError, match=r"rate must lie in \[0, 1\]; got 2"):
        drop_path(x, 2, key=framework.key(0))
    with pytest.raises(TypeError, match="x must be floating"):
        drop_path(framework.array(np.ones((2, 2), np.int32)), 0.5, key=framework.key(0))
    y = framework.numpy(drop_path(x, 0.5, key=framework.key(0)))
    kept = y[:, 3] != 0
    np.testing.assert_array_equal(y[~kept], 0)
    assert (np.isfinite(y[kept]) == [False, False, False, True]).all()
    for rate, value in ((1.0, 0), (1.5, np.nan), (np.nan, np.nan)):
        ones = np.ones((5, 2), np.float32)
        y, gradient = vjp(framework, ones, ones, np.float32(rate), **options)
        np.testing.assert_array_equal(y, np.full((5, 2), value))
        assert np.isfinite(gradient).all() or np.isnan(value)


@both_frameworks
def test_modes_and_shapes(framework: Framework):
    drop_path, key = framework.library.drop_path, framework.key(0)
    scalar = framework.array(np.array(1, np.float32))
    with pytest.raises(ValueError, match='mode must be "row" or "batch"; got \'layer\''):
        drop_path(scalar, 0.5, key=key, mode="layer")
    with pytest.raises(ValueError, match='x must have a batch dimension with mode="row"'):
        drop_path(scalar, 0.5, key=key)
    assert drop_path(scalar, 0.5, key=key, mode="batch").shape == ()
    assert drop_path(framework.array(np.ones((0, 3), np.float32)), 0.5, key=key).shape == (0, 3)


@both_frameworks
def test_the_packed_sampler_reaches_the_scale(framework: Framework):
    x = framework.array(np.ones((4096, 2), np.float32))
    sampler = functools.partial(framework.library.packed_bernoulli, bits=4)
    y = framework.library.drop_path(x, 0.1, key=framework.key(0), sampler=sampler)
    np.testing.assert_array_equal(np.unique(framework.numpy(y)), [0, np.float32(16 / 14)])


@both_frameworks
def test_a_draw_is_observed(framework: Framework):
    drawn: list[Any] = []
    with framework.library.observing(drawn.append):
        framework.library.drop_path(
            framework.array(np.ones((4, 3), np.float32)), 0.5, key=framework.key(0)
        )
        if framework is JAX:
            jax.effects_barrier()
    (draw,) = drawn
    assert (draw.function, draw.rate, draw.mask.shape) == ("drop_path", 0.5, (4, 1))
