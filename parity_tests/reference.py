"""Independent NumPy reference for masks, dropout and keys.

It is slow and plain, and shares no method with the packages: keys and counters are Python integers
truncated to 32 bits, the uniform variate is a real float32 that is compared with the keep
probability, and the output is a division.
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
    """Encrypt one block as in the paper: inject the key every fourth round."""
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
    """Return the 32 bits of the elements at the given row-major indices, as uint32."""
    blocks = (threefry2x32(key, (index >> 32, index & _MASK)) for index in indices)
    return np.array([out0 ^ out1 for out0, out1 in blocks], np.uint32)


def bernoulli(key: Key, keep_prob: float, shape: Sequence[int]) -> np.ndarray:
    """Return a keep mask: a float32 uniform of the upper 23 bits is less than the probability."""
    return bernoulli_at(key, keep_prob, range(math.prod(shape))).reshape(tuple(shape))


def bernoulli_at(key: Key, keep_prob: float, indices: Iterable[int]) -> np.ndarray:
    """Return the elements of a keep mask at the given row-major indices."""
    drawn = bits(key, map(int, indices))
    uniform = ((drawn >> np.uint32(9)) | np.uint32(0x3F800000)).view(np.float32) - np.float32(1)
    return uniform < np.float32(keep_prob)


def packed_bernoulli(key: Key, threshold: int, shape: Sequence[int], bits: int) -> np.ndarray:
    """Return a packed keep mask: each element is kept if its integer U is >= 2**bits - threshold.

    Bit i of U, counted from the most significant, is the element's bit in word i of its group. Word
    i is the upper or lower half of block i // 2.
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
    """Return inverted dropout, computed in double and rounded once to the dtype of `x`.

    The packages multiply by the reciprocal instead of dividing. Float64 and complex128 differ from
    them by that rounding alone, the other dtypes also by one rounding of the result.
    """
    shape = [1 if dim in broadcast_dims else size for dim, size in enumerate(x.shape)]
    keep = bernoulli(key, 1 - rate, shape)
    wide = np.complex128 if np.iscomplexobj(x) else np.float64
    kept = (x.astype(wide) / (1 - rate)).astype(x.dtype) if rate < 1 else np.zeros_like(x)
    return np.where(keep, kept, np.zeros((), x.dtype))


def site_key(root: Key, step: int, site: str) -> Key:
    """Derive a key in two blocks: the root encrypts the site's hash, and the result the step."""
    digest = hashlib.sha256(site.encode()).hexdigest()
    at_site = threefry2x32(root, (int(digest[:8], 16), int(digest[8:16], 16)))
    return threefry2x32(at_site, (step >> 32, step & _MASK))
