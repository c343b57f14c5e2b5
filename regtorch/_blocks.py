"""DropBlock: dropout of contiguous blocks of feature maps."""

from __future__ import annotations

import dataclasses
import math
import operator
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from regtorch._dropout import check_axis, check_inexact, drawn, real_dtype, selected
from regtorch._masks import bernoulli


def drop_block(
    x: Tensor,
    rate: float | Tensor,
    *,
    block_size: int = 7,
    key: Tensor | torch.Generator | None = None,
    deterministic: bool | Tensor = False,
    channel_axis: int = 1,
    share_channels: bool = False,
) -> Tensor:
    """Zeroes blocks of neighbouring elements of feature maps, and scales up what is left.

    Neighbouring elements say nearly the same, so that a feature dropped element by element shines
    through; here it goes in squares, cubes or, along one dimension, runs of `block_size`. Every
    place where a whole block fits starts one with probability

        gamma = rate / block_size**d * prod(size / (size - block_size + 1))

    over the d spatial dimensions: a block covers an element `rate` times on average. As blocks may
    overlap, somewhat fewer elements are zeroed, about `1 - exp(-rate)`. What is left of the whole
    batch is multiplied by elements / elements left, as they are counted: the mean of the mask and
    scale is 1.

    Row n, channel c and the block that starts at s draw from the row-major index of `(n, c, *s)`
    wherever the channels lie, so that NCHW and NHWC have one mask. Nothing but the key is stored
    for the backward pass.

    Args:
        x: floating or complex, the batch first, then the channels and one or more spatial
            dimensions. Of one row, give it a batch dimension of 1.
        rate: about the share of elements that is zeroed, in [0, 1]; a number or a 0-d tensor. At 1
            everything is, as in the whole family.
        block_size: how many elements a block has along each spatial dimension, odd or even. On a
            map that is smaller in some dimension, that dimension's size.
        key: the random key, or a `torch.Generator` from which one is drawn; see `dropout`.
        deterministic: True in evaluation: `x` itself.
        channel_axis: the dimension of the channels, counted from the end if negative.
        share_channels: whether all channels of a row have one mask; each has its own otherwise.

    Returns:
        A tensor of the shape, dtype and device of `x`. If nothing is left, zeros.

    Raises:
        TypeError: as `dropout`, or `block_size` or `channel_axis` is not an integer.
        ValueError: as `dropout`; `block_size` is below 1; `channel_axis` is not a dimension of `x`,
            or the batch's; or `x` has no spatial dimension.

    PyTorch:
        `torchvision.ops.drop_block2d(x, rate, block_size)` and `drop_block3d` draw in this way too,
        for blocks that are odd and fit into the map.

    JAX:
        `regjax.drop_block`, whose channels are last by default: with the same key the same blocks
        of the same rows are zeroed, and the results agree bit for bit.

    Example:
        >>> import torch, regtorch
        >>> images = torch.ones(1, 1, 5, 8)
        >>> y = regtorch.drop_block(images, 0.3, block_size=3, key=regtorch.key(2))
        >>> (y[0, 0] > 0).int()
        tensor([[1, 1, 1, 1, 1, 1, 1, 1],
                [1, 1, 1, 1, 0, 0, 0, 1],
                [0, 0, 0, 1, 0, 0, 0, 1],
                [0, 0, 0, 1, 0, 0, 0, 1],
                [0, 0, 0, 1, 1, 1, 1, 1]], dtype=torch.int32)
        >>> y.max()  # 40 elements / 22 elements left
        tensor(1.8182)

    Source: Ghiasi, Lin, Le, "DropBlock: a regularization method for convolutional networks",
    NeurIPS 2018.
    """
    x = check_inexact(x)
    blocks = _check_blocks(tuple(x.shape), block_size, channel_axis, share_channels)
    return drawn(x, rate, key, deterministic, blocks)


@dataclasses.dataclass(frozen=True)
class _Blocks:
    """Masks of blocks, and the scale by what they leave.

    Attributes:
        size: how many elements a block has along each spatial dimension.
        channel_axis: the dimension of the channels, counted from 0.
        share_channels: whether all channels of a row have one mask.
    """

    size: int
    channel_axis: int
    share_channels: bool
    name: ClassVar[str] = "drop_block"

    def keep(self, x: Tensor, key: Tensor, rate: float | Tensor) -> Tensor:
        """Draws where blocks start, and spreads them."""
        dims = [0, self.channel_axis]
        dims += [dim for dim in range(x.ndim) if dim not in dims]
        batch, channels, *sizes = (x.shape[dim] for dim in dims)
        starts = [size - self.size + 1 for size in sizes]
        shape = (batch, 1 if self.share_channels else channels, *starts)
        keep = bernoulli(key, _start_keep_prob(rate, self.size, sizes), shape)
        for dim in range(2, keep.ndim):
            keep = _spread(keep, dim, self.size)
        return keep.movedim(1, self.channel_axis)

    def apply(self, x: Tensor, keep: Tensor, rate: float | Tensor) -> Tensor:
        """Masks, and scales by elements / elements kept."""
        del rate
        real = real_dtype(x.dtype)
        # Two exact integers, rounded where they are large, and one division; a number divided by a
        # tensor would be two, as PyTorch takes the reciprocal first.
        kept, size = keep.sum().to(real), torch.full((), keep.numel(), dtype=real, device=x.device)
        return selected(keep, x, torch.where(kept > 0, size / kept, 0))

    def slope(self) -> _Blocks:
        """The same: linear as it is."""
        return self


def _start_keep_prob(rate: float | Tensor, block: int, sizes: list[int]) -> float | Tensor:
    """1 - gamma: how probably no block starts at a place."""
    gamma_of_1 = math.prod([size / (block * (size - block + 1)) for size in sizes if size])
    if isinstance(rate, Tensor):
        single = rate.to(torch.float32)
        return torch.where(single >= 1, 0, 1 - single * gamma_of_1)
    return 1 - rate * gamma_of_1


def _spread(keep: Tensor, dim: int, size: int) -> Tensor:
    """Each False becomes `size` of them along one dimension, from its place on."""
    if size == 1:
        return keep  # which may be empty
    ends = [0, 0] * (keep.ndim - 1 - dim) + [size - 1, size - 1]  # the last dimension comes first
    return pad(keep, ends, value=True).unfold(dim, size, 1).all(-1)


def _check_blocks(
    shape: tuple[int, ...], block_size: int, channel_axis: int, share_channels: bool
) -> _Blocks:
    size, ndim = check_block_size(block_size), len(shape)
    axis = check_axis("channel_axis", channel_axis, ndim)
    if ndim < 3 or axis == 0:
        raise ValueError(
            "x must have a batch dimension, which comes first, a channel dimension and at least "
            f"one spatial dimension; got shape {shape} with channel_axis={channel_axis}."
        )
    # Of an empty map no block is left, but its mask still has a shape.
    sizes = [max(1, length) for dim, length in enumerate(shape) if dim not in (0, axis)]
    return _Blocks(min(size, *sizes), axis, bool(share_channels))


def check_block_size(block_size: int) -> int:
    """Returns the number of elements as a Python integer.

    Raises:
        TypeError: it is not an integer.
        ValueError: it is below 1.
    """
    size = operator.index(block_size)
    if size < 1:
        raise ValueError(f"block_size must be at least 1; got {block_size}.")
    return size
