"""Watching what every dropout draws: for comparisons between frameworks, and for guard rails.

Nothing here changes a value. While nobody watches, a dropout pays for one look at a flag.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import re
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from regjax._compat import make_user_context

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Inexact

    Pair = tuple[Any, Any]


@dataclasses.dataclass(frozen=True)
class SiteKey:
    """A key was derived by `site_key`.

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
        order: where in the program it stands, counted from 0: a dropout inside a loop draws several
            times under one number.
        key: the two words of its key.
        rate: the probability that an element is zeroed.
        mask: what it keeps; of size 1 along dimensions that share it.
        entering: the values that it masks.
        function: the function of the library that draws, such as `"dropout"`.
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


class Observer:
    """Who watches: takes events, and counts the dropouts of the program.

    Events come from wherever the program runs, in no order: wait for `jax.effects_barrier()` before
    reading them.
    """

    def __init__(self, record: Callable[[SiteKey | Draw], None]) -> None:
        self._record = record
        self._orders = itertools.count()

    def site_key(self, site: str, root: Pair, step: Pair, key: Pair) -> None:
        """Called by `site_key`, with two words of each."""

        def record(root: Pair, step: Pair, key: Pair) -> None:
            high, low = _integers(step)
            self._record(SiteKey(site, _integers(root), (high << 32) | low, _integers(key)))

        jax.debug.callback(record, root, step, key)

    def draw(
        self,
        key: Pair,
        rate: Any,
        mask: Bool[Array, ...],
        entering: Inexact[Array, ...],
        off: Any = False,
    ) -> None:
        """Called by every dropout that draws; where `off` is True, the mask is not used."""
        order, (where, function), scope = next(self._orders), _place(), _scope()
        exact = rate if isinstance(rate, float) else None  # what enters a program is rounded

        def record(key: Pair, rate: Any, mask: Any, entering: Any, off: Any) -> None:
            if off:  # under vmap of the flag, which cannot branch
                return
            asked = float(rate) if exact is None else exact
            arrays = np.asarray(mask), np.asarray(entering)
            self._record(Draw(order, _integers(key), asked, *arrays, function, where, scope))

        jax.debug.callback(record, key, rate, mask, entering, off)


# Part of the key of every cache of traces: a function that was jitted before anybody watched is
# traced anew, and what was traced while somebody watched is not used afterwards.
_observer = make_user_context()


def observer() -> Observer | None:
    """Who watches, if anybody does."""
    return _observer.value


@contextlib.contextmanager
def observing(record: Callable[[SiteKey | Draw], None]) -> Iterator[Observer]:
    """Tells `record` of every key that `site_key` derives and every mask that a dropout draws.

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
    with watched_by(Observer(record)) as watching:
        yield watching


@contextlib.contextmanager
def watched_by(watching: Observer) -> Iterator[Observer]:
    """Lets an observer watch; what one traced in one such block is used again in its next."""
    with _observer(watching):
        yield watching


# Code of these is not the user's.
_LIBRARIES = {"regjax", "jax", "flax", "equinox", "haiku", "contextlib"}


def _place() -> tuple[str, str]:
    """The line of the user's code that is running, and the function of this library it called."""
    frame, function = sys._getframe(1), ""
    while frame.f_back:
        module = frame.f_globals.get("__name__", "")
        typed = frame.f_code.co_filename.startswith("<")  # at a prompt, or in a doctest
        if typed or module.partition(".")[0] not in _LIBRARIES:
            break
        if module.startswith("regjax._"):
            function = frame.f_code.co_name
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}", function


def _scope() -> str:
    """The name stack, `jvp(encoder)/layer_0`, without the transformations."""
    # Here and not above: JAX may change it, and nobody needs it who does not watch.
    from jax.extend import source_info_util

    return re.sub(r"\w+\(|\)", "", str(source_info_util.current_name_stack()))


def _integers(words: Pair) -> tuple[int, int]:
    high, low = (int(word) for word in words)
    return high, low
