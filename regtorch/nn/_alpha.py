"""Dropout that keeps mean and variance, for self-normalising networks."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from regtorch._dropout.alpha import alpha_dropout, feature_alpha_dropout
from regtorch.nn._layer import Layer


class AlphaDropout(Layer):
    """`torch.nn.AlphaDropout` whose masks come from an explicit key or generator.

    In training it keeps mean 0 and variance 1. See `regtorch.alpha_dropout`.

    Attributes:
        rate: the probability that an element is dropped; `p` in PyTorch.
        generator: where a call without a key draws one from.

    Example:
        >>> import torch, regtorch
        >>> regtorch.nn.AlphaDropout(0.5)(torch.zeros(3), key=regtorch.key(0))
        tensor([-0.7792, -0.7792,  0.7792])
    """

    @classmethod
    def drop(cls, x: Tensor, rate: float | Tensor, **options: Any) -> Tensor:
        """`regtorch.alpha_dropout`."""
        return alpha_dropout(x, rate, **options)


class FeatureAlphaDropout(Layer):
    """`torch.nn.FeatureAlphaDropout` whose masks come from an explicit key or generator.

    Alpha dropout of each channel of (N, C, ...) as one. See `regtorch.feature_alpha_dropout`.

    Attributes:
        rate: the probability that a channel is dropped; `p` in PyTorch.
        generator: where a call without a key draws one from.

    Raises:
        ValueError: when called on an input of fewer than 2 dimensions.

    Example:
        >>> import torch, regtorch
        >>> layer = regtorch.nn.FeatureAlphaDropout(0.5)
        >>> layer(torch.zeros(1, 3, 2), key=regtorch.key(0))[0, :, 0]
        tensor([-0.7792, -0.7792,  0.7792])
    """

    @classmethod
    def drop(cls, x: Tensor, rate: float | Tensor, **options: Any) -> Tensor:
        """`regtorch.feature_alpha_dropout`."""
        return feature_alpha_dropout(x, rate, **options)
