"""Statistics of masks: keep rate, mean, variance and independence, at 5 sigma.

A figure exceeds 5 sigma with probability 6e-7. The about 200 figures of these tests would raise a
false alarm in one of 8,000 runs with random seeds; the seeds are fixed.
"""

from __future__ import annotations

import numpy as np
import pytest

from parity_tests import reference
from parity_tests.frameworks import FRAMEWORKS, Framework
from parity_tests.statistics import assert_fair, dropout_z

RATES = [0.01, 0.1, 0.15, 0.3, 0.5, 0.75, 0.9, 0.99]
SHAPES = [(100_003,), (256, 1024), (8, 16, 32, 33)]
KEY = (0, 20)


def inputs(shape: tuple[int, ...]) -> np.ndarray:
    """Return values above 0.1, so that zeros of the output are dropped elements."""
    return (0.1 + np.abs(np.random.default_rng(1).normal(size=shape))).astype(np.float32)


@pytest.mark.parametrize("framework", FRAMEWORKS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rate", RATES)
@pytest.mark.sample(14)
def test_masks_are_fair(framework: Framework, rate, shape):
    assert_fair(lambda x, rate: framework.dropout(x, rate, seed=KEY[1]), inputs(shape), rate)


@pytest.mark.parametrize("framework", FRAMEWORKS, ids=str)
def test_masks_of_different_keys_sites_and_steps_are_independent(framework: Framework):
    shape, root = (64, 1024), framework.key(0)
    keys = [
        framework.library.site_key(root, step, site) for step in range(4) for site in ("a", "b")
    ]
    keys += [framework.key(seed) for seed in range(4)]
    draws = np.stack(
        [framework.numpy(framework.library.bernoulli(key, 0.5, shape)) for key in keys]
    )
    centred = 2.0 * draws.reshape(len(keys), -1) - 1
    # The correlation of each pair of masks, in standard deviations.
    z = centred @ centred.T / np.sqrt(centred.shape[1])
    assert np.abs(z[~np.eye(len(keys), dtype=bool)]).max() < 5


def threshold_off_by_two_hundredths(x, rate):
    return np.where(reference.bernoulli(KEY, 1 - rate + 2e-2, x.shape), x / (1 - rate), 0)


def scaled_by_rate(x, rate):
    return np.where(reference.bernoulli(KEY, 1 - rate, x.shape), x / rate, 0)


def not_scaled(x, rate):
    return np.where(reference.bernoulli(KEY, 1 - rate, x.shape), x, 0)


def rate_taken_for_keep_prob(x, rate):
    return reference.dropout(x, 1 - rate, KEY)


def one_mask_for_two_elements(x, rate):
    keep = reference.bernoulli(KEY, 1 - rate, (x.shape[0], x.shape[1] // 2)).repeat(2, axis=1)
    return np.where(keep, x / (1 - rate), 0)


PLANTED = {
    threshold_off_by_two_hundredths: "keep rate",
    scaled_by_rate: "mean",
    not_scaled: "mean",
    rate_taken_for_keep_prob: "keep rate",
    one_mask_for_two_elements: "neighbors along axis 1",
}


@pytest.mark.parametrize(
    ("planted", "figure"), PLANTED.items(), ids=lambda value: getattr(value, "__name__", None)
)
def test_a_planted_error_is_caught_by_name(planted, figure):
    """Test of the tests: the same check of wrong functions."""
    x = inputs((128, 128))
    assert_fair(lambda x, rate: reference.dropout(x, rate, KEY), x, 0.3)
    with pytest.raises(AssertionError, match=figure):
        assert_fair(planted, x, 0.3)


def test_at_rate_one_half_the_variance_is_exact():
    """Each element's contribution is constant, so another scale has an infinite z-score."""
    x = inputs((128, 128))
    assert dropout_z(lambda x, rate: reference.dropout(x, rate, KEY), x, 0.5)["variance"] == 0
    assert dropout_z(not_scaled, x, 0.5)["variance"] == -np.inf
