"""Dropout: zero random elements in training, scale the others, do nothing in evaluation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from regtorch._checks import check_callable, check_integer, check_integers, check_tensor
from regtorch._exact import rounded
from regtorch._keys import check_key, generator_key
from regtorch._masks import Sampler, bernoulli, check_probability, realised_keep_prob
from regtorch._observe import observer

_DOUBLE = (torch.float64, torch.complex128)


def dropout(
    x: Tensor,
    rate: float | Tensor,
    *,
    key: Tensor | torch.Generator | None = None,
    deterministic: bool | Tensor = False,
    broadcast_dims: Sequence[int] = (),
    sampler: Sampler = bernoulli,
) -> Tensor:
    """Zeroes each element with probability `rate` and divides the others by `1 - rate`.

    With keep ~ Bernoulli(1 - rate) for each element, `y = where(keep, x / (1 - rate), 0)`, so that
    the mean of `y` is `x`: in evaluation there is nothing to undo, and `deterministic=True` returns
    `x` itself. A dropped NaN or infinity is 0.

    The division is a multiplication by `float32(1) / float32(1 - rate)`; in double for float64 and
    complex128; half and 8-bit types are scaled in float32 and rounded once. A mask keeps elements
    with a multiple of 2**-23, rounded up. Where `1 - rate` is below 2**-12, the scale is the
    inverse of that multiple, so that the mean is right for every rate below 1.

    Args:
        x: floating or complex, of any shape, also 0-d and empty.
        rate: the probability that an element is zeroed, in [0, 1]. A Python number, or a 0-d
            tensor; then the rounding of `1 - rate` is float32's, which may change its last bit, and
            no gradient flows to it.
        key: the random key, or a `torch.Generator` from which one is drawn; needed unless
            `deterministic`, or `rate` is the number 0 or 1. Use each key once; `site_key` makes one
            for every place and step.
        deterministic: True in evaluation; a bool, or a 0-d boolean tensor.
        broadcast_dims: dimensions along which one mask is shared, such as `(1,)` for the same mask
            at every timestep of (batch, time, features).
        sampler: what draws the mask: `bernoulli`, `packed_bernoulli`, or a function with their
            arguments.

    Returns:
        A tensor of the shape, dtype, device and memory layout of `x`.

    Raises:
        TypeError: `x` is of an integer or boolean dtype, `rate` is not a real number, `key` is not
            a key, or `deterministic` is not a boolean.
        ValueError: the number `rate` is not in [0, 1]; the key is missing, or a batch of keys; or
            `broadcast_dims` are not distinct dimensions of `x`. A tensor rate out of range does not
            raise, as reading it would wait for the device: the result is NaN.

    PyTorch:
        `torch.nn.functional.dropout(x, p=rate, training=not deterministic)`, whose masks come from
        a hidden generator. Here the mask is explicit, and `regjax.dropout` with the same key gives
        the same result bit for bit.

    Example:
        >>> import torch, regtorch
        >>> x = torch.arange(1.0, 7.0)
        >>> regtorch.dropout(x, 0.5, key=regtorch.key(0))
        tensor([ 0.,  0.,  6.,  8.,  0., 12.])
        >>> regtorch.dropout(x, 0.5, deterministic=True)
        tensor([1., 2., 3., 4., 5., 6.])

    Source: Srivastava, Hinton, Krizhevsky, Sutskever, Salakhutdinov, "Dropout: a simple way to
    prevent neural networks from overfitting", JMLR 15, 2014; in the inverted form.
    """
    settings = Settings("dropout", check_integers("broadcast_dims", broadcast_dims), sampler)
    return masked(x, rate, key, deterministic, settings)


def masked(
    x: Tensor,
    rate: float | Tensor,
    key: Tensor | torch.Generator | None,
    deterministic: bool | Tensor,
    settings: Settings,
) -> Tensor:
    """Dropout whose mask a sampler draws: an element each, or shared along dimensions."""
    x = check_inexact(x)
    check_callable("sampler", settings.sampler, "(key, keep_prob, shape)")
    dims = check_dims(settings.broadcast_dims, x.ndim)
    settings = dataclasses.replace(settings, broadcast_dims=dims)
    return drawn(x, rate, key, deterministic, settings)


def drawn(
    x: Tensor,
    rate: float | Tensor,
    key: Tensor | torch.Generator | None,
    deterministic: bool | Tensor,
    kind: Kind,
    *tensors: Tensor,
) -> Tensor:
    """The frame of the whole family: checks, shortcuts, the key, who watches, then the mask.

    Args:
        x: what is dropped, checked by `check_inexact`.
        rate: as `dropout` takes it, like `key` and `deterministic`.
        key: see there.
        deterministic: see there.
        kind: what is drawn, and what becomes of `x`.
        *tensors: what the mask depends on besides.
    """
    rate = check_probability("rate", rate)
    deterministic = check_flag(deterministic)
    if deterministic is True or is_number(rate, 0):
        return x
    if is_number(rate, 1):
        # Not zeros_like: the result stays in the graph, and its gradient is zeros, not an error.
        dropped = torch.where(torch.zeros((), dtype=torch.bool, device=x.device), x, 0)
    else:
        one_key = require_key(key).to(x.device)
        if watching := observer():
            keep = kind.keep(x, one_key, rate, *tensors)
            watching.draw(kind.name, one_key, rate, keep, x, deterministic)
            dropped = made(x, one_key, rate, _Drawn(kind), keep)
        else:
            dropped = made(x, one_key, rate, kind, *tensors)
    if isinstance(deterministic, Tensor):
        return torch.where(deterministic, x, dropped)
    return dropped


def inverse(keep_prob: float | Tensor, dtype: torch.dtype) -> float | Tensor:
    """Dropout's scale: 1 / keep_prob, or 0 where nothing is kept."""
    real = real_dtype(dtype)
    if isinstance(keep_prob, Tensor):
        return torch.where(keep_prob > 0, 1 / keep_prob, 0.0).to(real)
    return (1 / torch.tensor(keep_prob, dtype=real)).item()


