"""Gaussian noise, multiplied with the activations or added to them.

`observing` records masks; noise has none and is not recorded.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from regjax._checks import as_number
from regjax._dropout.core import (
    check_flag,
    check_real,
    guard_rate,
    mask_and_scale,
    mask_sharding,
    real_dtype,
    require_key,
)
from regjax._random.bernoulli import check_probability
from regjax._random.normal import normal
from regjax._random.rounding import exact_sqrt
from regjax._random.xla import rounded
from regshared.spellings import explain_names

if TYPE_CHECKING:
    from collections.abc import Callable

    from jax.typing import ArrayLike
    from jaxtyping import Array, Float

    from regjax._random.keys import KeyLike


@explain_names
def gaussian_dropout(
    x: Float[ArrayLike, "*shape"],
    rate: ArrayLike,
    *,
    key: KeyLike | None = None,
    deterministic: ArrayLike = False,
) -> Float[Array, "*shape"]:
    """Multiply each element by a normal variate of mean 1 and variance `rate / (1 - rate)`.

    Those are the mean and the variance of the factor of `dropout` at this rate, 0 or `1 / (1 -
    rate)`; here nothing is zeroed. With n ~ N(0, 1) for each element,

        y = x * (1 + sqrt(rate / (1 - rate)) * n)

    Only the key is stored for the backward pass, which draws the same factors again. The root is
    computed in double and rounded once; for a traced rate, by three correctly rounded operations.
    The rest follows in float32, in double for float64. Half and 8-bit types are rounded once, at
    the end. The result and other errors are those of `dropout`.

    Args:
        x: Real floating, of any shape, including 0-d and empty.
        rate: The rate of the equivalent dropout, at least 0 and below 1; a number or a traced
            scalar. The root of a traced rate is computed in float32, in double for float64. No
            gradient flows to it.
        key: See `dropout`; required unless `deterministic`, or `rate` is the number 0.
        deterministic: See `dropout`.

    Raises:
        TypeError: `x` is complex.
        ValueError: `rate` is 1, where the variance is infinite. A traced rate outside [0, 1) gives
            NaN.

    Note (PyTorch):
        PyTorch has no equivalent; Keras has `keras.layers.GaussianDropout(rate)`.

    Example:
        >>> import jax, jax.numpy as jnp, regjax
        >>> regjax.gaussian_dropout(jnp.ones(4), 0.2, key=jax.random.key(0))
        Array([1.811321  , 2.0126324 , 0.7832028 , 0.96069133], dtype=float32)

    References:
        Srivastava et al., "Dropout", JMLR 15, 2014, section 10.
    """
    return _noisy(x, check_noise_rate(rate), key, deterministic, _multiplied)


@explain_names
def gaussian_noise(
    x: Float[ArrayLike, "*shape"],
    stddev: ArrayLike,
    *,
    key: KeyLike | None = None,
    deterministic: ArrayLike = False,
) -> Float[Array, "*shape"]:
    """Add to each element a normal variate of mean 0 and standard deviation `stddev`.

    With n ~ N(0, 1) for each element, `y = x + stddev * n`. The gradient with respect to `x` is
    that of `x` itself. Rounding is as in `gaussian_dropout`; the result and other errors are those
    of `dropout`.

    Args:
        x: Real floating, of any shape, including 0-d and empty.
        stddev: At least 0; a number or a traced scalar. No gradient flows to it: to learn it, write
            `x + stddev * regjax.normal(key, x.shape)`.
        key: See `dropout`; required unless `deterministic`, or `stddev` is the number 0.
        deterministic: See `dropout`.

    Raises:
        TypeError: `x` is complex, or `stddev` is not a real number.
        ValueError: A concrete `stddev` is negative, infinite or NaN. A traced one gives NaN.

    Note (PyTorch):
        PyTorch has no equivalent; Keras has `keras.layers.GaussianNoise(stddev)`.

    Example:
        >>> import jax, jax.numpy as jnp, regjax
        >>> regjax.gaussian_noise(jnp.zeros(4), 0.1, key=jax.random.key(0))
        Array([ 0.16226421,  0.20252648, -0.04335944, -0.00786174], dtype=float32)

    References:
        Bishop, "Training with noise is equivalent to Tikhonov regularization", 1995.
    """
    return _noisy(x, check_stddev(stddev), key, deterministic, _added)


def _noisy(
    x: Float[ArrayLike, "*shape"],
    rate_or_stddev: float | Float[Array, ""],
    key: KeyLike | None,
    deterministic: ArrayLike,
    make: Callable[..., Any],
) -> Float[Array, "*shape"]:
    """Check the arguments, take the shortcuts, then return `make(x, key, rate_or_stddev)`."""
    x = _check_real(x)
    deterministic = check_flag(deterministic)
    if deterministic is True or (isinstance(rate_or_stddev, float) and rate_or_stddev == 0):
        return x

    def noisy() -> Float[Array, "*shape"]:
        return make(x, require_key(key), rate_or_stddev)

    return noisy() if deterministic is False else lax.cond(deterministic, lambda: x, noisy)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Factors:
    """Factors around 1 in place of a mask."""

    name: str = "gaussian_dropout"

    @guard_rate
    def __call__(
        self, x: Float[Array, "*shape"], key: KeyLike, rate: float | Float[Array, ""]
    ) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
        """Draw the factors and multiply."""
        factors = 1 + rounded(_noise(x, key) * _deviation(rate, x.dtype))
        return rounded(x.astype(factors.dtype) * factors).astype(x.dtype), factors


def _multiplied(
    x: Float[Array, "*shape"], key: KeyLike, rate: float | Float[Array, ""]
) -> Float[Array, "*shape"]:
    return mask_and_scale(_Factors(), x, key, rate)


def _deviation(rate: float | Float[Array, ""], dtype: np.dtype) -> np.floating | Float[Array, ""]:
    """Return sqrt(rate / (1 - rate)); NaN at 1."""
    real = real_dtype(dtype)
    if isinstance(rate, jax.Array):
        rate = lax.stop_gradient(rate).astype(real)
        return jnp.where(rate < 1, exact_sqrt(rate / (1 - rate)), jnp.nan)
    return real(math.sqrt(rate / (1 - rate)))


@jax.jit
def _added(
    x: Float[Array, "*shape"], key: KeyLike, stddev: float | Float[Array, ""]
) -> Float[Array, "*shape"]:
    noise = _noise(x, key)
    stddev = lax.stop_gradient(jnp.asarray(stddev)).astype(noise.dtype)
    in_range = (stddev >= 0) & (stddev < jnp.inf)
    noise = rounded(noise * jnp.where(in_range, stddev, jnp.nan))
    # `x` may itself be a product in the user's code.
    return (rounded(x.astype(noise.dtype)) + noise).astype(x.dtype)


def _noise(x: Float[Array, "*shape"], key: KeyLike) -> Float[Array, "*shape"]:
    """Return a variate for each element, in the dtype of the arithmetic, with the layout of `x`."""
    return normal(key, x.shape, real_dtype(x.dtype), out_sharding=mask_sharding(x, ()))


def check_noise_rate(rate: ArrayLike) -> float | Float[Array, ""]:
    """Return a rate as `check_probability` does; reject the number 1."""
    rate = check_probability("rate", rate)
    if isinstance(rate, float) and rate == 1:
        raise ValueError("rate must be below 1, where the variance is infinite; got 1.")
    return rate


def check_stddev(stddev: ArrayLike) -> float | Float[Array, ""]:
    """Return a finite standard deviation as a Python float, a traced scalar unchanged."""
    number = as_number("stddev", stddev)
    if not any(jnp.issubdtype(number.dtype, kind) for kind in (jnp.floating, jnp.integer)):
        raise TypeError(f"stddev must be a real number of at least 0; got {stddev!r}.")
    if number.ndim:
        raise ValueError(f"stddev must be a scalar of at least 0; got shape {number.shape}.")
    if isinstance(number, Tracer):
        return number
    if not 0 <= number < math.inf:
        raise ValueError(f"stddev must be finite and at least 0; got {stddev}.")
    return float(number)


def _check_real(x: Float[ArrayLike, "*shape"]) -> Float[Array, "*shape"]:
    return check_real(x, "Gaussian noise", "Add it to x.real and x.imag.")
