"""Dropout for sequences."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regshared.checks import check_integer
from regtorch._dropout.variational import variational_dropout
from regtorch.nn._layer import Layer


class VariationalDropout(Layer):
    """Dropout with one mask for all timesteps, also called locked dropout.

    It stands before, between and behind recurrent layers; see `regtorch.variational_dropout`, also
    for the state inside a recurrence.

    Attributes:
        rate: the probability that an element is zeroed.
        time_axis: the dimension of time: 1 of (batch, time, features), 0 of (time, batch,
            features), which `torch.nn.LSTM` takes unless it is `batch_first`.
        generator: where a call without a key draws one from.

    Raises:
        ValueError: when called on an input that has no such dimension.

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
        """`regtorch.variational_dropout`."""
        return variational_dropout(x, rate, **options)

    def options(self) -> dict[str, Any]:
        """The dimension along which one mask is shared."""
        return {"time_axis": self.time_axis}

    def extra_repr(self) -> str:
        """What stands between the parentheses of the printed module."""
        return f"{super().extra_repr()}, time_axis={self.time_axis}"
