"""Dropout by the operations of Flax, Equinox and Haiku, which give it their last bits too.

The mask is the same without them. XLA adds and divides in an order that depends on the program
around, so bitwise identical sums and quotients take the same operations.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_batching import custom_vmap

from regjax._dropout.core import dropout, keep_mask, keep_prob_of
from regjax._random.bernoulli import ExactSampler, Sampler, bernoulli, exact_keep_prob
from regjax._random.keys import consume, is_threefry, key_words
from regjax._random.threefry import at_most, counter_bits

if TYPE_CHECKING:
    from jax.typing import ArrayLike
    from jaxtyping import Array, Bool, Float, Float32, Inexact

    from regjax._random.keys import KeyLike
    from regjax._random.threefry import Layout

# On CPU, XLA computes a larger sum in a separate kernel. It fuses a smaller sum with its terms; the
# order of the additions then depends on everything in the loop, including the sampling of masks.
_LARGEST_FUSED = 4095


def flax_dropout(
    x: Inexact[ArrayLike, "*shape"], rate: ArrayLike, *, sampler: Sampler, **options: Any
) -> Inexact[Array, "*shape"]:
    """Apply `regjax.dropout`; by default, sums of the results are bitwise identical to Flax's."""
    return dropout(x, rate, sampler=FLAX if sampler is bernoulli else sampler, **options)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class DividedMask:
    """A mask whose kept elements are divided by the keep probability, for `apply_dropout`.

    Equinox and Haiku divide, where `regjax.dropout` multiplies by the inverse, and XLA rounds the
    two differently. `divide` takes the mask, the array and the keep probability.
    """

    divide: Callable[..., Any]
    broadcast_dims: tuple[int, ...] = ()
    name: str = "dropout"

    def __call__(
        self, x: Float[Array, "*shape"], key: KeyLike, rate: float | Float[Array, ""]
    ) -> tuple[Float[Array, "*shape"], Bool[Array, "*mask"]]:
        # No guard_rate: a traced rate may be a product, which XLA contracts with the subtraction
        # from 1 as in the originals, if nothing else needs the product. So the range of the
        # difference is checked, which makes a rate from -2**-24 to 0 count as 0.
        keep_prob = exact_keep_prob(keep_prob_of(rate, x.dtype))
        if isinstance(keep_prob, jax.Array):
            # -1 lies below every number in [0, 1) and keeps nothing; dividing by 0 would give NaN.
            some = jnp.where(keep_prob > 0, keep_prob, -1)
            keep_prob = jnp.where((keep_prob >= 0) & (keep_prob <= 1), some, jnp.nan)
        keep = keep_mask(x, key, keep_prob, self.broadcast_dims, COMPARING)
        return self.divide(keep, x, keep_prob), keep


@jax.tree_util.register_static
class _FlaxSampler(ExactSampler):
    """The exact sampler, which draws small masks by Flax's own operations if they give the same."""

    def draw(
        self,
        key: KeyLike,
        keep_prob: float | Float[Array, ""],
        shape: tuple[int, ...],
        out_sharding: Layout,
    ) -> Bool[Array, "*shape"]:
        if _is_default(key) and at_most(math.prod(shape), _LARGEST_FUSED):
            if key.dtype == jnp.uint32:  # raw threefry key; threefry may not be the default
                key = jax.random.wrap_key_data(jnp.asarray(key), impl="threefry2x32")
            return jax.random.bernoulli(key, keep_prob, shape, out_sharding=out_sharding)
        return super().draw(key, keep_prob, shape, out_sharding)


@jax.tree_util.register_static
class _ComparingSampler(ExactSampler):
    """The exact sampler; masks, and sums of masked values, equal those of Equinox and Haiku."""

    def draw(
        self,
        key: KeyLike,
        keep_prob: float | Float[Array, ""],
        shape: tuple[int, ...],
        out_sharding: Layout,
    ) -> Bool[Array, "*shape"]:
        return uniform(key, shape, out_sharding=out_sharding) < keep_prob


FLAX = _FlaxSampler(bernoulli)
COMPARING = _ComparingSampler(bernoulli)


def uniform(
    key: KeyLike, shape: Sequence[int], *, out_sharding: Layout = None
) -> Float32[Array, "*shape"]:
    """Draw float32 numbers in [0, 1) to make masks from: those below `keep_prob` are kept."""
    # The layers for Equinox and Haiku compare these numbers themselves, because they divide by the
    # same scalar. XLA replaces a division by a scalar with a multiplication by its inverse, which
    # rounds differently, but only where nothing else needs the scalar.
    # Small arrays are drawn by the operations of jax.random.uniform, as in `_FlaxSampler`; here
    # vmap cannot hide the total size.
    shape, is_default = tuple(shape), _is_default(key)

    def draw(size: int, key: KeyLike) -> Float32[Array, "*shape"]:
        if is_default and at_most(size, _LARGEST_FUSED):
            return jax.random.uniform(key, shape, jnp.float32, out_sharding=out_sharding)
        consume(key)
        bits = counter_bits(key_words(key), shape, out_sharding=out_sharding)
        # With the exponent of 1, 23 random bits form a number in [1, 2).
        one = np.float32(1).view(np.uint32)
        return lax.bitcast_convert_type((bits >> np.uint32(9)) | one, jnp.float32) - 1

    return _counting(draw, math.prod(shape))(key)


def _counting(draw: Callable[..., Any], size: int) -> Callable[..., Any]:
    """Return `draw(size, key)`, with the size multiplied by the number of keys under `vmap`."""
    counted = custom_vmap(functools.partial(draw, size))

    @counted.def_vmap
    def _(number: int, _: Any, keys: Any) -> tuple[Any, bool]:
        def each(size: int, keys: Any) -> Any:
            return jax.vmap(functools.partial(draw, size))(keys)

        return _counting(each, number * size)(keys), True

    return counted


def _is_default(key: KeyLike) -> bool:
    """Return whether JAX itself would draw the same numbers from this key."""
    settings: Any = jax.config
    default = settings.jax_threefry_partitionable and not settings.jax_enable_x64
    return default and is_threefry(key)
