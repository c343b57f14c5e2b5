"""Packed keep masks: 32 elements at a time, from a few random words.

`regjax._random.packed`, which this file mirrors, explains why. The exact sampler is `bernoulli`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from regshared.checks import check_callable, check_integer
from regtorch._checks import check_shape
from regtorch._random.bernoulli import (
    EXACT,
    MaskSampler,
    Sampler,
    bernoulli,
    check_probability,
)
from regtorch._random.keys import check_key, key_words
from regtorch._random.threefry import (
    Part,
    Span,
    Words,
    as_signed,
    check_size,
    counter_bits,
    index_words,
    part_bits,
    part_index,
    part_shape,
    shift_right,
    threefry2x32,
)

_LANES = 32
_SMALLEST_PACKED = 2**12


@dataclasses.dataclass(frozen=True)
class PackedSampler(MaskSampler):
    """The sampler behind `packed_bernoulli`, with `bits` bits of the keep probability."""

    bits: int = 16

    draws_parts = True

    def draw(self, key: Tensor, keep_prob: float | Tensor, shape: tuple[int, ...]) -> Tensor:
        return self.draw_part(key, keep_prob, shape, (None,) * len(shape))

    def draw_part(
        self, key: Tensor, keep_prob: float | Tensor, whole: tuple[Any, ...], part: Part
    ) -> Tensor:
        """Draw part of a mask. Examples whose number is unknown share no words."""
        words, threshold = key_words(key), _threshold(keep_prob, self.bits)
        shape = part_shape(whole, part)
        check_size(shape, key.device)
        is_by_example = bool(whole) and whole[0] is None
        axis = packed_axis(whole[1:] if is_by_example else whole)
        if axis is None:
            if any(entry is not None for entry in part):
                drawn = part_bits(words, whole, part)
            else:
                drawn = counter_bits(words, shape)
            return _below(shift_right(drawn, 32 - self.bits), threshold, self.bits)
        axis += is_by_example
        grouped = _replaced(whole, axis, whole[axis] // _LANES)
        entry = part[axis]
        draw = functools.partial(_compared, words, threshold, self.bits, grouped)
        if entry is None or (
            isinstance(entry, Span) and not (entry.start % _LANES or entry.size % _LANES)
        ):
            if entry is not None:
                part = _replaced(part, axis, Span(entry.start // _LANES, entry.size // _LANES))
            return _spread(draw(part), axis).reshape(shape)
        # Words that the part contains in part are drawn for each element.
        along = part_index(whole[axis : axis + 1], (entry,), key.device)
        own = draw(_replaced(part, axis, along // _LANES))
        lane = (along % _LANES).reshape(-1, *[1] * (len(shape) - axis - 1)).to(torch.int32)
        return (own >> lane) & 1 != 0

    def realized_keep_prob(self, keep_prob: float | Tensor) -> float | Tensor:
        return _threshold(keep_prob, self.bits) / 2**self.bits


def mask_sampler(sampler: Sampler) -> MaskSampler:
    """Return the `MaskSampler` of a `sampler`, with the options of a `functools.partial`."""
    if isinstance(sampler, MaskSampler):
        return sampler
    function, options = sampler, {}
    if isinstance(sampler, functools.partial) and not sampler.args:
        function, options = sampler.func, sampler.keywords
    if function is bernoulli and not options:
        return EXACT
    if function is packed_bernoulli and options.keys() <= {"bits"}:
        return PackedSampler(packed_bernoulli, **{k: _check_bits(v) for k, v in options.items()})
    return MaskSampler(check_callable("sampler", sampler, "(key, keep_prob, shape)"))


def packed_bernoulli(
    key: Tensor, keep_prob: float | Tensor, shape: Sequence[int], *, bits: int = 16
) -> Tensor:
    """Draw a keep mask, 32 elements at a time, with `keep_prob` rounded to a few bits.

    An element is kept with probability `T / 2**bits`, where `T = round(keep_prob * 2**bits)`: a
    uniform integer of `bits` bits is compared with T. The comparison is bit-sliced: one random word
    holds one bit of 32 integers, and `and`/`or` of such words compare 32 elements at once. An
    element costs `bits / 64` blocks of threefry instead of a whole one, and less where T ends in
    zeros: keep probability 1/2 takes one block for 32 elements.

    The 32 elements that share words are consecutive along the longest axis, other than the last,
    whose length is a multiple of 32 (the later of two equal ones). Without such an axis, or with
    fewer than 4,096 elements, each element compares the first `bits` bits of its own word.

    Args:
        key: One key.
        keep_prob: The keep probability, in [0, 1]; a number or a 0-d tensor. Rounded to float32
            first.
        shape: The shape of the mask.
        bits: The number of bits of `keep_prob` that count, from 1 to 32.

    Returns:
        A boolean tensor, on the key's device. Its mean is `T / 2**bits`, which `regtorch.dropout`
        divides by: with 16 bits within 7.7e-6 of `keep_prob`.

    Raises:
        TypeError: `key` is not a key, `keep_prob` is not a number, or `bits` is not an integer.
        ValueError: The number `keep_prob` is not in [0, 1], or lies strictly inside but would round
            to an end; `bits` is not in 1..32; or `key` is a batch of keys. A tensor is not checked:
            strictly inside it stays inside, below 0 or NaN it keeps nothing, above 1 everything.

    Note (JAX):
        `regjax.packed_bernoulli` draws the same mask; `torch.bernoulli` draws another stream.

    Example:
        >>> import torch, regtorch
        >>> x, sampler = torch.ones(1024, 64), regtorch.packed_bernoulli
        >>> regtorch.dropout(x, 0.75, key=regtorch.key(0), sampler=sampler).unique().tolist()
        [0.0, 4.0]
    """
    sampler = PackedSampler(packed_bernoulli, _check_bits(bits))
    probability = check_probability("keep_prob", keep_prob)
    return sampler.draw(check_key(key), probability, check_shape("shape", shape))


def packed_axis(shape: Sequence[int]) -> int | None:
    """Return the axis along which 32 elements share words; None where each has its own."""
    if math.prod(shape) < _SMALLEST_PACKED:
        return None
    axes = [axis for axis, size in enumerate(shape[:-1]) if size % _LANES == 0]
    return max(axes, key=lambda axis: (shape[axis], axis), default=None)


def _threshold(keep_prob: float | Tensor, bits: int) -> int | Tensor:
    """Return how many of the 2**bits integers are kept; a tensor in float64, which is exact."""
    levels = 2**bits
    if isinstance(keep_prob, Tensor):
        probability = keep_prob.to(torch.float32).to(torch.float64)
        inside = torch.clamp(torch.round(probability * levels), 1, levels - 1)
        ends = torch.where(probability >= 1, float(levels), 0.0)
        return torch.where((probability > 0) & (probability < 1), inside, ends)
    threshold = round(torch.tensor(keep_prob, dtype=torch.float32).item() * levels)
    if 0 < keep_prob < 1 and threshold in (0, levels):
        raise ValueError(
            f"keep_prob must not round to {threshold // levels} in {bits} bits; got {keep_prob}. "
            "Use more bits, as in functools.partial(regtorch.packed_bernoulli, bits=32), or "
            "regtorch.bernoulli."
        )
    return threshold


def _check_bits(bits: int) -> int:
    return check_integer("bits", bits, minimum=1, maximum=32)


def _below(drawn: Tensor, threshold: int | Tensor, bits: int) -> Tensor:
    """Compare each element's integer with the threshold, in 64 bits, which hold both."""
    return (drawn.to(torch.int64) & (2**bits - 1)) < threshold


