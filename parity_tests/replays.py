"""The first difference of two sides that draw from one stream, PyTorch's own, and its cause.

A draw has no name here, only a position in the stream. The masks of both sides are paired in the
order of drawing; their keys are the next two words of the stream, from which positions are found.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from parity_tests import seeded
from parity_tests.recording import Difference, Drawn
from parity_tests.seeded import SeededDraw

# Words of the stream beyond those of the masks of a step, in which a position is searched.
MARGIN = 1 << 16
# Words from the seed on, in which a position before the step is searched.
HISTORY = 1 << 22
# The bytes of a state that determine its next numbers, without the seed and unused fields.
_WORDS, _HAS_NORMAL = slice(8, 5024), slice(5040, 5044)


class Stream:
    """The words of PyTorch's generator from the beginning of a step on.

    Args:
        start: The bytes of the state at the beginning of the step.
        length: The number of words to search.
    """

    def __init__(self, start: np.ndarray, length: int) -> None:
        self._start, self._length = start, length

    @functools.cached_property
    def _forward(self) -> np.ndarray:
        return seeded.words(self._start, self._length)

    @functools.cached_property
    def _backward(self) -> np.ndarray:
        """Return the words from the seed to the beginning of the step; none if they are too far."""
        start = seeded.state_of_seed(seeded.seed_of(self._start))
        history = seeded.words(start, HISTORY)
        place = _find(history, seeded.key_of(self._start))
        return history[: 0 if place is None else place + 1]

    def locate(self, key: tuple[int, int]) -> int | None:
        """Return the position of two words, 0 at the beginning of the step, or None."""
        place = _find(self._forward, key)
        if place is None and (place := _find(self._backward, key)) is not None:
            place -= len(self._backward) - 1
        return place


def _find(stream: np.ndarray, key: tuple[int, int]) -> int | None:
    found = np.flatnonzero((stream[:-1] == key[0]) & (stream[1:] == key[1]))
    return int(found[0]) if found.size else None


def is_same_state(one: np.ndarray, other: np.ndarray) -> bool:
    """Return whether two states give the same numbers from there on."""
    return all(np.array_equal(one[part], other[part]) for part in (_WORDS, _HAS_NORMAL))


@dataclasses.dataclass(frozen=True)
class Replay:
    """The draws of both sides in a step.

    Attributes:
        in_jax: The masks of JAX, in the order of the stream, with the axes of PyTorch.
        in_torch: The masks of PyTorch, in the order of drawing.
        draws: All draws of PyTorch, and the dropouts that drew nothing.
        stream: The stream from the beginning of the step on.
        ends: The bytes of the states after the step, in JAX and in PyTorch; None if unknown.
    """

    in_jax: Sequence[Drawn]
    in_torch: Sequence[Drawn]
    draws: Sequence[SeededDraw]
    stream: Stream
    ends: tuple[np.ndarray | None, np.ndarray]

    def difference(self) -> Difference | None:
        """Return the first mask that differs."""
        for place, (here, there) in enumerate(itertools.zip_longest(self.in_jax, self.in_torch)):
            if detail := self._detail(place, here, there):
                named = there or here
                idle = self._idle(place) if there is None else None
                site = idle.site if idle else named.site
                return Difference(site, float("inf"), "; ".join([detail, *self._end()]))
        return None

    def end_difference(self) -> Difference | None:
        """Return the difference of the generators after the step."""
        end = self.ends[0]
        if end is None or is_same_state(end, self.ends[1]):
            return None
        cause = self._offset(seeded.key_of(end), seeded.key_of(self.ends[1]), len(self.draws))
        masks = "masks agree, and " if self.in_torch else ""
        return Difference("state", float("inf"), f"{masks}at the end of the step {cause}")

    def _end(self) -> list[str]:
        end = self.ends[0]
        if end is None:
            return []
        verb = "agree" if is_same_state(end, self.ends[1]) else "differ"
        return [f"the generators {verb} at the end of the step"]

    def _detail(self, place: int, here: Any, there: Any) -> str:
        """Describe the difference of the masks at a place in order; an empty string for none."""
        if here is None:
            return f"PyTorch draws {_form(there)} here, and JAX does not{self._earlier(there)}"
        if there is None:
            return f"JAX draws {_form(here)}, and PyTorch does not{self._why_idle(place)}"
        if here.key != there.key:
            cause = self._offset(here.key, there.key, self._index(there))
            for earlier, drawn in zip(self.in_jax[:place], self.in_torch, strict=False):
                if earlier.key == here.key:
                    cause = (
                        f"JAX draws it from the state that the mask of '{drawn.site}' was drawn "
                        "from; pass each call the generator that the last one returned"
                    )
            return "; ".join([cause, *_forms(here, there)])
        if not (forms := _forms(here, there)):
            return _layout(here, there)
        return self._exchange(place) or "; ".join(forms)

    def _exchange(self, place: int) -> str:
        """Return the cause of masks of another form at one position, if other masks show it."""
        (here, *later_here), (there, *later_there) = self.in_jax[place:], self.in_torch[place:]
        skips = bool(later_there) and not _forms(here, later_there[0])
        adds = bool(later_here) and not _forms(later_here[0], there)
        count = len(later_here) - len(later_there)
        if count < 0 and skips:
            return (
                f"JAX skips this draw of {_form(there)}: its next mask has the form of "
                f"'{later_there[0].site}'"
            )
        if count > 0 and adds:
            return f"JAX draws {_form(here)} before this one{self._why_idle(place)}"
        if count == 0 and skips and adds:
            return (
                f"JAX draws the masks of '{there.site}' and '{later_there[0].site}' in the "
                "other order"
            )
        return ""

    def _earlier(self, there: Drawn) -> str:
        """Return the sites that JAX may have skipped in place of the last, of the same form."""
        before = itertools.takewhile(
            lambda drawn: not _forms(drawn, there), reversed(self.in_torch[: len(self.in_jax)])
        )
        names = [repr(drawn.site) for drawn in before][::-1]
        return f", unless it skips one of the same form: {', '.join(names)}" if names else ""

    def _index(self, there: Drawn) -> int:
        return next(
            i for i, draw in enumerate(self.draws) if draw.key == there.key and not draw.idle
        )

    def _idle(self, place: int) -> SeededDraw | None:
        """Return the dropout without a draw between the masks of PyTorch before and at a place."""
        begin = self._index(self.in_torch[place - 1]) if 0 < place <= len(self.in_torch) else 0
        end = self._index(self.in_torch[place]) if place < len(self.in_torch) else len(self.draws)
        return next((draw for draw in self.draws[begin:end] if draw.idle), None)

    def _why_idle(self, place: int) -> str:
        idle = self._idle(place)
        return f": PyTorch draws nothing at rate {idle.rate:g} in '{idle.site}'" if idle else ""

    def _offset(self, here: tuple[int, int], there: tuple[int, int], index: int) -> str:
        """Describe the distance of two positions; `index` is that of the draw at PyTorch's."""
        places = self.stream.locate(here), self.stream.locate(there)
        if places[0] is None or places[1] is None:
            return (
                "JAX draws from another stream than PyTorch, of another seed or by a function that "
                "is not in regjax.torch_random"
            )
        apart = places[0] - places[1]
        if apart > 0:
            return f"JAX is {_count(apart)} ahead in the stream{self._ahead(apart, index)}"
        return (
            f"JAX is {_count(-apart)} behind in the stream{self._behind(-apart, places[1], index)}"
        )

    def _ahead(self, apart: int, index: int) -> str:
        for draw in itertools.takewhile(lambda draw: draw.idle, reversed(self.draws[:index])):
            if 2 * int(np.prod(draw.shape)) == apart:
                return (
                    f", as many as a mask of shape {list(draw.shape)} takes: PyTorch draws nothing "
                    f"at rate {draw.rate:g} in '{draw.site}'"
                )
        return ""

    def _behind(self, apart: int, end: int, index: int) -> str:
        if end == 0:
            return (
                " from the beginning of the step on: begin with the state of PyTorch, as of "
                "regjax.torch_random.from_torch(torch.default_generator)"
            )
        drew = [draw for draw in self.draws[:index] if not draw.idle]
        for first in reversed(range(len(drew))):
            start = self.stream.locate(drew[first].key)
            if start is not None and end - start == apart:
                return f", as many as PyTorch draws by {', '.join(map(str, drew[first:]))}"
        return ""


