"""Modules of DropBlock."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from regshared.checks import check_bool
from regtorch._checks import check_tensor
from regtorch._dropout.drop_block import check_block_size, check_gamma_scale, drop_block
from regtorch.nn._layer import Layer


class BlockLayer(Layer):
    """DropBlock for inputs with the number of spatial dimensions of the class.

    The attributes are the arguments of `regtorch.drop_block`, and `generator`.
    """

    spatial_dims: ClassVar[int]

    def __init__(
        self,
        rate: float = 0.1,
        block_size: int = 7,
        *,
        share_channels: bool = False,
        gamma_scale: float = 1.0,
        scale_by_keep: bool = True,
        with_noise: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(rate, generator=generator)
        self.block_size = check_block_size(block_size)
        self.share_channels = check_bool("share_channels", share_channels)
        self.gamma_scale = check_gamma_scale(gamma_scale)
        self.scale_by_keep = check_bool("scale_by_keep", scale_by_keep)
        self.with_noise = check_bool("with_noise", with_noise)

    @classmethod
    def drop(cls, x: Tensor, rate: float | Tensor, **options: Any) -> Tensor:
        if check_tensor("x", x).ndim != cls.spatial_dims + 2:
            raise ValueError(
                f"x must be {cls.spatial_dims + 2}-D for {cls.__name__}, with the batch first and "
                f"the channels second; got a {x.ndim}-D input of shape {tuple(x.shape)}."
            )
        return drop_block(x, rate, **options)

    def options(self) -> dict[str, Any]:
        return {
            "block_size": self.block_size,
            "share_channels": self.share_channels,
            "gamma_scale": self.gamma_scale,
            "scale_by_keep": self.scale_by_keep,
            "with_noise": self.with_noise,
        }

    def extra_repr(self) -> str:
        shown = {"share_channels": False, "gamma_scale": 1.0, "scale_by_keep": True}
        shown |= {"with_noise": False}
        others = [
            f", {name}={getattr(self, name)}"
            for name in shown
            if getattr(self, name) != shown[name]
        ]
        return f"{super().extra_repr()}, block_size={self.block_size}{''.join(others)}"


class DropBlock1d(BlockLayer):
    """DropBlock for (N, C, L), with masks from an explicit key or generator.

    In training it zeroes runs of `block_size` neighboring elements. The attributes are the
    arguments of `regtorch.drop_block`, and `generator`. A call on an input that is not 3-D raises a
    ValueError.

    Example:
        >>> import torch, regtorch
        >>> layer = regtorch.nn.DropBlock1d(0.2, block_size=3)
        >>> (layer(torch.ones(1, 1, 16), key=regtorch.key(1)) > 0).int().tolist()
        [[[1, 1, 1, 1, 1, 1, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1]]]
    """

    spatial_dims: ClassVar[int] = 1


class DropBlock2d(BlockLayer):
    """`torchvision.ops.DropBlock2d` with masks from an explicit key or generator.

    It zeroes squares of elements of (N, C, H, W), and is otherwise like `DropBlock1d`; `rate` is
    `p` in torchvision. A call on an input that is not 4-D raises a ValueError.

    Example:
        >>> import torch, regtorch
        >>> layer = regtorch.nn.DropBlock2d(0.2, block_size=3)
        >>> (layer(torch.ones(1, 1, 6, 6), key=regtorch.key(1)) > 0).int()[0, 0, 1]
        tensor([1, 1, 0, 0, 0, 1], dtype=torch.int32)
    """

    spatial_dims: ClassVar[int] = 2


class DropBlock3d(BlockLayer):
    """`torchvision.ops.DropBlock3d` with masks from an explicit key or generator.

    It zeroes cubes of elements of (N, C, D, H, W); see `DropBlock2d`. A call on an input that is
    not 5-D raises a ValueError.

    Example:
        >>> import torch, regtorch
        >>> layer = regtorch.nn.DropBlock3d(0.2, block_size=3)
        >>> layer(torch.ones(2, 4, 5, 5, 5), key=regtorch.key(0)).shape
        torch.Size([2, 4, 5, 5, 5])
    """

    spatial_dims: ClassVar[int] = 3
