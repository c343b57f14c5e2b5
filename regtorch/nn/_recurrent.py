"""Module of variational dropout, for sequences."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regshared.checks import check_integer
from regtorch._dropout.variational import variational_dropout
from regtorch.nn._layer import Layer


class VariationalDropout(Layer):
    """Dropout with one mask for all timesteps, also called locked dropout.

    Use it before, between and after recurrent layers; for the state inside a recurrence, see
    `regtorch.variational_dropout`. The `time_axis` is 1 for (batch, time, features), and 0 for
    (time, batch, features), which `torch.nn.LSTM` takes unless it is `batch_first`. A call on an
    input without this dimension raises a ValueError.

    Example:
        >>> import torch, regtorch
        >>> layer = regtorch.nn.VariationalDropout(0.5)
        >>> layer(torch.ones(1, 2, 4), key=regtorch.key(0))
        tensor([[[0., 0., 2., 2.],
                 [0., 0., 2., 2.]]])
    """

    def __init__(
        self,
        rate: float = 0.5,
        *,
        time_axis: int = 1,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(rate, generator=generator)
        self.time_axis = check_integer("time_axis", time_axis)

    @classmethod
    def drop(cls, x: Tensor, rate: float | Tensor, **options: Any) -> Tensor:
        return variational_dropout(x, rate, **options)

    def options(self) -> dict[str, Any]:
        return {"time_axis": self.time_axis}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, time_axis={self.time_axis}"
