"""Guard rails that report silent errors of dropout.

A key that does not advance, a key that two layers share, a flag that evaluation forgets: training
continues, with worse results and no error. This module observes a few steps, and compares the masks
that their dropouts drew.
"""

from __future__ import annotations

import contextlib
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from regjax._random.events import Observer, observed_by
from regshared.checks import check_callable, describe, is_bool
from regshared.events import SampledDraw, SiteKey
from regshared.mask_audit import MaskRelation, audit, split_sample
from regshared.report import DropoutProblem, DropoutReport, MaskSummary, Site, draws_of, make_report

if TYPE_CHECKING:
    from jaxtyping import Array, Bool

    from regshared.report import Expected, Step


def check_dropout(
    train_step: Callable[..., Any],
    *carry: Any,
    evaluate: Callable[..., Any] | None = None,
    expect: Expected = (),
    allow: Collection[str] = (),
) -> DropoutReport:
    """Run a training step twice, and report errors of its dropout.

    `DropoutProblem` lists the errors: sites that drew the same mask in both steps, or at every
    timestep; sites that share a key; masks that depend on one another, as `audit_masks` finds them;
    dropout that is inactive in training, or active in evaluation. The check covers the masks that
    `regjax` draws, in its functions and in the layers made from them; no other library's, and no
    Gaussian noise, which has no mask. For a loop that does not fit the arguments, use a
    `DropoutGuard`.

    Pass real data. A site that draws again from one key for the same values counts once, as under a
    checkpoint: the rows of a batch of ones could not be distinguished.

    The step is compiled once more, for both runs; earlier compilations are reused afterwards.

    Args:
        train_step: Called as `train_step(*carry, step)` with step 0 and 1; jitted or not. It
            returns the next `carry`, several values as a tuple. Without a carry, its result is
            ignored.
        *carry: The state of training: parameters, optimizer, keys. Each call receives the result of
            the previous one, so that a step may donate its arguments.
        evaluate: Called once as `evaluate(*carry)`; dropout must be off in it.
        expect: Names of sites that must draw, or a dict from names to their rates, 0 for a site
            that must not draw. A site's name is the one passed to `site_key`, or the path of its
            module in Flax Linen and Haiku; its line of code, `"model.py:42"`, also names it. Globs
            are allowed.
        allow: Names of sites whose findings are ignored, such as one whose mask is the same at
            every timestep on purpose. Globs are allowed; one that matches nothing is an error.

    Returns:
        A report to print; `.raise_if_wrong()` raises an error if there are findings.

    Raises:
        TypeError: `expect` or `allow` is a string.
        ValueError: The result of `train_step` does not match `carry`, or a glob of `allow` matches
            nothing.
        RuntimeError: Called inside a traced function, as under `jax.jit`.

    Note (PyTorch):
        `regtorch.check_dropout` reports the same errors.

    Example:
        >>> import jax, jax.numpy as jnp, regjax
        >>> root = jax.random.key(0)
        >>> @jax.jit
        ... def train_step(w, step):
        ...     key = regjax.site_key(root, 0, "hidden")  # forgets the step
        ...     return w - 0.1 * jax.grad(lambda w: regjax.dropout(w, 0.5, key=key).sum())(w)
        >>> report = regjax.check_dropout(train_step, jnp.ones(8))
        >>> report.findings[0].problem.name, report.findings[0].detail
        ('SAME_MASK', "the key of 'hidden' at step 0 drew in steps 0 and 1")
    """
    check_callable("train_step", train_step, "(*carry, step)")
    if evaluate is not None:
        check_callable("evaluate", evaluate, "(*carry)")
    guard = DropoutGuard()
    for step in range(2):
        with guard.training():
            carry = _next_carry(train_step(*carry, step), carry)
    if evaluate is not None:
        with guard.evaluation():
            evaluate(*carry)
    return guard.report(expect=expect, allow=allow)


