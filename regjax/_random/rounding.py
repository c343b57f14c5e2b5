"""Arithmetic that rounds alike on every backend."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np
from jax import lax

from regjax._random.xla import rounded

if TYPE_CHECKING:
    from jaxtyping import Array, Float


def exact_sqrt(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Return the correctly rounded square root, even where the backend's own is off by one ulp.

    `torch.sqrt` on a CPU misrounds one float32 in five, whatever the instruction set. The error of
    the backend's root is computed exactly, and the neighbor is returned where it is nearer. `x`
    must be zero or in [2**-60, 2**60], in float32 or float64; elsewhere, and for infinity and NaN,
    the result is the backend's, or one of its neighbors.

    Example:
        >>> import jax.numpy as jnp
        >>> exact_sqrt(jnp.float32(2))
        Array(1.4142135, dtype=float32)
    """
    # `x` must not be contracted with the first difference below; all other products are exact.
    x = rounded(x)
    info = np.finfo(x.dtype)
    integer = np.int64 if x.dtype == np.float64 else np.int32
    as_float = functools.partial(lax.bitcast_convert_type, new_dtype=x.dtype)
    near = lax.sqrt(x)
    bits = lax.bitcast_convert_type(near, integer)
    # Rounded to half its digits, so that each of the three products below is exact.
    tail = integer(1 << (info.nmant + 2) // 2)
    high = as_float((bits + tail // 2) & -tail)
    low = near - high
    excess = x - high * high - x.dtype.type(2) * high * low - low * low
    ulp = as_float(bits & -integer(1 << info.nmant)) * info.eps
    # (near + ulp / 2)**2 exceeds near**2 by near * ulp and less than the last digit of excess.
    limit = near * ulp
    below = lax.select(lax.le(excess, -limit), near - ulp, near)
    return lax.select(lax.gt(excess, limit), near + ulp, below)
