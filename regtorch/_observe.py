"""Watching what every dropout draws: for comparisons between frameworks, and for guard rails.

Nothing here changes a value. While nobody watches, a dropout pays for one look at a flag.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor


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
        order: how many dropouts drew before it.
        key: the two words of its key.
        rate: the probability that an element is zeroed.
        mask: what it keeps; of size 1 along dimensions that share it.
        entering: the values that it masks.
    """

    order: int
    key: tuple[int, int]
    rate: float
    mask: Tensor
    entering: Tensor


class Observer:
    """Who watches: takes events, and counts the dropouts."""

    def __init__(self, record: Callable[[SiteKey | Draw], None]) -> None:
        self._record = record
        self._orders = itertools.count()

    def site_key(self, site: str, root: tuple[int, int], step: int, key: tuple[int, int]) -> None:
        """Called where the key of a site is derived."""
        self._record(SiteKey(site, root, step, key))

    def draw(self, key: Tensor, rate: float | Tensor, mask: Tensor, entering: Tensor) -> None:
        """Called by every dropout that draws."""
        high, low = key.tolist()
        # A copy: the model may go on to write into the tensor.
        entering = entering.detach().clone()
        self._record(Draw(next(self._orders), (high, low), float(rate), mask, entering))


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
    watching = Observer(record)
    token = _observer.set(watching)
    try:
        yield watching
    finally:
        _observer.reset(token)
