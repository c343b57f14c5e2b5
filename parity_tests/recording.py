"""Draws of every dropout of a training step, in both frameworks, and their differences.

Models need no changes: `regjax.observing` and `regtorch.observing` report the draws. A dropout is
identified by its site, the name that its key was derived with.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

import regjax
import regtorch
from parity_tests import compare, seeded
from parity_tests.compare import Tier
from parity_tests.frameworks import from_torch

if TYPE_CHECKING:
    import torch

    from parity_tests.seeded import SeededDraw


@dataclasses.dataclass(frozen=True)
class Origin:
    """The arguments from which `site_key` derived a key.

    Attributes:
        root: The two words of the root key.
        step: The step of training.
        site: The name of the place.
    """

    root: tuple[int, int]
    step: int
    site: str


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A mask, and the values it applies to.

    Attributes:
        site: The name its key was derived with, or, for a key made otherwise, a name from the
            dropout's place in the program.
        key: The two words of the key.
        origin: The origin of the key, if known.
        rate: The dropout rate.
        mask: The mask, True where kept.
        entering: The values that are masked; None if the model masks them itself, with the result
            of a function that only draws, such as `bernoulli_`.
        unused: The sites whose keys were derived in the same step, and drew no mask.
        where: The calling line of code in JAX, `"model.py:42"`.
        memory_order: The axes in PyTorch, from the outermost to the innermost in memory, if the
            mask was drawn from PyTorch's generator.
        axes: The axes in JAX, in the order of those of PyTorch; of such a mask only.
    """

    site: str
    key: tuple[int, int]
    origin: Origin | None
    rate: float
    mask: np.ndarray
    entering: np.ndarray | None
    unused: frozenset[str] = frozenset()
    where: str = ""
    memory_order: tuple[int, ...] = ()
    axes: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Difference:
    """A site at which the frameworks diverge.

    Attributes:
        site: Its name.
        deviation: The deviation in the unit of a tier; infinite for masks.
        detail: The difference, in words.
    """

    site: str
    deviation: float
    detail: str


