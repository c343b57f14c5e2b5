"""Dropout: zero random elements in training, scale the others, do nothing in evaluation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from regshared.checks import check_integer, check_integers
from regshared.spellings import explain_names
from regtorch._checks import check_tensor
from regtorch._dropout.dtensor import Place, is_dtensor, on_local_part, sampler_at
from regtorch._random.bernoulli import MaskSampler, Sampler, bernoulli, check_probability
from regtorch._random.events import observer
from regtorch._random.keys import check_key, generator_key
from regtorch._random.packed import mask_sampler
from regtorch._random.rounding import rounded

_DOUBLE = (torch.float64, torch.complex128)


@explain_names
def dropout(
    x: Tensor,
    rate: float | Tensor,
    *,
    key: Tensor | torch.Generator | None = None,
    deterministic: bool | Tensor = False,
    broadcast_dims: Sequence[int] = (),
    sampler: Sampler = bernoulli,
) -> Tensor:
    """Zero each element with probability `rate` and divide the others by `1 - rate`.

    With keep ~ Bernoulli(1 - rate) for each element, `y = where(keep, x / (1 - rate), 0)`, so that
    the mean of `y` is `x` and evaluation needs no rescaling: `deterministic=True` returns `x`
    itself. A dropped NaN or infinity is 0. Only the key is stored for the backward pass, which
    draws the same mask again; the temporary tensors of the sampler take the place of a stored mask,
    so the peak of memory is no lower than that of PyTorch's dropout.

    The division is a multiplication by `float32(1) / float32(1 - rate)`, in double for float64 and
    complex128; half and 8-bit types are scaled in float32 and rounded once. A mask keeps elements
    with a probability that is a multiple of 2**-23, rounded up. Where `1 - rate` is below 2**-12,
    the scale is the inverse of that multiple, so that the mean is right for every rate below 1.

    Args:
        x: Floating or complex, of any shape, including 0-d and empty. For a `DTensor`, each rank
            draws its part of the mask of the whole tensor, without communication; the result and
            the gradient have its placements, which are `Shard` and `Replicate`.
        rate: The dropout rate, in [0, 1]: a number, or a 0-d tensor. For a tensor `1 - rate` is
            rounded in float32, which may change its last bit, and no gradient flows to it.
        key: The PRNG key, or a `torch.Generator` from which a key is drawn; required unless
            `deterministic`, or `rate` is the number 0 or 1. Use each key once; `site_key` derives
            one for every place and step.
        deterministic: True in evaluation; a bool, or a 0-d boolean tensor.
        broadcast_dims: Dimensions along which one mask is shared, such as `(1,)` for the same mask
            at every timestep of (batch, time, features).
        sampler: The function that draws the mask: `bernoulli`, `packed_bernoulli`, or any function
            with their arguments. `by_example(examples)` draws a part of a batch as in the whole.

    Returns:
        A tensor of the shape, dtype, device and memory layout of `x`.

    Raises:
        TypeError: `x` has an integer or boolean dtype, `rate` is not a real number, `key` is not a
            key, or `deterministic` is not a boolean.
        ValueError: The number `rate` is not in [0, 1]; `key` is missing, or a batch of keys; or
            `broadcast_dims` are not distinct dimensions of `x`. A tensor rate out of range gives
            NaN, because reading it would wait for the device.

    Note (PyTorch):
        `torch.nn.functional.dropout(x, p=rate, training=not deterministic)` draws its masks from a
        hidden generator.

    Note (JAX):
        `regjax.dropout` with the same key returns bitwise identical results. So do the other
        functions of the family, unless a note states otherwise.

    Example:
        >>> import torch, regtorch
        >>> regtorch.dropout(torch.arange(1.0, 7.0), 0.5, key=regtorch.key(0))
        tensor([ 0.,  0.,  6.,  8.,  0., 12.])

    References:
        Srivastava et al., "Dropout: a simple way to prevent neural networks from overfitting", JMLR
        15, 2014; here in the inverted form.
    """
    x = check_inexact(x)
    dims = check_dims(broadcast_dims, x.ndim)
    return apply_dropout(
        SampledMask("dropout", mask_sampler(sampler), dims), x, rate, key, deterministic
    )


def apply_dropout(
    spec: DropoutSpec,
    x: Tensor,
    rate: float | Tensor,
    key: Tensor | torch.Generator | None,
    deterministic: bool | Tensor,
    given: Tensor | None = None,
) -> Tensor:
    """Apply a kind of dropout to `x`: checks, shortcuts, key, observers, mask.

    `check_inexact` has checked `x`; `given` is a further tensor that the mask depends on.
    """
    rate = check_probability("rate", rate)
    deterministic = check_flag(deterministic)
    if deterministic is True or is_number(rate, 0):
        return x
    if is_dtensor(x):

        def apply(local: Tensor, place: Place) -> Tensor:
            kind = spec.at(place) if isinstance(spec, SampledMask) else spec
            return apply_dropout(kind, local, rate, key, deterministic, given)

        return on_local_part(
            apply, x, only_whole="" if isinstance(spec, SampledMask) else spec.name
        )
    examples = None
    if given is None and isinstance(spec, SampledMask):
        spec, given = spec.split()
        examples = given
    if is_number(rate, 1):
        # Unlike zeros_like, this keeps the result in the graph, with a gradient of zeros.
        dropped = torch.where(torch.zeros((), dtype=torch.bool, device=x.device), x, 0)
    else:
        one_key = require_key(key).to(x.device)
        if observers := observer():
            keep = spec.keep(x, one_key, rate, given)
            observers.draw(spec.name, one_key, rate, keep, x, deterministic, examples)
            dropped = mask_and_scale(_DrawnMask(spec), x, one_key, rate, keep)
        else:
            dropped = mask_and_scale(spec, x, one_key, rate, given)
    if isinstance(deterministic, Tensor):
        return torch.where(deterministic, x, dropped)
    return dropped


def inverse_keep_prob(keep_prob: float | Tensor, dtype: torch.dtype) -> float | Tensor:
    """Return dropout's scale: 1 / keep_prob, or 0 where nothing is kept."""
    real = real_dtype(dtype)
    if isinstance(keep_prob, Tensor):
        return torch.where(keep_prob > 0, 1 / keep_prob, 0.0).to(real)
    return (1 / torch.tensor(keep_prob, dtype=real)).item()


