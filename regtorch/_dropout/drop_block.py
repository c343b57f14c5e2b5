"""DropBlock: dropout of contiguous blocks of feature maps."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from regshared.checks import check_bool, check_integer
from regshared.spellings import explain_names
from regtorch._checks import check_number
from regtorch._dropout.core import (
    apply_dropout,
    check_axis,
    check_flag,
    check_inexact,
    check_real,
    is_number,
    mask_and_scale,
    real_dtype,
    require_key,
    where_kept,
)
from regtorch._dropout.dtensor import is_dtensor, on_local_part
from regtorch._random.bernoulli import EXACT, check_probability
from regtorch._random.keys import key_words
from regtorch._random.normal import normal
from regtorch._random.rounding import rounded
from regtorch._random.threefry import threefry2x32


@explain_names
def drop_block(
    x: Tensor,
    rate: float | Tensor,
    *,
    block_size: int = 7,
    key: Tensor | torch.Generator | None = None,
    deterministic: bool | Tensor = False,
    channel_axis: int = 1,
    share_channels: bool = False,
    gamma_scale: float = 1.0,
    scale_by_keep: bool = True,
    with_noise: bool = False,
) -> Tensor:
    """Zero blocks of neighboring elements of feature maps, and scale up the others.

    Neighboring elements carry nearly the same information, so that a feature can still be read when
    its elements are dropped one by one; this drops squares, cubes or, along one dimension, runs of
    `block_size`. Every place where a whole block fits starts one with probability

        gamma = rate / block_size**d * prod(size / (size - block_size + 1))

    over the d spatial dimensions: an element is covered by `rate` blocks on average. As blocks may
    overlap, somewhat fewer elements are zeroed, about `1 - exp(-rate)`. The other elements of the
    whole batch are multiplied by elements / kept elements, as counted: the mean of mask times scale
    is 1.

    Row n, channel c and the block that starts at s draw from the row-major index of `(n, c, *s)`
    wherever the channels lie, so that NCHW and NHWC have the same mask. Only the key is stored for
    the backward pass. The other errors are those of `dropout`.

    Args:
        x: Floating or complex, the batch first, with channels and one or more spatial dimensions.
            Give a single row a batch dimension of 1.
        rate: About the share of zeroed elements, in [0, 1]; a number or a 0-d tensor. At 1 every
            element is zeroed.
        block_size: The length of a block along each spatial dimension, odd or even. It is capped at
            the size of the smallest spatial dimension.
        key: See `dropout`.
        deterministic: See `dropout`.
        channel_axis: The dimension of the channels, counted from the end if negative.
        share_channels: Whether all channels of a row share one mask.
        gamma_scale: A factor of gamma, finite and at least 0. A gamma above 1 counts as 1, and a
            rate of 1 drops everything.
        scale_by_keep: False leaves kept elements unscaled, and the mean falls.
        with_noise: Whether a dropped element becomes a standard normal variate instead of 0. Kept
            elements are then not scaled. The variates come from a separate key derived from `key`;
            element `(n, c, *s)` has the same one wherever the channels lie.

    Returns:
        A tensor of the shape, dtype and device of `x`; zeros if nothing is kept.

    Raises:
        TypeError: `block_size` or `channel_axis` is not an integer; `gamma_scale` is not a real
            number; or `x` is complex and `with_noise` is set.
        ValueError: `block_size` is below 1; `gamma_scale` is negative, infinite or NaN;
            `channel_axis` is not a dimension of `x`, or is the batch dimension; or `x` has no
            spatial dimension.

    Note (PyTorch):
        `torchvision.ops.drop_block2d(x, rate, block_size)` and `drop_block3d` draw in this way too,
        for odd blocks that fit into the map. `timm.layers.drop_block_2d` (1.0.29) has
        `gamma_scale`, `scale_by_keep`, `with_noise` and, on by default, `couple_channels`
        (`share_channels`); there a block may start at any element and is cut off at the border,
        masks and noise come from the global generator, and channels that share a mask share their
        noise.

    Note (JAX):
        In `regjax.drop_block` the channels are last by default.

    Example:
        >>> import torch, regtorch
        >>> y = regtorch.drop_block(torch.ones(1, 1, 4, 8), 0.4, block_size=2, key=regtorch.key(2))
        >>> bool((y == 0).any()), round(y.mean().item(), 5)
        (True, 1.0)

    References:
        Ghiasi, Lin, Le, "DropBlock: a regularization method for convolutional networks", NeurIPS
        2018.
    """
    x = check_inexact(x)
    blocks = _check_blocks(tuple(x.shape), block_size, channel_axis, share_channels)
    with_noise = check_bool("with_noise", with_noise)
    blocks = dataclasses.replace(
        blocks,
        gamma_scale=check_gamma_scale(gamma_scale),
        scale_by_keep=check_bool("scale_by_keep", scale_by_keep) and not with_noise,
    )
    if with_noise:
        return _noisy(x, rate, key, deterministic, blocks)
    return apply_dropout(blocks, x, rate, key, deterministic)


@dataclasses.dataclass(frozen=True)
class _Blocks:
    """A mask of blocks of length `size`, and the scale computed from the count of kept elements."""

    size: int
    channel_axis: int
    share_channels: bool
    gamma_scale: float = 1.0
    scale_by_keep: bool = True
    name: str = "drop_block"

    def keep(
        self, x: Tensor, key: Tensor, rate: float | Tensor, given: Tensor | None = None
    ) -> Tensor:
        batch, channels, *sizes = (x.shape[dim] for dim in self.order(x.ndim))
        starts = [size - self.size + 1 for size in sizes]
        shape = (batch, 1 if self.share_channels else channels, *starts)
        keep_prob = _start_keep_prob(rate, self.size, sizes, self.gamma_scale)
        keep = EXACT.draw(key, keep_prob, shape)
        for dim in range(2, keep.ndim):
            keep = _spread(keep, dim, self.size)
        return keep.movedim(1, self.channel_axis)

    def order(self, ndim: int) -> tuple[int, ...]:
        """Return the dimensions with channels second, the order in which elements are numbered."""
        first = (0, self.channel_axis)
        return (*first, *(dim for dim in range(ndim) if dim not in first))

    def apply(self, x: Tensor, keep: Tensor, rate: float | Tensor) -> Tensor:
        del rate
        if not self.scale_by_keep:
            return where_kept(keep, x, 1.0)
        real = real_dtype(x.dtype)
        # One division of two integers, exact unless they are large. PyTorch divides a number by a
        # tensor in two steps, through the reciprocal.
        kept, size = keep.sum().to(real), torch.full((), keep.numel(), dtype=real, device=x.device)
        return where_kept(keep, x, torch.where(kept > 0, size / kept, 0))

    def slope(self) -> _Blocks:
        return self


@dataclasses.dataclass(frozen=True)
class _Dropped:
    """The complement of a mask of blocks: it keeps the dropped elements, unscaled."""

    blocks: _Blocks
    name: str = "drop_block"

    def keep(
        self, x: Tensor, key: Tensor, rate: float | Tensor, given: Tensor | None = None
    ) -> Tensor:
        return ~self.blocks.keep(x, key, rate)

    def apply(self, x: Tensor, keep: Tensor, rate: float | Tensor) -> Tensor:
        return self.blocks.apply(x, keep, rate)

    def slope(self) -> _Dropped:
        return self


def _noisy(
    x: Tensor,
    rate: float | Tensor,
    key: Tensor | torch.Generator | None,
    deterministic: bool | Tensor,
    blocks: _Blocks,
) -> Tensor:
    """Apply DropBlock with noise in place of zeros: the sum of two masked terms, one of them 0."""
    x = check_real(x, "noise", "Leave with_noise out, or drop in x.real and x.imag.")
    rate, flag = check_probability("rate", rate), check_flag(deterministic)
    if flag is True or is_number(rate, 0):
        return x
    if is_dtensor(x):
        arguments = rate, key, flag, blocks
        return on_local_part(lambda local, _: _noisy(local, *arguments), x, only_whole=blocks.name)
    one_key = require_key(key).to(x.device)
    noise = _noise(x, one_key, blocks.order(x.ndim))
    if not is_number(rate, 1):
        noise = mask_and_scale(_Dropped(blocks), noise, one_key, rate)
    noisy = apply_dropout(blocks, x, rate, one_key, flag) + noise
    return torch.where(flag, x, noisy) if isinstance(flag, Tensor) else noisy


def _noise(x: Tensor, key: Tensor, order: tuple[int, ...]) -> Tensor:
    """Return variates for all elements, numbered in an order of the dimensions."""
    # The key is the block of the last counter, which no mask has an element for.
    last = torch.full((), -1, dtype=torch.int32, device=key.device)
    own_key = torch.stack(threefry2x32(key_words(key), (last, last))).view(torch.uint32)
    variates = normal(own_key, tuple(x.shape[dim] for dim in order), real_dtype(x.dtype))
    return variates.permute(*sorted(range(x.ndim), key=order.__getitem__)).to(x.dtype)


def _start_keep_prob(
    rate: float | Tensor, block: int, sizes: list[int], gamma_scale: float = 1.0
) -> float | Tensor:
    """Return 1 - gamma, the probability that no block starts at a place."""
    gamma_of_1 = math.prod([size / (block * (size - block + 1)) for size in sizes if size])
    gamma_of_1 *= gamma_scale
    if isinstance(rate, Tensor):
        single = rate.to(torch.float32)
        some = torch.clamp(1 - rounded(single * gamma_of_1), min=0)  # NaN stays NaN
        return torch.where(single >= 1, 0, some)
    return max(0.0, 1 - rate * gamma_of_1)


def _spread(keep: Tensor, dim: int, size: int) -> Tensor:
    """Expand each False to `size` of them along one dimension, from its place on."""
    if size == 1:
        return keep  # it may be empty
    ends = [0, 0] * (keep.ndim - 1 - dim) + [size - 1, size - 1]  # the last dimension comes first
    return pad(keep, ends, value=True).unfold(dim, size, 1).all(-1)


def _check_blocks(
    shape: tuple[int, ...], block_size: int, channel_axis: int, share_channels: bool
) -> _Blocks:
    size, ndim = check_block_size(block_size), len(shape)
    axis = check_axis("channel_axis", channel_axis, ndim)
    if ndim < 3 or axis == 0:
        raise ValueError(
            "x must have a batch dimension first, a channel dimension and at least one spatial "
            f"dimension; got shape {shape} with channel_axis={channel_axis}."
        )
    # An empty map has no block, but its mask still has a shape.
    sizes = [max(1, length) for dim, length in enumerate(shape) if dim not in (0, axis)]
    return _Blocks(min(size, *sizes), axis, check_bool("share_channels", share_channels))


def check_gamma_scale(gamma_scale: float) -> float:
    return check_number("gamma_scale", gamma_scale, minimum=0)


def check_block_size(block_size: int) -> int:
    return check_integer("block_size", block_size, minimum=1)
