"""A fused multiply-add of one rounding, computed from sums and products in float64."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from regjax._random.xla import rounded

if TYPE_CHECKING:
    from jaxtyping import Array, Float


def fused_multiply_add(a: Float[Array, "*shape"], b: Any, c: Any) -> Float[Array, "*shape"]:
    """Return `a * b + c`, rounded once, in float32 or float64.

    PyTorch's kernels for CPUs with AVX2 contract products with sums; a CPU without FMA cannot, and
    XLA does so or not. In float64, no intermediate result may overflow or be subnormal.

    Example:
        >>> import jax.numpy as jnp
        >>> x = jnp.float32(1 + 2**-12)
        >>> fused_multiply_add(x, x, -x * x)
        Array(5.9604645e-08, dtype=float32)

    References:
        Boldo and Melquiond, "Emulation of a FMA and correctly rounded sums: proved algorithms using
        rounding to odd", IEEE Transactions on Computers 57, 2008.
    """
    with jax.enable_x64(True):
        b, c = (jnp.broadcast_to(jnp.asarray(number, a.dtype), a.shape) for number in (b, c))
        if a.dtype == np.float32:
            # In float64 the product of two float32 is exact.
            a, b, c = (number.astype(np.float64) for number in (a, b, c))
            return _sum_rounded_to_odd(a * b, c).astype(np.float32)
        product, tail = _exact_product(a, b)
        high, low = _exact_sum(c, tail)
        high, rest = _exact_sum(product, high)
        return high + _sum_rounded_to_odd(low, rest)


def _exact_product(a: Array, b: Array) -> tuple[Array, Array]:
    """Return the rounded product and its error."""
    product = rounded(a * b)
    (a_high, a_low), (b_high, b_low) = _halves(a), _halves(b)
    # Each product is exact, so that it does not matter whether a compiler contracts it.
    error = a_high * b_high - product + a_high * b_low + a_low * b_high + a_low * b_low
    return product, error


def _halves(x: Array) -> tuple[Array, Array]:
    """Return two numbers of half the digits, whose sum is `x`."""
    tail = np.int64(1 << 27)
    bits = lax.bitcast_convert_type(x, np.int64)
    high = lax.bitcast_convert_type((bits + tail // 2) & -tail, np.float64)
    return high, x - high


def _exact_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """Return the rounded sum and its error."""
    # XLA cancels a constant that is added and subtracted again.
    total = rounded(a + b)
    part = total - a
    return total, (a - (total - part)) + (b - part)


def _sum_rounded_to_odd(a: Array, b: Array) -> Array:
    """Return the sum; if it is inexact, its neighbor with an odd last digit.

    A later rounding to fewer digits then gives the result of a single rounding.
    """
    total, error = _exact_sum(a, b)
    bits = lax.bitcast_convert_type(total, np.int64)
    is_away = (error > 0) == (total > 0)
    odd = jnp.where(is_away, bits + np.int64(1), bits - np.int64(1))
    is_even = (bits & np.int64(1)) == 0
    return lax.bitcast_convert_type(jnp.where((error != 0) & is_even, odd, bits), np.float64)
