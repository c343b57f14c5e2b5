"""What the layers for `flax.linen` and `flax.nnx` share: being the same to the last bit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from regjax._keys import _is_threefry, check_key
from regjax._masks import Sampler, bernoulli

if TYPE_CHECKING:
    from jax.typing import ArrayLike
    from jaxtyping import Array, Bool

    from regjax._keys import KeyLike
    from regjax._threefry import Layout

# From here on XLA sums on CPU in a kernel of its own. A smaller sum it fuses with what it sums, and
# then the order of the terms depends on all that the loop does: on how a mask is drawn, too.
_OWN_KERNEL = 4096


def as_flax_draws(sampler: Sampler) -> Sampler:
    """The sampler whose masks, and sums of what they mask, are those of Flax's own layers."""
    return _bernoulli if sampler is bernoulli else sampler


def wrapped_dims(broadcast_dims: Sequence[int], ndim: int) -> tuple[int, ...]:
    """`broadcast_dims` as Flax understands them: negative ones count from the end.

    Raises:
        IndexError: one of them is not a dimension.
    """
    if any(not -ndim <= dim < ndim for dim in broadcast_dims):
        raise IndexError(
            f"broadcast_dims must be dimensions of inputs, which has {ndim}; got "
            f"{tuple(broadcast_dims)}."
        )
    return tuple({dim % ndim for dim in broadcast_dims})


def _bernoulli(
    key: KeyLike, keep_prob: ArrayLike, shape: Sequence[int], *, out_sharding: Layout = None
) -> Bool[Array, "*shape"]:
    """`bernoulli`, its small masks drawn by the operations that Flax draws them with.

    The mask is the same. Where the operations would give another one, they are not used.
    """
    settings: Any = jax.config
    default = settings.jax_threefry_partitionable and not settings.jax_enable_x64
    if default and _is_threefry(check_key(key)) and math.prod(shape) < _OWN_KERNEL:
        if key.dtype == jnp.uint32:  # raw: it may be threefry's where that is not the default
            key = jax.random.wrap_key_data(key, impl="threefry2x32")
        return jax.random.bernoulli(key, keep_prob, tuple(shape), out_sharding=out_sharding)
    return bernoulli(key, keep_prob, shape, out_sharding=out_sharding)
