"""Standard normal variates, bitwise identical in both packages.

This is **normal stream v1**: a variate is a function of the key, its index and the dtype alone, and
will not change under this name. It is computed by operations that IEEE 754 rounds alike on every
device; tests confirm this on CPUs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from regtorch._checks import check_shape
from regtorch._random.keys import check_key, key_words
from regtorch._random.quantile import quantile
from regtorch._random.threefry import element_bits, element_words, in_pieces, shift_right

_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def normal(key: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Draw standard normal variates on the key's device: mean 0, standard deviation 1.

    Each variate is the normal quantile function at a uniform variate, which is made from the
    threefry bits at the element's row-major index: the upper 23 bits of one word, or the upper 52
    of two for float64. Half types are computed in float32 and rounded once. In float32 the variates
    lie between -5.42 and 5.23, within 8e-7 of the exact quantile.

    Args:
        key: One key.
        shape: The shape of the result.
        dtype: One of float16, bfloat16, float32 and float64.

    Raises:
        TypeError: `key` is not a key, or `dtype` is none of these.
        ValueError: `key` is a batch of keys.

    Note (PyTorch):
        `torch.randn` draws another stream, from a hidden generator.

    Note (JAX):
        `regjax.normal` draws the same bits, and `jax.random.normal` nearly the same numbers.

    Example:
        >>> import regtorch
        >>> regtorch.normal(regtorch.key(0), (3,))
        tensor([ 1.6226,  2.0253, -0.4336])

    References:
        Devroye, "Non-uniform random variate generation", 1986, chapter II (inversion).
    """
    if dtype not in _TYPES:
        raise TypeError(f"dtype must be float16, bfloat16, float32 or float64; got {dtype}.")
    return normal_at(check_key(key), check_shape("shape", shape), dtype)


def normal_at(
    key: Tensor, shape: tuple[int, ...], dtype: torch.dtype, at: Tensor | None = None
) -> Tensor:
    """Draw the variates of `normal`, or those at the indices `at` (int64), whatever its shape."""
    words = key_words(key)

    def make(start: int, stop: int) -> Tensor:
        if dtype == torch.float64:
            high, low = element_words(words, at, start, stop)
            # int64 holds a word as an unsigned integer.
            bits = ((high.to(torch.int64) & 0xFFFFFFFF) << 20) | shift_right(low, 12)
            count = 52
        else:
            bits, count = shift_right(element_bits(words, at, start, stop), 9), 23
        bits = bits.to(torch.float64 if count == 52 else torch.float32)
        # Every step is exact: an odd multiple of 2**-(count + 1), so never 0, -1 or 1.
        uniform = bits * 2.0 ** (1 - count) - (1 - 2.0 ** -(count + 1))
        return quantile(uniform).to(dtype)

    return in_pieces(make, shape, key.device)
