"""The packed sampler: equal masks in both frameworks and NumPy, unbiased and scaled correctly."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from parity_tests import reference
from parity_tests.frameworks import FRAMEWORKS, JAX, TORCH, Framework
from parity_tests.statistics import FIVE_SIGMA, keep_rate_z, neighbor_z

both_frameworks = pytest.mark.parametrize("framework", FRAMEWORKS, ids=str)

PACKED = [(64, 64), (2, 96, 24), (3, 32, 64, 2), (64, 64, 2)]  # the last packs the later axis
EACH_ITS_OWN = [(), (0,), (4096,), (100, 77), (32, 32), (64, 31)]


def draw(framework: Framework, seed: int, keep_prob, shape, **options) -> np.ndarray:
    return framework.numpy(
        framework.library.packed_bernoulli(framework.key(seed), keep_prob, shape, **options)
    )


@both_frameworks
@pytest.mark.parametrize(
    ("shape", "keep_prob", "bits"),
    [(shape, 0.9, 16) for shape in PACKED]
    + [(PACKED[1], *each) for each in ((0.5, 16), (0.3, 5), (0.75, 18))],
    ids=str,
)
def test_packed_masks_are_those_of_the_reference(framework: Framework, shape, keep_prob, bits):
    threshold = round(float(np.float32(keep_prob)) * 2**bits)
    expected = reference.packed_bernoulli((0, 4), threshold, shape, bits)
    np.testing.assert_array_equal(draw(framework, 4, keep_prob, shape, bits=bits), expected)


@both_frameworks
@pytest.mark.parametrize("shape", EACH_ITS_OWN, ids=str)
def test_where_nothing_packs_each_element_has_its_own_word(framework: Framework, shape):
    words = reference.bits((0, 4), range(int(np.prod(shape)))).reshape(shape)
    np.testing.assert_array_equal(
        draw(framework, 4, 0.3, shape), (words >> 16) < round(0.3 * 2**16)
    )


# `make test` runs a few entries of this table, since each compiles one or two programs.
QUICK = [(1, 0.5), (16, 0.1), (16, 0.0), (24, 0.9), (32, 0.123), (32, 1.0)]
TABLE = [
    pytest.param(bits, keep_prob, marks=[pytest.mark.slow] * ((bits, keep_prob) not in QUICK))
    for bits in (1, 8, 16, 24, 31, 32)
    for keep_prob in (0.0, 0.5, 0.25, 0.1, 0.9, 0.123, 1.0)
]


@pytest.mark.parametrize("shape", [(128, 96), (100, 77), (9,)], ids=str)
@pytest.mark.parametrize(("bits", "keep_prob"), TABLE)
def test_both_wings_and_both_kinds_of_keep_prob_agree(shape, bits, keep_prob):
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


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.123])
@pytest.mark.parametrize("traced", [False, True])
def test_both_wings_agree_in_every_bit_forward_and_backward(rate, traced):
    rng = np.random.default_rng(0)
    x, cotangent = (rng.normal(size=(64, 96)).astype(np.float32) for _ in range(2))

    def run(framework: Framework):
        key, sampler = framework.key(2), framework.library.packed_bernoulli

        def at(rate):
            apply = lambda x: framework.library.dropout(x, rate, key=key, sampler=sampler)
            return framework.vjp(apply, framework.array(x), framework.array(cotangent))

        return map(framework.numpy, framework.traced(at)(np.float32(rate)) if traced else at(rate))

    for ours, theirs in zip(run(JAX), run(TORCH), strict=True):
        np.testing.assert_array_equal(ours.view(np.uint32), theirs.view(np.uint32))


@both_frameworks
@pytest.mark.parametrize("bits", [0, 33, -1])
def test_wrong_bits_are_refused_by_value(framework: Framework, bits):
    with pytest.raises(ValueError, match=rf"bits must be at (least 1|most 32); got {bits}"):
        draw(framework, 0, 0.5, (3,), bits=bits)


@both_frameworks
@pytest.mark.parametrize(("keep_prob", "end"), [(1e-6, 0), (1 - 1e-6, 1)])
def test_a_keep_prob_that_the_bits_cannot_hold_is_refused(framework: Framework, keep_prob, end):
    with pytest.raises(
        ValueError, match=rf"must not round to {end} in 16 bits; got .*\. Use more bits"
    ):
        draw(framework, 0, keep_prob, (64, 64))
    with pytest.raises(ValueError, match="Use more bits"):
        framework.dropout(
            np.ones((64, 64), np.float32), 1e-6, sampler=framework.library.packed_bernoulli
        )
    assert draw(framework, 0, keep_prob, (64, 64), bits=32).mean() == end
