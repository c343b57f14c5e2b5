"""Watching what every dropout draws: for comparisons between frameworks, and for guard rails.

Nothing here changes a value. While nobody watches, a dropout pays for one look at a flag.
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

from regtorch._checks import check_callable


@dataclasses.dataclass(frozen=True)
class SiteKey:
    """A key was derived by `site_key`, or by a converted layer.

    Attributes:
        site: the name of the place.
        root: the two words of the root key.
        step: the step of training.
        key: the two words of the derived key.
    """

    site: str
    root: tuple[int, int]
    step: int
    key: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Draw:
    """A dropout drew a mask.

    Attributes:
        order: how many dropouts drew before it; the rows of a `torch.func.vmap` have one number.
        key: the two words of its key.
        rate: the probability that an element is zeroed.
        mask: what it keeps; of size 1 along dimensions that share it.
        entering: the values that it masks.
        function: the function of the library that draws, such as `"dropout"`.
        where: the line of code that called it, `"path/model.py:42"`: the innermost one that is not
            in the library or in PyTorch.
        remade: True where a checkpoint makes a forward pass again for the backward one, whose line
            of code it then is.
    """

    order: int
    key: tuple[int, int]
    rate: float
    mask: Tensor
    entering: Tensor
    function: str
    where: str
    remade: bool


class Observer:
    """Who watches: takes events, and counts the dropouts."""

    def __init__(self, record: Callable[[SiteKey | Draw], None]) -> None:
        self._record = record
        self._orders = itertools.count()

    def site_key(self, site: str, root: tuple[int, int], step: int, key: tuple[int, int]) -> None:
        """Called where the key of a site is derived."""
        self._record(SiteKey(site, root, step, key))

    def draw(
        self,
        key: Tensor,
        rate: float | Tensor,
        mask: Tensor,
        entering: Tensor,
        off: bool | Tensor = False,
    ) -> None:
        """Called by every dropout that draws; where `off` is True, the mask is not used."""
        order, (where, function) = next(self._orders), _place()
        remade = torch._C._current_graph_task_id() != -1  # a backward pass is running

        def record(
            key: Tensor, rate: float | Tensor, mask: Tensor, entering: Tensor, off: bool | Tensor
        ) -> None:
            if off:  # a tensor as a flag does not branch
                return
            high, low = key.tolist()
            # A copy: the model may go on to write into the tensor.
            values = mask, entering.clone()
            draw = Draw(order, (high, low), float(rate), *values, function, where, remade)
            self._record(draw)

        _Tell.apply(record, key, rate, mask, entering.detach(), off)


class _Tell(torch.autograd.Function):
    """Calls a function with the values behind `torch.func`'s transforms; under vmap row by row."""

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
            _Tell.apply(*at_row)
        return torch.empty(0), None


_observer: contextvars.ContextVar[Observer | None] = contextvars.ContextVar("observer")


def observer() -> Observer | None:
    """Who watches, if anybody does. In what is being compiled nobody can."""
    return None if torch.compiler.is_compiling() else _observer.get(None)


@contextlib.contextmanager
def observing(record: Callable[[SiteKey | Draw], None]) -> Iterator[Observer]:
    """Tells `record` of every key that is derived for a site and every mask that a dropout draws.

    Args:
        record: called with each event.

    Example:
        >>> import torch, regtorch
        >>> drawn = []
        >>> with regtorch.observing(drawn.append):
        ...     y = regtorch.dropout(torch.ones(3), 0.5, key=regtorch.key(0))
        >>> [(type(event).__name__, event.rate, event.mask.tolist()) for event in drawn]
        [('Draw', 0.5, [False, False, True])]
    """
    with watched_by(Observer(check_callable("record", record, "(event)"))) as watching:
        yield watching


@contextlib.contextmanager
def watched_by(watching: Observer) -> Iterator[Observer]:
    """Lets an observer watch."""
    token = _observer.set(watching)
    try:
        yield watching
    finally:
        _observer.reset(token)


# Code of these is not the user's.
_LIBRARIES = {"regtorch", "torch", "contextlib"}


def _place() -> tuple[str, str]:
    """The line of the user's code that is running, and the function of this library it called."""
    frame, function = sys._getframe(1), ""
    while frame.f_back:
        module = frame.f_globals.get("__name__", "")
        typed = frame.f_code.co_filename.startswith("<")  # at a prompt, or in a doctest
        if typed or module.partition(".")[0] not in _LIBRARIES:
            break
        if module.startswith("regtorch._"):
            function = frame.f_code.co_name
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}", function
