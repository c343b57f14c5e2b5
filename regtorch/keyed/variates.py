"""PyTorch's other draws with keys: Bernoulli, uniform, normal, integers, permutations.

In evaluation they are left to PyTorch: a model that samples is not regularized.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from regtorch._dropout.dtensor import Place, is_dtensor, mask_for, on_local_part
from regtorch._random.bernoulli import bernoulli_at
from regtorch._random.events import observer
from regtorch._random.normal import normal_at
from regtorch._random.packed import mask_sampler
from regtorch.keyed.generators import is_default
from regtorch.keyed.replacements import Draws, replaces
from regtorch.keyed.streams import integers, permutation, uniform

_REAL = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _into(out: Tensor | None, y: Tensor) -> Tensor:
    """Return `y`, or `out` with its shape and values."""
    return y if out is None else torch.empty(y.shape, out=out).copy_(y)


@replaces(Tensor.bernoulli_)
def _bernoulli_(draws: Draws, x: Tensor, p: float | Tensor = 0.5) -> Any:
    if not isinstance(p, Tensor) and not 0 <= p <= 1:
        return NotImplemented
    return x.copy_(_mask(draws, p, x))


@replaces(torch.bernoulli, Tensor.bernoulli)
def _bernoulli(
    draws: Draws, x: Tensor, p: float | None = None, *, out: Tensor | None = None
) -> Any:
    if p is not None and not 0 <= p <= 1:
        return NotImplemented
    keep = _mask(draws, x if p is None else p, x)
    # `where`, for PyTorch's gradient of zeros.
    return _into(out, torch.where(torch.zeros_like(keep), x, keep.to(x.dtype)))


def _mask(draws: Draws, p: float | Tensor, x: Tensor) -> Tensor:
    """Return the mask of `regtorch.bernoulli` for `x`, also for many probabilities."""
    if isinstance(p, Tensor) and p.ndim:

        def make(key: Tensor, shape: Sequence[int], at: Tensor | None, p: Tensor) -> Tensor:
            index = torch.arange(x.numel(), device=x.device).reshape(x.shape) if at is None else at
            return bernoulli_at(key, p, index)

        return _numbers(draws, x, make, p.detach())
    options = draws.mask(x.shape, x.device)
    keep = mask_for(x, p, **options)
    if observers := observer():
        shards: Any = keep
        local = shards.to_local() if is_dtensor(keep) else keep
        numbers = mask_sampler(options["sampler"]).split()[1]
        values = options["key"], 1 - p, local, local.to(torch.float32)
        observers.draw("bernoulli", *values, examples=numbers)
    return keep


def _numbers(draws: Draws, x: Tensor, make: Callable[..., Tensor], *parameters: Tensor) -> Tensor:
    """Return `make(key, shape, at, *parameters)`, numbers for the elements of `x`; see `streams`.

    `parameters` have the shape of `x`.
    """
    key, at = draws.place(x)
    if not is_dtensor(x):
        return make(key, x.shape, at, *parameters)

    def part(local: Tensor, place: Place) -> Tensor:
        index = place.elements(x.device) if at is None else place.local(at)
        return make(key, local.shape, index, *map(place.local, parameters))

    return on_local_part(part, x)


def _filled(
    make: Callable[..., Tensor], fill: Callable[..., Tensor]
) -> Callable[..., Tensor | Any]:
    """Return a replacement that makes an empty tensor and fills it in place."""

    def replacement(draws: Draws, *args: Any, **options: Any) -> Any:
        with torch.no_grad():
            x = make(*args, **options)
            y = fill(draws, x)
            return y if y is NotImplemented else x

    return replacement


def _uniform(draws: Draws, x: Tensor, dtype: torch.dtype) -> Tensor:
    return _numbers(draws, x, lambda key, shape, at: uniform(key, shape, dtype, at))


@replaces(Tensor.uniform_)
def _uniform_(draws: Draws, x: Tensor, *ends: float, **named: float) -> Any:
    if x.dtype not in _REAL:
        return NotImplemented
    low, high = (*ends, *(0.0, 1.0)[len(ends) :])
    low, high = named.get("from", low), named.get("to", high)
    if not low <= high:
        return NotImplemented
    u = _uniform(draws, x, x.dtype)
    if (low, high) != (0, 1):
        u = u * (high - low) + low
        u = torch.where(u == high, low, u)  # rounding may reach the upper end
    return x.copy_(u)


@replaces(Tensor.normal_)
def _normal_(draws: Draws, x: Tensor, mean: Any = 0.0, std: Any = 1.0) -> Any:
    y = _normal(draws, x, mean, std)
    return y if y is NotImplemented else x.copy_(y)


def _normal(draws: Draws, x: Tensor, mean: float | Tensor, std: float | Tensor) -> Any:
    negative = (not std.is_meta and (std < 0).any()) if isinstance(std, Tensor) else std < 0
    if x.dtype not in _REAL or negative:
        return NotImplemented
    n = _numbers(draws, x, lambda key, shape, at: normal_at(key, tuple(shape), x.dtype, at))
    return n * std + mean


replaces(torch.rand)(_filled(torch.empty, _uniform_))
replaces(torch.rand_like)(_filled(torch.empty_like, _uniform_))
replaces(torch.randn)(_filled(torch.empty, _normal_))
replaces(torch.randn_like)(_filled(torch.empty_like, _normal_))


@replaces(torch.normal)
def _torch_normal(
    draws: Draws,
    mean: float | Tensor = 0.0,
    std: float | Tensor = 1.0,
    size: Any = None,
    *,
    out: Tensor | None = None,
    **options: Any,
) -> Any:
    if size is not None:
        with torch.no_grad():
            return _normal_(draws, torch.empty(size, out=out, **options), mean, std)
    x = torch.broadcast_tensors(*(t for t in (mean, std) if isinstance(t, Tensor)))[0]
    y = _normal(draws, x, mean, std)
    return y if y is NotImplemented else _into(out, y.to(x.dtype))


@replaces(Tensor.exponential_)
def _exponential_(draws: Draws, x: Tensor, lambd: float = 1.0) -> Any:
    """Compute `-log(u) / lambd` from a uniform variate in float32, or float64."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    if x.dtype not in _REAL or lambd <= 0:
        return NotImplemented
    return x.copy_(-torch.log(_uniform(draws, x, wide)) / lambd)


