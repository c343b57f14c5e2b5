"""Record what every dropout draws, for comparisons between frameworks and for guard rails.

Recording changes no value, and the recorded mask is the tensor that is applied. Without an
observer, a dropout only checks a flag.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from regshared.checks import check_callable
from regshared.events import SampledDraw, SiteKey
from regshared.mask_audit import observed_segments
from regtorch._random.collect import BlockwiseDraw, BlockwisePlan, Collected


@dataclasses.dataclass(frozen=True)
class Draw:
    """The event of a dropout that drew a mask.

    Attributes:
        order: The number of earlier draws; the rows of a `torch.func.vmap` share one number.
        key: The two words of its PRNG key.
        rate: The dropout rate.
        mask: The mask that was applied, True where an element is kept; of size 1 along dimensions
            that share it.
        entering: The values that it masks.
        function: The name of the function, such as `"dropout"`; a layer reports that of its
            function.
        where: The calling line of code, `"path/model.py:42"`: the innermost one outside the library
            and PyTorch.
        remade: True where a checkpoint runs a forward pass again; `where` is then in the backward
            pass.
        examples: The numbers that `by_example` drew the mask for; None for any other mask.
    """

    order: int
    key: tuple[int, int]
    rate: float
    mask: Tensor
    entering: Tensor
    function: str
    where: str
    remade: bool
    examples: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True)
class _Call:
    """A call of a dropout function, as numbered by one observer."""

    order: int
    function: str
    where: str
    remade: bool


class Observer:
    """A receiver of events that numbers the dropout calls.

    Args:
        record: Called with each event.
        sample: The number of elements, evenly spaced, to keep of each mask and of the values that
            it applies to; None keeps all of them.

    Attributes:
        idle: The sites of converted models that were called in training at rate 0, or that drew
            something other than a mask.
    """

    def __init__(self, record: Callable[[Any], None], *, sample: int | None = None) -> None:
        self.record = record
        self.idle: set[str] = set()
        self._sample = sample
        self._orders = itertools.count()

    def called(self, function: str, where: str, remade: bool) -> _Call:
        return _Call(next(self._orders), function, where, remade)

    def draw(
        self,
        call: _Call,
        key: tuple[int, int],
        rate: float,
        mask: Tensor,
        entering: Tensor,
        examples: tuple[int, ...] | None,
    ) -> None:
        """Record a mask that was applied at once."""
        # Copies: the model may go on to write into the tensors.
        segments = observed_segments(mask.shape, self._sample)
        kept = Collected(tuple(mask.shape), self._sample, segments).add(mask)
        values = Collected(tuple(entering.shape), self._sample).add(entering)
        self._record_draw(call, key, rate, kept, values, examples)

    def blocks(self, plan: BlockwisePlan) -> BlockwiseDraw:
        """Start a draw whose mask is applied block by block."""
        return BlockwiseDraw(plan, self._sample)

    def end(
        self,
        call: _Call,
        key: tuple[int, int],
        rate: float,
        draw: BlockwiseDraw,
        examples: tuple[int, ...] | None,
    ) -> None:
        """Record a draw whose blocks are complete."""
        self._record_draw(call, key, rate, draw.mask, draw.weights, examples)

    def _record_draw(
        self,
        call: _Call,
        key: tuple[int, int],
        rate: float,
        mask: Collected,
        entering: Collected,
        examples: tuple[int, ...] | None,
    ) -> None:
        names = call.function, call.where, call.remade
        draw = Draw(call.order, key, rate, mask.values, entering.values, *names, examples)
        if self._sample is None:
            self.record(draw)
        else:
            self.record(SampledDraw(draw, entering.shape, mask.size, mask.nonzero, mask.segments))


class Observers:
    """All observers at one place in the program."""

    def __init__(self, members: tuple[Observer, ...]) -> None:
        self.members = members

    def site_key(self, site: str, root: tuple[int, int], step: int, key: tuple[int, int]) -> None:
        """Record a derived key."""
        for member in self.members:
            member.record(SiteKey(site, root, step, key))

    def idle(self, site: str) -> None:
        """Record a site of a converted model that is called and draws no mask."""
        for member in self.members:
            member.idle.add(site)

    def draw(
        self,
        function: str,
        key: Tensor,
        rate: float | Tensor,
        mask: Tensor,
        entering: Tensor,
        off: bool | Tensor = False,
        examples: Tensor | None = None,
    ) -> None:
        """Record the mask that a dropout applies; where `off` is True, the result is not used.

        `examples` are the numbers that the mask was drawn for.
        """
        calls = self._calls(function)

        def record(
            key: Tensor,
            rate: float | Tensor,
            mask: Tensor,
            entering: Tensor,
            off: bool | Tensor,
            examples: Tensor | None,
        ) -> None:
            if off:  # a tensor flag does not branch: the mask was drawn, but is not used
                return
            high, low = key.tolist()
            for member, call in calls:
                member.draw(call, (high, low), float(rate), mask, entering, _numbers(examples))

        _CallAtRuntime.apply(record, key, rate, mask, entering.detach(), off, examples)

    def blockwise(
        self, function: str, rate: float | Tensor, plan: BlockwisePlan, off: bool | Tensor
    ) -> _Blockwise:
        """Start the record of a mask that is applied block by block."""
        draws = [(member, call, member.blocks(plan)) for member, call in self._calls(function)]
        return _Blockwise(draws, rate, off)

    def _calls(self, function: str) -> list[tuple[Observer, _Call]]:
        remade = torch._C._current_graph_task_id() != -1  # a backward pass is running
        names = function, _user_line(), remade
        return [(member, member.called(*names)) for member in self.members]


@dataclasses.dataclass(frozen=True)
class _Blockwise:
    """A mask that is being applied block by block, also under `torch.func`'s transforms."""

    draws: list[tuple[Observer, _Call, BlockwiseDraw]]
    rate: float | Tensor
    off: bool | Tensor

    def block(self, first: int, keep: Tensor, scores: Tensor) -> None:
        for _, _, draw in self.draws:
            draw.add_block(first, keep, scores)

    def end(self, key: Tensor, log_total: Tensor, examples: Tensor | None) -> None:
        """Record the whole, given the logarithm of each row's sum, and the examples."""
        if self.off:
            return
        high, low = key.tolist()
        for member, call, draw in self.draws:
            draw.add_end(log_total)
            member.end(call, (high, low), float(self.rate), draw, _numbers(examples))


