"""Modules of Gaussian noise."""

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
    """Multiplication by normal variates with dropout's mean and variance, in training.

    See `regtorch.gaussian_dropout`. The constructor raises a ValueError for a `rate` outside [0,
    1).

    Example:
        >>> import torch, regtorch
        >>> regtorch.nn.GaussianDropout(0.2)(torch.ones(4), key=regtorch.key(0))
        tensor([1.8113, 2.0126, 0.7832, 0.9607])
    """

    def __init__(self, rate: float = 0.5, *, generator: torch.Generator | None = None) -> None:
        super().__init__(rate, generator=generator)
        check_noise_rate(rate)

    @classmethod
    def drop(cls, x: Tensor, rate: float | Tensor, **options: Any) -> Tensor:
        return gaussian_dropout(x, rate, **options)


class GaussianNoise(GeneratorModule):
    """Addition of normal variates with standard deviation `stddev`, in training.

    See `regtorch.gaussian_noise`. The constructor raises a ValueError for a negative, infinite or
    NaN `stddev`. A number or a 0-d tensor may be assigned to it at any step.

    Example:
        >>> import torch, regtorch
        >>> regtorch.nn.GaussianNoise(0.1)(torch.zeros(4), key=regtorch.key(0))
        tensor([ 0.1623,  0.2025, -0.0434, -0.0079])
    """

    def __init__(self, stddev: float, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.stddev = check_stddev(stddev)
        self.generator = generator

    def forward(self, x: Tensor, *, key: Tensor | torch.Generator | None = None) -> Tensor:
        key = self.generator if key is None else key
        return gaussian_noise(x, self.stddev, key=key, deterministic=not self.training)

    def extra_repr(self) -> str:
        return f"stddev={self.stddev}"
