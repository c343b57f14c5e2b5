"""Keep masks: random bits compared with a threshold.

This is **mask stream v1**: the mask is a function of the key, the keep probability and the shape
alone, whatever the configuration, device, mesh or transform, and will not change under this name.
It equals `jax.random.bernoulli` under JAX's default configuration.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from regjax._checks import as_number, check_layout, check_shape
from regjax._random.keys import check_key, consume, is_typed, key_words
from regjax._random.threefry import (
    Places,
    counter_bits,
    part_bits,
    spec_of,
    threefry2x32,
    with_spec,
)

if TYPE_CHECKING:
    from jax.typing import ArrayLike
    from jaxtyping import Array, Bool, Float, UInt32

    from regjax._random.keys import KeyLike
    from regjax._random.threefry import Layout, Part, Words

_MANTISSA = 23  # jax.random draws float32 uniforms in [0, 1) as multiples of 2**-23
# A subnormal probability counts as 0: CPUs and TPUs flush it, others do not, and the mask must not
# depend on the device.
_SMALLEST = float(np.finfo(np.float32).smallest_normal)
_TINY = 2.0**-12  # below it, the realized keep probability may differ from the requested one


@runtime_checkable
class Sampler(Protocol):
    """A function that draws a keep mask: `bernoulli`, or any function with its arguments."""

    def __call__(
        self,
        key: KeyLike,
        keep_prob: ArrayLike,
        shape: Sequence[int],
        *,
        out_sharding: Layout = None,
    ) -> Bool[Array, "*shape"]:
        """Draw a mask of the given shape; True keeps an element."""
        ...


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class MaskSampler:
    """A user's function that draws a mask, trusted to keep elements with the requested probability.

    The subclasses know the probability that they realize. A sampler is a pytree, whose leaves are
    the arrays that the mask depends on.

    Attributes:
        function: The `sampler` that the user passed.
    """

    function: Sampler

    draws_parts: ClassVar[bool] = False

    def __call__(
        self,
        key: KeyLike,
        keep_prob: ArrayLike,
        shape: Sequence[int],
        *,
        out_sharding: Layout = None,
    ) -> Bool[Array, "*shape"]:
        """Draw a mask, as any other sampler does."""
        probability = check_probability("keep_prob", keep_prob)
        return self.draw(key, probability, tuple(shape), out_sharding)

    def draw(
        self,
        key: KeyLike,
        keep_prob: float | Float[Array, ""],
        shape: tuple[int, ...],
        out_sharding: Layout,
    ) -> Bool[Array, "*shape"]:
        """Draw a mask from checked arguments; True keeps an element."""
        return self.function(key, keep_prob, shape, out_sharding=out_sharding)

    def draw_part(
        self,
        key: KeyLike,
        keep_prob: float | Float[Array, ""],
        whole: tuple[Any, ...],
        part: Part,
        out_sharding: Layout,
    ) -> Bool[Array, "*_part"]:
        """Draw part of the mask of shape `whole` without drawing the rest; see `part_index`.

        If the first size is None, the array consists of examples whose number is unknown, and their
        masks do not depend on it. A user's function, which can only draw a whole mask, then draws
        whole examples with the keys `jax.random.fold_in(key, example)`.
        """
        examples, *rest = part
        if whole[0] is not None or not isinstance(examples, Places) or any(rest):
            raise NotImplementedError(f"{self.function} draws whole masks only.")
        layout = with_spec(out_sharding, spec_of(out_sharding, len(whole))[1:])

        def row(high: UInt32[Array, ""], low: UInt32[Array, ""]) -> Bool[Array, "*_example"]:
            words = jnp.stack(threefry2x32(key_words(key), (high, low)))
            own = jax.random.wrap_key_data(words, impl="threefry2x32") if is_typed(key) else words
            return self.draw(own, keep_prob, tuple(whole[1:]), layout)

        high = jnp.zeros_like(examples.low) if examples.high is None else examples.high
        return jax.vmap(row)(high, examples.low)

    @property
    def numbers(self) -> Places | None:
        """The numbers of the examples that it draws, for observers; None for a whole mask."""
        return None

    def check_fit(self, shape: tuple[int, ...], shared: tuple[int, ...]) -> None:
        """Raise a ValueError if no mask fits x of this shape, where dimensions may share one."""

    def realized_keep_prob(self, keep_prob: float | Float[Array, ""]) -> float | Float[Array, ""]:
        """Return the number by which kept elements are divided."""
        return keep_prob


def exact_keep_prob(keep_prob: float | Float[Array, ""]) -> float | Float[Array, ""]:
    """Return the probability with which `bernoulli` keeps an element, for the scale.

    It is a multiple of 2**-23. From 2**-12 on it exceeds `keep_prob` by a relative 2**-11 at most,
    and the scale uses `keep_prob` itself, as other libraries do. Below, the difference can be
    large.
    """
    if isinstance(keep_prob, jax.Array):
        share = _threshold(keep_prob).astype(keep_prob.dtype) * 2.0**-_MANTISSA
        return jnp.where((keep_prob > 0) & (keep_prob < _TINY), share, keep_prob)
    return float(_threshold(keep_prob)) / 2**_MANTISSA if keep_prob < _TINY else keep_prob


@jax.tree_util.register_static
class ExactSampler(MaskSampler):
    """The sampler behind `bernoulli`."""

    draws_parts = True
    bits = _MANTISSA

    def threshold(self, keep_prob: float | Float[Array, ""]) -> np.uint32 | UInt32[Array, ""]:
        """Return how many of the `2**bits` equally likely integers are kept."""
        return _threshold(keep_prob)

    def draw(
        self,
        key: KeyLike,
        keep_prob: float | Float[Array, ""],
        shape: tuple[int, ...],
        out_sharding: Layout,
    ) -> Bool[Array, "*shape"]:
        return _threshold_mask(key, _threshold(keep_prob), shape, out_sharding)

    def draw_part(
        self,
        key: KeyLike,
        keep_prob: float | Float[Array, ""],
        whole: tuple[Any, ...],
        part: Part,
        out_sharding: Layout,
    ) -> Bool[Array, "*_part"]:
        consume(key)
        bits = part_bits(key_words(key), whole, part, out_sharding=out_sharding)
        return (bits >> np.uint32(32 - _MANTISSA)) < _threshold(keep_prob)

    def realized_keep_prob(self, keep_prob: float | Float[Array, ""]) -> float | Float[Array, ""]:
        """Return `exact_keep_prob(keep_prob)`."""
        return exact_keep_prob(keep_prob)


def bernoulli(
    key: KeyLike, keep_prob: ArrayLike, shape: Sequence[int], *, out_sharding: Layout = None
) -> Bool[Array, "*shape"]:
    """Draw a keep mask: each element is True with probability `keep_prob`, independently.

    An element is kept where `(bits >> 9) < ceil(float32(keep_prob) * 2**23)`; `bits` are the
    threefry bits at its row-major index. The mask therefore depends only on the arguments.

    Args:
        key: One JAX PRNG key, typed or raw, of any implementation.
        keep_prob: The probability of True, in [0, 1]; it may be traced. Rounded to float32.
        shape: The shape of the mask.
        out_sharding: The layout of the mask over devices: a `Sharding` or a `PartitionSpec`.

    Raises:
        TypeError: `key` is not a key, or `keep_prob` is not a number.
        ValueError: A concrete `keep_prob` is not in [0, 1], or `key` is a batch of keys. A traced
            `keep_prob` is not checked: below 0 or NaN keeps nothing, above 1 keeps everything.

    Note (PyTorch):
        `regtorch.bernoulli` returns the same mask. `torch.bernoulli` draws another stream.

    Example:
        >>> import jax, regjax
        >>> regjax.bernoulli(jax.random.key(0), 0.5, (6,)).tolist()
        [False, False, True, True, False, True]
    """
    probability = check_probability("keep_prob", keep_prob)
    shape, layout = check_shape("shape", shape), check_layout("out_sharding", out_sharding)
    return EXACT.draw(check_key(key), probability, shape, layout)


EXACT = ExactSampler(bernoulli)


# The inner jit makes an eager call one dispatch instead of a hundred, and sites of a model with
# equal shapes share one trace. The threshold is a traced argument: the trace serves every rate.
@functools.partial(jax.jit, static_argnums=(2, 3))
def _threshold_mask(
    key: KeyLike,
    threshold: np.uint32 | UInt32[Array, ""],
    shape: tuple[int, ...],
    out_sharding: Layout,
) -> Bool[Array, "*shape"]:
    consume(key)
    bits = counter_bits(key_words(key), shape, out_sharding=out_sharding)
    return (bits >> np.uint32(32 - _MANTISSA)) < threshold


def bernoulli_at(
    key: KeyLike, keep_prob: float | Float[Array, ""], index: Words
) -> Bool[Array, "*shape"]:
    """Return the elements of `bernoulli`'s mask at given row-major indices, whatever its shape.

    `index` holds 64-bit indices as a
    high and a low word that broadcast against each other; `keep_prob` is checked by
    `check_probability`.
    """
    consume(key)
    out0, out1 = threefry2x32(key_words(key), index)
    return ((out0 ^ out1) >> np.uint32(32 - _MANTISSA)) < _threshold(keep_prob)


def _threshold(keep_prob: float | Float[Array, ""]) -> np.uint32 | UInt32[Array, ""]:
    """Return how many of the 2**23 equally likely uniforms lie below float32(keep_prob)."""
    if isinstance(keep_prob, jax.Array):
        probability = keep_prob.astype(jnp.float32)
        scaled = jnp.minimum(jnp.ceil(probability * 2.0**_MANTISSA), 2.0**_MANTISSA)
        # NaN compares false and therefore keeps nothing.
        return jnp.where(probability >= _SMALLEST, scaled, 0).astype(jnp.uint32)
    # Double precision is exact here, and no device flushes a tiny float32 to zero.
    probability = float(np.float32(keep_prob))
    return np.uint32(math.ceil(probability * 2**_MANTISSA) if probability >= _SMALLEST else 0)


def check_probability(name: str, value: ArrayLike) -> float | Float[Array, ""]:
    """Return a probability as a Python float; return a traced scalar with its range unchecked."""
    if type(value) is float and 0 <= value <= 1:
        return value
    number = as_number(name, value)
    if not any(jnp.issubdtype(number.dtype, kind) for kind in (jnp.floating, jnp.integer)):
        raise TypeError(f"{name} must be a real number in [0, 1]; got {value!r}.")
    if number.ndim:
        raise ValueError(f"{name} must be a scalar in [0, 1]; got shape {number.shape}.")
    if isinstance(number, Tracer):
        return number
    if not 0 <= number <= 1:
        raise ValueError(f"{name} must lie in [0, 1]; got {value}.")
    return float(number)