def _count(words: int) -> str:
    return f"{words} word{'s' * (words > 1)} of 32 bits"


def _form(drawn: Drawn) -> str:
    where = f" at {drawn.where}" if drawn.where else ""
    return f"a mask of shape {list(drawn.mask.shape)} at rate {drawn.rate:.6g}{where}"


def _forms(here: Drawn, there: Drawn) -> list[str]:
    """Return the differences of rate and size."""
    found = []
    if not np.isclose(here.rate, there.rate, rtol=1e-6, atol=1e-12):
        found.append(f"rate {here.rate:.6g} in JAX and {there.rate:.6g} in PyTorch")
    if here.mask.size != there.mask.size:
        shapes = (list(drawn.mask.shape) for drawn in (here, there))
        found.append("a mask of shape {} in JAX and {} in PyTorch".format(*shapes))
    return found


def _layout(here: Drawn, there: Drawn) -> str:
    """Describe the difference of two masks of the same form and position."""
    differ = int(np.count_nonzero(here.mask.ravel() != there.mask.ravel()))
    if not differ:
        return ""
    counted = f"{differ} of {there.mask.size} elements of the mask differ"
    bits = there.mask.transpose(there.memory_order).ravel()
    orders = itertools.permutations(range(here.mask.ndim))
    if len(here.axes) != there.mask.ndim or not any(
        np.array_equal(here.mask.transpose(order).ravel(), bits) for order in orders
    ):
        return counted
    order = tuple(here.axes[axis] for axis in there.memory_order)
    fix = "no memory_order" if order == tuple(range(len(order))) else f"memory_order={order}"
    return (
        f"{counted}, and the order of the strides explains it: PyTorch fills the axes "
        f"{list(there.memory_order)} of shape {list(there.mask.shape)}, the last one fastest; "
        f"pass {fix} in JAX"
    )