@runtime_checkable
class DropoutSpec(Protocol):
    """A kind of dropout with its options, without tensors: one value, opaque to transforms.

    Attributes:
        name: The name of the function, for observers.
    """

    @property
    def name(self) -> str: ...

    def keep(
        self, x: Tensor, key: Tensor, rate: float | Tensor, given: Tensor | None = None
    ) -> Tensor:
        """Return the mask for `x`, True where kept, of size 1 along dimensions that share it.

        `given` is a further tensor that the mask depends on.
        """
        ...

    def apply(self, x: Tensor, keep: Tensor, rate: float | Tensor) -> Tensor:
        """Mask and scale."""
        ...

    def slope(self) -> DropoutSpec:
        """Return the kind whose `apply`, linear in `x`, is the derivative of this one's."""
        ...


@dataclasses.dataclass(frozen=True)
class SampledMask:
    """A mask drawn by a sampler, with a scale and offsets computed from the keep probability.

    A kept element becomes `(x + shift) * scale`, a dropped one `fill`.

    Attributes:
        name: The name of the function, for observers.
        sampler: The sampler of the mask.
        broadcast_dims: Dimensions along which one mask is shared, in order.
        scale: Computes the scale from the keep probability and the dtype.
        offsets: Computes `(shift, fill)` from the same; both are 0 without it.
    """

    name: str
    sampler: MaskSampler
    broadcast_dims: tuple[int, ...] = ()
    scale: Callable[..., Any] = inverse_keep_prob
    offsets: Callable[..., Any] | None = None

    def split(self) -> tuple[SampledMask, Tensor | None]:
        """Return the kind without tensors, and the tensor that the mask depends on."""
        sampler, given = self.sampler.split()
        return (
            (self, None) if given is None else (dataclasses.replace(self, sampler=sampler), given)
        )

    def keep(
        self, x: Tensor, key: Tensor, rate: float | Tensor, given: Tensor | None = None
    ) -> Tensor:
        sampler = self.sampler if given is None else self.sampler.join(given)
        sampler.check_fit(tuple(x.shape), self.broadcast_dims)
        shape = tuple([1 if dim in self.broadcast_dims else n for dim, n in enumerate(x.shape)])
        return sampler.draw(key, keep_prob_of(rate, x.dtype), shape)

    def apply(self, x: Tensor, keep: Tensor, rate: float | Tensor) -> Tensor:
        realized = self.sampler.realized_keep_prob(keep_prob_of(rate, x.dtype))
        if isinstance(realized, Tensor):
            realized = realized.to(real_dtype(x.dtype))
        scale = self.scale(realized, x.dtype)
        if self.offsets is None:
            return where_kept(keep, x, scale)
        shift, fill = self.offsets(realized, x.dtype)
        # Sum before product: no compiler can contract the two into one rounding. `x` may itself be
        # a product.
        kept = (rounded(x.to(real_dtype(x.dtype))) + shift) * scale
        return torch.where(laid_out(keep, x), kept, fill).to(x.dtype)

    def slope(self) -> SampledMask:
        """Return the same kind without the offsets."""
        return dataclasses.replace(self, offsets=None)

    def at(self, place: Place) -> SampledMask:
        """Return the kind that drops in a part of a tensor what this one drops in the whole."""
        sampler = sampler_at(self.sampler, place, self.broadcast_dims)
        return dataclasses.replace(self, sampler=sampler)