@replaces(torch.rrelu)
def _rrelu(
    draws: Draws,
    x: Tensor,
    lower: float = 1 / 8,
    upper: float = 1 / 3,
    training: bool = False,
    generator: torch.Generator | None = None,
) -> Any:
    if not training or x.dtype not in _REAL or not (generator is None or is_default(generator)):
        return NotImplemented
    u = _uniform(draws, x, x.dtype)
    return torch.where(x <= 0, x * (u * (upper - lower) + lower), x)


@replaces(torch.rrelu_)
def _rrelu_(draws: Draws, x: Tensor, *args: Any, **options: Any) -> Any:
    y = _rrelu(draws, x, *args, **options)
    return y if y is NotImplemented else x.copy_(y)


@replaces(torch.randint)
def _randint(draws: Draws, *args: Any, **options: Any) -> Any:
    has_low = len(args) > 1 and not isinstance(args[1], Sequence)
    names = ("low", "high", "size") if has_low else ("high", "size")
    given: dict[str, Any] = dict(zip(names, args, strict=False)) | options
    ends = given.pop("low", 0), given.pop("high", None)
    return _new_integers(draws, torch.empty, ends, given)


@replaces(torch.randint_like)
def _randint_like(draws: Draws, x: Tensor, low: Any = 0, high: Any = None, **options: Any) -> Any:
    ends = (0, low) if high is None else (low, high)
    return _new_integers(draws, functools.partial(torch.empty_like, x), ends, options, x.dtype)


def _new_integers(
    draws: Draws, make: Callable[..., Tensor], ends: Any, given: Any, dtype: Any = torch.int64
) -> Any:
    if given.get("out") is None:
        given.setdefault("dtype", dtype)
    with torch.no_grad():
        return _integers(draws, make(**given), *ends)


@replaces(Tensor.random_)
def _random_(draws: Draws, x: Tensor, *ends: int, **named: int) -> Any:
    if "from" in named and "to" not in named:
        return NotImplemented
    ends += tuple(named[end] for end in ("from", "to") if end in named)
    return _integers(draws, x, *((0, *ends) if len(ends) == 1 else ends or (0, None)))


def _integers(draws: Draws, x: Tensor, low: Any, high: Any) -> Any:
    if high is None:
        return NotImplemented
    low, high = int(low), int(high)
    limits = None if x.dtype.is_floating_point or x.dtype == torch.bool else torch.iinfo(x.dtype)
    if not 0 < high - low <= 2**31 or (limits and not limits.min <= low < high <= limits.max + 1):
        return NotImplemented
    n = _numbers(draws, x, lambda key, shape, at: integers(key, shape, low, high, at))
    return x.copy_(n)


@replaces(torch.randperm)
def _randperm(draws: Draws, n: Any, **options: Any) -> Tensor:
    if options.get("out") is None:
        options.setdefault("dtype", torch.int64)
    x = torch.empty(int(n), **options)
    return x.copy_(permutation(draws.key(x.device, is_mask=False), len(x)))


@replaces(torch.multinomial, Tensor.multinomial)
def _multinomial(
    draws: Draws,
    x: Tensor,
    num_samples: int,
    replacement: bool = False,
    *,
    out: Tensor | None = None,
) -> Any:
    """Return the largest of `x / exponential`, as PyTorch does without replacement."""
    if (replacement and num_samples > 1) or x.dtype not in _REAL:
        return NotImplemented
    # For PyTorch's errors, and the shape of `out`.
    generator = None if x.is_meta else torch.Generator(x.device)
    y = torch.multinomial(x.detach(), num_samples, generator=generator, out=out)
    waiting = _exponential_(draws, torch.empty_like(x))
    return y.copy_(torch.topk(x / waiting, num_samples, dim=-1).indices)
