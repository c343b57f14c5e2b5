"""Dropout: zero random elements in training, scale the others, do nothing in evaluation."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from regjax._checks import check_array, check_callable, check_integer, check_integers
from regjax._exact import rounded
from regjax._keys import check_key, key_words
from regjax._masks import Sampler, bernoulli, check_probability, realised_keep_prob
from regjax._observe import observer
from regjax._threefry import at_most

if TYPE_CHECKING:
    from jax.typing import ArrayLike
    from jaxtyping import Array, Bool, Float, Inexact

    from regjax._keys import KeyLike

_DOUBLE = (np.dtype(np.float64), np.dtype(np.complex128))


def dropout(
    x: Inexact[ArrayLike, "*shape"],
    rate: ArrayLike,
    *,
    key: KeyLike | None = None,
    deterministic: ArrayLike = False,
    broadcast_dims: Sequence[int] = (),
    sampler: Sampler = bernoulli,
) -> Inexact[Array, "*shape"]:
    """Zeroes each element with probability `rate` and divides the others by `1 - rate`.

    With keep ~ Bernoulli(1 - rate) for each element, `y = where(keep, x / (1 - rate), 0)`, so that
    the mean of `y` is `x`: in evaluation there is nothing to undo, and `deterministic=True` returns
    `x` itself. A dropped NaN or infinity is 0. Nothing but the key is stored for the backward pass,
    which makes the same mask again.

    The division is a multiplication by `float32(1) / float32(1 - rate)`; in double for float64 and
    complex128; half and 8-bit types are scaled in float32 and rounded once. A mask keeps elements
    with a multiple of 2**-23, rounded up. Where `1 - rate` is below 2**-12, the scale is the
    inverse of that multiple, so that the mean is right for every rate below 1.

    Args:
        x: floating or complex, of any shape, also 0-d and empty.
        rate: the probability that an element is zeroed, in [0, 1]. A Python number, or a traced
            scalar, so that it can change without recompiling; then the rounding of `1 - rate` is
            float32's, which may change its last bit, and no gradient flows to it.
        key: the random key; needed unless `deterministic`, or `rate` is the number 0 or 1. Use each
            key once; `site_key` makes one for every place and step.
        deterministic: True in evaluation. It may be traced; True then spends no random bits.
        broadcast_dims: dimensions along which one mask is shared, such as `(1,)` for the same mask
            at every timestep of (batch, time, features).
        sampler: what draws the mask: `bernoulli`, `packed_bernoulli`, or a function with their
            arguments.

    Returns:
        An array of the shape, dtype and sharding of `x`.

    Raises:
        TypeError: `x` is of an integer or boolean dtype, `rate` is not a real number, `key` is not
            a key, or `deterministic` is not a boolean.
        ValueError: a concrete `rate` is not in [0, 1]; the key is missing, or a batch of keys; or
            `broadcast_dims` are not distinct dimensions of `x`. A traced rate out of range cannot
            raise: the result is NaN.

    PyTorch:
        `torch.nn.functional.dropout(x, p=rate, training=not deterministic)`, whose masks come from
        a hidden generator. `regtorch.dropout` with the same key gives the same result bit for bit.
        Inside a larger jitted function, XLA may contract the scale of a shared mask with a sum that
        follows, which then rounds once.

    Example:
        >>> import jax, jax.numpy as jnp, regjax
        >>> x = jnp.arange(1.0, 7.0)
        >>> regjax.dropout(x, 0.5, key=jax.random.key(0))
        Array([ 0.,  0.,  6.,  8.,  0., 12.], dtype=float32)
        >>> regjax.dropout(x, 0.5, deterministic=True)
        Array([1., 2., 3., 4., 5., 6.], dtype=float32)

    Source: Srivastava, Hinton, Krizhevsky, Sutskever, Salakhutdinov, "Dropout: a simple way to
    prevent neural networks from overfitting", JMLR 15, 2014; in the inverted form.
    """
    settings = Settings("dropout", check_integers("broadcast_dims", broadcast_dims), sampler)
    return masked(x, rate, key, deterministic, settings)


def masked(
    x: Inexact[ArrayLike, "*shape"],
    rate: ArrayLike,
    key: KeyLike | None,
    deterministic: ArrayLike,
    settings: Settings,
) -> Inexact[Array, "*shape"]:
    """Dropout whose mask a sampler draws: an element each, or shared along dimensions."""
    x = check_inexact(x)
    check_callable("sampler", settings.sampler, "(key, keep_prob, shape)")
    dims = check_dims(settings.broadcast_dims, x.ndim)
    settings = dataclasses.replace(settings, broadcast_dims=dims)
    return drawn(x, rate, key, deterministic, settings)


def drawn(
    x: Inexact[Array, "*shape"],
    rate: ArrayLike,
    key: KeyLike | None,
    deterministic: ArrayLike,
    kind: Kind,
    *arrays: Array,
) -> Inexact[Array, "*shape"]:
    """The frame of the whole family: checks, shortcuts, the key, who watches, then the mask.

    Args:
        x: what is dropped, checked by `check_inexact`.
        rate: as `dropout` takes it, like `key` and `deterministic`.
        key: see there.
        deterministic: see there.
        kind: what is drawn, and what becomes of `x`.
        *arrays: what the mask depends on besides.
    """
    rate = check_probability("rate", rate)
    deterministic = check_flag(deterministic)
    if deterministic is True or is_number(rate, 0):
        return x

    def drop() -> Inexact[Array, "*shape"]:
        if is_number(rate, 1):
            return jnp.zeros_like(x)
        one_key = require_key(key)
        if watching := observer():
            dropped, keep = made_with_mask(x, one_key, rate, kind, *arrays)
            watching.draw(kind.name, key_words(one_key), rate, keep, x, deterministic)
            return dropped
        return made(x, one_key, rate, kind, *arrays)

    return drop() if deterministic is False else lax.cond(deterministic, lambda: x, drop)


def made(
    x: Inexact[Array, "*shape"],
    key: KeyLike,
    rate: float | Float[Array, ""],
    kind: Kind,
    *arrays: Array,
) -> Inexact[Array, "*shape"]:
    """What `kind` makes of `x`; of a traced rate outside [0, 1], NaN.

    The backward pass has nothing but the key, and draws again.
    """
    jitted = _drop_at_tracer if isinstance(rate, jax.Array) else _drop_at_number
    return jitted(x, key, rate, kind, *arrays)


def made_with_mask(
    x: Inexact[Array, "*shape"],
    key: KeyLike,
    rate: float | Float[Array, ""],
    kind: Kind,
    *arrays: Array,
) -> tuple[Inexact[Array, "*shape"], Bool[Array, ...]]:
    """Return the same as `made`, and the mask that was applied, which is kept for the backward."""
    jitted = _masked_at_tracer if isinstance(rate, jax.Array) else _masked_at_number
    return jitted(x, key, rate, kind, *arrays)


def inverse(keep_prob: float | Float[Array, ""], dtype: np.dtype) -> np.floating | Float[Array, ""]:
    """Dropout's scale: 1 / keep_prob, or 0 where nothing is kept."""
    real = real_dtype(dtype)
    if isinstance(keep_prob, jax.Array):
        return jnp.where(keep_prob > 0, 1 / keep_prob, 0).astype(real)
    return real(1) / real(keep_prob)


