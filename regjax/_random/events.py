"""Record what every dropout draws, for comparisons between frameworks and for guard rails.

Recording changes no value, and the recorded mask is the array that is applied. A dropout that
nobody observes pays for one look at a flag.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import re
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from regjax._compat import make_user_context
from regjax._random.collect import BlockwiseDraw, BlockwisePlan, Collected
from regshared.checks import check_callable
from regshared.events import SiteKey

if TYPE_CHECKING:
    from jaxtyping import Array, Inexact

    Pair = tuple[Any, Any]


@dataclasses.dataclass(frozen=True)
class Draw:
    """A dropout drew a mask.

    Attributes:
        order: the place of the call in the program, counted from 0; a dropout inside a loop draws
            several times under one number.
        key: the two words of its key.
        rate: the probability that an element is zeroed.
        mask: the mask that was applied, True where an element is kept; of size 1 along dimensions
            that share it.
        entering: the values that it masks.
        function: the name of the function, such as `"dropout"`; a layer has that of its function.
        where: the line of code that called it, `"path/model.py:42"`: the innermost one that is not
            in the library or in a framework.
        scope: the names of the modules around it, `"encoder/layer_0"`, where the framework gives
            them to JAX as Linen and Haiku do, or `jax.named_scope`.
    """

    order: int
    key: tuple[int, int]
    rate: float
    mask: np.ndarray
    entering: np.ndarray
    function: str
    where: str
    scope: str


@dataclasses.dataclass(frozen=True)
class SampledDraw(Draw):
    """A `Draw` for an observer of samples: `mask` and `entering` are one-dimensional samples.

    Attributes:
        shape: the shape of the values that were masked.
        size: the number of elements of the mask.
        kept: the number of elements that are kept.
    """

    shape: tuple[int, ...]
    size: int
    kept: int


@dataclasses.dataclass(frozen=True)
class _Call:
    """A call of a dropout function, as one observer counts it."""

    order: int
    function: str
    where: str
    scope: str


class Observer:
    """Receives events, and counts the dropouts of the program.

    Events arrive from wherever the program runs, in no particular order: call
    `jax.effects_barrier()` before reading them.

    Args:
        record: called with each event.
        sample: the number of elements, evenly spread, to keep of each mask and of the values that
            it is applied to; None keeps all of them.
    """

    def __init__(
        self, record: Callable[[SiteKey | Draw], None], *, sample: int | None = None
    ) -> None:
        self.record = record
        self._sample = sample
        self._orders = itertools.count()
        self._blockwise: dict[int, tuple[_Call, BlockwisePlan]] = {}
        self._unfinished = defaultdict[Any, list[BlockwiseDraw]](list)
        self._lock = threading.Lock()  # each device calls back from a thread of its own

    def called(self, function: str, where: str, scope: str) -> _Call:
        """Counts a call."""
        return _Call(next(self._orders), function, where, scope)

    def draw(
        self, call: _Call, key: tuple[int, int], rate: float, mask: np.ndarray, entering: np.ndarray
    ) -> None:
        """Records a mask that was applied at once."""
        arrays = (Collected(array.shape, self._sample).add(array) for array in (mask, entering))
        self._record_draw(call, key, rate, *arrays)

    def expect_blocks(self, ticket: int, call: _Call, plan: BlockwisePlan) -> None:
        """Announces the call whose blocks arrive under a ticket."""
        self._blockwise[ticket] = call, plan

    def part(
        self,
        ticket: int,
        key: tuple[int, int],
        inputs: int,
        add: Callable[[BlockwiseDraw], bool],
    ) -> None:
        """Adds a part to the oldest draw of its call, key and inputs that lacks it.

        The rows of a `vmap` over one key share call and key, and their parts arrive in any order;
        `inputs` is a hash of what else the draw depends on.
        """
        call, plan = self._blockwise[ticket]
        with self._lock:
            waiting = self._unfinished[ticket, key, inputs]
            draw = next((draw for draw in waiting if add(draw)), None)
            if draw is None:
                draw = BlockwiseDraw(plan, self._sample)
                add(draw)
                waiting.append(draw)
            if draw.is_complete():
                waiting.remove(draw)
                if not waiting:
                    del self._unfinished[ticket, key, inputs]
        if draw.rate is not None and draw.is_complete():
            self._record_draw(call, key, draw.rate, draw.mask, draw.weights)

    def forget_unfinished(self) -> None:
        """Drops the parts that a program left behind when it failed."""
        self._unfinished.clear()

    def _record_draw(
        self, call: _Call, key: tuple[int, int], rate: float, mask: Collected, entering: Collected
    ) -> None:
        names = call.function, call.where, call.scope
        fields = call.order, key, rate, mask.values, entering.values, *names
        if self._sample is None:
            self.record(Draw(*fields))
        else:
            self.record(SampledDraw(*fields, entering.shape, mask.size, mask.nonzero))


class BlockwiseCall(NamedTuple):
    """What tells the parts of one blockwise draw from those of another, as operands.

    Attributes:
        ticket: from `Observers.expect_blocks`.
        key: the two words of the key.
        inputs: a hash of the arrays that the scores are made from.
        off: True where the result is not used.
    """

    ticket: Any
    key: Pair
    inputs: Any
    off: Any


# Shared by all observers: a compiled function may serve several of them, one after the other.
_tickets = itertools.count()


@dataclasses.dataclass(frozen=True)
class Observers:
    """All observers at a place in the program; equal if they are the same ones."""

    members: tuple[Observer, ...]

    def site_key(self, site: str, root: Pair, step: Pair, key: Pair) -> None:
        """Records a derived key; called by `site_key` with two words of each."""

        def record(root: Pair, step: Pair, key: Pair) -> None:
            high, low = _integers(step)
            event = SiteKey(site, _integers(root), (high << 32) | low, _integers(key))
            for member in self.members:
                member.record(event)

        jax.debug.callback(record, root, step, key)

    def draw(
        self,
        function: str,
        key: Pair,
        rate: Any,
        mask: Array,
        entering: Inexact[Array, "*shape"],
        off: Any = False,
    ) -> None:
        """Records the mask that a dropout applies; where `off` is True, the result is not used."""
        calls = self._calls(function)
        exact = rate if isinstance(rate, float) else None  # an operand is rounded to float32

        def record(key: Pair, rate: Any, mask: Any, entering: Any, off: Any) -> None:
            if off:  # under vmap of the flag, which cannot branch
                return
            words, number = _integers(key), float(rate) if exact is None else exact
            arrays = np.asarray(mask), np.asarray(entering)
            for member, call in calls:
                member.draw(call, words, number, *arrays)

        jax.debug.callback(record, key, rate, mask, entering, off)

    def expect_blocks(self, function: str, plan: BlockwisePlan) -> np.ndarray:
        """Announces a mask that is applied block by block.

        Returns:
            A ticket for its parts. The program takes it as an operand, so that calls of equal
            shapes share one compiled function.
        """
        ticket = next(_tickets)
        for member, call in self._calls(function):
            member.expect_blocks(ticket, call, plan)
        return np.asarray(ticket, np.uint32)

    def block(self, draw: BlockwiseCall, first: Any, keep: Any, scores: Any) -> None:
        """Records a block of a mask, which begins at the index `first`, and the scores under it."""

        def record(draw: BlockwiseCall, first: Any, keep: Any, scores: Any) -> None:
            arrays = int(first), np.asarray(keep), np.asarray(scores)
            self._part(draw, lambda parts: parts.add_block(*arrays))

        jax.debug.callback(record, draw, first, keep, scores)

    def end(self, draw: BlockwiseCall, rate: Any, log_total: Any) -> None:
        """Records the rate of the blocks, and the logarithm of each row's sum."""

        def record(draw: BlockwiseCall, rate: Any, log_total: Any) -> None:
            number, total = float(rate), np.asarray(log_total)
            self._part(draw, lambda parts: parts.add_end(number, total))

        jax.debug.callback(record, draw, rate, log_total)

    def _part(self, draw: BlockwiseCall, add: Callable[[BlockwiseDraw], bool]) -> None:
        if draw.off:
            return
        for member in self.members:
            member.part(int(draw.ticket), _integers(draw.key), int(draw.inputs), add)

    def _calls(self, function: str) -> list[tuple[Observer, _Call]]:
        names = function, _user_line(), _scope()
        return [(member, member.called(*names)) for member in self.members]


