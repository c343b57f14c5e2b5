"""Dropout: zero random elements in training, scale the others, do nothing in evaluation."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from regjax._checks import check_array
from regjax._random.bernoulli import EXACT, MaskSampler, Sampler, bernoulli, check_probability
from regjax._random.events import observer
from regjax._random.keys import check_key, key_words
from regjax._random.packed import mask_sampler
from regjax._random.threefry import at_most
from regjax._random.xla import materialize, rounded
from regshared.checks import check_choice, check_integer, check_integers
from regshared.spellings import explain_names

if TYPE_CHECKING:
    from jax.typing import ArrayLike
    from jaxtyping import Array, Bool, Float, Inexact

    from regjax._random.keys import KeyLike

_DOUBLE = (np.dtype(np.float64), np.dtype(np.complex128))


@explain_names
def dropout(
    x: Inexact[ArrayLike, "*shape"],
    rate: ArrayLike,
    *,
    key: KeyLike | None = None,
    deterministic: ArrayLike = False,
    broadcast_dims: Sequence[int] = (),
    sampler: Sampler = bernoulli,
    implementation: str | None = None,
) -> Inexact[Array, "*shape"]:
    """Zero each element with probability `rate` and divide the others by `1 - rate`.

    With keep ~ Bernoulli(1 - rate) for each element, `y = where(keep, x / (1 - rate), 0)`, so that
    the mean of `y` is `x` and evaluation needs no rescaling: `deterministic=True` returns `x`
    itself. A dropped NaN or infinity is 0. Only the key is stored for the backward pass, which
    draws the same mask again.

    The division is a multiplication by `float32(1) / float32(1 - rate)`, in double for float64 and
    complex128; half and 8-bit types are scaled in float32 and rounded once. A mask keeps elements
    with a probability that is a multiple of 2**-23, rounded up. Where `1 - rate` is below 2**-12,
    the scale is the inverse of that multiple, so that the mean is right for every rate below 1.

    Args:
        x: Floating or complex, of any shape, including 0-d and empty.
        rate: The dropout rate, in [0, 1]. A Python number, or a traced scalar, which can change
            without recompiling; then `1 - rate` is rounded in float32, which may change its last
            bit, and no gradient flows to it.
        key: The PRNG key; required unless `deterministic`, or `rate` is the number 0 or 1. Use each
            key once; `site_key` derives one for every place and step.
        deterministic: True in evaluation. It may be traced; True then spends no random bits.
        broadcast_dims: Dimensions along which one mask is shared, such as `(1,)` for the same mask
            at every timestep of (batch, time, features).
        sampler: The function that draws the mask: `bernoulli`, `packed_bernoulli`, or any function
            with their arguments. `by_example(examples)` draws a part of a batch as in the whole.
        implementation: "xla" or None, or "triton": a kernel for NVIDIA GPUs that keeps the words of
            `packed_bernoulli` in registers. The result is the same. It is not the default, because
            it has run in Pallas's interpreter only. It takes float32 and 16-bit arrays that are
            packed and not sharded, and a Python number as rate, and has no forward-mode derivative.

    Returns:
        An array of the shape, dtype and sharding of `x`.

    Raises:
        TypeError: `x` has an integer or boolean dtype, `rate` is not a real number, `key` is not a
            key, or `deterministic` is not a boolean.
        ValueError: A concrete `rate` is not in [0, 1]; `key` is missing, or a batch of keys; or
            `broadcast_dims` are not distinct dimensions of `x`; or the kernel of `implementation`
            does not support an argument. A traced rate out of range gives NaN.
        NotImplementedError: A program with the kernel is compiled for another platform.

    Note (PyTorch):
        `torch.nn.functional.dropout(x, p=rate, training=not deterministic)` draws its masks from a
        hidden generator. `regtorch.dropout` with the same key returns bitwise identical results,
        and so do the other functions of the family. Inside a larger jitted function, XLA may
        contract the scale of a shared mask with a sum that follows, which then rounds once.

    Example:
        >>> import jax, jax.numpy as jnp, regjax
        >>> regjax.dropout(jnp.arange(1.0, 7.0), 0.5, key=jax.random.key(0))
        Array([ 0.,  0.,  6.,  8.,  0., 12.], dtype=float32)

    References:
        Srivastava et al., "Dropout: a simple way to prevent neural networks from overfitting", JMLR
        15, 2014; here in the inverted form.
    """
    x = check_inexact(x)
    is_default = isinstance(broadcast_dims, tuple) and not broadcast_dims
    if is_default and sampler is bernoulli and implementation is None:
        return apply_dropout(_ELEMENTWISE, x, rate, key, deterministic)
    dims = () if is_default else check_dims(broadcast_dims, x.ndim)
    drawn_by = mask_sampler(sampler)
    choices = "xla", "triton"
    if implementation is None or check_choice("implementation", implementation, choices) == "xla":
        spec = SampledMask("dropout", drawn_by, dims)
        return apply_dropout(spec, x, rate, key, deterministic)
    from regjax._dropout.kernels import reverse_mode_only
    from regjax._dropout.triton_dropout import kernel_dropout

    spec = kernel_dropout(x, check_probability("rate", rate), dims, drawn_by)
    with reverse_mode_only("triton"):
        return apply_dropout(spec, x, rate, key, deterministic)


@runtime_checkable
class DropoutSpec(Protocol):
    """A kind of dropout with its options, which are static under `jit`.

    A spec is a pytree, whose leaves are the other arrays that the mask depends on. `name` is the
    name of the function, for observers.
    """

    @property
    def name(self) -> str: ...

    def __call__(
        self, x: Inexact[Array, "*shape"], key: KeyLike, rate: float | Float[Array, ""]
    ) -> tuple[Inexact[Array, "*shape"], Array]:
        """Return the result and the applied mask, of size 1 along dimensions that share it.

        The result is NaN for a traced rate outside [0, 1], by `guard_rate` or otherwise.
        """
        ...


def apply_dropout(
    spec: DropoutSpec,
    x: Inexact[Array, "*shape"],
    rate: ArrayLike,
    key: KeyLike | None,
    deterministic: ArrayLike,
) -> Inexact[Array, "*shape"]:
    """Apply a kind of dropout to `x`: checks, shortcuts, key, observers, mask.

    `check_inexact` has checked `x`; `rate`, `key` and `deterministic` are those of `dropout`.
    """
    rate = check_probability("rate", rate)
    deterministic = check_flag(deterministic)
    is_number = isinstance(rate, float)
    if deterministic is True or (is_number and rate == 0):
        return x

    def drop() -> Inexact[Array, "*shape"]:
        if is_number and rate == 1:
            return jnp.zeros_like(x)
        one_key = require_key(key)
        # Inside the jit, the numbers of examples are traced.
        if isinstance(spec, SampledMask) and spec.sampler is not EXACT:
            spec.sampler.check_fit(x.shape, spec.broadcast_dims)
        if observers := observer():
            jitted = _masked_at_number if is_number else _masked_at_tracer
            dropped, keep = jitted(spec, x, one_key, rate)
            examples = spec.sampler.numbers if isinstance(spec, SampledMask) else None
            words = key_words(one_key)
            observers.draw(spec.name, words, rate, keep, x, deterministic, examples)
            return dropped
        return mask_and_scale(spec, x, one_key, rate)

    return drop() if deterministic is False else lax.cond(deterministic, lambda: x, drop)


def mask_and_scale(
    spec: DropoutSpec, x: Inexact[Array, "*shape"], key: KeyLike, rate: float | Float[Array, ""]
) -> Inexact[Array, "*shape"]:
    """Apply `spec` to `x`, in one dispatch."""
    jitted = _drop_at_number if isinstance(rate, float) else _drop_at_tracer
    return jitted(spec, x, key, rate)


def _masked(
    spec: DropoutSpec, x: Inexact[Array, "*shape"], key: KeyLike, rate: float | Float[Array, ""]
) -> tuple[Inexact[Array, "*shape"], Array]:
    """Return the result of `mask_and_scale` and the mask."""
    return spec(x, key, rate)


def _drop(
    spec: DropoutSpec, x: Inexact[Array, "*shape"], key: KeyLike, rate: float | Float[Array, ""]
) -> Inexact[Array, "*shape"]:
    """Return the result alone; the backward pass draws the mask again."""
    # The backward pass only needs the mask. prevent_cse=False, because the barriers of a
    # checkpoint would keep XLA from fusing the mask.
    return jax.checkpoint(lambda spec, x, key: spec(x, key, rate)[0], prevent_cse=False)(
        spec, x, key
    )


# The inner jit makes an eager call one dispatch instead of a hundred, and sites of a model with
# equal shapes and rates share one trace and one lowering.
_drop_at_number = jax.jit(_drop, static_argnums=3)
_drop_at_tracer = jax.jit(_drop)
_masked_at_number = jax.jit(_masked, static_argnums=3)
_masked_at_tracer = jax.jit(_masked)


def guard_rate(draw: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate the call of a `DropoutSpec`: NaN where a traced rate is outside [0, 1]."""

    @functools.wraps(draw)
    def guarded(
        spec: Any, x: Inexact[Array, "*shape"], key: KeyLike, rate: float | Float[Array, ""]
    ) -> tuple[Inexact[Array, "*shape"], Array]:
        if not isinstance(rate, jax.Array):
            return draw(spec, x, key, rate)
        rate = rounded(rate)  # the caller may pass a product, which is subtracted later
        dropped, keep = draw(spec, x, key, rate)
        in_range = (rate >= 0) & (rate <= 1)
        return jnp.where(in_range, dropped, jnp.full((), jnp.nan, x.dtype)), keep

    return guarded


