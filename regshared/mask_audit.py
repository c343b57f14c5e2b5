"""A search for masks that are copies of one another: shifted, strided, inverted or nested.

Independent masks share no long run of elements. The search looks for windows of one mask in all
others, extends each window that it finds to the whole common run, and computes the probability of
such a run in independent masks. Time and memory are linear in the elements that are searched.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from regshared.checks import check_coefficient

# Independent masks give a false alarm with at most this probability per audit, half of it for
# copies and half for nested masks.
CHANCE = 1e-9
STRIDES = (2, 4, 8, 32)
# More masks than this are thinned out evenly.
MOST_MASKS = 256
# The length of a segment in the guards, and in `audit_masks`.
_OBSERVED, _AUDITED = 2**10, 2**13
# The information of a window that starts a comparison, in bits; it affects only the speed.
_WINDOW_BITS = 32


class Segment(NamedTuple):
    """Elements of a flattened mask.

    Attributes:
        start: The position of the first one.
        length: Their number.
        transposed: Whether they follow one another along the second to last axis.
    """

    start: int
    length: int
    transposed: bool

    def indices(self, shape: Sequence[int]) -> Collection[int]:
        """Return their positions in a flattened mask of a shape."""
        if not self.transposed:
            return range(self.start, self.start + self.length)
        rows, columns = shape[-2:]
        along = (range(column, rows * columns, columns) for column in range(columns))
        return list(itertools.islice(itertools.chain.from_iterable(along), self.length))


class SampledMask(NamedTuple):
    """The part of a mask that is searched.

    Attributes:
        label: Its name in the results.
        rate: The dropout rate, strictly between 0 and 1.
        segments: Places, and the elements there, one byte each: 1 where the mask keeps.
    """

    label: Hashable
    rate: float
    segments: Sequence[tuple[Segment, bytes]]


class MaskRelation(NamedTuple):
    """A relation between two masks that independent masks do not have.

    Attributes:
        first: The label of a mask.
        second: The label of a later mask, or the same one.
        relation: The relation in words, with `second` as its subject.
        length: The number of elements that show it.
        chance: An upper bound of the probability that an audit of independent masks finds such a
            relation.
    """

    first: Hashable
    second: Hashable
    relation: str
    length: int
    chance: float

    def __str__(self) -> str:
        return f"{self.second} {self.in_words(self.first)}"

    def in_words(self, first: Hashable) -> str:
        """Return the relation and its length with a name for the first mask."""
        first = "itself" if self.first == self.second else first
        plural = "s" * (self.length > 1)
        return f"{self.relation.format(first)} ({self.length} element{plural})"


def segments_of(shape: Sequence[int], length: int) -> list[Segment]:
    """Return the segments of a mask that are searched.

    Each has `length` elements: at the beginning, at the second index of each axis, at the end, and
    along the transposed mask. Those that touch are one segment.
    """
    size = math.prod(shape)
    steps = [math.prod(shape[axis + 1 :]) for axis, dim in enumerate(shape) if dim > 1]
    found: list[Segment] = []
    for start in sorted({0, *steps, max(0, size - length)}):
        end = min(start + length, size)
        if found and start <= found[-1].start + found[-1].length:
            found[-1] = found[-1]._replace(length=end - found[-1].start)
        elif end > start:
            found.append(Segment(start, end - start, False))
    if len(shape) > 1 and size and min(shape[-2:]) > 1:
        found.append(Segment(0, min(length, math.prod(shape[-2:])), True))
    return found


def observed_segments(shape: Sequence[int], sample: int | None) -> list[Segment]:
    """Return the segments that an observer keeps of a mask, if it keeps a sample of it."""
    return segments_of(shape, _OBSERVED) if sample else []


def split_sample(
    elements: bytes, segments: Sequence[Segment]
) -> tuple[bytes, tuple[tuple[Segment, bytes], ...]]:
    """Split a sample into its evenly spaced elements and the segments that follow them."""
    start = len(elements) - sum(segment.length for segment in segments)
    ends = itertools.accumulate((segment.length for segment in segments), initial=start)
    parts = (elements[a:b] for a, b in itertools.pairwise(ends))
    return elements[:start], tuple(zip(segments, parts, strict=True))


def find_relations(masks: Sequence[SampledMask]) -> list[MaskRelation]:
    """Return the pairs of masks that are not independent, in the order of the second mask.

    At most one relation is returned for each pair: the one with the longest common run.
    """
    masks = [mask for mask in masks if 0 < mask.rate < 1]
    masks = masks[:: max(1, math.ceil(len(masks) / MOST_MASKS))]
    found: dict[tuple[int, int], MaskRelation] = {}
    for first, second, relation in _copies(masks):
        pair = min(first, second), max(first, second)
        if pair not in found or relation.length > found[pair].length:
            found[pair] = relation
    for first, second, relation in _nested(masks):
        found.setdefault((first, second), relation)  # a copy is also nested
    return [found[pair] for pair in sorted(found, key=lambda pair: pair[::-1])]


class _Place(NamedTuple):
    """The place of a window."""

    mask: int
    segment: int
    offset: int
    inverted: bool


class _Text(NamedTuple):
    """Elements of a segment at a stride."""

    segment: Segment
    phase: int
    stride: int
    values: bytes


_INVERTED = bytes([1, 0]).ljust(256)


def _copies(masks: Sequence[SampledMask]) -> Iterator[tuple[int, int, MaskRelation]]:
    windows = _windows(masks)
    total = sum(len(values) for mask in masks for _, values in mask.segments)
    # Every pair of starts, for each stride, as a copy and inverted.
    comparisons = 2 * total**2 * (1 + len(STRIDES))
    for number, mask in enumerate(masks):
        length = _window_length(mask.rate)
        index = windows[length]
        for text in _texts(mask):
            values, end = text.values, 0
            starts = range(len(values) - length + 1)
            for start in [i for i in starts if values[i : i + length] in index]:
                place = index[values[start : start + length]]
                if start < end or not _is_compared(place, number, masks, text, start):
                    continue
                first, run, end = _extended(masks[place.mask], place, values, start)
                chance = comparisons * _chance(run, mask.rate)
                if chance < CHANCE / 2:
                    words = _in_words(text, place, first, end - len(run), masks[place.mask])
                    whole, part = masks[place.mask].label, mask.label
                    if text.stride > 1 or text.segment.transposed:
                        whole, part = part, whole
                    yield place.mask, number, MaskRelation(whole, part, words, len(run), chance)


def _windows(masks: Sequence[SampledMask]) -> dict[int, dict[bytes, _Place]]:
    """Return the windows of all masks by their lengths, each with the place where it is first."""
    windows: dict[int, dict[bytes, _Place]] = {}
    for number, mask in enumerate(masks):
        length = _window_length(mask.rate)
        index = windows.setdefault(length, {})
        for at, (segment, values) in enumerate(mask.segments):
            if segment.transposed:
                continue
            inverted = values.translate(_INVERTED)
            for offset in range(0, len(values) - length + 1, length // 2):
                window = values[offset : offset + length]
                # A common window, such as one that is kept as a whole, only takes time.
                if _chance(window, mask.rate) < 2.0 ** (-0.75 * _WINDOW_BITS):
                    index.setdefault(window, _Place(number, at, offset, False))
                    window = inverted[offset : offset + length]
                    index.setdefault(window, _Place(number, at, offset, True))
    return windows


def _texts(mask: SampledMask) -> Iterator[_Text]:
    for segment, values in mask.segments:
        for stride in (1,) if segment.transposed else (1, *STRIDES):
            for phase in range(stride):
                yield _Text(segment, phase, stride, values[phase::stride])


def _is_compared(
    place: _Place, number: int, masks: Sequence[SampledMask], text: _Text, start: int
) -> bool:
    """Return whether a place belongs to other elements than those at a start of a text.

    A mask is compared with itself only at stride 1, and each pair only once; at other strides,
    either one may be the part.
    """
    plain = text.stride == 1 and not text.segment.transposed
    if place.mask != number:
        return place.mask < number or not plain
    position = masks[number].segments[place.segment][0].start + place.offset
    return plain and position < text.segment.start + start


def _extended(
    mask: SampledMask, place: _Place, values: bytes, start: int
) -> tuple[int, bytes, int]:
    """Return the longest common run around a window: its offset in the mask, it, and its end."""
    other = mask.segments[place.segment][1]
    if place.inverted:
        other = other.translate(_INVERTED)
    before = _common(other[: place.offset][::-1], values[:start][::-1])
    after = _common(other[place.offset :], values[start:])
    return place.offset - before, values[start - before : start + after], start + after


def _common(one: bytes, other: bytes) -> int:
    """Return the length of the longest common beginning."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _in_words(text: _Text, place: _Place, first: int, start: int, mask: SampledMask) -> str:
    kind = "the complement" if place.inverted else "a copy"
    position = mask.segments[place.segment][0].start + first
    if text.segment.transposed:
        return f"is {kind} of the transpose of {{}}"
    at = text.segment.start + text.phase + text.stride * start
    if text.stride > 1:
        ordinal = f"{text.stride}{'nd' if text.stride % 10 == 2 else 'th'}"
        begin = f", from element {at}" if at else ""
        return f"is {kind} of every {ordinal} element of {{}}{begin}"
    shift = at - position
    moved = f", shifted by {abs(shift)}" if shift else ""
    return f"is {kind} of {{}}{moved}"


