"""The Box-Muller transform with the roundings of PyTorch's kernels.

In float32 PyTorch evaluates the logarithm, sine and cosine by the polynomials of the Cephes library
with fused multiply-adds, which this module repeats operation by operation. In float64 it uses the C
library, whose last bits no other library repeats.

References:
    Box and Muller, "A note on the generation of random normal deviates", Annals of Mathematical
    Statistics 29, 1958. Moshier, "Cephes mathematical library", 1984.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np
from jax import lax

from regjax._random.rounding import exact_sqrt
from regjax._random.xla import rounded
from regjax.torch_random.fma import fused_multiply_add as fma

if TYPE_CHECKING:
    from jaxtyping import Array, Float

    Pair = tuple[Float[Array, "*shape"], Float[Array, "*shape"]]

_LOG_SERIES = (
    *(7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1),
    *(-1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1),
)
_LOG2_HIGH, _LOG2_LOW = 0.693359375, -2.12194440e-4
_SINE_SERIES = (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
_COSINE_SERIES = (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)
# pi / 4 in three parts, of which the first two have so few digits that products are exact.
_QUARTERS = (0.78515625, 2.4187564849853515625e-4, 3.77489497744594108e-8)
_EXPONENT, _HALF = np.int32(0x7F800000), np.int32(0x3F000000)


def float32_pairs(
    radial: Float[Array, "*shape"], angular: Float[Array, "*shape"]
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    """Return two normal numbers for each two uniform ones in [0, 1), as PyTorch's AVX2 kernel."""
    log = _log(1 - radial)
    # abs, because the logarithm of 1 is 0, and only the sign of a zero would differ.
    radius = exact_sqrt(jnp.abs(-2 * log))
    sine, cosine = _sine_and_cosine(rounded(angular * np.float32(2 * math.pi)))
    return rounded(radius * cosine), rounded(radius * sine)


def float64_pairs(
    radial: Float[Array, "*shape"], angular: Float[Array, "*shape"]
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    """Return two normal numbers for each two uniform ones in [0, 1), in float64."""
    # The difference is exact; XLA's log1p is off by up to 128 units in the last place.
    radius = jnp.sqrt(-2 * jnp.log(1 - radial))
    angle = 2 * math.pi * angular
    return rounded(radius * jnp.cos(angle)), rounded(radius * jnp.sin(angle))


def _log(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Return the natural logarithm of normal numbers in (0, 1]."""
    bits = lax.bitcast_convert_type(x, np.int32)
    exponent = (bits >> 23) - 126
    x = lax.bitcast_convert_type((bits & ~_EXPONENT) | _HALF, np.float32)
    is_low = x < np.float32(math.sqrt(0.5))
    exponent = jnp.where(is_low, exponent - 1, exponent).astype(np.float32)
    x = jnp.where(is_low, x - 1 + x, x - 1)
    square = rounded(x * x)
    total = rounded(_series(x, _LOG_SERIES) * x)
    low = rounded(exponent * np.float32(_LOG2_LOW))
    total = fma(total, square, low) - square * np.float32(0.5)  # halving is exact
    return fma(exponent, _LOG2_HIGH, x + total)


def _sine_and_cosine(x: Float[Array, "*shape"]) -> Pair:
    """Return the sine and the cosine of numbers in [0, 2 pi]."""
    eighths = rounded(x * np.float32(4 / math.pi)).astype(np.int32)
    eighths = (eighths + 1) & ~1
    count = eighths.astype(np.float32)
    for part in _QUARTERS:
        x = fma(count, -part, x)
    square = rounded(x * x)
    cosine = rounded(_series(square, _COSINE_SERIES) * square)
    cosine = fma(cosine, square, square * np.float32(-0.5)) + 1
    sine = fma(rounded(_series(square, _SINE_SERIES) * square), x, x)
    swap = (eighths & 2) != 0
    sine, cosine = jnp.where(swap, cosine, sine), jnp.where(swap, sine, cosine)
    sine = jnp.where((eighths & 4) != 0, -sine, sine)
    cosine = jnp.where(((eighths + 2) & 4) != 0, -cosine, cosine)
    return sine, cosine


def _series(x: Float[Array, "*shape"], coefficients: Sequence[float]) -> Float[Array, "*shape"]:
    first, second, *rest = coefficients
    total = fma(x, first, second)
    for coefficient in rest:
        total = fma(total, x, coefficient)
    return total
