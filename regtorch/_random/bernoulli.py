"""Keep masks: random bits compared with a threshold.

This is **mask stream v1**: the mask is a function of the key, the keep probability and the shape
alone, and will not change under this name. It equals `regjax.bernoulli`, and `jax.random.bernoulli`
under JAX's default configuration.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from regtorch._checks import check_shape
from regtorch._random.keys import check_key, key_words
from regtorch._random.threefry import (
    Part,
    in_pieces,
    index_words,
    part_bits,
    range_bits,
    shift_right,
    threefry2x32,
)

_MANTISSA = 23  # a float32 uniform in [0, 1) is a multiple of 2**-23, as jax.random draws it
# A subnormal probability counts as 0: only some devices flush it, and the mask must not depend on
# the device.
_SMALLEST = torch.finfo(torch.float32).smallest_normal
_TINY = 2.0**-12  # below it, the kept share may differ from the request


@runtime_checkable
class Sampler(Protocol):
    """A function that draws a keep mask: `bernoulli`, or any function with its arguments."""

    def __call__(self, key: Tensor, keep_prob: float | Tensor, shape: Sequence[int]) -> Tensor:
        """Draw a mask of the given shape; True keeps."""
        ...


@dataclasses.dataclass(frozen=True)
class MaskSampler:
    """A user's function that draws a mask, trusted to keep elements with the requested probability.

    The subclasses know the probability that they realize.

    Attributes:
        function: The `sampler` that the user passed.
    """

    function: Sampler

    draws_parts: ClassVar[bool] = False

    def __call__(self, key: Tensor, keep_prob: float | Tensor, shape: Sequence[int]) -> Tensor:
        """Draw a mask, as any other sampler does."""
        probability = check_probability("keep_prob", keep_prob)
        return self.draw(key, probability, tuple(shape))

    def draw(self, key: Tensor, keep_prob: float | Tensor, shape: tuple[int, ...]) -> Tensor:
        """Draw a mask from checked arguments; True keeps an element."""
        return self.function(key, keep_prob, shape)

    def draw_part(
        self, key: Tensor, keep_prob: float | Tensor, whole: tuple[Any, ...], part: Part
    ) -> Tensor:
        """Draw part of the mask of shape `whole` without drawing the rest; see `part_bits`.

        If the first size is None, the tensor consists of examples whose number is unknown, and
        their masks do not depend on it. A user's function, which can only draw a whole mask, then
        draws whole examples with the keys `regtorch.fold_in(key, example)`.
        """
        examples, *rest = part
        if whole[0] is not None or not isinstance(examples, Tensor) or any(rest):
            raise NotImplementedError(f"{self.function} draws whole masks only.")
        words = threefry2x32(key_words(key), index_words(examples.to(key.device)))
        keys = torch.stack(words, dim=-1).view(torch.uint32)
        rows = [self.draw(keys[i], keep_prob, whole[1:]) for i in range(keys.shape[0])]
        return torch.stack(rows) if rows else torch.ones((0, *whole[1:]), dtype=torch.bool)

    def check_fit(self, shape: tuple[int, ...], shared: tuple[int, ...]) -> None:
        """Raise a ValueError if no mask fits x of this shape, where dimensions may share one."""

    def split(self) -> tuple[MaskSampler, Tensor | None]:
        """Return the sampler without tensors, and the tensor that the mask depends on."""
        return self, None

    def join(self, given: Tensor) -> MaskSampler:
        """Return the sampler with the tensor; the inverse of `split`."""
        raise NotImplementedError(f"{self.function} depends on no tensor.")

    def realized_keep_prob(self, keep_prob: float | Tensor) -> float | Tensor:
        """Return the number by which kept elements are divided."""
        return keep_prob


def exact_keep_prob(keep_prob: float | Tensor) -> float | Tensor:
    """Return the probability with which `bernoulli` keeps an element, for the scale.

    It is a multiple of 2**-23. From 2**-12 on it exceeds `keep_prob` by a relative 2**-11 at most,
    and the scale uses `keep_prob` itself, as other libraries do. Below, the difference can be
    large.
    """
    if isinstance(keep_prob, Tensor):
        share = torch.as_tensor(_threshold(keep_prob)).to(keep_prob.dtype) * 2.0**-_MANTISSA
        return torch.where((keep_prob > 0) & (keep_prob < _TINY), share, keep_prob)
    return _threshold(keep_prob) / 2**_MANTISSA if keep_prob < _TINY else keep_prob


class ExactSampler(MaskSampler):
    """The sampler behind `bernoulli`."""

    draws_parts = True

    def draw(self, key: Tensor, keep_prob: float | Tensor, shape: tuple[int, ...]) -> Tensor:
        words, threshold = key_words(key), _threshold(keep_prob)

        def mask(start: int, stop: int) -> Tensor:
            return shift_right(range_bits(words, start, stop), 32 - _MANTISSA) < threshold

        return in_pieces(mask, shape, key.device)

    def draw_part(
        self, key: Tensor, keep_prob: float | Tensor, whole: tuple[Any, ...], part: Part
    ) -> Tensor:
        bits = part_bits(key_words(key), whole, part)
        return shift_right(bits, 32 - _MANTISSA) < _threshold(keep_prob)

    def realized_keep_prob(self, keep_prob: float | Tensor) -> float | Tensor:
        """Return `exact_keep_prob(keep_prob)`."""
        return exact_keep_prob(keep_prob)


def bernoulli(key: Tensor, keep_prob: float | Tensor, shape: Sequence[int]) -> Tensor:
    """Draw a keep mask on the key's device; each element is True with probability `keep_prob`.

    An element is kept where `(bits >> 9) < ceil(float32(keep_prob) * 2**23)`, where `bits` are
    those of threefry at its row-major index. The mask therefore depends only on the arguments.

    Args:
        key: One key.
        keep_prob: The keep probability, in [0, 1]; a number or a 0-d tensor. Rounded to float32.
        shape: The shape of the mask.

    Raises:
        TypeError: `key` is not a key, or `keep_prob` is not a number.
        ValueError: The number `keep_prob` is not in [0, 1], or `key` is a batch of keys. A tensor
            is not checked: below 0 or NaN keeps nothing, above 1 everything.

    Note (JAX):
        `regjax.bernoulli` draws the same mask; `torch.bernoulli` draws another stream.

    Example:
        >>> import regtorch
        >>> regtorch.bernoulli(regtorch.key(0), 0.5, (6,)).tolist()
        [False, False, True, True, False, True]
    """
    probability = check_probability("keep_prob", keep_prob)
    return EXACT.draw(check_key(key), probability, check_shape("shape", shape))


EXACT = ExactSampler(bernoulli)


def bernoulli_at(key: Tensor, keep_prob: float | Tensor, index: Tensor) -> Tensor:
    """Return the elements of `bernoulli`'s mask at row-major indices (int64), whatever its shape.

    The arguments are checked.
    """
    out0, out1 = threefry2x32(key_words(key), index_words(index))
    return shift_right(out0 ^ out1, 32 - _MANTISSA) < _threshold(keep_prob)


def _threshold(keep_prob: float | Tensor) -> int | Tensor:
    """Return how many of the 2**23 equally likely uniforms lie below float32(keep_prob)."""
    if isinstance(keep_prob, Tensor):
        probability = keep_prob.to(torch.float32)
        scaled = torch.clamp(torch.ceil(probability * 2.0**_MANTISSA), max=2.0**_MANTISSA)
        # NaN compares false, and so keeps nothing.
        return torch.where(probability >= _SMALLEST, scaled, 0.0).to(torch.int32)
    probability = torch.tensor(keep_prob, dtype=torch.float32).item()
    return math.ceil(probability * 2**_MANTISSA) if probability >= _SMALLEST else 0


def check_probability(name: str, value: float | Tensor) -> float | Tensor:
    """Return a probability as a Python float; return a 0-d tensor with its range unchecked."""
    is_tensor = isinstance(value, Tensor)
    is_real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not (is_real or (is_tensor and not value.is_complex() and value.dtype != torch.bool)):
        raise TypeError(f"{name} must be a real number in [0, 1]; got {value!r}.")
    if is_tensor:
        if value.ndim:
            raise ValueError(f"{name} must be a scalar in [0, 1]; got shape {tuple(value.shape)}.")
        return value
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must lie in [0, 1]; got {value}.")
    return float(value)
