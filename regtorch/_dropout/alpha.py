"""Alpha dropout: dropped elements saturate, and mean 0 and variance 1 stay what they were."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from regtorch._dropout.core import SampledMask, apply_dropout, check_dims, check_real, real_dtype
from regtorch._dropout.features import shared_dims
from regtorch._random.bernoulli import Sampler, bernoulli
from regtorch._random.packed import mask_sampler
from regtorch._random.rounding import exact_sqrt, rounded

# The SELU saturates at -alpha: its scale 1.0507009873554805 times its alpha 1.6732632423543772.
_ALPHA = 1.7580993408473766
_ONE_MORE = 1 + _ALPHA**-2


def alpha_dropout(
    x: Tensor,
    rate: float | Tensor,
    *,
    key: Tensor | torch.Generator | None = None,
    deterministic: bool | Tensor = False,
    broadcast_dims: Sequence[int] = (),
    sampler: Sampler = bernoulli,
) -> Tensor:
    """Dropout for self-normalising networks: if `x` has mean 0 and variance 1, so has the result.

    An element is dropped with probability `rate`, to `-alpha`, where the SELU saturates, and not to
    0, where it does not. With q = 1 - rate, alpha = 1.7580993408473766 and
    a = 1 / sqrt((1 + alpha**2 * rate) * q):

        y = where(keep, (x + alpha * rate) * a, -alpha * q * a)

    The constants are computed in double and rounded once; the sum and the product follow in
    float32, in double for float64; half and 8-bit types are rounded once, at the end. The sum
    comes first, because a compiler could contract a product and a sum to one rounding.

    Args:
        x: real floating, of any shape, also 0-d and empty.
        rate: the probability that an element is dropped, in [0, 1]; a number or a 0-d tensor.
            The constants of the latter are computed in float32, in double for float64, and may
            differ from those in their last bits. At 1 everything is 0, the limit of the formula.
        key: the random key, or a `torch.Generator` from which one is drawn; see `dropout`.
        deterministic: True in evaluation: `x` itself.
        broadcast_dims: dimensions along which one mask is shared.
        sampler: what draws the mask.

    Returns:
        A tensor of the shape, dtype and device of `x`.

    Raises:
        TypeError: as `dropout`, or `x` is complex.
        ValueError: as `dropout`.

    PyTorch:
        `torch.nn.functional.alpha_dropout(x, p=rate, training=not deterministic)`, whose product
        comes before the sum; the results differ by rounding.

    JAX:
        `regjax.alpha_dropout` with the same key gives the same result bit for bit.

    Example:
        >>> import torch, regtorch
        >>> regtorch.alpha_dropout(torch.zeros(6), 0.5, key=regtorch.key(0))
        tensor([-0.7792, -0.7792,  0.7792,  0.7792, -0.7792,  0.7792])

    Source: Klambauer, Unterthiner, Mayr, Hochreiter, "Self-normalizing neural networks",
    NeurIPS 2017.
    """
    x = _check_real(x)
    dims = check_dims(broadcast_dims, x.ndim)
    return apply_dropout(alpha("alpha_dropout", sampler, dims), x, rate, key, deterministic)


def feature_alpha_dropout(
    x: Tensor,
    rate: float | Tensor,
    *,
    key: Tensor | torch.Generator | None = None,
    deterministic: bool | Tensor = False,
    channel_axis: int = 1,
    sampler: Sampler = bernoulli,
) -> Tensor:
    """Alpha dropout of whole channels: one decision for each channel of each row.

    To `alpha_dropout` what `feature_dropout` is to `dropout`.

    Args:
        x: real floating, with the batch first; see `feature_dropout`.
        rate: the probability that a channel is dropped, in [0, 1].
        key: the random key, or a `torch.Generator` from which one is drawn; see `dropout`.
        deterministic: True in evaluation: `x` itself.
        channel_axis: the dimension of the channels, counted from the end if negative.
        sampler: what draws the mask.

    Returns:
        A tensor of the shape, dtype and device of `x`.

    Raises:
        TypeError: as `alpha_dropout`, or `channel_axis` is not an integer.
        ValueError: as `alpha_dropout`, or `channel_axis` is not a dimension of `x`.

    PyTorch:
        `torch.nn.functional.feature_alpha_dropout(x, p=rate, training=not deterministic)`.

    JAX:
        `regjax.feature_alpha_dropout`, whose channels are last by default.

    Example:
        >>> import torch, regtorch
        >>> y = regtorch.feature_alpha_dropout(torch.zeros(1, 4, 3), 0.5, key=regtorch.key(0))
        >>> y[0, :, 0]
        tensor([-0.7792, -0.7792,  0.7792,  0.7792])

    Source: Klambauer, Unterthiner, Mayr, Hochreiter, "Self-normalizing neural networks",
    NeurIPS 2017.
    """
    x = _check_real(x)
    shared = shared_dims(x.ndim, channel_axis)
    return apply_dropout(
        alpha("feature_alpha_dropout", sampler, shared), x, rate, key, deterministic
    )


def alpha(name: str, sampler: Sampler, dims: tuple[int, ...]) -> SampledMask:
    """Alpha dropout under the name of the function that calls it."""
    return SampledMask(name, mask_sampler(sampler), dims, _scale, _offsets)


def _scale(keep_prob: float | Tensor, dtype: torch.dtype) -> float | Tensor:
    """What keeps the variance at 1: 1 / sqrt((1 + alpha**2 * (1 - keep_prob)) * keep_prob)."""
    if isinstance(keep_prob, Tensor):
        variance = (_ONE_MORE - keep_prob) * keep_prob
        positive = variance > 0
        root = exact_sqrt(torch.where(positive, variance, 1.0))
        return torch.where(positive, (1 / _ALPHA) * (1 / root), 0.0)
    return _rounded(_double_scale(keep_prob), dtype)


def _offsets(
    keep_prob: float | Tensor, dtype: torch.dtype
) -> tuple[float | Tensor, float | Tensor]:
    """What is added to a kept element before the scale, and what a dropped one becomes."""
    if isinstance(keep_prob, Tensor):
        fill = (keep_prob * -_ALPHA) * _scale(keep_prob, dtype)
        return rounded((1 - keep_prob) * _ALPHA), fill
    fill = -_ALPHA * keep_prob * _double_scale(keep_prob)
    return _rounded(_ALPHA * (1 - keep_prob), dtype), _rounded(fill, dtype)


def _double_scale(keep_prob: float) -> float:
    # In Python's doubles, which round the same in both packages.
    variance = (1 + _ALPHA**2 * (1 - keep_prob)) * keep_prob
    return 1 / math.sqrt(variance) if variance else 0.0


def _rounded(value: float, dtype: torch.dtype) -> float:
    return torch.tensor(value, dtype=real_dtype(dtype)).item()


def _check_real(x: Tensor) -> Tensor:
    advice = "Use regtorch.dropout, or drop in torch.view_as_real(x)."
    return check_real(x, "alpha dropout", advice)
