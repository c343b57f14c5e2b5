"""The packed sampler: equal masks in both frameworks and NumPy, unbiased and scaled correctly."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest

from parity_tests import reference
from parity_tests.frameworks import FRAMEWORKS, JAX, TORCH, Framework
from parity_tests.statistics import FIVE_SIGMA, keep_rate_z, neighbor_z
from parity_tests.tables import RATES, assert_same_bits, both_frameworks, inputs, vjp

EACH_ITS_OWN = [(), (0,), (4096,), (100, 77), (32, 32), (64, 31)]


def draw(framework: Framework, seed: int, keep_prob, shape, **options) -> np.ndarray:
    return framework.numpy(
        framework.library.packed_bernoulli(framework.key(seed), keep_prob, shape, **options)
    )


@both_frameworks
@pytest.mark.parametrize("shape", EACH_ITS_OWN, ids=str)
def test_where_nothing_packs_each_element_has_its_own_word(framework: Framework, shape):
    words = reference.bits((0, 4), range(int(np.prod(shape)))).reshape(shape)
    np.testing.assert_array_equal(
        draw(framework, 4, 0.3, shape), (words >> 16) < round(0.3 * 2**16)
    )


# Each entry compiles a program or two: `make test` takes the ends of each axis of this table where
# an array packs; `test_without_words_to_share` has those that do not.
QUICK = [((128, 96), *each) for each in ((1, 0.5), (16, 0.1), (16, 0.0), (24, 0.9), (32, 1.0))]
QUICK.append(((100, 77), 32, 0.123))
TABLE = [
    pytest.param(*case, marks=[pytest.mark.slow] * (case not in QUICK))
    for case in itertools.product(
        ((128, 96), (100, 77), (9,)),
        (1, 8, 16, 24, 31, 32),
        (0.0, 0.5, 0.25, 0.1, 0.9, 0.123, 1.0),
    )
]


@pytest.mark.parametrize(("shape", "bits", "keep_prob"), TABLE, ids=str)
@pytest.mark.sample(3)
def test_both_frameworks_and_both_kinds_of_keep_prob_agree(shape, bits, keep_prob):
    if bits == 1 and keep_prob not in (0, 0.5, 1):
        keep_prob = 0.6
    masks = [
        framework.numpy(
            framework.traced(functools.partial(packed, framework, shape, bits))(
                np.float32(keep_prob)
            )
        )
        for framework in FRAMEWORKS
    ]
    if not (bits == 1 and keep_prob == 0.6):
        masks += [draw(framework, 8, keep_prob, shape, bits=bits) for framework in FRAMEWORKS]
    for mask in masks[1:]:
        np.testing.assert_array_equal(mask, masks[0])


def packed(framework: Framework, shape, bits, keep_prob):
    return framework.library.packed_bernoulli(framework.key(8), keep_prob, shape, bits=bits)


@both_frameworks
@pytest.mark.parametrize("keep_prob", [1e-3, 0.1, 0.37, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("shape", [(1024, 512), (16, 64, 128)], ids=str)
@pytest.mark.sample(9)
def test_packed_masks_are_fair(framework: Framework, keep_prob, shape):
    mask = draw(framework, 1, keep_prob, shape)
    realized = round(keep_prob * 2**16) / 2**16
    assert abs(keep_rate_z(mask, realized)) < FIVE_SIGMA
    for axis in range(len(shape)):
        assert abs(neighbor_z(mask, realized, axis)) < FIVE_SIGMA


@both_frameworks
@pytest.mark.parametrize("bits", [3, 16])
def test_dropout_scales_by_what_is_really_kept(framework: Framework, bits):
    x = np.ones((256, 64), np.float32)
    sampler = functools.partial(framework.library.packed_bernoulli, bits=bits)
    y = framework.dropout(x, 0.3, sampler=sampler)
    realized = np.float32(round(0.7 * 2**bits) / 2**bits)
    assert set(np.unique(y)) == {0.0, np.float32(1) / realized}
    np.testing.assert_array_equal(y != 0, draw(framework, 0, 0.7, x.shape, bits=bits))


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.sample(2)
def test_both_frameworks_agree_in_every_bit_forward_and_backward(rate, traced):
    def run(framework: Framework):
        sampler = framework.library.packed_bernoulli
        drop = functools.partial(framework.library.dropout, key=framework.key(2), sampler=sampler)
        return vjp(framework, drop, np.float32(rate) if traced else rate, *inputs((64, 96)))

    assert_same_bits(np.dtype(np.float32), run(JAX), run(TORCH))


@both_frameworks
@pytest.mark.parametrize("bits", [0, 33, -1])
def test_wrong_bits_are_refused_by_value(framework: Framework, bits):
    with pytest.raises(ValueError, match=rf"bits must be at (least 1|most 32); got {bits}"):
        draw(framework, 0, 0.5, (3,), bits=bits)