class Kind(Protocol):
    """What of a dropout is no tensor: one value, into which no transform looks.

    Attributes:
        name: the name of the function, for observers.
    """

    @property
    def name(self) -> str: ...

    def keep(self, *args: Any, **kwargs: Any) -> Tensor:
        """Draws the mask for `x`, from a key, a rate and what else it depends on: True keeps.

        Of size 1 along dimensions that share it.
        """
        ...

    def apply(self, x: Tensor, keep: Tensor, rate: float | Tensor) -> Tensor:
        """Masks and scales."""
        ...

    def slope(self) -> Kind:
        """The kind whose `apply` is the derivative of this one's: linear in `x`."""
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

    def keep(self, x: Tensor, key: Tensor, rate: float | Tensor) -> Tensor:
        """Draws the mask."""
        return _keep_mask(x, key, keep_prob_of(rate, x.dtype), self)

    def apply(self, x: Tensor, keep: Tensor, rate: float | Tensor) -> Tensor:
        """Masks, shifts and scales."""
        realised = realised_keep_prob(self.sampler, keep_prob_of(rate, x.dtype))
        if isinstance(realised, Tensor):
            realised = realised.to(real_dtype(x.dtype))
        scale = self.scale(realised, x.dtype)
        if self.offsets is None:
            return selected(keep, x, scale)
        shift, fill = self.offsets(realised, x.dtype)
        # The sum before the product: no compiler can contract these two to one rounding. `x` may be
        # a product itself.
        kept = (rounded(x.to(real_dtype(x.dtype))) + shift) * scale
        return torch.where(laid_out(keep, x), kept, fill).to(x.dtype)

    def slope(self) -> Settings:
        """Without the offsets."""
        return dataclasses.replace(self, offsets=None)


def _masked(x: Tensor, key: Tensor, rate: float | Tensor, kind: Kind, *tensors: Tensor) -> Tensor:
    return kind.apply(x, kind.keep(x, key, rate, *tensors), rate)


class _Drop(torch.autograd.Function):
    """Masks and scales; affine in `x`, so that derivatives of every kind are the same again.

    Nothing is kept for them but the key, the rate where it is a tensor, and what the mask depends
    on besides: the mask is made anew.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, key: Tensor, rate: float | Tensor, kind: Kind, *tensors: Tensor
    ) -> Tensor:
        return _masked(x, key, rate, kind, *tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, key, rate, ctx.kind, *tensors = inputs
        ctx.rate = None if isinstance(rate, Tensor) else rate
        saved = (key, *tensors, *([rate] if isinstance(rate, Tensor) else []))
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        _, *others = ctx.needs_input_grad
        return _drop_again(ctx, *grad_outputs), *(None for _ in others)

    @staticmethod
    def jvp(ctx: Any, *grad_inputs: Any) -> Tensor:
        return _drop_again(ctx, grad_inputs[0])


def _drop_again(ctx: Any, x: Tensor) -> Tensor:
    """Apply the same mask and scale to another tensor, without the offsets."""
    key, *tensors = ctx.saved_tensors
    rate = tensors.pop() if ctx.rate is None else ctx.rate
    return _Drop.apply(x, key, rate, ctx.kind.slope(), *tensors)


def made(x: Tensor, key: Tensor, rate: float | Tensor, kind: Kind, *tensors: Tensor) -> Tensor:
    """What `kind` makes of `x`; of a tensor rate outside [0, 1], NaN.

    The backward pass has nothing but the key, and draws again.
    """
    # A compiler sees through the plain function and settles by itself what to keep; it cannot trace
    # a Function that has a forward-mode rule.
    apply = _masked if torch.compiler.is_compiling() else _Drop.apply
    if not isinstance(rate, Tensor):
        return apply(x, key, rate, kind, *tensors)
    rate = rounded(rate.detach())  # a product of the user's, perhaps
    nan = torch.full((), torch.nan, dtype=x.dtype, device=x.device)
    dropped = apply(x, key, rate, kind, *tensors)
    return torch.where((rate >= 0) & (rate <= 1), dropped, nan)


@dataclasses.dataclass(frozen=True)
class _Drawn:
    """A kind whose mask is drawn already: observers get the very tensor that is applied."""

    kind: Kind

    @property
    def name(self) -> str:
        """The name of the function."""
        return self.kind.name

    def keep(self, x: Tensor, key: Tensor, rate: float | Tensor, keep: Tensor) -> Tensor:
        """The mask."""
        return keep

    def apply(self, x: Tensor, keep: Tensor, rate: float | Tensor) -> Tensor:
        """Masks and scales as the kind does."""
        return self.kind.apply(x, keep, rate)

    def slope(self) -> _Drawn:
        """The same with the kind's slope."""
        return _Drawn(self.kind.slope())


