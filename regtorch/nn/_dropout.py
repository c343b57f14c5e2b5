"""Module of elementwise dropout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from regshared.checks import check_integers
from regtorch._dropout.core import dropout
from regtorch.nn._layer import Layer


class Dropout(Layer):
    """`torch.nn.Dropout` with masks from an explicit key or generator.

    In training it zeroes each element with probability `rate` and divides the others by `1 - rate`;
    after `eval()` it returns its input itself. See `regtorch.dropout`.

    Attributes:
        rate: The dropout rate; `p` in `torch.nn.Dropout`.
        broadcast_dims: Dimensions along which one mask is shared.
        generator: The source of the key of a call without one.

    Note (PyTorch):
        `torch.nn.Dropout(p=rate)` draws from the global generator.

    Example:
        >>> import torch, regtorch
        >>> layer = regtorch.nn.Dropout(0.5)
        >>> layer(torch.arange(1.0, 7.0), key=regtorch.key(0))
        tensor([ 0.,  0.,  6.,  8.,  0., 12.])
        >>> layer = regtorch.nn.Dropout(0.1, generator=torch.Generator().manual_seed(0))
        >>> torch.nn.Sequential(torch.nn.Linear(4, 8), layer)(torch.ones(2, 4)).shape
        torch.Size([2, 8])
    """

    def __init__(
        self,
        rate: float = 0.5,
        *,
        broadcast_dims: Sequence[int] = (),
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(rate, generator=generator)
        self.broadcast_dims = check_integers("broadcast_dims", broadcast_dims)

    @classmethod
    def drop(cls, x: Tensor, rate: float | Tensor, **options: Any) -> Tensor:
        return dropout(x, rate, **options)

    def options(self) -> dict[str, Any]:
        return {"broadcast_dims": self.broadcast_dims}

    def extra_repr(self) -> str:
        shared = f", broadcast_dims={self.broadcast_dims}" if self.broadcast_dims else ""
        return super().extra_repr() + shared
