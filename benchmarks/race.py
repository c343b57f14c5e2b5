"""Timing of several candidates in one process, with medians and ratios.

The speed of a machine varies over time, so separately measured times are not comparable. Each round
runs every candidate once and starts with another one; a ratio is the median over rounds of the
ratio of two times of the same round.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from parity_tests.output import write_atomically

# By whether a run includes the gradient.
WORK = {False: "forward", True: "forward + backward"}
PACKAGES = ("jax", "flax", "equinox", "dm-haiku", "keras", "torch", "numpy")


@dataclass(frozen=True)
class Result:
    """The times of one race.

    Attributes:
        title: The title of the race.
        elements: The number of elements of a run.
        seconds: The time of each candidate in each round.
    """

    title: str
    elements: int
    seconds: Mapping[str, list[float]]

    def nanoseconds(self, name: str) -> float:
        """Return the median time per element."""
        return statistics.median(self.seconds[name]) / self.elements * 1e9

    def ratio(self, name: str, base: str) -> float:
        """Return the median over rounds of one candidate's time over another's."""
        pairs = zip(self.seconds[name], self.seconds[base], strict=True)
        return statistics.median(one / other for one, other in pairs)

    def added(self, name: str, base: str) -> float:
        """Return the median over rounds of one candidate's time minus another's, in seconds."""
        pairs = zip(self.seconds[name], self.seconds[base], strict=True)
        return statistics.median(one - other for one, other in pairs)

    def fastest(self, names: Iterable[str]) -> str:
        """Return the candidate with the lowest median time."""
        return min(names, key=self.nanoseconds)


def race(
    title: str,
    candidates: Mapping[str, Callable[[], object]],
    *,
    elements: int,
    rounds: int,
    on_round: Callable[[], None] = lambda: None,
) -> Result:
    """Run every candidate once per round, after one warm-up each.

    Args:
        title: The title of the result.
        candidates: Functions that return when their work is done.
        elements: The number of elements of a run.
        rounds: The number of rounds.
        on_round: Called after each round.

    Returns:
        All times.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for run in candidates.values():
        run()
    names = list(candidates)
    for turn in range(rounds):
        shift = turn % len(names)  # another candidate starts each round
        for name in names[shift:] + names[:shift]:
            run = candidates[name]
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
        on_round()
    return Result(title, elements, seconds)


def environment() -> dict[str, object]:
    """Return the machine and the versions that the figures depend on."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "versions": versions,
    }


def save(path: Path, results: Iterable[Result], **extra: object) -> None:
    """Write results, environment and anything else as JSON."""
    record = {
        "environment": environment(),
        "results": [
            {"title": r.title, "elements": r.elements, "seconds": dict(r.seconds)} for r in results
        ],
        **extra,
    }
    write_atomically(path, json.dumps(record, indent=1) + "\n")
