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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from parity_tests.output import write_atomically
from regshared.versions import versions

# By whether a run includes the gradient.
WORK = {False: "forward", True: "forward + backward"}
PACKAGES = (
    "regjax",
    "jax",
    "jaxlib",
    "optax",
    "flax",
    "equinox",
    "dm-haiku",
    "keras",
    "torch",
    "numpy",
)


class Spread(NamedTuple):
    """The quartiles of a figure."""

    low: float
    median: float
    high: float


def quartiles(values: Sequence[float]) -> Spread:
    """Return the quartiles, by linear interpolation.

    Example:
        >>> quartiles([1.0, 2.0, 3.0, 4.0, 5.0])
        Spread(low=2.0, median=3.0, high=4.0)
        >>> quartiles([1.0])
        Spread(low=1.0, median=1.0, high=1.0)
    """
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    return Spread(*statistics.quantiles(values, method="inclusive"))


@dataclass(frozen=True)
class Result:
    """The times of one race.

    Attributes:
        title: The title of the race.
        elements: The number of elements of a run.
        seconds: The time of each candidate in each round.
        date: The day of the race in UTC, in ISO format; empty if it was not recorded.
    """

    title: str
    elements: int
    seconds: Mapping[str, list[float]]
    date: str = ""

    @property
    def rounds(self) -> int:
        """Return the number of rounds."""
        return len(next(iter(self.seconds.values())))

    def nanoseconds(self, name: str) -> float:
        """Return the median time per element."""
        return statistics.median(self.seconds[name]) / self.elements * 1e9

    def ratio(self, name: str, base: str) -> float:
        """Return the median over rounds of one candidate's time over another's."""
        return self.ratios(name, base).median

    def ratios(self, name: str, base: str) -> Spread:
        """Return the quartiles over rounds of one candidate's time over another's."""
        pairs = zip(self.seconds[name], self.seconds[base], strict=True)
        return quartiles([one / other for one, other in pairs])

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
    clock: Callable[[], float] = time.perf_counter,
) -> Result:
    """Run every candidate once per round, after one warm-up each.

    Args:
        title: The title of the result.
        candidates: Functions that return when their work is done.
        elements: The number of elements of a run.
        rounds: The number of rounds.
        on_round: Called after each round.
        clock: Returns the time in seconds.

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
            start = clock()
            run()
            seconds[name].append(clock() - start)
        on_round()
    return Result(title, elements, seconds, today())


def today() -> str:
    """Return the day in UTC, in ISO format."""
    return datetime.now(UTC).date().isoformat()


def environment(packages: Iterable[str] = PACKAGES) -> dict[str, Any]:
    """Return the machine and the versions that the figures depend on."""
    names = tuple(packages)
    found = versions(names)
    return {
        "python": found.pop("python"),
        "system": platform.system(),
        "machine": platform.machine(),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "versions": dict.fromkeys(names) | found,  # None if not installed
    }


def _cpu() -> str:
    """Return the model of the CPU; empty if the system does not report it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor()


@dataclass(frozen=True)
class Record:
    """The content of a JSON file: a run of a benchmark.

    Attributes:
        environment: The machine and the versions.
        results: All times.
        extra: Everything else, by name.
    """

    environment: Mapping[str, Any]
    results: Sequence[Result]
    extra: Mapping[str, Any]


def save(path: Path, results: Iterable[Result], **extra: object) -> None:
    """Write results, environment and anything else as JSON."""
    content = {
        "environment": environment(),
        "results": [asdict(result) for result in results],
        **extra,
    }
    write_atomically(path, json.dumps(content, indent=1) + "\n")


def load(path: Path) -> Record:
    """Return what `save` wrote."""
    content = json.loads(path.read_text(encoding="utf-8"))
    results = [Result(**result) for result in content.pop("results")]
    return Record(content.pop("environment"), results, content)
