"""Functions of PyTorch that draw, and their replacements with keys.

A replacement has the arguments of its function after `draws`, which gives the keys. It returns
NotImplemented where the function would not draw, or not as known here: PyTorch's own then runs, and
it is an error if a generator moves.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from regtorch._dropout.alpha import alpha_dropout, feature_alpha_dropout
from regtorch._dropout.core import dropout
from regtorch._dropout.dtensor import (
    Place,
    is_dtensor,
    mask_for,
    on_local_heads,
    on_local_part,
    sampler_at,
)
from regtorch._dropout.features import feature_dropout
from regtorch._random.bernoulli import bernoulli_at
from regtorch._random.events import observer
from regtorch._random.normal import normal_at
from regtorch._random.packed import mask_sampler
from regtorch.keyed.attention import attention
from regtorch.keyed.examples import Layout
from regtorch.keyed.generators import is_default
from regtorch.keyed.streams import integers, permutation, uniform


@runtime_checkable
class Draws(Protocol):
    """The source of keys for the draws of the innermost module."""

    def key(self, device: torch.device, part: str = "", *, is_mask: bool = True) -> Tensor:
        """Return the key of the next draw in the module, which cannot be drawn by example."""
        ...

    def mask(
        self,
        shape: Sequence[int],
        device: torch.device,
        part: str = "",
        *,
        layout: Layout | None = None,
    ) -> dict[str, Any]:
        """Return the arguments of the next draw of a mask, in the module or in a part of it.

        `layout` is that of the examples, where it is known.
        """
        ...

    def place(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the key of a draw of numbers for `x`, and their indices, or None for all."""
        ...

    def idle(self) -> None:
        """Report a function that was called in training at rate 0."""
        ...

    def run(
        self,
        function: Callable[..., Any],
        args: Any,
        options: Any,
        layout: Layout | None = None,
    ) -> Any:
        """Run a function of PyTorch that is written in Python, with keys for its own calls."""
        ...


@dataclasses.dataclass(frozen=True)
class Replacement:
    """A function with keys.

    Attributes:
        function: Called with a `Draws` and the arguments of the function that it replaces.
        in_evaluation: Whether it replaces also in modules in evaluation mode.
    """

    function: Callable[..., Any]
    in_evaluation: bool = False


REPLACEMENTS: dict[Any, Replacement] = {}
_F = TypeVar("_F", bound=Callable[..., Any])


def _replaces(*functions: Any, in_evaluation: bool = False) -> Callable[[_F], _F]:
    """Add a replacement, called with the argument that PyTorch names `input` by position.

    For arguments that it does not take, wrong ones or a form unknown here, it is NotImplemented.
    """

    def add(replacement: _F) -> _F:
        takes = inspect.signature(replacement).bind

        def positional(draws: Draws, *args: Any, **options: Any) -> Any:
            if "input" in options:
                args = (options.pop("input"), *args)
            try:
                return replacement(draws, *args, **options)
            except TypeError:
                try:
                    takes(draws, *args, **options)
                except TypeError:
                    return NotImplemented
                raise

        for function in functions:
            REPLACEMENTS[function] = Replacement(positional, in_evaluation)
        return replacement

    return add


# Dropout, which draws if it is called with training=True, in whichever mode the module is.


