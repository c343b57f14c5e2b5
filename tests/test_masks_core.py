"""Unit tests of keep masks, with the NumPy reference; `make mutants` runs them first."""

from __future__ import annotations

import functools
import math

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from parity_tests import reference
from parity_tests.frameworks import FRAMEWORKS, JAX, TORCH, Framework
from parity_tests.tables import KEEP_PROBS, SMALLEST, both_frameworks
from regjax._random import bernoulli as jax_masks
from regjax._random import packed as jax_packed
from regtorch._random import bernoulli as torch_masks
from regtorch._random import packed as torch_packed
from tests.test_random_core import jax_words


@pytest.mark.parametrize("keep_prob", [*KEEP_PROBS, -1.0, 2.0, math.nan])
def test_thresholds(keep_prob):
    """The threshold is `ceil(p * 2**23)`, or 0 below the smallest normal number, also if traced."""
    inside = min(keep_prob, 1.0) if keep_prob >= SMALLEST else 0.0
    expected = math.ceil(float(np.float32(inside)) * 2**23)
    assert int(jax.jit(jax_masks._threshold)(jnp.float32(keep_prob))) == expected
    assert int(torch_masks._threshold(torch.tensor(keep_prob))) == expected
    if 0 <= keep_prob <= 1:
        assert jax_masks._threshold(keep_prob) == expected
        assert torch_masks._threshold(keep_prob) == expected


TINY = 2.0**-12
SHARES = [-0.5, 3e-7, float(np.nextafter(np.float32(TINY), np.float32(0))), TINY, 1.001 * TINY]


@pytest.mark.parametrize("keep_prob", [*KEEP_PROBS, *SHARES])
def test_the_fraction_of_kept_elements(keep_prob):
    """The fraction is that of the threshold below 2**-12, otherwise the requested probability."""
    changing = np.float32(keep_prob)
    kept = math.ceil(float(changing) * 2**23) / 2**23 * (changing >= SMALLEST)
    if keep_prob >= 0:
        expected = kept if keep_prob < TINY else keep_prob
        assert jax_masks.EXACT.realized_keep_prob(keep_prob) == expected
        assert torch_masks.EXACT.realized_keep_prob(keep_prob) == expected
    if keep_prob <= 0 or keep_prob >= SMALLEST:  # a device may flush smaller numbers to zero
        expected = np.float32(kept) if 0 < keep_prob < TINY else changing
        assert jax_masks.exact_keep_prob(jnp.asarray(changing)) == expected
        assert torch_masks.exact_keep_prob(torch.tensor(changing)) == expected


@both_frameworks
def test_a_sampler_may_say_what_it_keeps(framework: Framework):
    """Also through `functools.partial`; without an attribute it keeps the requested probability."""
    of = (jax_packed if framework is JAX else torch_packed).mask_sampler
    realized = lambda sampler, keep_prob: of(sampler).realized_keep_prob(keep_prob)
    packed = framework.library.packed_bernoulli
    for share in (0.1, 0.3):
        assert realized(packed, share) == round(share * 2**16) / 2**16
    assert realized(functools.partial(packed, bits=3), 0.3) == 2 / 8
    for silent in (lambda *_: None, functools.partial(lambda *_, **options: None, bits=3)):
        assert realized(silent, 0.3) == 0.3
    exact = (jax_packed if framework is JAX else torch_packed).EXACT
    assert of(framework.library.bernoulli) is of(functools.partial(framework.library.bernoulli))
    assert of(framework.library.bernoulli) is exact


@both_frameworks
def test_probabilities(framework: Framework):
    check = (jax_masks if framework is JAX else torch_masks).check_probability
    for value in (0, 1, 0.5, np.float32(0.25), np.float64(1)):
        checked = check("share", value)
        assert (checked, type(checked)) == (value, float)
    for value in (-1e-9, 1 + 1e-7, math.nan, math.inf, 2):
        with pytest.raises(ValueError, match=r"share must lie in \[0, 1\]; got"):
            check("share", value)
    for value in (
        True,
        "0.5",
        None,
        0.5j,
        framework.array(np.bool_(1)),
        framework.array(np.complex64(1)),
    ):
        with pytest.raises(TypeError, match="share must be a real number"):
            check("share", value)
    with pytest.raises(ValueError, match=r"share must be a scalar in \[0, 1\]; got shape \(1,\)"):
        check("share", framework.array(np.ones(1, np.float32)))
    for dtype in (np.float32, np.int32):
        assert framework.traced(lambda value: check("share", value) + 0)(np.array(3, dtype)) == 3


def test_a_float_in_range_takes_the_shortcut(monkeypatch):
    """An eager call of dropout checks its rate: no conversion to an array, which takes time."""
    monkeypatch.delattr(jax_masks, "as_number")
    for value in (0.0, 0.5, 1.0):
        assert jax_masks.check_probability("share", value) is value


def test_a_uniform_equal_to_the_threshold_is_dropped():
    """The threshold is exactly that of an element, which is dropped."""
    (drawn,) = reference.bits((0, 9), [4])
    for kept, uniform in enumerate((drawn >> 9, (drawn >> 9) + 1)):
        keep_prob = float(uniform) / 2**23
        for framework in FRAMEWORKS:
            assert framework.bernoulli(9, keep_prob, (5,))[4] == kept
        assert bool(jax_masks.bernoulli_at(JAX.key(9), keep_prob, jax_words(0, 4))) == kept
        assert torch_masks.bernoulli_at(TORCH.key(9), keep_prob, torch.tensor(4)) == kept


def test_eager_calls_compile_once():
    """A call is one dispatch, since key and probability are not static."""
    before = jax_masks._threshold_mask._cache_size()
    for seed in range(3):
        JAX.library.bernoulli(JAX.key(seed), seed / 3, (3, 5, 11))
    assert jax_masks._threshold_mask._cache_size() == before + 1