def _nested(masks: Sequence[SampledMask]) -> Iterator[tuple[int, int, MaskRelation]]:
    """Find pairs in which one of the four combinations of two decisions never occurs.

    Masks made from the same uniform numbers at different rates are nested: what the higher rate
    keeps, the lower one keeps too.
    """
    plain = [
        {segment.start: values for segment, values in mask.segments if not segment.transposed}
        for mask in masks
    ]
    pairs = math.comb(len(masks), 2)
    for first, second in itertools.combinations(range(len(masks)), 2):
        p, q = masks[first].rate, masks[second].rate
        common = [
            (values, plain[second][start])
            for start, values in plain[first].items()
            if start in plain[second]
        ]
        length = sum(min(map(len, both)) for both in common)
        x, y = (
            int.from_bytes(b"".join(both[i][: min(map(len, both))] for both in common), "little")
            for i in range(2)
        )
        ones = int.from_bytes(bytes([1]) * length, "little")
        cases = (
            (x & ~y, (1 - p) * q, "keeps every element that {} keeps"),
            (y & ~x, (1 - q) * p, "keeps only elements that {} keeps"),
            (x & y, (1 - p) * (1 - q), "keeps only elements that {} drops"),
            (ones & ~(x | y), p * q, "keeps every element that {} drops"),
        )
        for seen, probability, words in cases:
            chance = 4 * pairs * (1 - probability) ** length
            if not seen and chance < CHANCE / 2:
                names = masks[first].label, masks[second].label
                yield first, second, MaskRelation(*names, words, length, chance)
                break


