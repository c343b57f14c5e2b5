"""DropBlock: dropout of contiguous blocks of feature maps."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from regjax._checks import check_number
from regjax._dropout.core import (
    apply_dropout,
    check_axis,
    check_flag,
    check_inexact,
    check_real,
    guard_rate,
    is_number,
    mask_and_scale,
    mask_sharding,
    real_dtype,
    require_key,
    where_kept,
)
from regjax._random.bernoulli import EXACT, check_probability
from regjax._random.keys import key_words
from regjax._random.normal import normal
from regjax._random.threefry import is_number as is_known
from regjax._random.threefry import product_words, threefry2x32
from regjax._random.xla import rounded
from regshared.checks import check_bool, check_integer
from regshared.spellings import explain_names

if TYPE_CHECKING:
    from jax.sharding import NamedSharding
    from jax.typing import ArrayLike
    from jaxtyping import Array, Bool, Float, Inexact

    from regjax._random.keys import KeyLike


@explain_names
def drop_block(
    x: Inexact[ArrayLike, "*shape"],
    rate: ArrayLike,
    *,
    block_size: int = 7,
    key: KeyLike | None = None,
    deterministic: ArrayLike = False,
    channel_axis: int = -1,
    share_channels: bool = False,
    gamma_scale: float = 1.0,
    scale_by_keep: bool = True,
    with_noise: bool = False,
) -> Inexact[Array, "*shape"]:
    """Zero blocks of neighboring elements of feature maps, and scale up the others.

    Neighboring elements carry nearly the same information, so that a feature can still be read when
    its elements are dropped one by one; this drops squares, cubes or, along one dimension, runs of
    `block_size`. Every place where a whole block fits starts one with probability

        gamma = rate / block_size**d * prod(size / (size - block_size + 1))

    over the d spatial dimensions: an element is covered by `rate` blocks on average. As blocks may
    overlap, somewhat fewer elements are zeroed, about `1 - exp(-rate)`. The other elements of the
    whole batch are multiplied by elements / kept elements, as counted, over all devices where the
    batch is sharded: the mean of mask times scale is 1.

    Row n, channel c and the block that starts at s draw from the row-major index of `(n, c, *s)`
    wherever the channels lie, so that NCHW and NHWC have the same mask. Only the key is stored for
    the backward pass. Under `vmap` each row is a batch, scaled by its own count.

    Args:
        x: Floating or complex, the batch first, then one or more spatial dimensions and the
            channels. Give a single row a batch dimension of 1.
        rate: About the share of zeroed elements, in [0, 1]; a number or a traced scalar. At 1 every
            element is zeroed, as in the whole family.
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
        An array of the shape, dtype and sharding of `x`; zeros if nothing is kept.

    Raises:
        TypeError: `block_size` or `channel_axis` is not an integer; `gamma_scale` is not a real
            number; `x` is complex and `with_noise` is set; or as `dropout`.
        ValueError: `block_size` is below 1; `gamma_scale` is negative, infinite or NaN;
            `channel_axis` is not a dimension of `x`, or is the batch dimension; `x` has no spatial
            dimension; the mask has 2**32 elements or more, which are not counted; or as `dropout`.

    Note (PyTorch):
        In `regtorch.drop_block` the channels are first by default.
        `torchvision.ops.drop_block2d(x, rate, block_size)` and `drop_block3d` draw in this way too,
        for odd blocks that fit into the map. `timm.layers.drop_block_2d` (1.0.29) has
        `gamma_scale`, `scale_by_keep`, `with_noise` and, on by default, `couple_channels`
        (`share_channels`); there a block may start at any element and is cut off at the border,
        masks and noise come from the global generator, and channels that share a mask share their
        noise.

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
        >>> y.max()  # 40 elements / 22 kept elements
        Array(1.8181819, dtype=float32)

    References:
        Ghiasi, Lin, Le, "DropBlock: a regularization method for convolutional networks", NeurIPS
        2018.
    """
    x = check_inexact(x)
    blocks = _check_blocks(x.shape, block_size, channel_axis, share_channels)
    with_noise = check_bool("with_noise", with_noise)
    blocks = dataclasses.replace(
        blocks,
        gamma_scale=_check_gamma_scale(gamma_scale),
        scale_by_keep=check_bool("scale_by_keep", scale_by_keep) and not with_noise,
    )
    if with_noise:
        return _noisy(x, rate, key, deterministic, blocks)
    return apply_dropout(blocks, x, rate, key, deterministic)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Blocks:
    """A mask of blocks of length `size`, and the scale computed from the count of kept elements."""

    size: int
    channel_axis: int
    share_channels: bool
    gamma_scale: float = 1.0
    scale_by_keep: bool = True
    name: str = "drop_block"

    @guard_rate
    def __call__(
        self, x: Inexact[Array, "*shape"], key: KeyLike, rate: float | Float[Array, ""]
    ) -> tuple[Inexact[Array, "*shape"], Bool[Array, "*mask"]]:
        keep = self.keep(x, key, rate)
        return self.apply(x, keep), keep

    def keep(
        self, x: Inexact[Array, "*shape"], key: KeyLike, rate: float | Float[Array, ""]
    ) -> Bool[Array, "*mask"]:
        """Draw where blocks start, and expand them."""
        batch, channels, *sizes = (x.shape[dim] for dim in self.order(x.ndim))
        starts = [size - self.size + 1 for size in sizes]
        shape = (batch, 1 if self.share_channels else channels, *starts)
        keep_prob = _start_keep_prob(rate, self.size, sizes, self.gamma_scale)
        keep = EXACT.draw(key, keep_prob, shape, self._layout(x))
        for dim in range(2, keep.ndim):
            keep = _spread(keep, dim, self.size)
        return jnp.moveaxis(keep, 1, self.channel_axis)

    def order(self, ndim: int) -> tuple[int, ...]:
        """Return the dimensions with channels second, the order in which elements are numbered."""
        first = (0, self.channel_axis)
        return (*first, *(dim for dim in range(ndim) if dim not in first))

    def _layout(self, x: Inexact[Array, "*shape"]) -> NamedSharding | None:
        """Return the layout of block starts: rows and channels sharded as in `x`, not the maps.

        Blocks cross the borders of shards of a map.
        """
        sharding = jax.typeof(x).sharding
        rows, channels = sharding.spec[0], sharding.spec[self.channel_axis]
        if self.share_channels:
            channels = None
        if rows is None and channels is None:
            return None
        return sharding.update(spec=PartitionSpec(rows, channels))

    def apply(
        self, x: Inexact[Array, "*shape"], keep: Bool[Array, "*mask"]
    ) -> Inexact[Array, "*shape"]:
        real = real_dtype(x.dtype)
        if not self.scale_by_keep:
            return where_kept(keep, x, real(1))
        high, size = product_words(keep.shape)
        if not isinstance(high, jax.Array) and high:
            raise ValueError(
                f"x must have fewer than 2**32 elements to mask and count; got {keep.size}. Map "
                "over rows with jax.vmap, or pass share_channels=True."
            )
        kept = jnp.sum(keep, dtype=jnp.uint32)
        # One division of two exact integers, which are rounded where they are large.
        scale = jnp.where(kept > 0, size.astype(real) / jnp.maximum(kept, 1).astype(real), 0)
        if isinstance(high, jax.Array):  # a symbolic size, known too late for an error
            scale = jnp.where(high > 0, jnp.nan, scale)
        return where_kept(keep, x, scale.astype(real))


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Dropped:
    """The complement of a mask of blocks: it keeps the dropped elements, unscaled."""

    blocks: _Blocks
    name: str = "drop_block"

    @guard_rate
    def __call__(
        self, x: Inexact[Array, "*shape"], key: KeyLike, rate: float | Float[Array, ""]
    ) -> tuple[Inexact[Array, "*shape"], Bool[Array, "*mask"]]:
        keep = ~self.blocks.keep(x, key, rate)
        return self.blocks.apply(x, keep), keep


def _noisy(
    x: Inexact[Array, "*shape"],
    rate: ArrayLike,
    key: KeyLike | None,
    deterministic: ArrayLike,
    blocks: _Blocks,
) -> Inexact[Array, "*shape"]:
    """Apply DropBlock with noise in place of zeros: the sum of two masked terms, one of them 0."""
    x = check_real(x, "noise", "Leave with_noise out, or drop in x.real and x.imag.")
    rate, flag = check_probability("rate", rate), check_flag(deterministic)
    if flag is True or is_number(rate, 0):
        return x
    one_key = require_key(key)
    kept = apply_dropout(blocks, x, rate, one_key, flag)

    words = jnp.stack(key_words(one_key))  # `jax_debug_key_reuse` counts the key as used by now

    def noise() -> Float[Array, "*shape"]:
        variates = _noise(x, words, blocks.order(x.ndim))
        at_1 = is_number(rate, 1)
        return variates if at_1 else mask_and_scale(_Dropped(blocks), variates, words, rate)

    if flag is False:
        return kept + noise()
    return kept + lax.cond(flag, lambda: jnp.zeros_like(x), noise)


@functools.partial(jax.jit, static_argnums=2)
def _noise(
    x: Float[Array, "*shape"], key: KeyLike, order: tuple[int, ...]
) -> Float[Array, "*shape"]:
    """Return variates for all elements, numbered in an order of the dimensions.

    Their key is the threefry block of the last counter, to which no mask has an element.
    """
    last = jnp.uint32(2**32 - 1)
    own_key = jnp.stack(threefry2x32(key_words(key), (last, last)))
    layout = mask_sharding(x, ())
    if layout is not None:
        layout = layout.update(spec=PartitionSpec(*(layout.spec[dim] for dim in order)))
    shape = tuple(x.shape[dim] for dim in order)
    variates = normal(own_key, shape, real_dtype(x.dtype), out_sharding=layout)
    back = sorted(range(x.ndim), key=order.__getitem__)
    return jnp.transpose(variates, back).astype(x.dtype)


def _start_keep_prob(
    rate: float | Float[Array, ""], block: int, sizes: list[int], gamma_scale: float = 1.0
) -> float | Float[Array, ""]:
    """Return 1 - gamma, the probability that no block starts at a place."""
    gamma_of_1 = math.prod([size / (block * (size - block + 1)) for size in sizes if size])
    gamma_of_1 *= gamma_scale
    if isinstance(rate, jax.Array):
        single = lax.stop_gradient(rate).astype(jnp.float32)
        # A NaN stays NaN.
        some = jnp.maximum(1 - rounded(single * np.float32(gamma_of_1)), 0)
        return jnp.where(single >= 1, 0, some)
    return max(0.0, 1 - rate * gamma_of_1)


def _spread(keep: Bool[Array, "*starts"], dim: int, size: int) -> Bool[Array, "*mask"]:
    """Expand each False to `size` of them along one dimension, from its place on."""
    window, ends = [1] * keep.ndim, [(0, 0)] * keep.ndim
    window[dim], ends[dim] = size, (size - 1, size - 1)
    strides = [1] * keep.ndim
    return lax.reduce_window(keep, np.bool_(True), lax.bitwise_and, window, strides, ends)


def _check_gamma_scale(gamma_scale: float) -> float:
    return check_number("gamma_scale", gamma_scale, minimum=0)


def _check_blocks(
    shape: tuple[int, ...], block_size: int, channel_axis: int, share_channels: bool
) -> _Blocks:
    size, ndim = check_integer("block_size", block_size, minimum=1), len(shape)
    axis = check_axis("channel_axis", channel_axis, ndim)
    if ndim < 3 or axis == 0:
        raise ValueError(
            "x must have a batch dimension first, a channel dimension and at least one spatial "
            f"dimension; got shape {shape} with channel_axis={channel_axis}."
        )
    sizes = [length for dim, length in enumerate(shape) if dim not in (0, axis)]
    if not all(is_known(length) for length in sizes):
        raise ValueError(
            "x must have spatial dimensions of known size, which determine the probability of a "
            f"block; got shape {shape}. Export one program for each size: only the batch and the "
            "channels may be symbolic."
        )
    # An empty map has no place for a block, but its mask still has a shape.
    sizes = [max(1, length) for length in sizes]
    return _Blocks(min(size, *sizes), axis, check_bool("share_channels", share_channels))
