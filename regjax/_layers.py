"""Code shared by the layers for Flax, Equinox and Haiku: settings, and samplers that match them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.custom_batching import custom_vmap

from regjax._checks import check_array, check_number
from regjax._dropout.core import dropout
from regjax._random.bernoulli import ExactSampler, Sampler, bernoulli
from regjax._random.keys import consume, is_threefry, key_words
from regjax._random.threefry import at_most, counter_bits
from regshared.checks import (
    check_bool,
    check_callable,
    check_choice,
    check_integer,
    check_integers,
    check_string,
)

if TYPE_CHECKING:
    from jax.typing import ArrayLike
    from jaxtyping import Array, Bool, Float, Float32

    from regjax._random.keys import KeyLike
    from regjax._random.threefry import Layout

# On CPU, XLA computes a larger sum in a separate kernel. It fuses a smaller sum with its terms; the
# order of the additions then depends on everything in the loop, including the sampling of masks.
_LARGEST_FUSED = 4095


def as_flax_draws(sampler: Sampler) -> Sampler:
    """Return a sampler whose masks, and sums of masked values, are bitwise identical to Flax's."""
    return FLAX if sampler is bernoulli else sampler


# The attributes that a layer may have and passes to its function, with the check of each.
_SETTINGS: dict[str, Callable[[str, Any], Any]] = {
    "block_size": lambda name, value: check_integer(name, value, minimum=1),
    "broadcast_dims": check_integers,
    "channel_axis": check_integer,
    "gamma_scale": lambda name, value: check_number(name, value, minimum=0),
    "mode": lambda name, value: check_choice(name, value, ("row", "batch")),
    "rule": lambda name, value: value,  # checked against the weights, in the call
    "sampler": lambda name, value: check_callable(name, value, "(key, keep_prob, shape)"),
    "scale_by_keep": check_bool,
    "share_channels": check_bool,
    "time_axis": check_integer,
    "with_noise": check_bool,
}


def check_settings(layer: object) -> None:
    """Raise a TypeError or ValueError for an invalid setting when a layer is constructed."""
    for name, check in {**_SETTINGS, "rng_collection": check_string}.items():
        if hasattr(layer, name):
            check(name, getattr(layer, name))


class FlaxLayer:
    """Base of the layers for Linen and NNX: calls `_function` with the layer's settings.

    Attributes:
        _function: The regjax function behind the layer; private, or `nnx.tabulate` would show it.
        keyless_rates: Rates or standard deviations for which nothing is random and no key is
            needed.
    """

    _function: ClassVar[Callable[..., Any]]
    keyless_rates: ClassVar[tuple[float, ...]] = (0, 1)

    def _needs_key(self, rate_or_stddev: ArrayLike) -> bool:
        """Return whether the rate is traced, or the result is random."""
        return isinstance(rate_or_stddev, Tracer) or rate_or_stddev not in self.keyless_rates

    def _drop(self, inputs: Sequence[Any], rate_or_stddev: ArrayLike, **options: Any) -> Any:
        """Apply the function to the inputs; `options` holds `key` and `deterministic`."""
        settings = {name: getattr(self, name) for name in _SETTINGS if hasattr(self, name)}
        if "broadcast_dims" in settings:
            ndim = check_array("inputs", inputs[0]).ndim
            settings["broadcast_dims"] = wrapped_dims(settings["broadcast_dims"], ndim)
        if self._function is dropout:
            settings["sampler"] = as_flax_draws(settings["sampler"])
        return self._function(*inputs, rate_or_stddev, **settings, **options)


def wrapped_dims(
    broadcast_dims: Sequence[int],
    ndim: int,
    *,
    of: str = "inputs",
    error: type[Exception] = IndexError,
) -> tuple[int, ...]:
    """Return `broadcast_dims` as Flax and Haiku interpret them: negative ones count from the end.

    `of` is the framework's name for the array with `ndim` dimensions, and `error` the exception
    that it raises if one is out of range.
    """
    broadcast_dims = check_integers("broadcast_dims", broadcast_dims)
    if any(not -ndim <= dim < ndim for dim in broadcast_dims):
        raise error(
            f"broadcast_dims must be dimensions of {of}, which has {ndim}; got {broadcast_dims}."
        )
    return tuple(sorted({dim % ndim for dim in broadcast_dims}))


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
                key = jax.random.wrap_key_data(key, impl="threefry2x32")
            return jax.random.bernoulli(key, keep_prob, shape, out_sharding=out_sharding)
        return super().draw(key, keep_prob, shape, out_sharding)


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
    # Small arrays are drawn by the operations of jax.random.uniform, as in as_flax_draws; here vmap
    # cannot hide the total size.
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