class Kind(Protocol):
    """What of a dropout is no array: one value, static under jit.

    Attributes:
        name: the name of the function, for observers.
    """

    @property
    def name(self) -> str: ...

    def keep(self, *args: Any, **kwargs: Any) -> Bool[Array, ...]:
        """Draws the mask for `x`, from a key, a rate and what else it depends on: True keeps.

        Of size 1 along dimensions that share it.
        """
        ...

    def apply(
        self, x: Inexact[Array, "*shape"], keep: Bool[Array, ...], rate: float | Float[Array, ""]
    ) -> Inexact[Array, "*shape"]:
        """Masks and scales."""
        ...


@dataclasses.dataclass(frozen=True)
class Settings:
    """A mask from a sampler, a scale from the rate: of dropout and what differs in those only.

    An element that is kept becomes `(x + shift) * scale`, one that is dropped `fill`.

    Attributes:
        name: the name of the function, for observers.
        broadcast_dims: dimensions along which one mask is shared.
        sampler: what draws the mask.
        scale: makes the scale from the keep probability and the dtype.
        offsets: makes `(shift, fill)` from the same; both are 0 without it.
    """

    name: str
    broadcast_dims: tuple[int, ...]
    sampler: Sampler
    scale: Callable[..., Any] = inverse
    offsets: Callable[..., Any] | None = None

    def keep(
        self, x: Inexact[Array, "*shape"], key: KeyLike, rate: float | Float[Array, ""]
    ) -> Bool[Array, ...]:
        """Draws the mask."""
        return keep_mask(x, key, keep_prob_of(rate, x.dtype), self.broadcast_dims, self.sampler)

    def apply(
        self, x: Inexact[Array, "*shape"], keep: Bool[Array, ...], rate: float | Float[Array, ""]
    ) -> Inexact[Array, "*shape"]:
        """Masks, shifts and scales."""
        realised = realised_keep_prob(self.sampler, keep_prob_of(rate, x.dtype))
        if isinstance(realised, jax.Array):
            realised = realised.astype(real_dtype(x.dtype))
        scale = self.scale(realised, x.dtype)
        if self.offsets is None:
            return selected(keep, x, scale)
        shift, fill = self.offsets(realised, x.dtype)
        # The sum before the product: no compiler can contract these two to one rounding. `x` may be
        # a product itself.
        kept = (rounded(x.astype(scale.dtype)) + shift) * scale
        return jnp.where(keep, kept, fill).astype(x.dtype)