def _masked(
    x: Tensor, key: Tensor, rate: float | Tensor, spec: DropoutSpec, given: Tensor | None
) -> Tensor:
    return spec.apply(x, spec.keep(x, key, rate, given), rate)


class _Drop(torch.autograd.Function):
    """Masking and scaling, affine in `x`, so that every derivative masks and scales again.

    Derivatives store only the key, a tensor rate and `given`: they draw the mask again.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, key: Tensor, rate: float | Tensor, spec: DropoutSpec, given: Tensor | None
    ) -> Tensor:
        return _masked(x, key, rate, spec, given)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, key, rate, ctx.spec, given = inputs
        ctx.rate = None if isinstance(rate, Tensor) else rate
        saved = (key, rate if isinstance(rate, Tensor) else None, given)
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return _drop_again(ctx, *grad_outputs), None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *grad_inputs: Any) -> Tensor:
        return _drop_again(ctx, grad_inputs[0])


def _drop_again(ctx: Any, x: Tensor) -> Tensor:
    """Apply the same mask and scale to another tensor, without the offsets."""
    key, rate, given = ctx.saved_tensors
    return _Drop.apply(x, key, rate if ctx.rate is None else ctx.rate, ctx.spec.slope(), given)


def mask_and_scale(
    spec: DropoutSpec, x: Tensor, key: Tensor, rate: float | Tensor, given: Tensor | None = None
) -> Tensor:
    """Apply `spec` to `x`; return NaN for a tensor rate outside [0, 1]."""
    # A compiler traces the plain function and decides what to store; it cannot trace a Function
    # that has a forward-mode rule.
    apply = _masked if torch.compiler.is_compiling() else _Drop.apply
    if not isinstance(rate, Tensor):
        return apply(x, key, rate, spec, given)
    rate = rounded(rate.detach())  # the caller may pass a product, which is subtracted later
    nan = torch.full((), torch.nan, dtype=x.dtype, device=x.device)
    dropped = apply(x, key, rate, spec, given)
    return torch.where((rate >= 0) & (rate <= 1), dropped, nan)


@dataclasses.dataclass(frozen=True)
class _DrawnMask:
    """A kind whose mask is already drawn, so that observers receive the tensor that is applied."""

    spec: DropoutSpec

    @property
    def name(self) -> str:
        return self.spec.name

    def keep(self, x: Tensor, key: Tensor, rate: float | Tensor, given: Any = None) -> Tensor:
        return given

    def apply(self, x: Tensor, keep: Tensor, rate: float | Tensor) -> Tensor:
        return self.spec.apply(x, keep, rate)

    def slope(self) -> _DrawnMask:
        return _DrawnMask(self.spec.slope())


def keep_prob_of(rate: float | Tensor, dtype: torch.dtype) -> float | Tensor:
    """Return 1 - rate, rounded once to the precision that `dtype` is scaled in."""
    real = real_dtype(dtype)
    if isinstance(rate, Tensor):
        return 1 - rate.to(real)
    return torch.tensor(1 - rate, dtype=real).item()  # the subtraction is in double


def real_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which elements of `dtype` are scaled before they are rounded once."""
    return torch.float64 if dtype in _DOUBLE else torch.float32


