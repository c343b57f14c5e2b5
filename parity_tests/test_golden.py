"""Masks, bits and keys are those of the golden vectors, in both frameworks."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from parity_tests import reference
from parity_tests.frameworks import FRAMEWORKS, Framework
from parity_tests.golden import BITS, MASKS, SITE_KEYS, Golden, digest
from parity_tests.tables import both_frameworks
from regjax import torch_random

COMPILED = "20e5cb45985f0b53"


@both_frameworks
@pytest.mark.parametrize("golden", MASKS, ids=str)
@pytest.mark.sample(9)
def test_masks(framework: Framework, golden: Golden):
    draw = getattr(framework.library, golden.sampler)
    mask = draw(framework.key(golden.seed), golden.keep_prob, golden.shape, **golden.options)
    assert digest(framework.numpy(mask)) == golden.digest


@both_frameworks
@pytest.mark.parametrize(("arguments", "words"), SITE_KEYS.items())
def test_site_keys(framework: Framework, arguments, words):
    seed, step, site = arguments
    assert framework.words(framework.library.site_key(framework.key(seed), step, site)) == words


def test_compiled_dropout():
    """The masks of `torch.compile` on a CPU, which a slow test compares with PyTorch's."""
    y, g = torch_random.compiled_dropout(jnp.ones((33, 65)), 0.3, torch_random.generator(7))
    assert digest(np.asarray(y != 0)) == COMPILED
    assert int(g.position) == 2


def test_bits():
    assert reference.bits((0, 0), range(4)).tolist() == BITS
    assert FRAMEWORKS[1].library.bits(FRAMEWORKS[1].key(0), (4,)).tolist() == BITS
