"""Dropout of whole features: each channel of each row is zeroed or kept as one."""

from __future__ import annotations

import torch
from torch import Tensor

from regshared.spellings import explain_names
from regtorch._dropout.core import SampledMask, apply_dropout, check_axis, check_inexact
from regtorch._random.bernoulli import Sampler, bernoulli
from regtorch._random.packed import mask_sampler


@explain_names
def feature_dropout(
    x: Tensor,
    rate: float | Tensor,
    *,
    key: Tensor | torch.Generator | None = None,
    deterministic: bool | Tensor = False,
    channel_axis: int = 1,
    sampler: Sampler = bernoulli,
) -> Tensor:
    """Zero each channel of each row with probability `rate` and divide the others by `1 - rate`.

    Neighboring pixels of a feature map are nearly redundant, so that dropping them one by one
    removes little; this drops the whole map. It is `dropout` with a mask shared along every
    dimension but the batch, dimension 0, and `channel_axis`. Row n and channel c draw from the
    index `n * C + c` wherever the channels lie, so that, with `bernoulli`, NCHW and NHWC have the
    same mask. The result and other errors are those of `dropout`.

    Args:
        x: Floating or complex, with the batch first. For one row without a batch dimension, pass
            `channel_axis=0` for (C, ...), and give (..., C) a batch dimension of 1.
        rate: See `dropout`.
        key: See `dropout`.
        deterministic: See `dropout`.
        channel_axis: The dimension of the channels, counted from the end if negative.
        sampler: See `dropout`.

    Raises:
        TypeError: `channel_axis` is not an integer.
        ValueError: `channel_axis` is not a dimension of `x`.

    Note (PyTorch):
        `torch.nn.functional.dropout1d`, `dropout2d` and `dropout3d` on a batch.

    Note (JAX):
        In `regjax.feature_dropout` the channels are last by default.

    Example:
        >>> import torch, regtorch
        >>> regtorch.feature_dropout(torch.ones(2, 4, 3, 3), 0.5, key=regtorch.key(0))[:, :, 0, 0]
        tensor([[0., 0., 2., 2.],
                [0., 2., 2., 0.]])

    References:
        Tompson et al., "Efficient object localization using convolutional networks", CVPR 2015.
    """
    x = check_inexact(x)
    shared = shared_dims(x.ndim, channel_axis)
    spec = SampledMask("feature_dropout", mask_sampler(sampler), shared)
    return apply_dropout(spec, x, rate, key, deterministic)


def shared_dims(ndim: int, channel_axis: int) -> tuple[int, ...]:
    """Return every dimension but the batch and the channels."""
    axis = check_axis("channel_axis", channel_axis, ndim)
    return tuple(dim for dim in range(1, ndim) if dim != axis)