def _keep_mask(x: Tensor, key: Tensor, keep_prob: float | Tensor, settings: Settings) -> Tensor:
    """Of size 1 along the dimensions that share it."""
    dims = settings.broadcast_dims
    shape = tuple(1 if dim in dims else size for dim, size in enumerate(x.shape))
    return settings.sampler(key, keep_prob, shape)


def keep_prob_of(rate: float | Tensor, dtype: torch.dtype) -> float | Tensor:
    """1 - rate, rounded once to the precision that `dtype` is scaled in."""
    real = real_dtype(dtype)
    if isinstance(rate, Tensor):
        return 1 - rate.to(real)
    return torch.tensor(1 - rate, dtype=real).item()  # the subtraction is in double


def real_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which elements of `dtype` are scaled, before they are rounded once."""
    return torch.float64 if dtype in _DOUBLE else torch.float32


def selected(keep: Tensor, x: Tensor, scale: float | Tensor) -> Tensor:
    """The elements that are kept, scaled, and zeros."""
    # A selection, not a product: a dropped NaN or infinity must become 0.
    return _scaled(torch.where(laid_out(keep, x), x, 0), scale)


def laid_out(keep: Tensor, x: Tensor) -> Tensor:
    """Return a mask with the order of strides of `x`, such as channels last.

    A mask is drawn in row-major order, and the result of `torch.where` has the layout of its mask.
    """
    if x.is_contiguous() or 0 in x.stride():  # an expanded dimension has no place in an order
        return keep
    order = sorted(range(x.ndim), key=x.stride, reverse=True)
    back = sorted(range(x.ndim), key=order.__getitem__)
    return keep.permute(order).contiguous().permute(back)


def _scaled(x: Tensor, scale: float | Tensor) -> Tensor:
    if x.is_complex():
        # Part by part: a complex product would make NaN of an infinite part.
        return torch.view_as_complex(torch.view_as_real(x) * scale)
    if isinstance(scale, float) and x.dtype.itemsize > 1 and not torch.compiler.is_compiling():
        return x * scale  # half types in float32 and rounded once, without a copy in float32
    return (x.to(real_dtype(x.dtype)) * scale).to(x.dtype)


def require_key(key: Tensor | torch.Generator | None) -> Tensor:
    """Returns the key if there is one, and one only; draws one from a generator.

    Raises:
        TypeError: it is not a key.
        ValueError: it is missing, or a batch of keys.
    """
    if key is None:
        raise ValueError(
            "key is missing: dropout in training needs one. Pass key=regtorch.key(seed), or "
            "key=regtorch.site_key(root, step, site) inside a training loop, or a torch.Generator, "
            "or deterministic=True to evaluate."
        )
    return generator_key(key) if isinstance(key, torch.Generator) else check_key(key)


def check_inexact(x: Tensor) -> Tensor:
    """Returns `x` if it is a floating or complex tensor; integers cannot be scaled.

    Raises:
        TypeError: it is of another dtype, or not a tensor.
    """
    check_tensor("x", x)
    if not (x.is_floating_point() or x.is_complex()):
        raise TypeError(
            f"x must be floating or complex; got dtype {x.dtype}. Cast it: x.to(torch.float32)."
        )
    return x


def check_real(x: Tensor, what: str, advice: str) -> Tensor:
    """Returns `x` if it is a real floating tensor.

    Raises:
        TypeError: it is of another dtype, or not a tensor.
    """
    x = check_inexact(x)
    if x.is_complex():
        raise TypeError(f"x must be real for {what}; got dtype {x.dtype}. {advice}")
    return x


def check_flag(deterministic: bool | Tensor) -> bool | Tensor:
    """Returns the flag if it is a bool or a 0-d boolean tensor.

    Raises:
        TypeError: it is not one boolean.
    """
    is_flag = isinstance(deterministic, Tensor) and deterministic.dtype == torch.bool
    if not (isinstance(deterministic, bool) or (is_flag and deterministic.ndim == 0)):
        raise TypeError(
            "deterministic must be one boolean: False in training, True in evaluation; got "
            f"{deterministic!r}."
        )
    return deterministic


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


def is_number(rate: float | Tensor, number: int) -> bool:
    """Whether a rate is known, and this number."""
    return not isinstance(rate, Tensor) and rate == number
