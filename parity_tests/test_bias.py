"""Bias and independence over 10^8 draws, which reveal errors too small for a small mask.

Both packages draw the same bits (`test_masks`, `test_packed`), so only JAX, the faster on CPUs, is
tested. A fraction exceeds 5 sigma with probability 6e-7, and a p-value is below 1e-6 with
probability 1e-6: with random seeds these tests would fail once in about 40,000 runs. The seeds are
fixed.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import regjax
from parity_tests.statistics import FIVE_SIGMA

SHAPE, KEYS = (4096, 4096), 6  # 10^8 draws
SAMPLERS = {
    "exact": (regjax.bernoulli, 23, math.ceil),
    "packed": (functools.partial(regjax.packed_bernoulli, bits=16), 16, round),
}
KEEP_PROBS = [1e-4, 0.01, 0.1, 0.37, 0.5, 0.9, 0.99, 1 - 1e-4]


@functools.partial(jax.jit, static_argnums=(1, 2))
def kept(key, draw, keep_prob):
    return draw(key, keep_prob, SHAPE).sum(dtype=jnp.int32)


def bias_z(draw, keep_prob: float, realized: float) -> float:
    """Return the z-score of the number of kept elements, for the realized probability."""
    total = sum(int(kept(jax.random.key(seed), draw, keep_prob)) for seed in range(KEYS))
    draws = KEYS * math.prod(SHAPE)
    return (total - draws * realized) / math.sqrt(draws * realized * (1 - realized))


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("keep_prob", KEEP_PROBS)
@pytest.mark.sample(2)
def test_the_share_of_kept_elements_is_unbiased(name, keep_prob):
    draw, bits, rounded = SAMPLERS[name]
    realized = rounded(float(np.float32(keep_prob)) * 2**bits) / 2**bits
    assert abs(bias_z(draw, keep_prob, realized)) < FIVE_SIGMA


@pytest.mark.parametrize("keep_prob", [0.1, 0.5, 0.9])
def test_a_planted_bias_of_a_thousandth_is_seen(keep_prob):
    """Test of the test: one element in a thousand too many is kept."""
    assert bias_z(regjax.bernoulli, keep_prob + 1e-3, keep_prob) > FIVE_SIGMA


@pytest.mark.parametrize("keep_prob", [0.1, 0.5, 0.9])
def test_the_lanes_of_a_packed_word_are_independent(keep_prob):
    """Test 496 pairs of 32 lanes over half a million words at 6 sigma: false-alarm rate 1e-6."""
    mask = np.asarray(regjax.packed_bernoulli(jax.random.key(3), keep_prob, SHAPE))
    realized = round(float(np.float32(keep_prob)) * 2**16) / 2**16
    # (4096, 4096) packs along its first axis: 128 groups of 32 rows.
    lanes = mask.reshape(128, 32, 4096).transpose(1, 0, 2).reshape(32, -1) - np.float32(realized)
    z = lanes @ lanes.T / (realized * (1 - realized) * math.sqrt(lanes.shape[1]))
    assert np.abs(z[~np.eye(32, dtype=bool)]).max() < 6


def runs_p_value(mask: np.ndarray, keep_prob: float) -> float:
    """Return the p-value of a chi-square test of the lengths of runs of kept elements.

    A run between two dropped elements has length k with probability q**k (1 - q). Each length with
    at least 20 expected runs is a class; the last class contains all longer runs.
    """
    lengths = np.diff(np.flatnonzero(~mask.ravel())) - 1
    classes = 1 + int(math.log(20 / lengths.size) / math.log(keep_prob))
    observed = np.bincount(np.minimum(lengths, classes), minlength=classes + 1)
    shares = (1 - keep_prob) * keep_prob ** np.arange(classes)
    expected = lengths.size * np.append(shares, keep_prob**classes)
    statistic = float(np.sum((observed - expected) ** 2 / expected))
    return float(jax.scipy.special.gammaincc(classes / 2, statistic / 2))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("keep_prob", [0.1, 0.5, 0.9])
def test_runs_have_the_lengths_of_independent_draws(name, keep_prob, axis):
    draw, bits, rounded = SAMPLERS[name]
    mask = np.asarray(draw(jax.random.key(9), keep_prob, (2048, 2048)))
    realized = rounded(float(np.float32(keep_prob)) * 2**bits) / 2**bits
    assert runs_p_value(mask if axis == 1 else mask.T, realized) > 1e-6


def test_runs_that_are_too_long_are_seen():
    """Test of the test: one element in a hundred copies its neighbor."""
    rng = np.random.default_rng(0)
    mask = rng.random((1024, 1024)) < 0.5
    assert runs_p_value(mask, 0.5) > 1e-6
    sticky = np.where(rng.random(mask.shape) < 0.01, np.roll(mask, 1, axis=1), mask)
    assert runs_p_value(sticky, 0.5) < 1e-6