def _drop(
    x: Inexact[Array, "*shape"],
    key: KeyLike,
    rate: float | Float[Array, ""],
    kind: Kind,
    *arrays: Array,
) -> Inexact[Array, "*shape"]:
    def masked(
        x: Inexact[Array, "*shape"], key: KeyLike, *arrays: Array
    ) -> Inexact[Array, "*shape"]:
        return _apply_mask(x, key, rate, kind, *arrays)[0]

    # What the backward pass needs of the forward one is the mask; under checkpoint it is made again
    # from the key. prevent_cse=False, because its barriers would keep XLA from fusing the mask.
    return jax.checkpoint(masked, prevent_cse=False)(x, key, *arrays)


def _apply_mask(
    x: Inexact[Array, "*shape"],
    key: KeyLike,
    rate: float | Float[Array, ""],
    kind: Kind,
    *arrays: Array,
) -> tuple[Inexact[Array, "*shape"], Bool[Array, ...]]:
    if isinstance(rate, jax.Array):
        rate = rounded(rate)  # the caller may pass a product, from which differences are made
    keep = kind.keep(x, key, rate, *arrays)
    dropped = kind.apply(x, keep, rate)
    if isinstance(rate, jax.Array):
        in_range = (rate >= 0) & (rate <= 1)
        dropped = jnp.where(in_range, dropped, jnp.full((), jnp.nan, x.dtype))
    return dropped, keep


# The inner jit makes an eager call one dispatch and not a hundred, and the sites of a model that
# agree in shape and rate share one trace and one lowering.
_drop_at_number = jax.jit(_drop, static_argnums=(2, 3))
_drop_at_tracer = jax.jit(_drop, static_argnums=3)
_masked_at_number = jax.jit(_apply_mask, static_argnums=(2, 3))
_masked_at_tracer = jax.jit(_apply_mask, static_argnums=3)


def keep_mask(
    x: Inexact[Array, "*shape"],
    key: KeyLike,
    keep_prob: float | Float[Array, ""],
    dims: tuple[int, ...],
    sampler: Sampler,
) -> Bool[Array, ...]:
    """A mask for `x`, of size 1 along the dimensions that share it and laid out as the others."""
    shape = tuple(1 if dim in dims else size for dim, size in enumerate(x.shape))
    layout = mask_sharding(x, dims)
    draw = functools.partial(sampler, key, keep_prob, shape, out_sharding=layout)
    first = min((dim for dim in dims if not at_most(x.shape[dim], 1)), default=x.ndim)
    # Shared along the last dimensions only, an element of the mask stays in a register.
    is_redrawn = not at_most(math.prod(shape[first:]), 1)
    return drawn_once(draw) if is_redrawn else draw()


def drawn_once(draw: Callable[[], Bool[Array, ...]]) -> Bool[Array, ...]:
    """Draws a mask before it is read, where a CPU would draw it for each element that shares it.

    XLA counts the operations of a draw as cheap, and repeats them in every loop that reads a mask.
    Into the branches of a conditional it does not look; the barrier keeps it from seeing that
    there is nothing to decide.
    """

    def in_a_branch() -> Bool[Array, ...]:
        return lax.cond(lax.optimization_barrier(True), draw, lambda: jnp.zeros_like(draw()))

    return lax.platform_dependent(cpu=in_a_branch, default=draw)


def keep_prob_of(rate: float | Float[Array, ""], dtype: np.dtype) -> float | Float[Array, ""]:
    """1 - rate, rounded once to the precision that `dtype` is scaled in."""
    real = real_dtype(dtype)
    if isinstance(rate, jax.Array):
        return real(1) - lax.stop_gradient(rate).astype(real)
    return float(real(1 - rate))  # the subtraction is in double