def _compared(
    key: Words, threshold: int | Tensor, bits: int, whole: tuple[Any, ...], part: Part
) -> Tensor:
    """Draw words that each hold 32 comparisons `U >= 2**bits - T` of uniform integers U.

    Bit i of 32 integers is one word, the most significant first. Starting at the least significant,
    a 1 where T has a 1, or a 0 where T has a 0, decides the comparison; otherwise the lower bits
    decide.
    """
    if isinstance(threshold, Tensor):
        number = threshold.to(torch.int64)
        bits_of_t = [(number >> (bits - 1 - i)) & 1 != 0 for i in range(bits)]
        needed, everything = bits, number >= 2**bits
    else:
        bits_of_t = [bool(threshold >> (bits - 1 - i) & 1) for i in range(bits)]
        # Trailing zeros of T decide nothing, and their words are not drawn.
        needed = bits + 1 - (threshold & -threshold).bit_length() if threshold else 0
        everything = threshold == 2**bits
    high, low = index_words(part_index(whole, part, key[0].device))
    kept = torch.zeros_like(low)
    for pair in reversed(range((needed + 1) // 2)):
        # The upper four bits of the counter number the blocks: no tensor has 2**60 words.
        block = threefry2x32(key, (high + as_signed(pair << 28), low))
        for i in range(min(2 * pair + 1, needed - 1), 2 * pair - 1, -1):
            either, both = block[i % 2] | kept, block[i % 2] & kept
            kept = _select(bits_of_t[i], either, both)
    return _select(everything, torch.full_like(low, -1), kept)


def _replaced(entries: Sequence[Any], axis: int, entry: Any) -> tuple[Any, ...]:
    return (*entries[:axis], entry, *entries[axis + 1 :])


def _select(condition: bool | Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Apply `torch.where`, or Python's choice if the condition is known beforehand."""
    if isinstance(condition, Tensor):
        return torch.where(condition, x, y)
    return x if condition else y


def _spread(words: Tensor, axis: int) -> Tensor:
    """Give each element its bit of its word, on a new axis behind `axis`."""
    lanes = torch.arange(_LANES, dtype=torch.int32, device=words.device)
    lanes = lanes.reshape(_LANES, *[1] * (words.ndim - axis - 1))
    return ((words.unsqueeze(axis + 1) >> lanes) & 1) != 0
