"""Guard rails that report silent errors of dropout.

A key that does not advance, a key that two layers share, a mode that evaluation forgets to set:
training continues, with worse results and no error. This module observes a few steps, and compares
the masks that were drawn.
"""

from __future__ import annotations

import contextlib
from array import array
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, Any

import torch

from regshared.checks import check_callable
from regshared.events import SampledDraw, SiteKey
from regshared.report import DropoutProblem, DropoutReport, MaskSummary, Site, draws_of, make_report
from regtorch._random.events import Observer, observed_by

if TYPE_CHECKING:
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
    timestep; sites that share a key; dropout that is inactive in training, or active in evaluation.
    The check covers the masks that `regtorch` draws, in its functions and in the layers made from
    them; no other library's, and no Gaussian noise, which has no mask. For a loop that does not fit
    the arguments, use a `DropoutGuard`.

    Pass real data. A site that draws again from one key for the same values counts once, as under a
    checkpoint: the rows of a batch of ones could not be distinguished.

    Args:
        train_step: Called as `train_step(step)` with steps 0 and 1; in a functional program as
            `train_step(*carry, step)`, which returns the next `carry`, several values as a tuple.
        *carry: The training state, unless a module holds it.
        evaluate: Called once as `evaluate(*carry)`; dropout must be off in it.
        expect: Names of sites that must draw, such as `regtorch.keyed.sites(model)`, or a dict from
            names to rates, 0 for a site that must not draw. A converted layer called at rate 0 need
            not draw, unless the dict gives it another rate. A site's name is the one passed to
            `site_key`; its line of code, `"model.py:42"`, also names it. Globs are allowed.
        allow: Names of sites whose findings are ignored, such as one whose mask is the same at
            every timestep on purpose. Globs are allowed; one that matches nothing is an error.

    Returns:
        A report to print; `.raise_if_wrong()` raises an error if there are findings.

    Raises:
        TypeError: `expect` or `allow` is a string.
        ValueError: The result of `train_step` does not match `carry`, or a glob of `allow` matches
            nothing.
        RuntimeError: Called inside `torch.compile`.

    Note (JAX):
        `regjax.check_dropout` reports the same errors.

    Example:
        >>> import torch, regtorch
        >>> model = regtorch.keyed.convert(torch.nn.Sequential(torch.nn.Dropout(0.5)))
        >>> def train_step(step):
        ...     regtorch.keyed.set_key(model, regtorch.key(0), 0)  # forgets the step
        ...     model(torch.ones(8, requires_grad=True)).sum().backward()
        >>> report = regtorch.check_dropout(train_step)
        >>> report.findings[0].problem.name, report.findings[0].detail
        ('SAME_MASK', "the key of '0' at step 0 drew in steps 0 and 1")
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


class DropoutGuard:
    """An observer of the dropout of a loop: some training steps, and evaluation.

    Blocks of different guards may be nested, and `check_dropout` may be called inside a block: each
    guard sees all masks drawn inside its own blocks.

    Example:
        >>> import torch, regtorch
        >>> guard, x = regtorch.DropoutGuard(), torch.ones(8)
        >>> for step in range(2):
        ...     with guard.training():
        ...         key = regtorch.site_key(regtorch.key(0), step, "hidden")
        ...         y = regtorch.dropout(x, 0.5, key=key)
        >>> with guard.evaluation():
        ...     y = regtorch.dropout(x, 0.5, key=key)  # forgets deterministic=True
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
        seen = self._steps, self._evaluations, self._derived
        return make_report(*seen, ADVICE, expect, allow, self._observer.idle)

    @contextlib.contextmanager
    def _observing(self) -> Iterator[list[SiteKey | MaskSummary]]:
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "check_dropout and the blocks of a DropoutGuard must be outside of torch.compile, "
                "whose code cannot be observed; got a call in a compiled function. Check the step "
                "before it is compiled: regtorch.check_dropout(train_step, …)."
            )
        if self._events is not None:
            raise RuntimeError(
                "guard.training() and guard.evaluation() must not be nested in one another; got a "
                "block inside a block of the same guard. End the first block, or use a second "
                "DropoutGuard, which may be nested."
            )
        self._events = events = []
        try:
            with observed_by(self._observer):
                yield events
        finally:
            self._events = None

    def _record(self, event: Any) -> None:
        if self._events is None:
            return
        if isinstance(event, SiteKey):
            self._events.append(event)
        elif not event.draw.remade:
            self._events.append(_summary(event))


# A step may draw gigabytes. This many elements distinguish a mask, or the values under it.
_SAMPLE = 2**11


def _summary(sampled: SampledDraw) -> MaskSummary:
    draw, values = sampled.draw, sampled.draw.entering
    values = torch.view_as_real(values) if values.is_complex() else values.to(torch.float64)
    return MaskSummary(
        order=draw.order,
        site=Site("", draw.where),
        key=draw.key,
        origin="",
        function=draw.function,
        rate=draw.rate,
        shape=sampled.shape,
        size=sampled.size,
        kept=sampled.kept,
        sample=bytes(draw.mask.tolist()),
        values=array("d", values[values.isfinite()].tolist()),
        digits=torch.finfo(draw.entering.dtype).eps,
    )


ADVICE = {
    DropoutProblem.SAME_MASK: (
        "Its key does not change with the step. Call regtorch.keyed.set_key(model, root, step) "
        "before each step, or pass the step: regtorch.site_key(root, step, name)."
    ),
    DropoutProblem.REPEATED_MASK: (
        "Give each timestep, layer, row or call its own key: regtorch.split, and torch.func.vmap "
        "over the keys. If it is meant, allow the site."
    ),
    DropoutProblem.SHARED_KEY: (
        "The masks depend on each other. Derive a key for each site, regtorch.site_key(root, step, "
        "name) or regtorch.split, and do not add the numbers of a step and of a layer."
    ),
    DropoutProblem.IGNORED_KEY: "Its sampler does not use the key.",
    DropoutProblem.NEVER_ACTIVE: (
        "Call model.train() before training, and look at the rate. Only regtorch is seen: models "
        "that regtorch.keyed converted, regtorch.nn and the functions; and not in torch.compile."
    ),
    DropoutProblem.ACTIVE_IN_EVALUATION: (
        "Call model.eval(), or pass deterministic=True, in evaluation."
    ),
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
        # A heuristic: a state returned with metrics is a tuple, and a missing return is None.
        fits = isinstance(result, tuple) == isinstance(first, tuple)
        fits = fits and (result is None) == (first is None)
    if not fits:
        got = f"a tuple of {len(result)}" if isinstance(result, tuple) else type(result).__name__
        raise ValueError(
            f"train_step must return the next values of its {len(carry)} arguments before the "
            f"step; got {got}. Select them: lambda state, step: update(state, batch)[0]."
        )
    return result if others else (result,)
