"""DropBlock: dropout of contiguous blocks of feature maps."""

from __future__ import annotations

import dataclasses
import math
import operator
from typing import TYPE_CHECKING, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from regjax._dropout import check_axis, check_inexact, drawn, real_dtype, selected
from regjax._masks import bernoulli

if TYPE_CHECKING:
    from jax.sharding import NamedSharding
    from jax.typing import ArrayLike
    from jaxtyping import Array, Bool, Float, Inexact

    from regjax._keys import KeyLike


def drop_block(
    x: Inexact[ArrayLike, "*shape"],
    rate: ArrayLike,
    *,
    block_size: int = 7,
    key: KeyLike | None = None,
    deterministic: ArrayLike = False,
    channel_axis: int = -1,
    share_channels: bool = False,
) -> Inexact[Array, "*shape"]:
    """Zeroes blocks of neighbouring elements of feature maps, and scales up what is left.

    Neighbouring elements say nearly the same, so that a feature dropped element by element shines
    through; here it goes in squares, cubes or, along one dimension, runs of `block_size`. Every
    place where a whole block fits starts one with probability

        gamma = rate / block_size**d * prod(size / (size - block_size + 1))

    over the d spatial dimensions: a block covers an element `rate` times on average. As blocks may
    overlap, somewhat fewer elements are zeroed, about `1 - exp(-rate)`. What is left of the whole
    batch is multiplied by elements / elements left, as they are counted, over all devices where
    the batch is shared out: the mean of the mask and scale is 1.

    Row n, channel c and the block that starts at s draw from the row-major index of `(n, c, *s)`
    wherever the channels lie, so that NCHW and NHWC have one mask. Nothing but the key is stored
    for the backward pass.

    Args:
        x: floating or complex, the batch first, then one or more spatial dimensions and the
            channels. Of one row, give it a batch dimension of 1.
        rate: about the share of elements that is zeroed, in [0, 1]; a number or a traced scalar.
            At 1 everything is, as in the whole family.
        block_size: how many elements a block has along each spatial dimension, odd or even. On a
            map that is smaller in some dimension, that dimension's size.
        key: the random key; see `dropout`.
        deterministic: True in evaluation: `x` itself.
        channel_axis: the dimension of the channels, counted from the end if negative.
        share_channels: whether all channels of a row have one mask; each has its own otherwise.

    Returns:
        An array of the shape, dtype and sharding of `x`. If nothing is left, zeros.

    Raises:
        TypeError: as `dropout`, or `block_size` or `channel_axis` is not an integer.
        ValueError: as `dropout`; `block_size` is below 1; `channel_axis` is not a dimension of `x`,
            or the batch's; `x` has no spatial dimension; or the mask has 2**32 elements or more,
            which are not counted.

    PyTorch:
        `torchvision.ops.drop_block2d(x, rate, block_size)` and `drop_block3d` draw in this way too,
        for blocks that are odd and fit into the map. `regtorch.drop_block`, whose channels are
        first by default: with the same key the same blocks of the same rows are zeroed, and the
        results agree bit for bit.

    Example:
        >>> import jax, jax.numpy as jnp, regjax
        >>> images = jnp.ones((1, 5, 8, 1))
        >>> y = regjax.drop_block(images, 0.3, block_size=3, key=jax.random.key(2))
        >>> (y[0, :, :, 0] > 0).astype(int)
        Array([[1, 1, 1, 1, 1, 1, 1, 1],
               [1, 1, 1, 1, 0, 0, 0, 1],
               [0, 0, 0, 1, 0, 0, 0, 1],
               [0, 0, 0, 1, 0, 0, 0, 1],
               [0, 0, 0, 1, 1, 1, 1, 1]], dtype=int32)
        >>> y.max()  # 40 elements / 22 elements left
        Array(1.8181819, dtype=float32)

        Each row scaled by its own count, as under `vmap` each row is a batch:

        >>> def row(x, key):
        ...     return regjax.drop_block(x[None], 0.3, block_size=3, key=key)[0]
        >>> keys = jax.random.split(jax.random.key(0), 2)
        >>> jax.vmap(row)(jnp.ones((2, 8, 8, 3)), keys).shape
        (2, 8, 8, 3)

    Source: Ghiasi, Lin, Le, "DropBlock: a regularization method for convolutional networks",
    NeurIPS 2018.
    """
    x = check_inexact(x)
    blocks = _check_blocks(x.shape, block_size, channel_axis, share_channels)
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

    def keep(
        self, x: Inexact[Array, "*shape"], key: KeyLike, rate: float | Float[Array, ""]
    ) -> Bool[Array, ...]:
        """Draws where blocks start, and spreads them."""
        dims = [0, self.channel_axis]
        dims += [dim for dim in range(x.ndim) if dim not in dims]
        batch, channels, *sizes = (x.shape[dim] for dim in dims)
        starts = [size - self.size + 1 for size in sizes]
        shape = (batch, 1 if self.share_channels else channels, *starts)
        keep_prob = _start_keep_prob(rate, self.size, sizes)
        keep = bernoulli(key, keep_prob, shape, out_sharding=self._layout(x))
        for dim in range(2, keep.ndim):
            keep = _spread(keep, dim, self.size)
        return jnp.moveaxis(keep, 1, self.channel_axis)

    def _layout(self, x: Inexact[Array, "*shape"]) -> NamedSharding | None:
        """Rows and channels lie where those of `x` do; blocks reach over the borders of shards."""
        sharding = jax.typeof(x).sharding
        rows, channels = sharding.spec[0], sharding.spec[self.channel_axis]
        if self.share_channels:
            channels = None
        if rows is None and channels is None:
            return None
        return sharding.update(spec=PartitionSpec(rows, channels))

    def apply(
        self, x: Inexact[Array, "*shape"], keep: Bool[Array, ...], rate: float | Float[Array, ""]
    ) -> Inexact[Array, "*shape"]:
        """Masks, and scales by elements / elements kept."""
        del rate
        if keep.size >= 2**32:
            raise ValueError(
                f"x has {keep.size} elements to mask, 2**32 or more, which are not counted. Map "
                "over rows with jax.vmap, or pass share_channels=True."
            )
        real = real_dtype(x.dtype)
        kept = jnp.sum(keep, dtype=jnp.uint32)
        # Two exact integers, rounded where they are large, and one division.
        scale = jnp.where(kept > 0, real(keep.size) / jnp.maximum(kept, 1).astype(real), 0)
        return selected(keep, x, scale.astype(real))