def inverse_keep_prob(
    keep_prob: float | Float[Array, ""], dtype: np.dtype
) -> np.floating | Float[Array, ""]:
    """Return dropout's scale: 1 / keep_prob, or 0 where nothing is kept."""
    real = real_dtype(dtype)
    if isinstance(keep_prob, jax.Array):
        return jnp.where(keep_prob > 0, 1 / keep_prob, 0).astype(real)
    return real(1) / real(keep_prob)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["sampler"],
    meta_fields=["name", "broadcast_dims", "scale", "offsets"],
)
@dataclasses.dataclass(frozen=True)
class SampledMask:
    """A mask drawn by a sampler, with a scale and offsets computed from the keep probability.

    A kept element becomes `(x + shift) * scale`, a dropped one `fill`. The functions `scale` and
    `offsets`, which returns `(shift, fill)`, take the keep probability and the dtype; without
    offsets both are 0.
    """

    name: str
    sampler: MaskSampler
    broadcast_dims: tuple[int, ...] = ()
    scale: Callable[..., Any] = inverse_keep_prob
    offsets: Callable[..., Any] | None = None

    @guard_rate
    def __call__(
        self, x: Inexact[Array, "*shape"], key: KeyLike, rate: float | Float[Array, ""]
    ) -> tuple[Inexact[Array, "*shape"], Bool[Array, "*mask"]]:
        """Draw the mask, shift and scale."""
        keep_prob = keep_prob_of(rate, x.dtype)
        keep = keep_mask(x, key, keep_prob, self.broadcast_dims, self.sampler)
        realized = self.sampler.realized_keep_prob(keep_prob)
        if isinstance(realized, jax.Array):
            realized = realized.astype(real_dtype(x.dtype))
        scale = self.scale(realized, x.dtype)
        if self.offsets is None:
            return where_kept(keep, x, scale), keep
        shift, fill = self.offsets(realized, x.dtype)
        # Sum before product: no compiler can contract the two into one rounding. `x` may itself be
        # a product.
        kept = (rounded(x.astype(scale.dtype)) + shift) * scale
        return jnp.where(keep, kept, fill).astype(x.dtype), keep


