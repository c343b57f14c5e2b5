"""Record what every dropout draws, for comparisons between frameworks and for guard rails.

Recording changes no value, and the recorded mask is the array that is applied. Without an observer,
a dropout only checks a flag.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import re
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from jax.core import Tracer

from regjax._compat import make_user_context
from regjax._random.collect import BlockwiseDraw, BlockwisePlan, Collected
from regshared.checks import check_callable
from regshared.events import SampledDraw, SiteKey
from regshared.mask_audit import observed_segments

if TYPE_CHECKING:
    from jaxtyping import Array, Inexact

    Pair = tuple[Any, Any]


@dataclasses.dataclass(frozen=True)
class Draw:
    """The event of a dropout that drew a mask.

    Attributes:
        order: The position of the call in the program, counted from 0. All draws of a dropout
            inside a loop have the same one.
        key: The two words of its PRNG key; for a draw of `regjax.torch_random`, the next two words
            of its stream, which identify the position.
        rate: The dropout rate.
        mask: The mask that was applied, True where an element is kept; of size 1 along dimensions
            that share it.
        entering: The values that it masks.
        function: The name of the function, such as `"dropout"`; a layer reports that of its
            function.
        where: The calling line of code, `"path/model.py:42"`: the innermost one outside the library
            and the frameworks.
        scope: The names of the enclosing modules, `"encoder/layer_0"`, where the framework passes
            them to JAX, as Linen and Haiku do, or `jax.named_scope` does.
        examples: The numbers that `by_example` drew the mask for; None for any other mask.
    """

    order: int
    key: tuple[int, int]
    rate: float
    mask: np.ndarray
    entering: np.ndarray
    function: str
    where: str
    scope: str
    examples: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True)
class _Call:
    """A call of a dropout function, as numbered by one observer."""

    order: int
    function: str
    where: str
    scope: str


class Observer:
    """A receiver of events that numbers the dropout calls of the program.

    Events arrive from wherever the program runs, in no particular order. Call
    `jax.effects_barrier()` before reading them.

    Args:
        record: Called with each event.
        sample: The number of elements, evenly spaced, to keep of each mask and of the values that
            it applies to; None keeps all of them.
    """

    def __init__(self, record: Callable[[Any], None], *, sample: int | None = None) -> None:
        self.record = record
        self._sample = sample
        self._orders = itertools.count()
        self._blockwise: dict[int, tuple[_Call, BlockwisePlan]] = {}
        self._unfinished = defaultdict[Any, list[BlockwiseDraw]](list)
        self._lock = threading.Lock()  # each device calls back from its own thread

    def called(self, function: str, where: str, scope: str) -> _Call:
        return _Call(next(self._orders), function, where, scope)

    def draw(
        self,
        call: _Call,
        key: tuple[int, int],
        rate: float,
        mask: np.ndarray,
        entering: np.ndarray,
        examples: tuple[int, ...] | None,
    ) -> None:
        """Record a mask that was applied at once."""
        segments = observed_segments(mask.shape, self._sample)
        kept = Collected(mask.shape, self._sample, segments).add(mask)
        values = Collected(entering.shape, self._sample).add(entering)
        self._record_draw(call, key, rate, kept, values, examples)

    def expect_blocks(self, ticket: int, call: _Call, plan: BlockwisePlan) -> None:
        """Register the call whose blocks arrive under a ticket."""
        self._blockwise[ticket] = call, plan

    def part(
        self,
        ticket: int,
        key: tuple[int, int],
        inputs: int,
        add: Callable[[BlockwiseDraw], bool],
    ) -> None:
        """Add a piece to the oldest draw of its call, key and inputs that lacks it.

        The rows of a `vmap` over one key share call and key, and their pieces arrive in any order;
        `inputs` is a hash of the other arrays that the draw depends on.
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
            arrays = draw.mask, draw.weights
            self._record_draw(call, key, draw.rate, *arrays, draw.examples)

    def forget_unfinished(self) -> None:
        """Discard the pieces that a failed program left behind."""
        self._unfinished.clear()

    def _record_draw(
        self,
        call: _Call,
        key: tuple[int, int],
        rate: float,
        mask: Collected,
        entering: Collected,
        examples: tuple[int, ...] | None,
    ) -> None:
        names = call.function, call.where, call.scope
        draw = Draw(call.order, key, rate, mask.values, entering.values, *names, examples)
        if self._sample is None:
            self.record(draw)
        else:
            self.record(SampledDraw(draw, entering.shape, mask.size, mask.nonzero, mask.segments))


class BlockwiseCall(NamedTuple):
    """The operands that identify the pieces of one blockwise draw."""

    ticket: Any  # from `Observers.expect_blocks`
    key: Pair
    inputs: Any  # a hash of the arrays that the scores are computed from
    off: Any  # True where the result is not used


def _call_back(record: Callable[..., None], *operands: Any) -> None:
    """Call a function with the values of the operands, when the program has computed them."""
    call = functools.partial(jax.debug.callback, record)
    # JAX has no callback in a `shard_map` that is not compiled, over explicit axes.
    is_traced = any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(operands))
    (jax.jit(call) if is_traced else call)(*operands)


# Shared by all observers, because one compiled function may serve several of them in turn.
_tickets = itertools.count()


