"""Gaussian noise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regtorch._dropout.gaussian import (
    check_noise_rate,
    check_stddev,
    gaussian_dropout,
    gaussian_noise,
)
from regtorch.nn._layer import GeneratorModule, Layer


class GaussianDropout(Layer):
    """Multiplies by normal variates in training; mean and variance are those of dropout.

    See `regtorch.gaussian_dropout`.

    Attributes:
        rate: that of the dropout it resembles. A number or a 0-d tensor may be assigned to it at
            any step.
        generator: where a call without a key draws one from.

    Raises:
        ValueError: `rate` is not at least 0 and below 1.

    JAX:
        `regjax.gaussian_dropout(x, rate, key=key, deterministic=not training)` gives the same
        result bit for bit. `keras.layers.GaussianDropout(rate)` draws other variates.

    Example:
        >>> import torch, regtorch
        >>> layer = regtorch.nn.GaussianDropout(0.2)
        >>> layer(torch.ones(4), key=regtorch.key(0))
        tensor([1.8113, 2.0126, 0.7832, 0.9607])
    """

    def __init__(self, rate: float = 0.5, *, generator: torch.Generator | None = None) -> None:
        super().__init__(rate, generator=generator)
        check_noise_rate(rate)

    @classmethod
    def drop(cls, x: Tensor, rate: float | Tensor, **options: Any) -> Tensor:
        """`regtorch.gaussian_dropout`."""
        return gaussian_dropout(x, rate, **options)


class GaussianNoise(GeneratorModule):
    """Adds normal variates in training.

    See `regtorch.gaussian_noise`.

    Attributes:
        stddev: the standard deviation of what is added. A number or a 0-d tensor may be assigned to
            it at any step.
        generator: where a call without a key draws one from.

    Raises:
        ValueError: `stddev` is negative, infinite or NaN.

    JAX:
        `regjax.gaussian_noise(x, stddev, key=key, deterministic=not training)` gives the same
        result bit for bit. `keras.layers.GaussianNoise(stddev)` draws other variates.

    Example:
        >>> import torch, regtorch
        >>> layer = regtorch.nn.GaussianNoise(0.1)
        >>> layer(torch.zeros(4), key=regtorch.key(0))
        tensor([ 0.1623,  0.2025, -0.0434, -0.0079])
    """

    def __init__(self, stddev: float, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.stddev = check_stddev(stddev)
        self.generator = generator

    def forward(self, x: Tensor, *, key: Tensor | torch.Generator | None = None) -> Tensor:
        """Adds noise in training, nothing in evaluation; `key` comes before the generator."""
        key = self.generator if key is None else key
        return gaussian_noise(x, self.stddev, key=key, deterministic=not self.training)

    def extra_repr(self) -> str:
        """What stands between the parentheses of the printed module."""
        return f"stddev={self.stddev}"
