"""How the benchmarks measure: all candidates in one process, in turn, medians and ratios.

A machine speeds up and slows down by itself, so a time says little and a difference of two times
less. Each round runs every candidate once, starting with another one each time; a ratio is the
median over rounds of the two times of one round.
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

# By whether the gradient is made too.
WORK = {False: "forward", True: "forward + backward"}
PACKAGES = ("jax", "flax", "equinox", "dm-haiku", "keras", "torch", "numpy")


@dataclass(frozen=True)
class Result:
    """The times of one race.

    Attributes:
        title: what was raced.
        elements: how many elements one run works on.
        seconds: for each candidate, its time in each round.
    """

    title: str
    elements: int
    seconds: Mapping[str, list[float]]

    def nanoseconds(self, name: str) -> float:
        """Median time of an element."""
        return statistics.median(self.seconds[name]) / self.elements * 1e9

    def ratio(self, name: str, base: str) -> float:
        """Median over rounds of a candidate's time over another's."""
        pairs = zip(self.seconds[name], self.seconds[base], strict=True)
        return statistics.median(ours / theirs for ours, theirs in pairs)

    def added(self, name: str, base: str) -> float:
        """Median over rounds of a candidate's time less another's, in seconds."""
        pairs = zip(self.seconds[name], self.seconds[base], strict=True)
        return statistics.median(ours - theirs for ours, theirs in pairs)

    def fastest(self, names: Iterable[str]) -> str:
        """The candidate of lowest median time."""
        return min(names, key=self.nanoseconds)


def race(
    title: str,
    candidates: Mapping[str, Callable[[], object]],
    *,
    elements: int,
    rounds: int,
    on_round: Callable[[], None] = lambda: None,
) -> Result:
    """Runs every candidate once a round, after one warm-up each.

    Args:
        title: what is raced.
        candidates: functions that return when their work is done.
        elements: how many elements one run works on.
        rounds: how many times each runs.
        on_round: told after each round.

    Returns:
        All times.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for run in candidates.values():
        run()
    names = list(candidates)
    for turn in range(rounds):
        shift = turn % len(names)  # nobody always follows the same one, or always comes first
        for name in names[shift:] + names[:shift]:
            run = candidates[name]
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
        on_round()
    return Result(title, elements, seconds)


def environment() -> dict[str, object]:
    """What the figures depend on: the machine and the versions."""
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
    """Writes results, environment and anything else as JSON."""
    record = {
        "environment": environment(),
        "results": [
            {"title": r.title, "elements": r.elements, "seconds": dict(r.seconds)} for r in results
        ],
        **extra,
    }
    write_atomically(path, json.dumps(record, indent=1) + "\n")
