"""A certificate: a row for each quantity, the first difference, and the result.

A row is required unless there is nothing to compare. Both programs agree if every required row
does: a row that lacks a side is not compared, and then nothing is certified.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

AGREES, DIFFERS, NOT_COMPARED, NONE = "agrees", "differs", "not compared", "none"
INCOMPLETE = "incomplete"


@dataclasses.dataclass
class Row:
    """A quantity, and how far both sides agree.

    Attributes:
        name: Its name.
        unit: What is counted.
        bound: The largest deviation that agrees; None if it must be equal.
        compared: The number of items that were compared.
        differing: The number of those beyond the bound.
        unequal: The number of those that are not bitwise equal.
        largest: The largest deviation; None if nothing was compared, or if it has no size.
        step: The step of the largest deviation, counted from 1, or of the first difference of items
            without a size; 0 is before the first step.
        where: The name of the array or the place there.
        detail: The reason why it was not compared, or the first difference.
        result: `agrees`, `differs`, `not compared`, or `none` if neither side has any.
        by_step: The largest deviation of each step.
    """

    name: str
    unit: str
    bound: float | None = None
    compared: int = 0
    differing: int = 0
    unequal: int = 0
    largest: float | None = None
    step: int | None = None
    where: str = ""
    detail: str = ""
    result: str = AGREES
    by_step: list[float] = dataclasses.field(default_factory=list)

    def add(self, step: int, apart: Any, where: str) -> None:
        """Include the largest deviation of a step."""
        self.by_step.append(float(apart))
        # The first NaN is the largest.
        if self.largest is None or not (apart <= self.largest or np.isnan(self.largest)):
            self.largest, self.step, self.where = float(apart), step, where

    def count(self, compared: int, differing: int, unequal: int | None = None) -> None:
        """Include numbers of items."""
        self.compared += int(compared)
        self.differing += int(differing)
        self.unequal += int(differing if unequal is None else unequal)

    def differ(self, step: int, where: str, detail: str) -> None:
        """Record a difference; only the first one keeps its place and words."""
        if self.result != DIFFERS:
            self.result, self.detail = DIFFERS, detail
            if self.largest is None:
                self.step, self.where = step, where

    def leave_out(self, reason: str) -> None:
        """Record that the row lacks a side."""
        if self.result == AGREES:
            self.result, self.detail = NOT_COMPARED, reason


@dataclasses.dataclass(frozen=True)
class First:
    """The first difference in the order of the programs.

    Attributes:
        step: Counted from 1; 0 is before the first step.
        quantity: The name of the row.
        where: The name of an array, a site or a place.
        detail: The likely cause, in words.
    """

    step: int
    quantity: str
    where: str
    detail: str

    def __str__(self) -> str:
        """Return one sentence."""
        when = f"at step {self.step}" if self.step else "before the first step"
        place = f" of '{self.where}'" if self.where else ""
        return f"JAX and PyTorch diverge {when}, in the {self.quantity}{place}: {self.detail}"


@dataclasses.dataclass(frozen=True)
class Certificate:
    """What was compared, and the result.

    Attributes:
        script: The PyTorch script.
        port: The JAX program.
        seed: The seed.
        optimizer: The class of the script's optimizer.
        tolerance: The bound of losses, buffers and parameters.
        dtype: The coarsest dtype of the parameters.
        rows: The quantities.
        losses: The losses of JAX and PyTorch at each step; empty if unknown.
        first: The first difference, or None.
        notes: What else is not compared.
    """

    script: Path
    port: Path
    seed: int
    optimizer: str
    tolerance: float
    dtype: str
    rows: Sequence[Row]
    losses: Sequence[tuple[float, float]]
    first: First | None
    notes: Sequence[str]

    @property
    def result(self) -> str:
        """Return `agrees`, `differs`, or `incomplete` if a row was not compared."""
        found = {row.result for row in self.rows}
        return DIFFERS if DIFFERS in found else INCOMPLETE if NOT_COMPARED in found else AGREES

    @property
    def steps(self) -> int:
        """The number of compared steps."""
        return self.rows[0].compared

    @property
    def conclusion(self) -> str:
        """Return one sentence."""
        steps = f"{self.steps} step{'s' * (self.steps != 1)} from the seed {self.seed}"
        if self.first is not None:
            return f"{self.first}."
        if self.result == INCOMPLETE:
            missing = ", ".join(row.name for row in self.rows if row.result == NOT_COMPARED)
            return f"Not certified: {missing} could not be compared in {steps}."
        return f"Certified: JAX trains as the PyTorch script does in {steps}."
