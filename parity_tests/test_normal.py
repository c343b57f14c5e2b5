"""Normal variates: equal bits in both frameworks, close to exact quantiles and to JAX's own."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from scipy import special

import regjax
import regjax._random.quantile
import regtorch._random.quantile
from parity_tests.frameworks import FRAMEWORKS, JAX, TORCH, Framework, from_torch, to_torch
from parity_tests.tables import FLOATS, both_frameworks, words


def draw(
    framework: Framework, seed: int, shape: tuple[int, ...], dtype: Any = np.float32
) -> np.ndarray:
    kind = jnp.dtype(dtype) if framework is JAX else to_torch(np.zeros(0, dtype)).dtype
    return framework.numpy(framework.library.normal(framework.key(seed), shape, kind))


def uniforms(k: np.ndarray, bits: int) -> np.ndarray:
    """Return the k-th of 2**bits equally likely values, as in jax.random.normal."""
    return k * 2.0 ** (1 - bits) - (1 - 2.0 ** -(bits + 1))


def exact(u: np.ndarray) -> np.ndarray:
    """Return the exact quantiles in double, computed from the tails."""
    return -special.ndtri((1 - np.abs(u)) / 2) * np.sign(u)


def quantiles(framework: Framework, u: np.ndarray) -> np.ndarray:
    if framework is JAX:
        return np.asarray(jax.jit(regjax._random.quantile.quantile)(u))
    return from_torch(regtorch._random.quantile.quantile(to_torch(u)))


def test_every_variate_of_float32():
    u = uniforms(np.arange(2**23), 23)
    single = u.astype(np.float32)
    np.testing.assert_array_equal(single, u)  # all are exact in float32
    in_jax, in_torch = (quantiles(framework, single) for framework in FRAMEWORKS)
    np.testing.assert_array_equal(words(in_jax), words(in_torch))
    few = slice(None, None, 7)
    apart = np.abs(in_jax[few] - exact(u[few]))
    assert apart.max() < 8e-7
    assert (apart / np.spacing(np.abs(in_jax[few]))).max() < 3  # units in the last place
    assert (np.diff(in_jax) > 0).all()
    assert -5.42 < in_jax.min() < in_jax.max() < 5.23
    odd = quantiles(TORCH, -single[::101])
    np.testing.assert_array_equal(odd, -in_jax[::101])


def test_variates_of_float64():
    rng = np.random.default_rng(0)
    tails = np.r_[np.arange(2000), 2.0 ** rng.uniform(0, 51, 20_000)].astype(np.int64)
    u = uniforms(np.r_[tails, 2**52 - 1 - tails, rng.integers(0, 2**52, 20_000)], 52)
    with jax.enable_x64():
        in_jax, in_torch = (quantiles(framework, u) for framework in FRAMEWORKS)
    np.testing.assert_array_equal(words(in_jax), words(in_torch))
    assert np.abs(in_jax - exact(u)).max() < 4e-15
    assert -8.3 < in_jax.min() < in_jax.max() < 8.2


@pytest.mark.parametrize(
    ("dtype", "x64"), [(d, d.itemsize == 8) for d in FLOATS] + [(FLOATS[0], True)]
)
@pytest.mark.sample(3)
def test_both_frameworks_draw_the_same_bits(dtype, x64):
    shape = (3, 5, 8741)  # a little more than the 2**17 elements that regtorch draws at a time
    with jax.enable_x64(x64):
        in_jax = draw(JAX, 3, shape, dtype)
        jitted = jax.jit(lambda key: regjax.normal(key, shape, dtype))(jax.random.key(3))
    in_torch = draw(TORCH, 3, shape, dtype)
    assert in_jax.dtype == in_torch.dtype == dtype
    np.testing.assert_array_equal(words(in_jax), words(in_torch))
    np.testing.assert_array_equal(words(in_jax), words(np.asarray(jitted)))


def test_half_types_are_rounded_once_from_float32():
    single = draw(TORCH, 5, (1000,))
    for dtype in (ml_dtypes.bfloat16, np.float16):
        np.testing.assert_array_equal(draw(TORCH, 5, (1000,), dtype), single.astype(dtype))


# The first half of the SHA-256 of the little-endian bytes.
GOLDEN = [
    (0, (1000,), np.float32, "bfe67910d6a20c69"),
    (42, (7, 11, 13), np.float32, "b28651a6c9d5b8df"),
    (2**32 - 1, (33, 65), np.float64, "0bad3ee87e446241"),
    (1, (1000,), ml_dtypes.bfloat16, "24a1b58e4e2bec63"),
]


@both_frameworks
@pytest.mark.parametrize(("seed", "shape", "dtype", "digest"), GOLDEN)
def test_normal_stream_v1(framework: Framework, seed, shape, dtype, digest):
    with jax.enable_x64(dtype is np.float64):
        values = draw(framework, seed, shape, dtype)
    assert hashlib.sha256(values.tobytes()).hexdigest()[:16] == digest


@pytest.mark.parametrize(
    ("dtype", "near", "far"), [("float32", 1e-6, 3e-5), ("float64", 1e-14, 1e-10)]
)
def test_jax_random_draws_nearly_the_same_numbers(dtype, near, far):
    shape = (1000, 1000)
    with jax.enable_x64(dtype == "float64"):
        in_jax = draw(JAX, 0, shape, dtype)
        reference = np.asarray(jax.random.normal(jax.random.key(0), shape, dtype))
    apart = np.abs(in_jax - reference)
    assert apart.max() < far
    assert apart[np.abs(in_jax) < 2].max() < near


def defects(sample: np.ndarray) -> list[str]:
    """Return the tests that a sample of normal variates fails.

    Nine figures are tested at 5 sigma, and the distribution by Kolmogorov-Smirnov at p = 1e-6: a
    false alarm in about 150,000 samples.
    """
    x = sample.astype(np.float64).ravel()
    size = x.size
    figures = {
        "mean": x.mean() * math.sqrt(size),
        "variance": (np.mean(x**2) - 1) * math.sqrt(size / 2),
        "skewness": np.mean(x**3) * math.sqrt(size / 15),
        "kurtosis": (np.mean(x**4) - 3) * math.sqrt(size / 96),
        "neighbors": np.mean(x[1:] * x[:-1]) * math.sqrt(size - 1),
    }
    for bound in (1, 2, 3, 4):
        share = math.erfc(bound / math.sqrt(2))
        excess = np.count_nonzero(np.abs(x) > bound) - size * share
        figures[f"beyond {bound}"] = excess / math.sqrt(size * share * (1 - share))
    steps = np.abs(special.ndtr(np.sort(x)) - (np.arange(size) + 0.5) / size)
    # Kolmogorov's bound for p = 1e-6, scaled to 5.
    figures["distribution"] = 5 * (steps.max() + 0.5 / size) * math.sqrt(size) / 2.694
    return [name for name, z in figures.items() if abs(z) > 5]


@both_frameworks
def test_the_sample_is_normal(framework: Framework):
    assert not defects(draw(framework, 0, (256, 1024)))


@pytest.mark.parametrize(
    ("corrupt", "found"),
    [
        (lambda x: x + 0.01, "mean"),
        (lambda x: x * 1.01, "variance"),
        (lambda x: np.clip(x, -2.9, 2.9), "beyond 3"),
        (lambda x: np.where(x > 0, x * 1.02, x * 0.98), "skewness"),
        (lambda x: np.repeat(x[::2], 2), "neighbors"),
        (lambda x: np.round(x * 20) / 20, "distribution"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_corrupted_sample_is_detected(corrupt, found):
    """Test of the test."""
    assert found in defects(corrupt(draw(TORCH, 0, (2**18,))))


@both_frameworks
def test_wrong_arguments_are_rejected(framework: Framework):
    normal, key = framework.library.normal, framework.key(0)
    integers = framework.array(np.zeros(0, np.int32)).dtype
    with pytest.raises(TypeError, match="dtype must be float16, bfloat16, float32 or float64"):
        normal(key, (3,), integers)
    batch = jax.random.split(key) if framework is JAX else framework.library.split(key)
    with pytest.raises(ValueError, match="batch of keys"):
        normal(batch, (3,))
    with pytest.raises(TypeError, match="key must be"):
        normal(0, (3,))
    if framework is JAX:
        with pytest.raises(ValueError, match="jax_enable_x64"):
            normal(key, (3,), np.float64)


@both_frameworks
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1, 1)])
def test_small_shapes(framework: Framework, shape):
    assert draw(framework, 0, shape).shape == shape
