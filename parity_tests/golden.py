"""Golden vectors of mask stream v1, which must never change.

A digest is the first half of the SHA-256 of `numpy.packbits(mask)`. All digests were computed with
the NumPy reference, which a test compares with the published vectors of threefry.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np


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
SITE_KEYS = {
    (0, 0, "hidden"): (944907536, 2436547292),
    (1, 2**40 + 5, "encoder/3/attention"): (4111423822, 2638670820),
    (2**32 - 1, 7, ""): (242482179, 3975368584),
}


def digest(mask: np.ndarray) -> str:
    """Return the digest of a mask."""
    return hashlib.sha256(np.packbits(mask).tobytes()).hexdigest()[:16]