def _chance(values: bytes, rate: float) -> float:
    """Return the probability of these elements in a mask."""
    kept = values.count(1)
    return (1 - rate) ** kept * rate ** (len(values) - kept)


def _window_length(rate: float) -> int:
    """Return the length of a window; masks of one rate, and their complements, have the same."""
    entropy = -rate * math.log2(rate) - (1 - rate) * math.log2(1 - rate)
    return math.ceil(_WINDOW_BITS / entropy)


def audit(
    masks: Mapping[Hashable, tuple[tuple[int, ...], bytes]],
    rates: float | Mapping[Any, float],
    equal: Iterable[tuple[Hashable, Hashable]],
) -> list[MaskRelation]:
    """Return the relations between masks, given as shapes and elements; see `audit_masks`."""
    found, skipped = [], set[Hashable]()
    for first, second in equal:
        for label in (first, second):
            if label not in masks:
                known = ", ".join(map(repr, masks))
                raise ValueError(f"equal must name masks; got {label!r}. Use one of {known}.")
        (shape, one), (other_shape, other) = masks[first], masks[second]
        if shape != other_shape:
            raise ValueError(
                f"equal must pair masks of one shape; got {first!r} of shape {shape} and "
                f"{second!r} of shape {other_shape}. Select the elements that correspond."
            )
        if one != other:
            count = sum(map(operator.ne, one, other))
            found.append(MaskRelation(first, second, "differs from {}", count, 0.0))
        skipped.add(second)
    sampled = []
    for label, (shape, values) in masks.items():
        rate = _rate_of(label, rates)
        if label not in skipped:
            places = segments_of(shape, _AUDITED)
            parts = [(each, bytes(map(values.__getitem__, each.indices(shape)))) for each in places]
            sampled.append(SampledMask(label, rate, parts))
    return [*found, *find_relations(sampled)]


def _rate_of(label: Hashable, rates: float | Mapping[Any, float]) -> float:
    name = "rates"
    if isinstance(rates, Mapping):
        name = f"rates[{label!r}]"
        if label not in rates:
            known = ", ".join(map(repr, rates)) or "none"
            raise ValueError(
                f"rates must have a rate for each mask; got {known}. Add one for {label!r}."
            )
        rates = rates[label]
    fix = "A mask at rate 0 or 1 is constant; leave it out."
    check_coefficient(name, rates, fix=fix, below=1.0)
    if rates == 0:
        raise ValueError(f"{name} must lie in (0, 1); got {rates}. {fix}")
    return float(rates)
