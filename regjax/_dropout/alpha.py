"""Alpha dropout: dropped elements saturate, and mean 0 and variance 1 are preserved."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from regjax._dropout.core import SampledMask, apply_dropout, check_dims, check_real, real_dtype
from regjax._dropout.features import shared_dims
from regjax._random.bernoulli import Sampler, bernoulli
from regjax._random.packed import mask_sampler
from regjax._random.rounding import exact_sqrt
from regjax._random.xla import rounded
from regshared.spellings import explain_names

if TYPE_CHECKING:
    from jax.typing import ArrayLike
    from jaxtyping import Array, Float

    from regjax._random.keys import KeyLike

# The SELU saturates at -alpha: its scale 1.0507009873554805 times its alpha 1.6732632423543772.
_ALPHA = 1.7580993408473766
_ONE_MORE = 1 + _ALPHA**-2


@explain_names
def alpha_dropout(
    x: Float[ArrayLike, "*shape"],
    rate: ArrayLike,
    *,
    key: KeyLike | None = None,
    deterministic: ArrayLike = False,
    broadcast_dims: Sequence[int] = (),
    sampler: Sampler = bernoulli,
) -> Float[Array, "*shape"]:
    """Apply dropout that preserves mean 0 and variance 1, for self-normalizing networks.

    An element is dropped, with probability `rate`, to `-alpha`, where the SELU saturates, instead
    of 0. With q = 1 - rate, alpha = 1.7580993408473766 and a = 1 / sqrt((1 + alpha**2 * rate) * q):

        y = where(keep, (x + alpha * rate) * a, -alpha * q * a)

    The constants are computed in double and rounded once; the sum and the product follow in
    float32, in double for float64; half and 8-bit types are rounded once, at the end. The sum comes
    first, because XLA could contract a product and a sum to one rounding. The result and other
    errors are those of `dropout`.

    Args:
        x: Real floating, of any shape, including 0-d and empty.
        rate: See `dropout`. The constants of a traced rate are computed in float32, in double for
            float64, and may differ from a number's in their last bits. At 1 everything is 0, the
            limit of the formula.
        key: See `dropout`.
        deterministic: See `dropout`.
        broadcast_dims: See `dropout`.
        sampler: See `dropout`.

    Raises:
        TypeError: `x` is complex.

    Note (PyTorch):
        `torch.nn.functional.alpha_dropout(x, p=rate, training=not deterministic)` multiplies before
        it adds; the results differ by rounding.

    Example:
        >>> import jax, jax.numpy as jnp, regjax
        >>> regjax.alpha_dropout(jnp.zeros(6), 0.5, key=jax.random.key(0))
        Array([-0.77919394, -0.77919394,  0.7791939 ,  0.7791939 , -0.77919394,
                0.7791939 ], dtype=float32)

    References:
        Klambauer et al., "Self-normalizing neural networks", NeurIPS 2017.
    """
    x = check_alpha_input(x)
    spec = alpha("alpha_dropout", sampler, check_dims(broadcast_dims, x.ndim))
    return apply_dropout(spec, x, rate, key, deterministic)


@explain_names
def feature_alpha_dropout(
    x: Float[ArrayLike, "*shape"],
    rate: ArrayLike,
    *,
    key: KeyLike | None = None,
    deterministic: ArrayLike = False,
    channel_axis: int = -1,
    sampler: Sampler = bernoulli,
) -> Float[Array, "*shape"]:
    """Apply `alpha_dropout` to whole channels, as `feature_dropout` applies `dropout`.

    See these two for the arguments, result and errors.

    Note (PyTorch):
        `torch.nn.functional.feature_alpha_dropout(x, p=rate, training=not deterministic)`.

    Example:
        >>> import jax, jax.numpy as jnp, regjax
        >>> y = regjax.feature_alpha_dropout(jnp.zeros((1, 3, 4)), 0.5, key=jax.random.key(0))
        >>> y[0, 0, :]
        Array([-0.77919394, -0.77919394,  0.7791939 ,  0.7791939 ], dtype=float32)
    """
    x = check_alpha_input(x)
    spec = alpha("feature_alpha_dropout", sampler, shared_dims(x.ndim, channel_axis))
    return apply_dropout(spec, x, rate, key, deterministic)


def alpha(name: str, sampler: Sampler, dims: tuple[int, ...]) -> SampledMask:
    """Return the spec of alpha dropout under the name of the calling function."""
    return SampledMask(name, mask_sampler(sampler), dims, _scale, _offsets)


def _scale(keep_prob: float | Float[Array, ""], dtype: np.dtype) -> np.floating | Float[Array, ""]:
    """Return 1 / sqrt((1 + alpha**2 * (1 - keep_prob)) * keep_prob), for a variance of 1."""
    real = real_dtype(dtype)
    if isinstance(keep_prob, jax.Array):
        variance = (real(_ONE_MORE) - keep_prob) * keep_prob
        positive = variance > 0
        root = exact_sqrt(jnp.where(positive, variance, 1))
        return jnp.where(positive, real(1 / _ALPHA) * (1 / root), 0)
    return real(_double_scale(keep_prob))


def _offsets(
    keep_prob: float | Float[Array, ""], dtype: np.dtype
) -> tuple[np.floating | Float[Array, ""], np.floating | Float[Array, ""]]:
    """Return the shift of a kept element, before the scale, and the value of a dropped one."""
    real = real_dtype(dtype)
    if isinstance(keep_prob, jax.Array):
        fill = (keep_prob * real(-_ALPHA)) * _scale(keep_prob, dtype)
        return rounded((1 - keep_prob) * real(_ALPHA)), fill
    fill = -_ALPHA * keep_prob * _double_scale(keep_prob)
    return real(_ALPHA * (1 - keep_prob)), real(fill)


def _double_scale(keep_prob: float) -> float:
    # Python floats round the same in both packages.
    variance = (1 + _ALPHA**2 * (1 - keep_prob)) * keep_prob
    return 1 / math.sqrt(variance) if variance else 0.0


def check_alpha_input(x: Float[ArrayLike, "*shape"]) -> Float[Array, "*shape"]:
    advice = "Use regjax.dropout, or drop in x.real and x.imag."
    return check_real(x, "alpha dropout", advice)