@jax.tree_util.register_static
class _StaticMask(SampledMask):
    """A mask that depends on no other array: as a single static node it is dispatched sooner."""


# Made once: an eager call on a few elements takes microseconds.
_ELEMENTWISE = _StaticMask("dropout", mask_sampler(bernoulli))


def keep_mask(
    x: Inexact[Array, "*shape"],
    key: KeyLike,
    keep_prob: float | Float[Array, ""],
    dims: tuple[int, ...],
    sampler: MaskSampler,
) -> Bool[Array, "*mask"]:
    """Return a mask for `x`, of size 1 along dimensions that share it, with the layout of `x`."""
    sampler.check_fit(x.shape, dims)
    layout = mask_sharding(x, dims)
    if not dims:
        return sampler.draw(key, keep_prob, x.shape, layout)
    shape = tuple([1 if dim in dims else size for dim, size in enumerate(x.shape)])
    keep = sampler.draw(key, keep_prob, shape, layout)
    first = min([dim for dim in dims if not at_most(x.shape[dim], 1)], default=x.ndim)
    # Shared along the last dimensions only, a mask element stays in a register.
    is_redrawn = not at_most(math.prod(shape[first:]), 1)
    return materialize(keep) if is_redrawn else keep


def keep_prob_of(rate: float | Float[Array, ""], dtype: np.dtype) -> float | Float[Array, ""]:
    """Return 1 - rate, rounded once to the precision that `dtype` is scaled in."""
    real = real_dtype(dtype)
    if isinstance(rate, jax.Array):
        return real(1) - lax.stop_gradient(rate).astype(real)
    return float(real(1 - rate))  # the subtraction is in double


