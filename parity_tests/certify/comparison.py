"""The comparison of a script and its port, step by step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from parity_tests import causes, compare, replays, seeded, verdicts
from parity_tests.certify import words
from parity_tests.certify.certificate import AGREES, NONE, Certificate, First, Row
from parity_tests.compare import Tier
from parity_tests.recording import count_mask_elements
from parity_tests.verdicts import Noise
from regjax.interop._leaves import plain_name, unwrapped

if TYPE_CHECKING:
    from parity_tests.certify.port import Names, PortStep
    from parity_tests.certify.script import ScriptRun, ScriptStep
    from parity_tests.replays import Replay

    Arrays = Mapping[str, np.ndarray]
    Explain = Callable[[str, Arrays, Arrays, list[str], float], str]

# By the dtype of the parameters, as the tiers of parity_tests.compare for whole models.
TOLERANCES = {"float64": 1e-10, "float32": 1e-5}
COARSE = 1e-2
# The bound of updates, in units of the tolerance. In ten scripts over six steps, the largest
# deviation of an update in float32 was 4e-6. A decay that is missing at biases is about 1e-3.
UPDATES = 10.0
# On CPUs without AVX2, the last bits of initial weights may differ.
ROUNDINGS = 4.0


def certify(
    paths: tuple[Path, Path],
    script: ScriptRun,
    port: Iterable[tuple[Names, PortStep]],
    *,
    tolerance: float | None = None,
    progress: Callable[[int], object] = lambda step: None,
) -> Certificate:
    """Compare the steps of a port with those of a script.

    Args:
        paths: The files of the script and of the port.
        script: The run of the script.
        port: The steps of the port, as `run_port` yields them.
        tolerance: The bound of losses, buffers and parameters; None for that of the dtype.
        progress: Called with the number of each completed step.
    """
    comparison, steps, taken = _Comparison(script, tolerance), iter(port), 0
    beginning = next(steps, None)
    if beginning is not None:
        comparison.compare_beginning(*beginning)
    for there, (names, here) in zip(script.steps, steps, strict=False):
        taken += 1
        comparison.compare_step(taken, names, here, there)
        progress(taken)
    is_longer = taken == len(script.steps) and script.ended and next(steps, None) is not None
    comparison.compare_lengths(taken, is_longer)
    return comparison.certificate(*paths)


class _Comparison:
    """The rows so far."""

    def __init__(self, script: ScriptRun, tolerance: float | None) -> None:
        dtype = _coarsest({str(array.dtype) for array in script.initial.values()})
        bound = TOLERANCES.get(dtype, COARSE) if tolerance is None else tolerance
        self._tier = Tier(dtype, bound, relative=UPDATES * bound)
        self._script = script
        self._first: First | None = None
        self._losses: list[tuple[float, float]] = []
        self._previous: tuple[Arrays, Arrays] = ({}, {})
        update_bound = verdicts.bound_of("update", self._tier)
        self._rows = {
            row.name: row
            for row in (
                Row("steps", "steps"),
                Row("seed", "states"),
                Row("initial weights", "numbers", ROUNDINGS * self._tier.eps),
                Row("batch order", "indices"),
                Row("masks", "elements"),
                Row("generator", "states"),
                Row("losses", "losses", bound),
                Row("buffers", "numbers", bound),
                Row("updates", "arrays", update_bound),
                Row("parameters", "numbers", bound),
            )
        }

    def certificate(self, script: Path, port: Path) -> Certificate:
        """Return the certificate of what was compared."""
        for row in self._rows.values():
            if row.result == AGREES and not row.compared:
                row.result = NONE
        bound = self._tier.tolerance or 0.0
        return Certificate(
            *(script, port, self._script.seed, self._script.optimizer, bound, self._tier.dtype),
            *([*self._rows.values()], self._losses, self._first, self._script.notes),
        )

    def compare_lengths(self, taken: int, is_longer: bool) -> None:
        """Compare the numbers of steps; the port may have more than a script that was stopped."""
        row, made = self._rows["steps"], len(self._script.steps)
        row.compared = taken
        if is_longer:
            self._differ(taken + 1, row, "", f"the script ends after {made} steps; JAX does not")
        elif taken < made:
            row.count(0, made - taken)
            detail = f"JAX ends after {taken} steps; the script made {made}"
            self._differ(taken + 1, row, "", detail)

    def compare_beginning(self, names: Names, here: PortStep) -> None:
        """Compare the seed and the initial weights."""
        self._compare_seed(0, here, self._script.seed)
        there = names.laid_out(names.params, self._script.initial)
        self._previous = here.params, there
        explain = functools.partial(words.initial_difference, draws=self._script.steps[0].draws)
        self._compare_arrays(0, "initial weights", names, here.params, there, explain)

    def compare_step(self, step: int, names: Names, here: PortStep, there: ScriptStep) -> None:
        """Compare a step, in the order of causes."""
        before = self._script.steps[step - 2].state if step > 1 else None
        start = seeded.state_of_seed(self._script.seed) if before is None else before
        ends = here.state, there.state
        replay = replays.replay(here.masks, there.masks, there.draws, start, ends)
        self._compare_seed(step, here, seeded.seed_of(there.state))
        self._compare_batches(step, here, there, replay)
        self._compare_masks(step, replay)
        self._compare_generators(step, here, replay)
        self._compare_losses(step, here, there, replay)
        self._compare_buffers(step, names, here, there)
        in_torch = names.laid_out(names.params, there.params)
        self._compare_updates(step, names, here.params, in_torch)
        explain = functools.partial(causes.describe, "parameter")
        self._compare_arrays(step, "parameters", names, here.params, in_torch, explain)
        self._previous = here.params, in_torch

    def _differ(self, step: int, row: Row, where: str, detail: str) -> None:
        row.differ(step, where, detail)
        if self._first is None:
            self._first = First(step, row.name, where, detail)

    def _compare_seed(self, step: int, here: PortStep, there: int) -> None:
        row = self._rows["seed"]
        if here.state is None:
            if step:
                row.leave_out("train yields no 'generator'")
            return
        seed = seeded.seed_of(here.state)
        row.count(1, int(seed != there))
        if seed != there:
            detail = f"JAX's generator has the seed {seed} and PyTorch's {there}"
            self._differ(step, row, "", detail)

    def _compare_batches(
        self, step: int, here: PortStep, there: ScriptStep, replay: Replay
    ) -> None:
        row = self._rows["batch order"]
        indices = _indices(there.batches)
        if not self._script.has_loader:
            row.detail = "the script takes no batch from a DataLoader"
        elif indices is None:
            row.detail = "the dataset of the script has no indices that are integers"
        elif here.batch is None:
            row.leave_out("train yields no 'batch'")
        else:
            size = max(len(indices), len(here.batch))
            is_alike = len(indices) == len(here.batch)
            row.count(size, int(np.count_nonzero(indices != here.batch)) if is_alike else size)
            if not np.array_equal(indices, here.batch):
                others = [_indices(each.batches) for each in self._script.steps]
                detail = words.batch_difference(here.batch, indices, others)
                ends = replay.end_difference()
                cause = [detail, *([ends.detail.removeprefix("masks agree, and ")] if ends else [])]
                self._differ(step, row, "", "; ".join(cause))

    def _compare_masks(self, step: int, replay: Replay) -> None:
        row = self._rows["masks"]
        row.count(*count_mask_elements(replay.in_jax, replay.in_torch))
        if difference := replay.difference():
            self._differ(step, row, difference.site, difference.detail)

    def _compare_generators(self, step: int, here: PortStep, replay: Replay) -> None:
        row = self._rows["generator"]
        if here.state is None:
            row.leave_out("train yields no 'generator'")
            return
        difference = replay.end_difference()
        row.count(1, int(difference is not None))
        if difference:
            self._differ(step, row, "", difference.detail)

    def _compare_losses(self, step: int, here: PortStep, there: ScriptStep, replay: Replay) -> None:
        row = self._rows["losses"]
        if not there.losses.size:
            row.leave_out("the script does not call backward")
        elif here.losses is None:
            row.leave_out("train yields no 'loss'")
        elif here.losses.shape != there.losses.shape:
            counts = here.losses.size, there.losses.size
            row.count(max(counts), max(counts))
            detail = "JAX yields {} losses; the script calls backward on {}".format(*counts)
            self._differ(step, row, "", detail)
        else:
            self._losses.append((float(here.losses.sum()), float(there.losses.sum())))
            pair = {"": here.losses}, {"": there.losses}
            if beyond := self._tally(step, row, *pair, {"": ""}):
                size = causes.describe("loss", "", *pair, [*beyond], row.bound or 0.0)
                detail = words.loss_difference(replay, self._tier)
                self._differ(step, row, "", "; ".join(filter(None, [size, detail])))

    def _compare_buffers(self, step: int, names: Names, here: PortStep, there: ScriptStep) -> None:
        known = [name for name in self._stored if name in there.buffers]
        taken = {names.leaves[path].name for path in names.buffers}
        if missing := [name for name in known if name not in taken]:
            self._rows["buffers"].leave_out(f"train yields no {', '.join(missing)}")
        in_torch = names.laid_out(names.buffers, there.buffers)
        self._compare_arrays(step, "buffers", names, here.params, in_torch, words.buffer_difference)

    @functools.cached_property
    def _stored(self) -> list[str]:
        """The entries of the state dict, without those that only count batches."""
        entries = map(plain_name, unwrapped(self._script.model).state_dict())
        return [name for name in entries if not name.endswith("num_batches_tracked")]

    def _compare_updates(self, step: int, names: Names, here: Arrays, there: Arrays) -> None:
        """Compare the changes of the parameters, which are small beside them."""
        row, bound = self._rows["updates"], self._rows["updates"].bound or 0.0
        before = self._previous
        moved = (
            {path: _wide(here[path]) - _wide(before[0][path]) for path in there},
            {path: _wide(there[path]) - _wide(before[1][path]) for path in there},
        )
        noise = Noise(self._tier.eps)
        apart = verdicts.deviations("update", *moved, self._tier, bound, noise, there)
        beyond = [path for path, value in apart.items() if not value <= bound]
        worst = compare.furthest(apart)
        where = names.leaves[worst].name
        unequal = [path for path in apart if not np.array_equal(moved[0][path], moved[1][path])]
        row.count(len(apart), len(beyond), len(unequal))
        row.add(step, apart[worst], where)
        if beyond:
            self._differ(step, row, where, causes.describe("update", worst, *moved, beyond, bound))

    def _compare_arrays(
        self, step: int, quantity: str, names: Names, here: Arrays, there: Arrays, explain: Explain
    ) -> None:
        row, here = self._rows[quantity], {path: here[path] for path in there}
        labels = {path: names.leaves[path].name for path in there}
        beyond = self._tally(step, row, here, there, labels)
        if beyond:
            # Initial weights are drawn in order, so that the first one is the cause.
            path = next(iter(beyond)) if step == 0 else compare.furthest(beyond)
            detail = explain(path, here, there, [*beyond], row.bound or 0.0)
            self._differ(step, row, labels[path], detail)

    def _tally(
        self, step: int, row: Row, here: Arrays, there: Arrays, labels: Mapping[str, str]
    ) -> dict[str, float]:
        """Count the numbers that differ; return the deviations beyond the bound, by path."""
        beyond, apart, bound = {}, {}, row.bound or 0.0
        for path, right in there.items():
            left = here[path]
            differences = np.abs(_wide(left) - _wide(right))
            # Of initial weights, which may be small, relative to the largest one.
            size = np.abs(_wide(right)).max(initial=0.0)
            size = max(1.0, size) if step else size or 1.0
            exceeding = ~(differences <= bound * size)
            apart[path] = float(differences.max(initial=0.0) / size)
            row.count(right.size, int(exceeding.sum()), int((_wide(left) != _wide(right)).sum()))
            if exceeding.any() or (right.dtype.kind != "i" and left.dtype != right.dtype):
                beyond[path] = apart[path]
        if apart:
            worst = compare.furthest(apart)
            row.add(step, apart[worst], labels[worst])
        return beyond


def _wide(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float64)


def _coarsest(dtypes: Collection[str]) -> str:
    """Return the dtype of parameters whose tolerance is the largest."""
    floating = [dtype for dtype in dtypes if "float" in dtype]
    return max(floating, key=lambda dtype: TOLERANCES.get(dtype, COARSE), default="float32")


def _indices(batches: Sequence[Any]) -> np.ndarray | None:
    """Return the indices of batches in one array; None if they are not integers."""
    parts = [np.ravel(np.asarray(indices)) for indices in batches]
    if any(part.dtype.kind not in "iu" for part in parts if part.size):
        return None
    return np.concatenate([np.zeros(0, np.int64), *parts]).astype(np.int64)
