"""NumPy as the third party: what both wings must compute, written down a second time.

Slow, plain, and by other means than the wings use: the key and the counter are Python integers cut
to 32 bits, the uniform is a real float32, the mask compares it with the keep probability, and the
output divides. Whoever doubts a wing reads this.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence

import numpy as np

Key = tuple[int, int]

_MASK = 0xFFFFFFFF
_ROTATIONS = (13, 15, 26, 6, 17, 29, 16, 24)


def threefry2x32(key: Key, counter: tuple[int, int], rounds: int = 20) -> tuple[int, int]:
    """One block, round by round as the paper states it: inject the key every fourth round."""
    schedule = (*key, 0x1BD11BDA ^ key[0] ^ key[1])
    x0, x1 = counter
    x0, x1 = (x0 + schedule[0]) & _MASK, (x1 + schedule[1]) & _MASK
    for i in range(rounds):
        x0 = (x0 + x1) & _MASK
        distance = _ROTATIONS[i % 8]
        x1 = ((x1 << distance) | (x1 >> (32 - distance))) & _MASK
        x1 ^= x0
        if i % 4 == 3:
            injection = i // 4 + 1
            x0 = (x0 + schedule[injection % 3]) & _MASK
            x1 = (x1 + schedule[(injection + 1) % 3] + injection) & _MASK
    return x0, x1


def bits(key: Key, indices: Iterable[int]) -> np.ndarray:
    """The 32 bits of the elements with the given row-major indices, uint32."""
    blocks = (threefry2x32(key, (index >> 32, index & _MASK)) for index in indices)
    return np.array([out0 ^ out1 for out0, out1 in blocks], np.uint32)


def bernoulli(key: Key, keep_prob: float, shape: Sequence[int]) -> np.ndarray:
    """The keep mask: a float32 uniform from the upper 23 bits, compared with float32(keep_prob)."""
    return bernoulli_at(key, keep_prob, range(math.prod(shape))).reshape(tuple(shape))


def bernoulli_at(key: Key, keep_prob: float, indices: Iterable[int]) -> np.ndarray:
    """The elements of the keep mask at the given row-major indices."""
    drawn = bits(key, map(int, indices))
    uniform = ((drawn >> np.uint32(9)) | np.uint32(0x3F800000)).view(np.float32) - np.float32(1)
    return uniform < np.float32(keep_prob)


def packed_bernoulli(key: Key, threshold: int, shape: Sequence[int], bits: int) -> np.ndarray:
    """The packed keep mask, element by element: a uniform integer U with U >= 2**bits - T.

    Bit i of U, counted from the most significant, is the element's bit of word i: the word with its
    group's index in the upper or lower half of block i // 2.
    """
    drawn = np.zeros(shape, np.int64)
    axes = [axis for axis, size in enumerate(shape[:-1]) if size % 32 == 0]
    axis = max(axes, key=lambda axis: (shape[axis], axis))
    grouped = [size // 32 if i == axis else size for i, size in enumerate(shape)]
    words = {
        (group, i): threefry2x32(key, (i // 2 << 28, group))[i % 2]
        for group in range(math.prod(grouped))
        for i in range(bits)
    }
    for place in np.ndindex(*shape):
        in_group = [index // 32 if i == axis else index for i, index in enumerate(place)]
        group, lane = int(np.ravel_multi_index(in_group, grouped)), place[axis] % 32
        for i in range(bits):
            drawn[place] = 2 * drawn[place] + (words[group, i] >> lane & 1)
    return drawn >= 2**bits - threshold


def dropout(x: np.ndarray, rate: float, key: Key, broadcast_dims: Sequence[int] = ()) -> np.ndarray:
    """Inverted dropout in double, rounded to the dtype of `x` at the end.

    Float64 and complex128 differ from the wings by at most the rounding of a division against that
    of a product with the reciprocal; the others by that and one rounding of the result.
    """
    shape = [1 if dim in broadcast_dims else size for dim, size in enumerate(x.shape)]
    keep = bernoulli(key, 1 - rate, shape)
    wide = np.complex128 if np.iscomplexobj(x) else np.float64
    kept = (x.astype(wide) / (1 - rate)).astype(x.dtype) if rate < 1 else np.zeros_like(x)
    return np.where(keep, kept, np.zeros((), x.dtype))


def site_key(root: Key, step: int, site: str) -> Key:
    """Two blocks: the root encrypts the site's hash, the result encrypts the step."""
    digest = hashlib.sha256(site.encode()).hexdigest()
    at_site = threefry2x32(root, (int(digest[:8], 16), int(digest[8:16], 16)))
    return threefry2x32(at_site, (step >> 32, step & _MASK))
