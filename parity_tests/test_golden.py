"""Golden vectors of mask stream v1, which must never change.

A digest is the first half of the SHA-256 of `numpy.packbits(mask)`. All digests were computed with
the NumPy reference, which another test compares with the published vectors of threefry.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from parity_tests import reference
from parity_tests.frameworks import FRAMEWORKS, Framework
from parity_tests.tables import both_frameworks
from regjax import torch_random


@dataclass(frozen=True)
class Golden:
    """The sampler of a mask, its arguments, and the digest of the mask."""

    sampler: str
    seed: int
    keep_prob: float
    shape: tuple[int, ...]
    digest: str
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.sampler}-{self.keep_prob}-{self.shape}"


MASKS = [
    Golden("bernoulli", 0, 0.5, (1000,), "31c9c036486f5cf3"),
    Golden("bernoulli", 1, 0.9, (33, 65), "99872cf147cd36aa"),
    Golden("bernoulli", 2**32 - 1, 0.123, (7, 11, 13), "f24ab29be2190719"),
    Golden("bernoulli", 42, 0.999, (64, 128), "43dbf9b9896a9df6"),
    Golden("packed_bernoulli", 0, 0.5, (64, 64), "a12673851f20b52d"),
    Golden("packed_bernoulli", 1, 0.9, (128, 33), "f01a0eabb91e1e80"),
    Golden("packed_bernoulli", 42, 0.123, (3, 64, 32), "ad7ed9a86eaa33aa"),
    Golden("packed_bernoulli", 7, 0.3, (64, 64), "632d4ec95c9ec911", {"bits": 5}),
    Golden("packed_bernoulli", 2**32 - 1, 0.7, (32, 160), "2b4dbcf6896015a8", {"bits": 32}),
]
BITS = [4070199207, 4202968722, 1427181096, 2012915765]  # of key(0), shape (4,)
COMPILED = "20e5cb45985f0b53"
SITE_KEYS = {
    (0, 0, "hidden"): (944907536, 2436547292),
    (1, 2**40 + 5, "encoder/3/attention"): (4111423822, 2638670820),
    (2**32 - 1, 7, ""): (242482179, 3975368584),
}


@both_frameworks
@pytest.mark.parametrize("golden", MASKS, ids=str)
def test_masks(framework: Framework, golden: Golden):
    draw = getattr(framework.library, golden.sampler)
    mask = draw(framework.key(golden.seed), golden.keep_prob, golden.shape, **golden.options)
    packed = np.packbits(framework.numpy(mask))
    assert hashlib.sha256(packed.tobytes()).hexdigest()[:16] == golden.digest


@both_frameworks
@pytest.mark.parametrize(("arguments", "words"), SITE_KEYS.items())
def test_site_keys(framework: Framework, arguments, words):
    seed, step, site = arguments
    assert framework.words(framework.library.site_key(framework.key(seed), step, site)) == words


def test_compiled_dropout():
    """The masks of `torch.compile` on a CPU, which a slow test compares with PyTorch's."""
    y, g = torch_random.compiled_dropout(jnp.ones((33, 65)), 0.3, torch_random.generator(7))
    assert hashlib.sha256(np.packbits(y != 0).tobytes()).hexdigest()[:16] == COMPILED
    assert int(g.position) == 2


def test_bits():
    assert reference.bits((0, 0), range(4)).tolist() == BITS
    assert FRAMEWORKS[1].library.bits(FRAMEWORKS[1].key(0), (4,)).tolist() == BITS