@dataclasses.dataclass(frozen=True)
class Observers:
    """All observers at one place in the program; equal if they are the same ones."""

    members: tuple[Observer, ...]

    def site_key(
        self, sites: Sequence[str], number: Any, root: Pair, step: Pair, key: Pair
    ) -> None:
        """Record the key of one of the sites, derived from two words of root and step."""

        def record(number: Any, root: Pair, step: Pair, key: Pair) -> None:
            high, low = _integers(step)
            site = sites[int(number)]
            event = SiteKey(site, _integers(root), (high << 32) | low, _integers(key))
            for member in self.members:
                member.record(event)

        _call_back(record, number, root, step, key)

    def draw(
        self,
        function: str,
        key: Pair,
        rate: Any,
        mask: Array,
        entering: Inexact[Array, "*shape"],
        off: Any = False,
        examples: Any = None,
    ) -> None:
        """Record the mask that a dropout applies; where `off` is True, the result is not used.

        `examples` are the words of the numbers that the mask was drawn for.
        """
        calls = self._calls(function)
        exact = rate if isinstance(rate, float) else None  # an operand is rounded to float32

        def record(key: Pair, rate: Any, mask: Any, entering: Any, off: Any, examples: Any) -> None:
            if off:  # under vmap of the flag, which cannot branch
                return
            words, number = _integers(key), float(rate) if exact is None else exact
            arrays = np.asarray(mask), np.asarray(entering)
            for member, call in calls:
                member.draw(call, words, number, *arrays, _numbers(examples))

        _call_back(record, key, rate, mask, entering, off, examples)

    def expect_blocks(self, function: str, plan: BlockwisePlan) -> np.ndarray:
        """Register a mask that is applied block by block, and return the ticket of its pieces.

        The program takes the ticket as an operand, so that calls of equal shapes share one compiled
        function.
        """
        ticket = next(_tickets)
        for member, call in self._calls(function):
            member.expect_blocks(ticket, call, plan)
        return np.asarray(ticket, np.uint32)

    def block(self, draw: BlockwiseCall, first: Any, keep: Any, scores: Any) -> None:
        """Record the block of a mask that begins at the index `first`, and the scores under it."""

        def record(draw: BlockwiseCall, first: Any, keep: Any, scores: Any) -> None:
            arrays = int(first), np.asarray(keep), np.asarray(scores)
            self._part(draw, lambda parts: parts.add_block(*arrays))

        jax.debug.callback(record, draw, first, keep, scores)

    def end(self, draw: BlockwiseCall, rate: Any, examples: Any, log_total: Any) -> None:
        """Record the rate of the blocks, their examples, and the logarithm of each row's sum."""

        def record(draw: BlockwiseCall, rate: Any, examples: Any, log_total: Any) -> None:
            number, total, rows = float(rate), np.asarray(log_total), _numbers(examples)
            self._part(draw, lambda parts: parts.add_end(number, total, rows))

        jax.debug.callback(record, draw, rate, examples, log_total)

    def _part(self, draw: BlockwiseCall, add: Callable[[BlockwiseDraw], bool]) -> None:
        if draw.off:
            return
        for member in self.members:
            member.part(int(draw.ticket), _integers(draw.key), int(draw.inputs), add)

    def _calls(self, function: str) -> list[tuple[Observer, _Call]]:
        names = function, _user_line(), _scope()
        return [(member, member.called(*names)) for member in self.members]


# Part of the key of every trace cache: a function jitted before an observer was added is traced
# again, and a trace made under an observer is not reused without it.
_observer = make_user_context()


def observer() -> Observers | None:
    """Return all active observers, or None."""
    return _observer.value


@contextlib.contextmanager
def observing(record: Callable[[SiteKey | Draw], None]) -> Iterator[Observer]:
    """Pass `record` every key that `site_key` derives and every mask that a dropout applies.

    Nested blocks each receive the events inside them. Under `jax.checkpoint`, the forward pass that
    runs again for the backward pass is recorded again.

    Args:
        record: Called with each event; under jit, at run time.

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
    """Add an observer; later blocks with the same observers reuse the functions traced here."""
    outer = _observer.value
    with _observer(Observers((*(outer.members if outer else ()), added))):
        yield added


# Packages whose lines are not the user's code.
_LIBRARIES = {"regjax", "regshared", "jax", "flax", "equinox", "haiku", "contextlib"}


def _user_line() -> str:
    """Return the innermost running line of code outside the libraries."""
    frame = sys._getframe(1)
    while frame.f_back:
        module = frame.f_globals.get("__name__", "")
        typed = frame.f_code.co_filename.startswith("<")  # at a prompt, or in a doctest
        if typed or module.partition(".")[0] not in _LIBRARIES:
            break
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def _scope() -> str:
    """Return the name stack, `jvp(encoder)/layer_0`, without the transformations."""
    # Imported here because JAX may change it, and only observers need it.
    from jax.extend import source_info_util

    return re.sub(r"\w+\(|\)", "", str(source_info_util.current_name_stack()))


def _numbers(words: tuple[Any, Any] | None) -> tuple[int, ...] | None:
    """Return 64-bit numbers, given as a high and a low word of each; a high word of None is 0."""
    if words is None:
        return None
    low = np.ravel(words[1])
    high = np.zeros_like(low) if words[0] is None else np.ravel(words[0])
    return tuple([(int(h) << 32) | int(x) for h, x in zip(high, low, strict=True)])


def _integers(words: Pair) -> tuple[int, int]:
    high, low = (int(word) for word in words)
    return high, low
