"""Alpha dropout: dropped elements saturate, and mean 0 and variance 1 are preserved."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from regshared.spellings import explain_names
from regtorch._dropout.core import SampledMask, apply_dropout, check_dims, check_real, real_dtype
from regtorch._dropout.features import shared_dims
from regtorch._random.bernoulli import Sampler, bernoulli
from regtorch._random.packed import mask_sampler
from regtorch._random.rounding import exact_sqrt, rounded

# The SELU saturates at -alpha: its scale 1.0507009873554805 times its alpha 1.6732632423543772.
_ALPHA = 1.7580993408473766
_ONE_MORE = 1 + _ALPHA**-2


@explain_names
def alpha_dropout(
    x: Tensor,
    rate: float | Tensor,
    *,
    key: Tensor | torch.Generator | None = None,
    deterministic: bool | Tensor = False,
    broadcast_dims: Sequence[int] = (),
    sampler: Sampler = bernoulli,
) -> Tensor:
    """Apply dropout that preserves mean 0 and variance 1, for self-normalizing networks.

    An element is dropped, with probability `rate`, to `-alpha`, where the SELU saturates, instead
    of 0. With q = 1 - rate, alpha = 1.7580993408473766 and a = 1 / sqrt((1 + alpha**2 * rate) * q):

        y = where(keep, (x + alpha * rate) * a, -alpha * q * a)

    The constants are computed in double and rounded once; the sum and the product follow in
    float32, in double for float64; half and 8-bit types are rounded once, at the end. The sum comes
    first, because a compiler could contract a product and a sum to one rounding. The result and
    other errors are those of `dropout`.

    Args:
        x: Real floating, of any shape, including 0-d and empty.
        rate: See `dropout`. The constants of a tensor rate are computed in float32, in double for
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
        >>> import torch, regtorch
        >>> regtorch.alpha_dropout(torch.zeros(6), 0.5, key=regtorch.key(0))
        tensor([-0.7792, -0.7792,  0.7792,  0.7792, -0.7792,  0.7792])

    References:
        Klambauer et al., "Self-normalizing neural networks", NeurIPS 2017.
    """
    x = _check_real(x)
    dims = check_dims(broadcast_dims, x.ndim)
    return apply_dropout(alpha("alpha_dropout", sampler, dims), x, rate, key, deterministic)


@explain_names
def feature_alpha_dropout(
    x: Tensor,
    rate: float | Tensor,
    *,
    key: Tensor | torch.Generator | None = None,
    deterministic: bool | Tensor = False,
    channel_axis: int = 1,
    sampler: Sampler = bernoulli,
) -> Tensor:
    """Apply `alpha_dropout` to whole channels, as `feature_dropout` applies `dropout`.

    See these two for the arguments, result and errors.

    Note (PyTorch):
        `torch.nn.functional.feature_alpha_dropout(x, p=rate, training=not deterministic)`.

    Example:
        >>> import torch, regtorch
        >>> y = regtorch.feature_alpha_dropout(torch.zeros(1, 4, 3), 0.5, key=regtorch.key(0))
        >>> y[0, :, 0]
        tensor([-0.7792, -0.7792,  0.7792,  0.7792])
    """
    x = _check_real(x)
    shared = shared_dims(x.ndim, channel_axis)
    return apply_dropout(
        alpha("feature_alpha_dropout", sampler, shared), x, rate, key, deterministic
    )


def alpha(name: str, sampler: Sampler, dims: tuple[int, ...]) -> SampledMask:
    """Return alpha dropout under the name of the calling function."""
    return SampledMask(name, mask_sampler(sampler), dims, _scale, _offsets)


def _scale(keep_prob: float | Tensor, dtype: torch.dtype) -> float | Tensor:
    """Return the scale for variance 1: 1 / sqrt((1 + alpha**2 * (1 - keep_prob)) * keep_prob)."""
    if isinstance(keep_prob, Tensor):
        variance = (_ONE_MORE - keep_prob) * keep_prob
        positive = variance > 0
        root = exact_sqrt(torch.where(positive, variance, 1.0))
        return torch.where(positive, (1 / _ALPHA) * (1 / root), 0.0)
    return _rounded(_double_scale(keep_prob), dtype)


def _offsets(
    keep_prob: float | Tensor, dtype: torch.dtype
) -> tuple[float | Tensor, float | Tensor]:
    """Return the shift of a kept element before scaling, and the value of a dropped one."""
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
