"""Module of stochastic depth."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from regshared.checks import check_bool
from regtorch._dropout.drop_path import check_mode, drop_path
from regtorch.nn._layer import Layer


class DropPath(Layer):
    """Stochastic depth for the output of a residual branch: `h + drop_path(branch(h))`.

    `regtorch.drop_path` describes the attributes, and `regtorch.depth_rates` returns the rates of a
    stack of layers. The constructor raises a ValueError for a `mode` other than "row" and "batch".

    Note (PyTorch):
        `timm.layers.DropPath(rate, scale_by_keep)`, whose `drop_prob` is also 0 by default, and
        `torchvision.ops.StochasticDepth(rate, mode)`.

    Example:
        >>> import torch, regtorch
        >>> regtorch.nn.DropPath(0.5)(torch.ones(4, 2), key=regtorch.key(0))[:, 0]
        tensor([0., 0., 2., 2.])
    """

    def __init__(
        self,
        rate: float = 0.0,
        *,
        mode: Literal["row", "batch"] = "row",
        scale_by_keep: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(rate, generator=generator)
        self.mode = check_mode(mode)
        self.scale_by_keep = check_bool("scale_by_keep", scale_by_keep)

    @classmethod
    def drop(cls, x: Tensor, rate: float | Tensor, **options: Any) -> Tensor:
        return drop_path(x, rate, **options)

    def options(self) -> dict[str, Any]:
        return {"mode": self.mode, "scale_by_keep": self.scale_by_keep}

    def extra_repr(self) -> str:
        mode = "" if self.mode == "row" else f", mode={self.mode!r}"
        scale = "" if self.scale_by_keep else ", scale_by_keep=False"
        return super().extra_repr() + mode + scale