def _python_dropout(drop: Callable[..., Tensor]) -> Callable[..., Any]:
    def replacement(
        draws: Draws, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Any:
        if training and p == 0:
            draws.idle()
        if not training or not 0 < p <= 1:
            return NotImplemented
        y = drop(x, p, **draws.mask(x.shape, x.device))
        return x.copy_(y) if inplace else y

    return replacement


def _native_dropout(drop: Callable[..., Tensor], inplace: bool) -> Callable[..., Any]:
    def replacement(draws: Draws, x: Tensor, p: float, train: bool) -> Any:
        return apply(draws, x, p, train, inplace)

    apply = _python_dropout(drop)
    return replacement


def _of_channels(
    original: Callable[..., Tensor], batched_ndim: int = 0, drop: Any = feature_dropout
) -> Callable[..., Tensor]:
    """Return a dropout of channels for the shapes of `original`; 0 if every input is batched."""

    def channels(x: Tensor, p: float, **options: Any) -> Tensor:
        original(x, p, training=False)  # for PyTorch's warnings and errors about a shape
        channel_axis = 1 if batched_ndim in (0, x.ndim) else 0
        if x.ndim <= channel_axis:
            raise RuntimeError(
                f"input must have at least {channel_axis + 1} dimensions for "
                f"{original.__name__}; got shape {tuple(x.shape)}. Use Dropout for elements."
            )
        return drop(x, p, channel_axis=channel_axis, **options)

    return channels


for _function, _drop in {
    F.dropout: dropout,
    F.dropout1d: _of_channels(F.dropout1d, 3),
    F.dropout2d: _of_channels(F.dropout2d),
    F.dropout3d: _of_channels(F.dropout3d, 5),
    F.alpha_dropout: alpha_dropout,
    F.feature_alpha_dropout: _of_channels(F.feature_alpha_dropout, drop=feature_alpha_dropout),
}.items():
    _replaces(_function, in_evaluation=True)(_python_dropout(_drop))
for _name, _drop in {
    "dropout": dropout,
    "feature_dropout": feature_dropout,
    "alpha_dropout": alpha_dropout,
    "feature_alpha_dropout": feature_alpha_dropout,
}.items():
    for _inplace in (False, True):
        _native = getattr(torch, _name + "_" * _inplace)
        _replaces(_native, in_evaluation=True)(_native_dropout(_drop, _inplace))


@_replaces(F.scaled_dot_product_attention, in_evaluation=True)
def _attention(
    draws: Draws,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    if not 0 < dropout_p <= 1 or (is_causal and attn_mask is not None) or query.is_nested:
        return NotImplemented
    settings: Any = {"is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}

    def attend(tensors: tuple[Any, ...], place: Place | None = None) -> Tensor:
        def drop(weights: Tensor) -> Tensor:
            shape = place.whole if place else weights.shape
            options = draws.mask(shape, weights.device, layout=Layout(0, 1))
            if place:
                options["sampler"] = sampler_at(mask_sampler(options["sampler"]), place)
            return dropout(weights, dropout_p, **options)

        return attention(*tensors, drop=drop, **settings)

    tensors = query, key, value, attn_mask
    return on_local_heads(attend, *tensors) if is_dtensor(query) else attend(tensors)


def _recurrent(function: Callable[..., Any]) -> Callable[..., Any]:
    def replacement(draws: Draws, x: Tensor, *args: Any, **named: Any) -> Any:
        """Run layer by layer, and drop after each but the last, at `path.0`, `path.1`, …."""
        if named:
            return NotImplemented
        # For a packed sequence, the sizes of its batches precede the states.
        packed = isinstance(args[0], Tensor) and not args[0].is_floating_point()
        sizes = args[:1] if packed else ()
        hx, parameters, has_biases, layers, p, training, bidirectional, *rest = args[len(sizes) :]
        if not training or p == 0 or layers == 1:
            return NotImplemented
        directions, per_layer = 2 if bidirectional else 1, len(parameters) // layers
        states = []
        for layer in range(layers):
            if layer:
                part = str(layer - 1)
                if packed:  # its examples have no dimension
                    x = dropout(x, p, key=draws.key(x.device, part))
                else:
                    layout = Layout(0 if rest[0] else 1, 1)
                    x = dropout(x, p, **draws.mask(x.shape, x.device, part, layout=layout))
            rows = slice(layer * directions, (layer + 1) * directions)
            state = hx[rows] if isinstance(hx, Tensor) else tuple(part[rows] for part in hx)
            own = parameters[layer * per_layer : (layer + 1) * per_layer]
            settings = (has_biases, 1, 0.0, training, bidirectional, *rest)
            x, *state = function(x, *sizes, state, own, *settings)
            states.append(state)
        return x, *(torch.cat(parts) for parts in zip(*states, strict=True))

    return replacement


for _function in (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu):
    _replaces(_function, in_evaluation=True)(_recurrent(_function))


# Other draws, left to PyTorch in evaluation: a model that samples is not regularized.

_REAL = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _into(out: Tensor | None, y: Tensor) -> Tensor:
    """Return `y`, or `out` with its shape and values."""
    return y if out is None else torch.empty(y.shape, out=out).copy_(y)


@_replaces(Tensor.bernoulli_)
def _bernoulli_(draws: Draws, x: Tensor, p: float | Tensor = 0.5) -> Any:
    if not isinstance(p, Tensor) and not 0 <= p <= 1:
        return NotImplemented
    return x.copy_(_mask(draws, p, x))


@_replaces(torch.bernoulli, Tensor.bernoulli)
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


@_replaces(Tensor.uniform_)
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


@_replaces(Tensor.normal_)
def _normal_(draws: Draws, x: Tensor, mean: Any = 0.0, std: Any = 1.0) -> Any:
    y = _normal(draws, x, mean, std)
    return y if y is NotImplemented else x.copy_(y)


def _normal(draws: Draws, x: Tensor, mean: float | Tensor, std: float | Tensor) -> Any:
    negative = (not std.is_meta and (std < 0).any()) if isinstance(std, Tensor) else std < 0
    if x.dtype not in _REAL or negative:
        return NotImplemented
    n = _numbers(draws, x, lambda key, shape, at: normal_at(key, tuple(shape), x.dtype, at))
    return n * std + mean


_replaces(torch.rand)(_filled(torch.empty, _uniform_))
_replaces(torch.rand_like)(_filled(torch.empty_like, _uniform_))
_replaces(torch.randn)(_filled(torch.empty, _normal_))
_replaces(torch.randn_like)(_filled(torch.empty_like, _normal_))


@_replaces(torch.normal)
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


@_replaces(Tensor.exponential_)
def _exponential_(draws: Draws, x: Tensor, lambd: float = 1.0) -> Any:
    """Compute `-log(u) / lambd` from a uniform variate in float32, or float64."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    if x.dtype not in _REAL or lambd <= 0:
        return NotImplemented
    return x.copy_(-torch.log(_uniform(draws, x, wide)) / lambd)


@_replaces(torch.rrelu)
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


@_replaces(torch.rrelu_)
def _rrelu_(draws: Draws, x: Tensor, *args: Any, **options: Any) -> Any:
    y = _rrelu(draws, x, *args, **options)
    return y if y is NotImplemented else x.copy_(y)


@_replaces(torch.randint)
def _randint(draws: Draws, *args: Any, **options: Any) -> Any:
    has_low = len(args) > 1 and not isinstance(args[1], Sequence)
    names = ("low", "high", "size") if has_low else ("high", "size")
    given: dict[str, Any] = dict(zip(names, args, strict=False)) | options
    ends = given.pop("low", 0), given.pop("high", None)
    return _new_integers(draws, torch.empty, ends, given)


@_replaces(torch.randint_like)
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


@_replaces(Tensor.random_)
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


@_replaces(torch.randperm)
def _randperm(draws: Draws, n: Any, **options: Any) -> Tensor:
    if options.get("out") is None:
        options.setdefault("dtype", torch.int64)
    x = torch.empty(int(n), **options)
    return x.copy_(permutation(draws.key(x.device, is_mask=False), len(x)))


@_replaces(torch.multinomial, Tensor.multinomial)
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


# Functions in Python, whose own calls draw.


def _never(*args: Any) -> bool:
    return False


@functools.cache
def composite(function: FunctionType) -> FunctionType:
    """Return a copy of a function in PyTorch's Python that does not look for a mode itself.

    PyTorch gives a mode the whole call first, and runs it outside of the mode. A second call within
    the mode would be given to the mode again, without end.
    """
    names = (n for n in function.__globals__ if n.startswith("has_torch_function"))
    own = function.__globals__ | dict.fromkeys(names, _never)
    closure = function.__closure__
    twin = FunctionType(function.__code__, own, function.__name__, function.__defaults__, closure)
    twin.__kwdefaults__ = function.__kwdefaults__
    return twin


def _run_composite(function: Callable[..., Any], draws: Draws, *args: Any, **options: Any) -> Any:
    return draws.run(function, args, options)


for _function in (
    F.gumbel_softmax,
    F.rrelu,
    F.fractional_max_pool2d_with_indices,
    F.fractional_max_pool3d_with_indices,
):
    _replaces(_function, in_evaluation=True)(functools.partial(_run_composite, _function))


@_replaces(F.multi_head_attention_forward, in_evaluation=True)
def _multi_head_attention(draws: Draws, *args: Any, **options: Any) -> Any:
    """Drop in weights of shape (batch * heads, queries, keys), whatever the layout of the input."""
    heads = args[4] if len(args) > 4 else options["num_heads"]
    return draws.run(F.multi_head_attention_forward, args, options, Layout(0, heads))


# These two choose between the functions above and a private one by an argument.
for _function in (F.fractional_max_pool2d, F.fractional_max_pool3d):
    _without_indices = getattr(F, "_" + _function.__name__)
    _replaces(_function, in_evaluation=True)(functools.partial(_run_composite, _without_indices))

# The rest of PyTorch's functions that draw: an error in training, if they do.
_NAMES = ("native_dropout", "poisson", "binomial", "_standard_gamma", "_sample_dirichlet")
_UNKNOWN = [getattr(torch, name) for name in _NAMES]
for _function in (*_UNKNOWN, Tensor.cauchy_, Tensor.geometric_, Tensor.log_normal_):
    _replaces(_function)(lambda draws, *args, **options: NotImplemented)