def _start_keep_prob(
    rate: float | Float[Array, ""], block: int, sizes: list[int]
) -> float | Float[Array, ""]:
    """1 - gamma: how probably no block starts at a place."""
    gamma_of_1 = math.prod([size / (block * (size - block + 1)) for size in sizes if size])
    if isinstance(rate, jax.Array):
        single = lax.stop_gradient(rate).astype(jnp.float32)
        return jnp.where(single >= 1, 0, 1 - single * np.float32(gamma_of_1))
    return 1 - rate * gamma_of_1


def _spread(keep: Bool[Array, ...], dim: int, size: int) -> Bool[Array, ...]:
    """Each False becomes `size` of them along one dimension, from its place on."""
    window, ends = [1] * keep.ndim, [(0, 0)] * keep.ndim
    window[dim], ends[dim] = size, (size - 1, size - 1)
    strides = [1] * keep.ndim
    return lax.reduce_window(keep, np.bool_(True), lax.bitwise_and, window, strides, ends)


def _check_blocks(
    shape: tuple[int, ...], block_size: int, channel_axis: int, share_channels: bool
) -> _Blocks:
    size, ndim = operator.index(block_size), len(shape)
    if size < 1:
        raise ValueError(f"block_size must be at least 1; got {block_size}.")
    axis = check_axis("channel_axis", channel_axis, ndim)
    if ndim < 3 or axis == 0:
        raise ValueError(
            "x must have a batch dimension, which comes first, a channel dimension and at least "
            f"one spatial dimension; got shape {shape} with channel_axis={channel_axis}."
        )
    # Of an empty map no block is left, but its mask still has a shape.
    sizes = [max(1, length) for dim, length in enumerate(shape) if dim not in (0, axis)]
    return _Blocks(min(size, *sizes), axis, bool(share_channels))