def real_dtype(dtype: np.dtype) -> type[np.floating]:
    """The type in which elements of `dtype` are scaled, before they are rounded once."""
    return np.float64 if dtype in _DOUBLE else np.float32


def selected(
    keep: Bool[Array, ...], x: Inexact[Array, "*shape"], scale: np.floating | Float[Array, ""]
) -> Inexact[Array, "*shape"]:
    """The elements that are kept, scaled, and zeros."""
    # A selection, not a product: a dropped NaN or infinity must become 0.
    return jnp.where(keep, _scaled(x, scale), jnp.zeros((), x.dtype))


def _scaled(
    x: Inexact[Array, "*shape"], scale: np.floating | Float[Array, ""]
) -> Inexact[Array, "*shape"]:
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        # Part by part: a complex product would make NaN of an infinite part.
        return lax.complex(x.real * scale, x.imag * scale)
    return (x.astype(scale.dtype) * scale).astype(x.dtype)


def mask_sharding(
    x: Inexact[Array, "*shape"], broadcast_dims: tuple[int, ...]
) -> NamedSharding | None:
    """The layout of `x` for its mask: made without one, a mask is built whole on every device."""
    sharding = jax.typeof(x).sharding
    if all(axes is None for axes in sharding.spec):
        return None
    spec = [None if dim in broadcast_dims else axes for dim, axes in enumerate(sharding.spec)]
    return sharding.update(spec=PartitionSpec(*spec))


def require_key(key: KeyLike | None) -> KeyLike:
    """Returns the key if there is one, and one only.

    Raises:
        TypeError: it is not a key.
        ValueError: it is missing, or a batch of keys.
    """
    if key is None:
        raise ValueError(
            "key is missing: dropout in training needs one. Pass key=jax.random.key(seed), or "
            "key=regjax.site_key(root, step, site) inside a training loop, or deterministic=True "
            "to evaluate."
        )
    return check_key(key)


def check_inexact(x: Inexact[ArrayLike, "*shape"]) -> Inexact[Array, "*shape"]:
    """Returns `x` as an array if it is floating or complex; integers cannot be scaled.

    Raises:
        TypeError: it is of another dtype.
    """
    x = check_array("x", x)
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        raise TypeError(
            f"x must be floating or complex; got dtype {x.dtype}. Cast it: x.astype(jnp.float32)."
        )
    return x


def check_real(x: Inexact[ArrayLike, "*shape"], what: str, advice: str) -> Float[Array, "*shape"]:
    """Returns `x` as an array if it is real and floating.

    Raises:
        TypeError: it is of another dtype.
    """
    x = check_inexact(x)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        raise TypeError(f"x must be real for {what}; got dtype {x.dtype}. {advice}")
    return x


def check_flag(deterministic: ArrayLike) -> bool | Bool[Array, ""]:
    """Returns a concrete flag as a Python bool, a traced one as it is.

    Raises:
        TypeError: it is not one boolean.
    """
    if isinstance(deterministic, bool):
        return deterministic
    if getattr(deterministic, "dtype", None) != np.bool_ or np.ndim(deterministic):
        raise TypeError(
            "deterministic must be one boolean: False in training, True in evaluation; got "
            f"{deterministic!r}."
        )
    return deterministic if isinstance(deterministic, Tracer) else bool(deterministic)


def check_dims(broadcast_dims: Sequence[int], ndim: int) -> tuple[int, ...]:
    """Returns `broadcast_dims` as a sorted tuple of distinct dimensions.

    Raises:
        ValueError: one of them is negative, too large, or there twice.
    """
    dims = tuple(sorted(check_integers("broadcast_dims", broadcast_dims)))
    if any(not 0 <= dim < ndim for dim in dims) or len(set(dims)) != len(dims):
        raise ValueError(
            "broadcast_dims must be distinct dimensions of x, counted from 0 and below "
            f"{ndim}; got {tuple(broadcast_dims)}."
        )
    return dims


def check_axis(name: str, axis: int, ndim: int, advice: str = "") -> int:
    """Returns a dimension of `x`, counted from the end if negative, as one counted from 0.

    Raises:
        TypeError: it is not an integer.
        ValueError: it is not one of `ndim` dimensions; `advice` says what to do.
    """
    index = check_integer(name, axis)
    if not -ndim <= index < ndim:
        raise ValueError(f"{name} must be a dimension of x, which has {ndim}; got {axis}.{advice}")
    return index % ndim


def is_number(rate: float | Float[Array, ""], number: int) -> bool:
    """Whether a rate is known, and this number."""
    return not isinstance(rate, jax.Array) and rate == number