def where_kept(keep: Tensor, x: Tensor, scale: float | Tensor) -> Tensor:
    """Return the kept elements, scaled, and zeros elsewhere."""
    # Select instead of multiply: a dropped NaN or infinity must become 0.
    return _scaled(torch.where(laid_out(keep, x), x, 0), scale)


def laid_out(keep: Tensor, x: Tensor) -> Tensor:
    """Return a mask with the stride order of `x`, such as channels last."""
    # A mask is drawn in row-major order, and the result of `torch.where` has its layout. An
    # expanded dimension (stride 0) has no place in the order.
    if x.is_contiguous() or 0 in x.stride():
        return keep
    order = sorted(range(x.ndim), key=x.stride, reverse=True)
    back = sorted(range(x.ndim), key=order.__getitem__)
    return keep.permute(order).contiguous().permute(back)


def _scaled(x: Tensor, scale: float | Tensor) -> Tensor:
    if x.is_complex():
        # Real and imaginary parts separately: a complex product turns an infinite part into NaN.
        return torch.view_as_complex(torch.view_as_real(x) * scale)
    if isinstance(scale, float) and x.dtype.itemsize > 1 and not torch.compiler.is_compiling():
        return x * scale  # half types in float32 and rounded once, without a copy in float32
    return (x.to(real_dtype(x.dtype)) * scale).to(x.dtype)


def require_key(key: Tensor | torch.Generator | None) -> Tensor:
    """Return the key if it is a single key, or draw one from a generator."""
    if key is None:
        raise ValueError(
            "key must be a random key in training; got None. Pass key=regtorch.key(seed), or "
            "key=regtorch.site_key(root, step, site) inside a training loop, or a torch.Generator, "
            "or deterministic=True to evaluate."
        )
    return generator_key(key) if isinstance(key, torch.Generator) else check_key(key)


def check_inexact(x: Tensor) -> Tensor:
    """Return `x` if it is a floating or complex tensor; integers cannot be scaled."""
    check_tensor("x", x)
    if not (x.is_floating_point() or x.is_complex()):
        raise TypeError(
            f"x must be floating or complex; got dtype {x.dtype}. Cast it: x.to(torch.float32)."
        )
    return x


def check_real(x: Tensor, what: str, advice: str) -> Tensor:
    """Return `x` if it is a real floating tensor."""
    x = check_inexact(x)
    if x.is_complex():
        raise TypeError(f"x must be real for {what}; got dtype {x.dtype}. {advice}")
    return x


def check_flag(deterministic: bool | Tensor) -> bool | Tensor:
    """Return the flag if it is a bool or a 0-d boolean tensor."""
    is_flag = isinstance(deterministic, Tensor) and deterministic.dtype == torch.bool
    if not (isinstance(deterministic, bool) or (is_flag and deterministic.ndim == 0)):
        raise TypeError(
            "deterministic must be a boolean, False in training and True in evaluation; got "
            f"{deterministic!r}."
        )
    return deterministic


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


def is_number(rate: float | Tensor, number: int) -> bool:
    """Return whether a rate is not a tensor and equals `number`."""
    return not isinstance(rate, Tensor) and rate == number