def replay(
    in_jax: Sequence[Drawn],
    in_torch: Sequence[Drawn],
    draws: Sequence[SeededDraw],
    start: np.ndarray,
    ends: tuple[np.ndarray | None, np.ndarray],
) -> Replay:
    """Return the draws of a step, those of JAX in the order of the stream and PyTorch's axes."""
    elements = sum(int(np.prod(draw.shape)) for draw in draws)
    elements += sum(drawn.mask.size for drawn in in_jax)
    stream = Stream(start, 2 * elements + MARGIN)
    places: dict[Any, int | None] = {drawn.key: i for i, drawn in enumerate(in_torch)}
    if not all(drawn.key in places for drawn in in_jax):
        places = {drawn.key: stream.locate(drawn.key) for drawn in in_jax}
    if None not in places.values():
        in_jax = sorted(in_jax, key=lambda drawn: places[drawn.key] or 0)
    aligned = [
        _aligned(here, there) if there else here
        for here, there in itertools.zip_longest(in_jax, in_torch[: len(in_jax)])
    ]
    return Replay(aligned, in_torch, draws, stream, ends)


def _aligned(here: Drawn, there: Drawn) -> Drawn:
    """Return a mask of JAX, and its values, with the axes in the order of PyTorch's."""
    shape, wanted = here.mask.shape, there.mask.shape
    if sorted(shape) != sorted(wanted):
        return here
    orders = [
        order
        for order in itertools.permutations(range(len(shape)))
        if tuple(shape[axis] for axis in order) == wanted
    ]
    order = next((order for order in orders if _is_close(here, there, order)), orders[0])
    entering = here.entering
    if entering is not None and entering.ndim == len(order):
        entering = entering.transpose(order)
    return dataclasses.replace(here, mask=here.mask.transpose(order), entering=entering, axes=order)


def _is_close(here: Drawn, there: Drawn, order: tuple[int, ...]) -> bool:
    """Return whether the values agree with the axes in an order, as equal sizes leave it open."""
    left, right = here.entering, there.entering
    if left is None or right is None or left.ndim != len(order):
        return False
    left = left.transpose(order)
    return left.shape == right.shape and np.allclose(left, right, rtol=0.01, atol=1e-4)
