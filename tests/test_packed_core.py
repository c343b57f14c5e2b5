"""The packed sampler in small, against the NumPy reference: `make mutants` runs these first."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from parity_tests import reference
from parity_tests.wings import Wing
from regjax import _packed as jax_packed
from regtorch import _packed as torch_packed
from tests.test_random_core import PROBABILITIES, SMALLEST, both_wings


@pytest.mark.parametrize("bits", [1, 5, 16, 23, 24, 25, 32])
@pytest.mark.parametrize("keep_prob", [*PROBABILITIES, 1e-3, 0.75, -1.0, 2.0, math.nan])
def test_packed_thresholds(bits, keep_prob):
    """`round(p * 2**bits)`, kept off both ends where the probability is."""
    exact = float(np.float32(keep_prob))
    rounded = round(exact * 2**bits) if math.isfinite(exact) else 0
    expected = min(max(rounded, 1), 2**bits - 1) if 0 < exact < 1 else 2**bits * (exact >= 1)
    if 0 <= keep_prob <= 1 and (rounded == expected or not 0 < keep_prob < 1):
        assert jax_packed._threshold(keep_prob, bits) == expected
        assert torch_packed._threshold(keep_prob, bits) == expected
    elif 0 <= keep_prob <= 1:
        for packed in (jax_packed, torch_packed):
            with pytest.raises(ValueError, match=f"rounds to {rounded >> bits} in {bits} bits"):
                packed._threshold(keep_prob, bits)
    if keep_prob == 0 or not keep_prob < SMALLEST:  # a device may flush what is smaller
        changing = jax.jit(jax_packed._threshold, static_argnums=1)
        assert float(changing(jnp.float32(keep_prob), bits)) == expected
        assert float(torch_packed._threshold(torch.tensor(keep_prob), bits)) == expected


@both_wings
@pytest.mark.parametrize("shape", [(64, 64), (4, 32, 40)], ids=str)
@pytest.mark.parametrize(("threshold", "bits"), [(1, 1), (5, 3), (200, 8), (0x2A95, 16), (7, 18)])
def test_packed_words(wing: Wing, shape, threshold, bits):
    keep_prob = threshold / 2**bits
    expected = reference.packed_bernoulli((0, 9), threshold, shape, bits)
    draw = lambda prob: wing.library.packed_bernoulli(wing.key(9), prob, shape, bits=bits)
    np.testing.assert_array_equal(wing.numpy(draw(keep_prob)), expected)
    changing = wing.traced(draw)(np.float32(keep_prob))
    np.testing.assert_array_equal(wing.numpy(changing), expected)


def test_which_axis_packs():
    cases = {(64, 64): 0, (64, 63): None, (4, 32, 32): 1, (128, 32, 4): 0, (64, 64, 2): 1}
    cases |= {(32, 64, 2): 1, (4096,): None, (33, 128): None, (2, 64, 64): 1, (0, 64): None}
    for shape, axis in cases.items():
        assert (jax_packed.packed_axis(shape), torch_packed.packed_axis(shape)) == (axis, axis)


@both_wings
@pytest.mark.parametrize("bits", [1, 8, 32])
def test_without_words_to_share(wing: Wing, bits):
    drawn = reference.bits((0, 9), range(99)) >> np.uint32(32 - bits)
    for threshold in {0, 1, 2 ** (bits - 1), 2**bits}:
        draw = lambda p: wing.library.packed_bernoulli(wing.key(9), p, (99,), bits=bits)
        changing = wing.traced(draw)(np.float32(threshold / 2**bits))
        for mask in (draw(threshold / 2**bits), changing):
            np.testing.assert_array_equal(wing.numpy(mask), drawn < threshold)
