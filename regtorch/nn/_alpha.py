"""Modules of alpha dropout, for self-normalizing networks."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from regtorch._dropout.alpha import alpha_dropout, feature_alpha_dropout
from regtorch.nn._layer import Layer


class AlphaDropout(Layer):
    """`torch.nn.AlphaDropout` with masks from an explicit key or generator.

    `rate` is `p` in PyTorch. See `regtorch.alpha_dropout`.

    Example:
        >>> import torch, regtorch
        >>> regtorch.nn.AlphaDropout(0.5)(torch.zeros(3), key=regtorch.key(0))
        tensor([-0.7792, -0.7792,  0.7792])
    """

    @classmethod
    def drop(cls, x: Tensor, rate: float | Tensor, **options: Any) -> Tensor:
        return alpha_dropout(x, rate, **options)


class FeatureAlphaDropout(Layer):
    """`torch.nn.FeatureAlphaDropout` with masks from an explicit key or generator.

    `rate` is `p` in PyTorch. See `regtorch.feature_alpha_dropout`. A call on an input of fewer than
    2 dimensions raises a ValueError.

    Example:
        >>> import torch, regtorch
        >>> layer = regtorch.nn.FeatureAlphaDropout(0.5)
        >>> layer(torch.zeros(1, 3, 2), key=regtorch.key(0))[0, :, 0]
        tensor([-0.7792, -0.7792,  0.7792])
    """

    @classmethod
    def drop(cls, x: Tensor, rate: float | Tensor, **options: Any) -> Tensor:
        return feature_alpha_dropout(x, rate, **options)
