"""Dropout of blocks of feature maps."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from regshared.checks import check_bool
from regtorch._checks import check_tensor
from regtorch._dropout.drop_block import check_block_size, check_gamma_scale, drop_block
from regtorch.nn._layer import Layer


class BlockLayer(Layer):
    """Dropout of blocks, of inputs that have as many spatial dimensions as the layer knows.

    Attributes:
        rate: about the share of elements that are zeroed; `p` in torchvision.
        block_size: how many elements a block has along each spatial dimension.
        share_channels: whether all channels of a row have one mask.
        gamma_scale: a factor of the probability that a block starts.
        scale_by_keep: whether elements that are kept are scaled.
        with_noise: whether dropped elements become normal variates, not 0.
        generator: where a call without a key draws one from.
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
        """`regtorch.drop_block`, of as many dimensions as the layer is made for."""
        if check_tensor("x", x).ndim != cls.spatial_dims + 2:
            raise ValueError(
                f"x must be {cls.spatial_dims + 2}-D for {cls.__name__}, with the batch first and "
                f"the channels second; got a {x.ndim}-D input of shape {tuple(x.shape)}."
            )
        return drop_block(x, rate, **options)

    def options(self) -> dict[str, Any]:
        """The shape of the blocks, and what becomes of them and of the rest."""
        return {
            "block_size": self.block_size,
            "share_channels": self.share_channels,
            "gamma_scale": self.gamma_scale,
            "scale_by_keep": self.scale_by_keep,
            "with_noise": self.with_noise,
        }

    def extra_repr(self) -> str:
        """What stands between the parentheses of the printed module."""
        shown = {"share_channels": False, "gamma_scale": 1.0, "scale_by_keep": True}
        shown |= {"with_noise": False}
        others = [
            f", {name}={getattr(self, name)}"
            for name in shown
            if getattr(self, name) != shown[name]
        ]
        return f"{super().extra_repr()}, block_size={self.block_size}{''.join(others)}"


class DropBlock1d(BlockLayer):
    """DropBlock of (N, C, L), whose masks come from an explicit key or generator.

    In training it zeroes runs of `block_size` neighbouring elements. See `regtorch.drop_block`.

    Attributes:
        rate: about the share of elements that are zeroed.
        block_size: how many elements a block has.
        share_channels: whether all channels of a row have one mask.
        gamma_scale: a factor of the probability that a block starts.
        scale_by_keep: whether elements that are kept are scaled.
        with_noise: whether dropped elements become normal variates, not 0.
        generator: where a call without a key draws one from.

    Raises:
        ValueError: when called on an input that is not 3-D.

    Example:
        >>> import torch, regtorch
        >>> layer = regtorch.nn.DropBlock1d(0.2, block_size=3)
        >>> (layer(torch.ones(1, 1, 16), key=regtorch.key(1)) > 0).int().tolist()
        [[[1, 1, 1, 1, 1, 1, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1]]]
    """

    spatial_dims: ClassVar[int] = 1


class DropBlock2d(BlockLayer):
    """`torchvision.ops.DropBlock2d` whose masks come from an explicit key or generator.

    In training it zeroes squares of `block_size` by `block_size` elements of (N, C, H, W). See
    `regtorch.drop_block`.

    Attributes:
        rate: about the share of elements that are zeroed; `p` in torchvision.
        block_size: how many elements a block has along each spatial dimension.
        share_channels: whether all channels of a row have one mask.
        gamma_scale: a factor of the probability that a block starts.
        scale_by_keep: whether elements that are kept are scaled.
        with_noise: whether dropped elements become normal variates, not 0.
        generator: where a call without a key draws one from.

    Raises:
        ValueError: when called on an input that is not 4-D.

    Example:
        >>> import torch, regtorch
        >>> layer = regtorch.nn.DropBlock2d(0.2, block_size=3)
        >>> (layer(torch.ones(1, 1, 6, 6), key=regtorch.key(1)) > 0).int()[0, 0]
        tensor([[1, 1, 1, 1, 1, 1],
                [1, 1, 0, 0, 0, 1],
                [1, 1, 0, 0, 0, 1],
                [1, 1, 0, 0, 0, 1],
                [1, 1, 1, 1, 1, 1],
                [1, 1, 1, 1, 1, 1]], dtype=torch.int32)
    """

    spatial_dims: ClassVar[int] = 2


class DropBlock3d(BlockLayer):
    """`torchvision.ops.DropBlock3d` whose masks come from an explicit key or generator.

    In training it zeroes cubes of `block_size` elements a side of (N, C, D, H, W). See
    `regtorch.drop_block`.

    Attributes:
        rate: about the share of elements that are zeroed; `p` in torchvision.
        block_size: how many elements a block has along each spatial dimension.
        share_channels: whether all channels of a row have one mask.
        gamma_scale: a factor of the probability that a block starts.
        scale_by_keep: whether elements that are kept are scaled.
        with_noise: whether dropped elements become normal variates, not 0.
        generator: where a call without a key draws one from.

    Raises:
        ValueError: when called on an input that is not 5-D.

    Example:
        >>> import torch, regtorch
        >>> layer = regtorch.nn.DropBlock3d(0.2, block_size=3)
        >>> layer(torch.ones(2, 4, 5, 5, 5), key=regtorch.key(0)).shape
        torch.Size([2, 4, 5, 5, 5])
    """

    spatial_dims: ClassVar[int] = 3