# Part of the key of every cache of traces: a function that was jitted before anybody watched is
# traced anew, and what was traced while somebody watched is not used afterwards.
_observer = make_user_context()


def observer() -> Observers | None:
    """Return all who observe here, or None."""
    return _observer.value


@contextlib.contextmanager
def observing(record: Callable[[SiteKey | Draw], None]) -> Iterator[Observer]:
    """Pass `record` every key that `site_key` derives and every mask that a dropout applies.

    Blocks nest: events inside both go to both. Under `jax.checkpoint` the forward pass that runs
    again for the backward one is recorded again.

    Args:
        record: called with each event, under jit at run time.

    Example:
        >>> import jax, regjax
        >>> drawn = []
        >>> with regjax.observing(drawn.append):
        ...     y = regjax.dropout(jax.numpy.ones(3), 0.5, key=jax.random.key(0))
        ...     jax.effects_barrier()
        >>> [(type(event).__name__, event.rate, event.mask.tolist()) for event in drawn]
        [('Draw', 0.5, [False, False, True])]
    """
    with observed_by(Observer(check_callable("record", record, "(event)"))) as added:
        yield added


@contextlib.contextmanager
def observed_by(added: Observer) -> Iterator[Observer]:
    """Add an observer; functions traced in one such block are reused in the next."""
    outer = _observer.value
    with _observer(Observers((*(outer.members if outer else ()), added))):
        yield added


# Code of these is not the user's.
_LIBRARIES = {"regjax", "jax", "flax", "equinox", "haiku", "contextlib"}


def _user_line() -> str:
    """The innermost line of code that is running outside of the libraries."""
    frame = sys._getframe(1)
    while frame.f_back:
        module = frame.f_globals.get("__name__", "")
        typed = frame.f_code.co_filename.startswith("<")  # at a prompt, or in a doctest
        if typed or module.partition(".")[0] not in _LIBRARIES:
            break
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def _scope() -> str:
    """The name stack, `jvp(encoder)/layer_0`, without the transformations."""
    # Here and not above: JAX may change it, and nobody needs it who does not watch.
    from jax.extend import source_info_util

    return re.sub(r"\w+\(|\)", "", str(source_info_util.current_name_stack()))


def _integers(words: Pair) -> tuple[int, int]:
    high, low = (int(word) for word in words)
    return high, low