class Recorder:
    """A recorder of the draws of both frameworks, step by step.

    Args:
        model: The PyTorch model, if it draws from a generator of PyTorch.
        generator: This generator; None if the model is converted by `regtorch.keyed`.

    Attributes:
        draws: All draws from the generator in the last step taken, in order.
        without_mask: The sites where JAX drew a mask and a converted PyTorch model drew numbers, in
            the steps taken so far; such a mask is left out.

    Example:
        >>> import jax, regjax
        >>> recorder = Recorder()
        >>> with recorder.watching():
        ...     key = regjax.site_key(jax.random.key(0), 3, "hidden")
        ...     y = regjax.dropout(jax.numpy.ones(64), 0.5, key=key)
        ...     in_jax, in_torch = recorder.taken()
        >>> [drawn.site for drawn in in_jax], in_torch
        (['hidden'], [])
    """

    def __init__(
        self, model: torch.nn.Module | None = None, generator: torch.Generator | None = None
    ) -> None:
        self._model, self._generator = model, generator
        self._events: tuple[list[Any], list[Any]] = ([], [])
        self.draws: Sequence[SeededDraw] = ()
        self._idle: Set[str] = frozenset()
        self.without_mask: dict[str, None] = {}

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Record the draws inside; enter it once around a loop, since each entry recompiles."""
        in_jax, in_torch = self._events
        if self._model is not None and self._generator is not None:
            paths = seeded.paths_of(self._model)
            watching = seeded.observing(
                lambda module: paths.get(id(module)), self._generator, in_torch.append
            )
            with _x64_in_all_threads(), regjax.observing(in_jax.append), watching:
                yield
            return
        with (
            _x64_in_all_threads(),
            regjax.observing(in_jax.append),
            regtorch.observing(in_torch.append) as observer,
        ):
            self._idle = observer.idle
            yield

    def taken(self) -> tuple[list[Drawn], list[Drawn]]:
        """Return the draws of JAX and of PyTorch since the last call, each in program order."""
        jax.effects_barrier()
        if self._generator is not None:
            in_jax, self.draws = self._events[0].copy(), once(self._events[1])
            for events in self._events:
                events.clear()
            return _drawn(in_jax), masks_of(self.draws)
        in_jax, in_torch = (_drawn(events) for events in self._events)
        keys = {event.site for event in self._events[1] if hasattr(event, "site")}
        # Numbers from which the model makes a mask of its own, such as `floor(keep_prob + rand)`.
        numbers = keys & self._idle - {drawn.site for drawn in in_torch}
        self.without_mask |= dict.fromkeys(each.site for each in in_jax if each.site in numbers)
        for events in self._events:
            events.clear()
        return [drawn for drawn in in_jax if drawn.site not in numbers], in_torch


@contextlib.contextmanager
def _x64_in_all_threads() -> Iterator[None]:
    """Extend `jax.enable_x64` of this thread to callbacks, which would round to float32."""
    with ThreadPoolExecutor(1) as other:  # which has the value of new threads
        before = other.submit(jax.config.read, "jax_enable_x64").result()
    jax.config.update("jax_enable_x64", jax.config.read("jax_enable_x64"))
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)


def _drawn(events: Iterable[Any]) -> list[Drawn]:
    keys = [event for event in events if hasattr(event, "site")]
    origins = {event.key: Origin(event.root, event.step, event.site) for event in keys}
    found: dict[Any, Drawn] = {}
    draws = [event for event in events if not hasattr(event, "site")]
    used = {draw.key for draw in draws}
    unused = frozenset(origin.site for key, origin in origins.items() if key not in used)
    for draw in sorted(draws, key=lambda draw: draw.order):
        origin = origins.get(draw.key)
        mask, entering = (
            from_torch(array) if hasattr(array, "detach") else array
            for array in (draw.mask, draw.entering)
        )
        entering = None if draw.function.endswith("bernoulli") else entering
        # A repeated mask belongs to a forward pass that a checkpoint runs again. Two calls that
        # draw from one state of PyTorch's generator are a mistake, and have different orders.
        is_seeded = draw.function.startswith("torch_random.")
        mark = (draw.key, draw.rate, mask.shape, draw.order if is_seeded else None)
        if mark not in found:
            site = origin.site if origin else f"dropout {len(found) + 1}"
            where = draw.where.rpartition("/")[2] if is_seeded else ""
            values = mask, entering, unused, where
            found[mark] = Drawn(site, draw.key, origin, draw.rate, *values)
    return list(found.values())


def once(draws: Iterable[SeededDraw]) -> list[SeededDraw]:
    """Return the draws without those that a checkpoint repeats."""
    found = {}
    for draw in draws:
        mark = draw.site, draw.function, draw.shape, draw.key, draw.rate, draw.idle
        found.setdefault(mark, draw)
    return list(found.values())


def masks_of(draws: Iterable[SeededDraw]) -> list[Drawn]:
    """Return the masks; the site of the second one in a module is `"attention, mask 2"`."""
    counts, found = collections.Counter[str](), []
    for draw in draws:
        if draw.mask is not None and draw.rate is not None:
            counts[draw.site] += 1
            number = counts[draw.site]
            site = f"{draw.site}, mask {number}" if number > 1 else draw.site
            drawn = Drawn(site, draw.key, None, draw.rate, draw.mask, draw.entering)
            found.append(dataclasses.replace(drawn, memory_order=draw.memory_order))
    return found


def mask_differences(in_jax: Sequence[Drawn], in_torch: Sequence[Drawn]) -> list[Difference]:
    """Return the sites whose masks differ, in the order of the PyTorch program.

    Masks are compared element by element in row-major order, so that a mask of (batch, 1, 1,
    channels) can match one of (batch, channels, 1, 1).

    Example:
        >>> import numpy as np
        >>> x = np.ones(2)
        >>> in_jax = Drawn("a", (0, 1), None, 0.5, np.array([True, False]), x)
        >>> in_torch = Drawn("a", (0, 1), None, 0.5, np.array([True, True]), x)
        >>> [difference.detail for difference in mask_differences([in_jax], [in_torch])]
        ['1 of 2 elements of the mask differ']
    """
    pairs, left, right = _paired(in_jax, in_torch)
    places = {id(drawn): place for place, drawn in enumerate(in_torch)}
    found = [
        (places[id(there)], Difference(there.site, float("inf"), detail))
        for here, there in pairs
        if (detail := _difference(here, there))
    ]
    found += [
        (places[id(there)], _alone(there, ("PyTorch", "JAX"), unmatched=left)) for there in right
    ]
    found += [(len(in_torch), _alone(here, ("JAX", "PyTorch"), unmatched=right)) for here in left]
    return [difference for _, difference in sorted(found, key=lambda item: item[0])]


def count_mask_elements(in_jax: Sequence[Drawn], in_torch: Sequence[Drawn]) -> tuple[int, int]:
    """Return the number of elements of all masks, and of those that differ.

    A mask without a counterpart of its size differs in every element.
    """
    pairs, left, right = _paired(in_jax, in_torch)
    elements = different = sum(drawn.mask.size for drawn in (*left, *right))
    for here, there in pairs:
        size = max(here.mask.size, there.mask.size)
        is_alike = here.mask.size == there.mask.size
        elements += size
        different += (
            int(np.count_nonzero(here.mask.ravel() != there.mask.ravel())) if is_alike else size
        )
    return elements, different


def value_deviations(
    in_jax: Sequence[Drawn], in_torch: Sequence[Drawn], tier: Tier
) -> dict[str, float]:
    """Return the deviation of the values that enter each site, by site in the order of the program.

    If a site has another layout in JAX, such as channels last, the values are compared in sorted
    order, which ignores their places. A site whose values are unknown is left out.
    """
    pairs, _, _ = _paired(in_jax, in_torch)
    pairs.sort(key=lambda pair: [id(drawn) for drawn in in_torch].index(id(pair[1])))
    found: dict[str, float] = {}
    for here, there in pairs:
        left, right = here.entering, there.entering
        if left is None or right is None:
            continue
        if left.size != right.size:
            apart = float("inf")
        else:
            if left.shape != right.shape:
                left, right = np.sort(left, axis=None), np.sort(right, axis=None)
            apart = compare.deviations({"": left}, {"": right}, tier)[""]
        found[there.site] = max(apart, found.get(there.site, 0.0))
    return found


def _paired(
    in_jax: Sequence[Drawn], in_torch: Sequence[Drawn]
) -> tuple[list[tuple[Drawn, Drawn]], list[Drawn], list[Drawn]]:
    """Pair the draws of JAX and PyTorch, by name or else by key; return the unpaired ones, too."""
    left, pairs, alone = list(in_jax), [], []
    by_name = _match(in_torch, left, lambda here, there: here.site == there.site)
    for there, here in by_name:
        (pairs.append((here, there)) if here else alone.append(there))
    by_key = _match(alone, left, lambda here, there: here.key == there.key)
    right = []
    for there, here in by_key:
        (pairs.append((here, there)) if here else right.append(there))
    # Dropouts without names are paired in order if both sides have equally many.
    nameless = [here for here in left if here.origin is None]
    if len(nameless) == len(left) == len(right):
        pairs += zip(left, right, strict=True)
        return pairs, [], []
    return pairs, left, right


def _match(
    wanted: Iterable[Drawn], pool: list[Drawn], same: Any
) -> list[tuple[Drawn, Drawn | None]]:
    """Return for each wanted draw the first equal one of the pool, and remove it from the pool."""
    found = []
    for there in wanted:
        here = next((here for here in pool if same(here, there)), None)
        if here is not None:
            pool[:] = [drawn for drawn in pool if drawn is not here]
        found.append((there, here))
    return found


def _difference(in_jax: Drawn, in_torch: Drawn) -> str:
    """Describe the difference of two masks of one site; an empty string if they are equal."""
    causes = []
    if not np.isclose(in_jax.rate, in_torch.rate, rtol=1e-6, atol=0.0):
        causes.append(f"rate {in_jax.rate:.6g} in JAX and {in_torch.rate:.6g} in PyTorch")
    if in_jax.key != in_torch.key:
        causes.append(_key_difference(in_jax, in_torch))
    if in_jax.mask.size != in_torch.mask.size:
        shapes = (list(drawn.mask.shape) for drawn in (in_jax, in_torch))
        causes.append("a mask of shape {} in JAX and {} in PyTorch".format(*shapes))
    else:
        differ = int(np.count_nonzero(in_jax.mask.ravel() != in_torch.mask.ravel()))
        if differ:
            causes.append(f"{differ} of {in_jax.mask.size} elements of the mask differ")
    return "; ".join(causes)


def _key_difference(in_jax: Drawn, in_torch: Drawn) -> str:
    here, there = in_jax.origin, in_torch.origin
    if here and there:
        if here.root != there.root:
            return f"another root key: {here.root} in JAX and {there.root} in PyTorch"
        if here.step != there.step:
            return f"its key is that of step {here.step} in JAX and of {there.step} in PyTorch"
        return f"its key is that of site '{here.site}' in JAX and of '{there.site}' in PyTorch"
    unknown = "a key that site_key did not derive"
    return (
        f"another key: {here.site if here else unknown} in JAX and "
        f"{there.site if there else unknown} in PyTorch{_unused_key(in_torch.site, [in_jax])}"
    )


def _unused_key(site: str, in_jax: Iterable[Drawn]) -> str:
    """Return the usual cause of a mask that was not drawn from the key of its site."""
    if not any(site in drawn.unused for drawn in in_jax):
        return ""
    return (
        f", although JAX derived the key of '{site}'. Linen's rngs={{'dropout': key}} and "
        "nnx.Rngs(dropout=key) draw from other keys, derived from it: pass the key in the call, "
        "rng=key in regjax.linen and rngs=key in regjax.nnx, or use regjax.keyed.bind"
    )


def _alone(drawn: Drawn, sides: tuple[str, str], *, unmatched: Sequence[Drawn]) -> Difference:
    side, other = sides
    rest = ", ".join(repr(each.site) for each in unmatched)
    instead = f", but at {rest}" if rest else ""
    cause = _unused_key(drawn.site, unmatched) if other == "JAX" else ""
    detail = f"{side} draws a mask here, {other} does not{instead}{cause}"
    return Difference(drawn.site, float("inf"), detail)