def real_dtype(dtype: np.dtype) -> type[np.floating]:
    """Return the dtype in which elements of `dtype` are scaled before they are rounded once."""
    return np.float64 if dtype in _DOUBLE else np.float32


def where_kept(
    keep: Bool[Array, "*mask"], x: Inexact[Array, "*shape"], scale: np.floating | Float[Array, ""]
) -> Inexact[Array, "*shape"]:
    """Return the kept elements, scaled, and zeros elsewhere."""
    # Select instead of multiply: a dropped NaN or infinity must become 0.
    return jnp.where(keep, _scaled(x, scale), jnp.zeros((), x.dtype))


def _scaled(
    x: Inexact[Array, "*shape"], scale: np.floating | Float[Array, ""]
) -> Inexact[Array, "*shape"]:
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        # Real and imaginary parts separately: a complex product turns an infinite part into NaN.
        return lax.complex(x.real * scale, x.imag * scale)
    return (x.astype(scale.dtype) * scale).astype(x.dtype)


def mask_sharding(
    x: Inexact[Array, "*shape"], broadcast_dims: tuple[int, ...]
) -> NamedSharding | None:
    """Return the layout of the mask of `x`; without one, every device draws the whole mask."""
    sharding = jax.typeof(x).sharding
    if not any(sharding.spec):
        return None
    spec = [None if dim in broadcast_dims else axes for dim, axes in enumerate(sharding.spec)]
    return sharding.update(spec=PartitionSpec(*spec))


def require_key(key: KeyLike | None) -> KeyLike:
    """Return the key if it is present and a single key."""
    if key is None:
        raise ValueError(
            "key must be a random key in training; got None. Pass key=jax.random.key(seed), or "
            "key=regjax.site_key(root, step, site) inside a training loop, or deterministic=True "
            "to evaluate."
        )
    return check_key(key)


def check_inexact(x: Inexact[ArrayLike, "*shape"]) -> Inexact[Array, "*shape"]:
    """Return `x` as an array if it is floating or complex; integers cannot be scaled."""
    if not isinstance(x, jax.Array):
        x = check_array("x", x)
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        raise TypeError(
            f"x must be floating or complex; got dtype {x.dtype}. Cast it: x.astype(jnp.float32)."
        )
    return x


def check_real(x: Inexact[ArrayLike, "*shape"], what: str, advice: str) -> Float[Array, "*shape"]:
    """Return `x` as an array if it is real and floating."""
    x = check_inexact(x)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        raise TypeError(f"x must be real for {what}; got dtype {x.dtype}. {advice}")
    return x


def check_flag(deterministic: ArrayLike) -> bool | Bool[Array, ""]:
    """Return one concrete boolean as a Python bool, a traced one unchanged."""
    if isinstance(deterministic, bool):
        return deterministic
    if getattr(deterministic, "dtype", None) != np.bool_ or np.ndim(deterministic):
        raise TypeError(
            "deterministic must be a boolean, False in training and True in evaluation; got "
            f"{deterministic!r}."
        )
    return deterministic if isinstance(deterministic, Tracer) else bool(deterministic)


def check_dims(broadcast_dims: Sequence[int], ndim: int) -> tuple[int, ...]:
    """Return `broadcast_dims` as a sorted tuple of distinct dimensions."""
    dims = tuple(sorted(check_integers("broadcast_dims", broadcast_dims)))
    if any(not 0 <= dim < ndim for dim in dims) or len(set(dims)) != len(dims):
        raise ValueError(
            f"broadcast_dims must be distinct dimensions of x, counted from 0 and below {ndim}; "
            f"got {tuple(broadcast_dims)}."
        )
    return dims


def check_axis(name: str, axis: int, ndim: int, advice: str = "") -> int:
    """Return a dimension of `x`, which may be negative, counted from 0; `advice` ends the error."""
    index = check_integer(name, axis)
    if not ndim:
        raise ValueError(f"x must have a {name}; got shape ().{advice}")
    if not -ndim <= index < ndim:
        raise ValueError(f"{name} must be a dimension of x, which has {ndim}; got {axis}.{advice}")
    return index % ndim


def is_number(rate: float | Float[Array, ""], number: int) -> bool:
    """Return whether a rate is concrete and equal to `number`."""
    return not isinstance(rate, jax.Array) and rate == number
