"""Gaussian noise, multiplied with the activations or added to them.

`observing` records masks; noise has none and is not recorded.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable

import torch
from torch import Tensor

from regshared.spellings import explain_names
from regtorch._dropout.core import check_flag, check_real, mask_and_scale, real_dtype, require_key
from regtorch._dropout.dtensor import Place, is_dtensor, on_local_part
from regtorch._random.bernoulli import check_probability
from regtorch._random.normal import normal_at
from regtorch._random.rounding import exact_sqrt, rounded


@explain_names
def gaussian_dropout(
    x: Tensor,
    rate: float | Tensor,
    *,
    key: Tensor | torch.Generator | None = None,
    deterministic: bool | Tensor = False,
) -> Tensor:
    """Multiply each element by a normal variate of mean 1 and variance `rate / (1 - rate)`.

    These are the mean and the variance of the factor of `dropout` at this rate, 0 or `1 / (1 -
    rate)`; here nothing is zeroed. With n ~ N(0, 1) for each element,

        y = x * (1 + sqrt(rate / (1 - rate)) * n)

    Only the key is stored for the backward pass, which draws the same factors again. The root is
    computed in double and rounded once; for a tensor rate, by three correctly rounded operations.
    The rest follows in float32, in double for float64. Half and 8-bit types are rounded once, at
    the end. The result and other errors are those of `dropout`.

    Args:
        x: Real floating, of any shape, including 0-d and empty.
        rate: The rate of the equivalent dropout, at least 0 and below 1; a number or a 0-d tensor,
            whose root is computed in float32, in double for float64. No gradient flows to it.
        key: See `dropout`; required unless `deterministic`, or `rate` is the number 0.
        deterministic: See `dropout`.

    Raises:
        TypeError: `x` is complex.
        ValueError: `rate` is 1, where the variance is infinite. A tensor rate outside [0, 1) gives
            NaN.

    Note (PyTorch):
        PyTorch has no equivalent; Keras has `keras.layers.GaussianDropout(rate)`.

    Example:
        >>> import torch, regtorch
        >>> regtorch.gaussian_dropout(torch.ones(4), 0.2, key=regtorch.key(0))
        tensor([1.8113, 2.0126, 0.7832, 0.9607])

    References:
        Srivastava et al., "Dropout", JMLR 15, 2014, section 10.
    """
    return _noisy(x, check_noise_rate(rate), key, deterministic, _multiplied)


@explain_names
def gaussian_noise(
    x: Tensor,
    stddev: float | Tensor,
    *,
    key: Tensor | torch.Generator | None = None,
    deterministic: bool | Tensor = False,
) -> Tensor:
    """Add to each element a normal variate of mean 0 and standard deviation `stddev`.

    With n ~ N(0, 1) for each element, `y = x + stddev * n`. The gradient with respect to `x` is
    that of `x` itself. Rounding is as in `gaussian_dropout`; the result and other errors are those
    of `dropout`.

    Args:
        x: Real floating, of any shape, including 0-d and empty.
        stddev: At least 0; a number or a 0-d tensor. No gradient flows to it: to learn it, write `x
            + stddev * regtorch.normal(key, x.shape)`.
        key: See `dropout`; required unless `deterministic`, or `stddev` is the number 0.
        deterministic: See `dropout`.

    Raises:
        TypeError: `x` is complex, or `stddev` is not a real number.
        ValueError: The number `stddev` is negative, infinite or NaN. Such a tensor gives NaN.

    Note (PyTorch):
        PyTorch has no equivalent; Keras has `keras.layers.GaussianNoise(stddev)`.

    Example:
        >>> import torch, regtorch
        >>> regtorch.gaussian_noise(torch.zeros(4), 0.1, key=regtorch.key(0))
        tensor([ 0.1623,  0.2025, -0.0434, -0.0079])

    References:
        Bishop, "Training with noise is equivalent to Tikhonov regularization", 1995.
    """
    return _noisy(x, check_stddev(stddev), key, deterministic, _added)


def _noisy(
    x: Tensor,
    rate_or_stddev: float | Tensor,
    key: Tensor | torch.Generator | None,
    deterministic: bool | Tensor,
    make: Callable[..., Tensor],
    place: Place | None = None,
) -> Tensor:
    """Check the arguments, take the shortcuts, then return `make(x, key, rate_or_stddev, place)`.

    `place` is that of `x` in a DTensor.
    """
    x = _check_real(x)
    deterministic = check_flag(deterministic)
    if deterministic is True or (isinstance(rate_or_stddev, float) and rate_or_stddev == 0):
        return x
    if is_dtensor(x):
        arguments = rate_or_stddev, key, deterministic, make
        return on_local_part(lambda local, place: _noisy(local, *arguments, place), x)
    noisy = make(x, require_key(key).to(x.device), rate_or_stddev, place)
    if isinstance(deterministic, Tensor):
        return torch.where(deterministic, x, noisy)
    return noisy


@dataclasses.dataclass(frozen=True)
class _Factors:
    """Factors around 1 in place of a mask."""

    place: Place | None = None
    name: str = "gaussian_dropout"

    def keep(
        self, x: Tensor, key: Tensor, rate: float | Tensor, given: Tensor | None = None
    ) -> Tensor:
        return 1 + rounded(_noise(x, key, self.place) * _deviation(rate, x.dtype))

    def apply(self, x: Tensor, keep: Tensor, rate: float | Tensor) -> Tensor:
        return rounded(x.to(keep.dtype) * keep).to(x.dtype)

    def slope(self) -> _Factors:
        return self


def _multiplied(x: Tensor, key: Tensor, rate: float | Tensor, place: Place | None) -> Tensor:
    return mask_and_scale(_Factors(place), x, key, rate)


def _deviation(rate: float | Tensor, dtype: torch.dtype) -> float | Tensor:
    """Return sqrt(rate / (1 - rate)), or NaN at 1."""
    if isinstance(rate, Tensor):
        rate = rate.to(real_dtype(dtype))
        return torch.where(rate < 1, exact_sqrt(rate / (1 - rate)), torch.nan)
    return math.sqrt(rate / (1 - rate))


def _added(x: Tensor, key: Tensor, stddev: float | Tensor, place: Place | None) -> Tensor:
    noise = _noise(x, key, place)
    if isinstance(stddev, Tensor):
        stddev = stddev.detach().to(noise.dtype)
        stddev = torch.where((stddev >= 0) & (stddev < torch.inf), stddev, torch.nan)
    return (rounded(x.to(noise.dtype)) + rounded(noise * stddev)).to(x.dtype)


def _noise(x: Tensor, key: Tensor, place: Place | None) -> Tensor:
    """Return a variate for each element, in the dtype that `x` is computed in."""
    at = None if place is None else place.elements(key.device)
    return normal_at(key, tuple(x.shape), real_dtype(x.dtype), at)


def check_noise_rate(rate: float | Tensor) -> float | Tensor:
    """Return a rate as `check_probability` does; reject the number 1."""
    rate = check_probability("rate", rate)
    if isinstance(rate, float) and rate == 1:
        raise ValueError("rate must be below 1, where the variance is infinite; got 1.")
    return rate


def check_stddev(stddev: float | Tensor) -> float | Tensor:
    """Return a finite standard deviation as a Python float, a 0-d tensor unchanged."""
    is_tensor = isinstance(stddev, Tensor)
    is_real = isinstance(stddev, numbers.Real) and not isinstance(stddev, bool)
    if not (is_real or (is_tensor and not stddev.is_complex() and stddev.dtype != torch.bool)):
        raise TypeError(f"stddev must be a real number of at least 0; got {stddev!r}.")
    if is_tensor:
        if stddev.ndim:
            raise ValueError(
                f"stddev must be a scalar of at least 0; got shape {tuple(stddev.shape)}."
            )
        return stddev
    if not 0 <= stddev < math.inf:
        raise ValueError(f"stddev must be finite and at least 0; got {stddev}.")
    return float(stddev)


def _check_real(x: Tensor) -> Tensor:
    return check_real(x, "Gaussian noise", "Add it to x.real and x.imag.")