def _numbers(examples: Tensor | None) -> tuple[int, ...] | None:
    return None if examples is None else tuple(examples.reshape(-1).tolist())


class _CallAtRuntime(torch.autograd.Function):
    """A call of a function with the values behind `torch.func`'s transforms; per row under vmap."""

    @staticmethod
    def forward(record: Callable[..., None], *values: Any) -> Tensor:
        record(*values)
        return torch.empty(0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, None]:
        for row in range(info.batch_size):
            at_row = (
                arg if dim is None else arg.select(dim, row)
                for arg, dim in zip(args, in_dims, strict=True)
            )
            _CallAtRuntime.apply(*at_row)
        return torch.empty(0), None


_observer: contextvars.ContextVar[Observers | None] = contextvars.ContextVar("observer")


def observer() -> Observers | None:
    """Return the observers at this place, or None; compiled code cannot be observed."""
    return None if torch.compiler.is_compiling() else _observer.get(None)


@contextlib.contextmanager
def observing(record: Callable[[SiteKey | Draw], None]) -> Iterator[Observer]:
    """Pass `record` every key that `site_key` derives and every mask that a dropout applies.

    Nested blocks each receive the events inside them. Under `torch.utils.checkpoint`, the forward
    pass that runs again for the backward pass is recorded again.

    Example:
        >>> import torch, regtorch
        >>> drawn = []
        >>> with regtorch.observing(drawn.append):
        ...     y = regtorch.dropout(torch.ones(3), 0.5, key=regtorch.key(0))
        >>> [(type(event).__name__, event.rate, event.mask.tolist()) for event in drawn]
        [('Draw', 0.5, [False, False, True])]
    """
    with observed_by(Observer(check_callable("record", record, "(event)"))) as added:
        yield added


@contextlib.contextmanager
def observed_by(added: Observer) -> Iterator[Observer]:
    outer = _observer.get(None)
    token = _observer.set(Observers((*(outer.members if outer else ()), added)))
    try:
        yield added
    finally:
        _observer.reset(token)


# Packages whose lines are not the user's code.
_LIBRARIES = {"regtorch", "regshared", "torch", "contextlib"}


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