def audit_masks(
    masks: Mapping[Any, Bool[Array, ...]],
    rates: float | Mapping[Any, float],
    *,
    equal: Iterable[tuple[Any, Any]] = (),
) -> list[MaskRelation]:
    """Return the pairs of masks that are not independent: copies, and nested masks.

    A mask may be a copy of another one of the same rate, or of a part of it: shifted, every 2nd,
    4th, 8th or 32nd element, transposed, or inverted; or repeat itself, as along the rows of a
    batch. Masks of different rates may be nested, as those made from the same random numbers.
    Independent masks give a result with a probability of at most 1e-9 per audit. `DropoutGuard` and
    `check_dropout` search the masks that they observe in the same way.

    A copy is found if its elements carry at least `log2(2e9 * 10 * n**2)` bits of information,
    where `n` is the number of elements searched in all masks; an element carries 1 bit at rate 0.5,
    and 0.47 on average at 0.1. Nested masks are found from about `31 + log2(4 * pairs)` bits, where
    an element carries `-log2(1 - p)` bits, and `p` is the probability of the combination of two
    decisions that never occurs. Of large masks, 8192 elements are searched at the beginning, at the
    second index of each axis, at the end, and of the transposed mask; of more than 256 masks, 256.

    Args:
        masks: Arrays of booleans by labels, such as `(site, step, device)`.
        rates: The dropout rate, or a dict from labels to rates.
        equal: Pairs of labels whose masks must be equal, such as those of a forward and a backward
            pass. The second mask of a pair is compared with the first one only.

    Returns:
        One relation for each pair, with its attributes `first`, `second`, `relation`, `length` and
        `chance`; empty if there are none.

    Raises:
        TypeError: A mask has no boolean dtype, or a rate is not a number.
        ValueError: A rate is missing or not in (0, 1); `equal` has an unknown label, or a pair of
            different shapes.

    Note (PyTorch):
        `regtorch.audit_masks` returns the same relations.

    Example:
        >>> import jax, regjax
        >>> stream = regjax.bernoulli(jax.random.key(0), 0.5, (1004,))
        >>> masks = {"hidden": stream[:1000], "output": stream[4:]}
        >>> for relation in regjax.audit_masks(masks, 0.5):
        ...     print(relation)
        output is a copy of hidden, shifted by 4 (996 elements)
    """
    return audit({label: _elements(label, mask) for label, mask in masks.items()}, rates, equal)


class DropoutGuard:
    """An observer of the dropout of a loop: some training steps, and evaluation.

    Blocks of different guards may be nested, and `check_dropout` may be called inside a block: each
    guard sees all masks drawn inside its own blocks.

    Example:
        >>> import jax, jax.numpy as jnp, regjax
        >>> key = jax.random.key(0)
        >>> guard = regjax.DropoutGuard()
        >>> for step in range(2):
        ...     with guard.training():
        ...         key, now = jax.random.split(key)
        ...         y = regjax.dropout(jnp.ones(8), 0.5, key=now)
        >>> with guard.evaluation():
        ...     y = regjax.dropout(jnp.ones(8), 0.5, key=now)  # forgets deterministic=True
        >>> [finding.problem.value for finding in guard.report().findings]
        ['active in evaluation']
    """

    def __init__(self) -> None:
        self._observer = Observer(self._record, sample=_SAMPLE)
        self._events: list[SiteKey | MaskSummary] | None = None
        self._steps: list[Step] = []
        self._evaluations: list[Step] = []
        self._derived: set[str] = set()

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Observe one training step; a report requires two."""
        with self._observing() as events:
            yield
        self._steps.append(draws_of(events))
        self._derived |= {event.site for event in events if isinstance(event, SiteKey)}

    @contextlib.contextmanager
    def evaluation(self) -> Iterator[None]:
        """Observe an evaluation, in which nothing may be dropped."""
        with self._observing() as events:
            yield
        self._evaluations.append(draws_of(events))

    def report(self, *, expect: Expected = (), allow: Collection[str] = ()) -> DropoutReport:
        """Report the errors in the observed steps.

        Args:
            expect: See `check_dropout`.
            allow: See `check_dropout`.

        Raises:
            TypeError: `expect` or `allow` is a string.
            ValueError: Fewer than two steps were observed, or a glob of `allow` matches nothing.
        """
        if len(self._steps) < 2:
            raise ValueError(
                f"a guard must observe two training steps to compare; got {len(self._steps)}. Run "
                "each of two steps in its own block: with guard.training(): …"
            )
        return make_report(self._steps, self._evaluations, self._derived, ADVICE, expect, allow)

    @contextlib.contextmanager
    def _observing(self) -> Iterator[list[SiteKey | MaskSummary]]:
        if isinstance(jnp.zeros(()), Tracer):
            raise RuntimeError(
                "check_dropout and the blocks of a DropoutGuard must be outside of jax.jit and of "
                "jax.lax's loops and branches; got a call in a traced function, whose masks are "
                "drawn later. Check the jitted step from outside: "
                "regjax.check_dropout(jax.jit(train_step), …)."
            )
        if self._events is not None:
            raise RuntimeError(
                "guard.training() and guard.evaluation() must not be nested in one another; got a "
                "block inside a block of the same guard. End the first block, or use a second "
                "DropoutGuard, which may be nested."
            )
        self._events = events = []
        try:
            # The same observer each time: a jitted step is compiled once for all blocks.
            with observed_by(self._observer):
                yield events
        finally:
            jax.effects_barrier()  # also after an error: a late event would enter the next block
            self._observer.forget_unfinished()
            self._events = None

    def _record(self, event: Any) -> None:
        if self._events is not None:
            self._events.append(event if isinstance(event, SiteKey) else _summary(event))


# A step may draw gigabytes. This many elements distinguish a mask, or the masked values.
_SAMPLE = 2**11


def _summary(sampled: SampledDraw) -> MaskSummary:
    draw, values = sampled.draw, sampled.draw.entering
    if np.iscomplexobj(values):
        values = np.concatenate([np.real(values), np.imag(values)])
    values = values.astype(float)
    sample, segments = split_sample(draw.mask.tobytes(), sampled.segments)
    return MaskSummary(
        order=draw.order,
        site=Site(draw.scope, draw.where),
        key=draw.key,
        origin="",
        function=draw.function,
        rate=draw.rate,
        shape=sampled.shape,
        size=sampled.size,
        kept=sampled.kept,
        sample=sample,
        values=array("d", values[np.isfinite(values)].tobytes()),
        digits=float(jnp.finfo(draw.entering.dtype).eps),
        segments=segments,
        examples=draw.examples,
    )


def _elements(label: Any, mask: Any) -> tuple[tuple[int, ...], bytes]:
    """Return the shape of a mask and its elements, one byte each."""
    if not is_bool(mask):
        raise TypeError(f"masks[{label!r}] must be a boolean array; got {describe(mask)}.")
    array = np.asarray(mask)
    return array.shape, array.tobytes()


ADVICE = {
    DropoutProblem.SAME_MASK: (
        "Its key does not change with the step. Pass the step, regjax.site_key(root, step, name), "
        "or split the key and carry the new one out of the step, as the state of nnx has to be."
    ),
    DropoutProblem.REPEATED_MASK: (
        "Give each timestep, layer or row its own key: jax.random.split and scan or vmap over the "
        "keys; in shard_map, pass sampler=regjax.by_example(numbers of the rows). If it is meant, "
        "allow the site."
    ),
    DropoutProblem.SHARED_KEY: (
        "The masks depend on each other. Derive a key for each site, regjax.site_key(root, step, "
        "name) or jax.random.split, and do not add the numbers of a step and of a layer."
    ),
    DropoutProblem.COPIED_MASK: (
        "Their keys differ, so that a sampler reuses random numbers. Draw each mask from its key "
        "alone, as regjax.bernoulli does, with a key for each site and step: "
        "regjax.site_key(root, step, name), and in shard_map regjax.by_example as the sampler. If "
        "it is meant, allow the site."
    ),
    DropoutProblem.REMADE_MASK: (
        "The gradient belongs to another mask. Use a sampler that computes the mask from its "
        "arguments alone, as regjax.bernoulli does."
    ),
    DropoutProblem.IGNORED_KEY: (
        "Its sampler does not use the key; drawn with NumPy, a mask is a constant under jit."
    ),
    DropoutProblem.NEVER_ACTIVE: (
        "Pass deterministic=False in training, and look at the rate. Only regjax is seen: "
        "regjax.dropout and the layers of regjax.linen, nnx, equinox and haiku."
    ),
    DropoutProblem.ACTIVE_IN_EVALUATION: "Pass deterministic=True in evaluation.",
    DropoutProblem.OTHER_RATE: "Look at how the rate reaches the site.",
    DropoutProblem.INVALID_RATE: "Look at the schedule of the rate.",
    DropoutProblem.ALL_OR_NOTHING: "Look at its sampler.",
}


def _next_carry(result: Any, carry: tuple[Any, ...]) -> tuple[Any, ...]:
    if not carry:
        return ()
    first, *others = carry
    if others:
        fits = isinstance(result, tuple) and len(result) == len(carry)
    else:
        # The detectable cases: a tuple of state and metrics, and a missing return value (None).
        fits = isinstance(result, tuple) == isinstance(first, tuple)
        fits = fits and (result is None) == (first is None)
    if not fits:
        got = f"a tuple of {len(result)}" if isinstance(result, tuple) else type(result).__name__
        raise ValueError(
            f"train_step must return the next values of its {len(carry)} arguments before the "
            f"step; got {got}. Select them: lambda state, step: update(state, batch)[0]."
        )
    return result if others else (result,)
