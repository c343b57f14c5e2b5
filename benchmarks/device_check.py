"""Check regjax on a GPU or a TPU: first its results, then its times beside other libraries.

    python -m benchmarks.device_check             # under 4 minutes
    python -m benchmarks.device_check --quick     # fewer and shorter races
    python -m benchmarks.device_check --rehearse  # on the CPU in small sizes, to test the program

Masks, layers and attention are compared with golden vectors, with the CPU and with Flax, and so is
regtorch if PyTorch has a CUDA device. If a result is wrong, nothing is timed. The times of dropout
and attention, in float32 and bfloat16, are medians. `--out docs/benchmarks` puts the record into
the documentation.

Exit code: 0 if all checks passed; 1 if one failed, or time was up before the last; 2 if there is
neither a GPU nor a TPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from benchmarks import cli, race
from benchmarks.device_record import FAILED, LATE, Outcome, Record, Timing, save
from parity_tests import output

NAME = "device_check"
SECONDS = 230
PACKAGES = ("regjax", "jax", "jaxlib", "flax", "torch", "jax-cuda12-plugin", "jax-cuda13-plugin")
PACKAGES += ("nvidia-cudnn-cu12", "nvidia-cudnn-cu13", "libtpu")


class Budget:
    """The time of a run."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock, self._start, self._seconds = clock, clock(), seconds

    @property
    def spent(self) -> float:
        """The seconds since the beginning."""
        return self._clock() - self._start

    def allows(self, seconds: float = 0.0) -> bool:
        """Return whether a step of a number of seconds still fits."""
        return self.spent + seconds < self._seconds


def main(argv: Sequence[str] | None = None) -> int:
    """Check, measure, print the tables, and write them as JSON and Markdown."""
    options = _parser().parse_args(argv)
    budget = Budget(options.seconds)
    devices, cpu, reason = find_devices(is_rehearsal=options.rehearse)
    if reason:
        print(f"{reason}. Nothing was checked. See --rehearse.", file=sys.stderr)
        return 2
    from benchmarks import device_times
    from benchmarks.device_sides import Sides, runner

    sides = Sides(runner(devices[0]), runner(cpu), devices, is_rehearsal=options.rehearse)
    checks = check_all(sides, budget)
    sizes = device_times.QUICK if options.quick else device_times.FULL
    sizes = device_times.REHEARSAL if options.rehearse else sizes
    timings, left_out = time_all(device_times.cases(devices[0], sizes), checks, budget)
    record = Record(
        device=describe(devices),
        is_rehearsal=options.rehearse,
        date=race.today(),
        environment=race.environment(PACKAGES),
        checks=checks,
        timings=timings,
        left_out=left_out,
        seconds=budget.spent,
    )
    # A rehearsal must not replace the record of a device.
    stem = options.out / (f"{NAME}_rehearsal" if options.rehearse else NAME)
    print(f"\n{save(stem, record)}\nTable and JSON: {stem}.{{md,json}}")
    return record.code


def _parser() -> output.Parser:
    parser = output.Parser(f"python -m benchmarks.{NAME}", __doc__)
    parser.add_out(cli.OUT, "table and JSON")
    parser.add_quick("fewer and shorter races")
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="run on the CPU in small sizes, to test the program; the times have no meaning",
    )
    parser.add_argument(
        "--seconds",
        type=output.integer(1),
        default=SECONDS,
        metavar="N",
        help="time after which the rest is left out, with a message (default: %(default)s)",
    )
    return parser


def find_devices(*, is_rehearsal: bool = False) -> tuple[Sequence[Any], Any, str]:
    """Return the GPUs or TPUs, the CPU to compare them with, and why one of the two is missing.

    In a rehearsal, CPUs take the place of the devices.
    """
    import jax

    platforms = os.environ.get("JAX_PLATFORMS", "")
    try:
        devices = jax.devices()
    except Exception as error:  # a plug-in may raise anything
        start = f"JAX does not start with JAX_PLATFORMS={platforms!r}"
        return (), None, f"no GPU or TPU: {start} ({type(error).__name__})"
    try:
        cpus = jax.devices("cpu")
    except RuntimeError:
        fix = f"JAX_PLATFORMS={platforms},cpu"
        return (), None, f"no CPU to compare with: set {fix}; got {platforms!r}"
    if is_rehearsal or devices[0].platform in ("gpu", "tpu"):
        return cpus if is_rehearsal else devices, cpus[0], ""
    only = f"JAX {jax.__version__} has devices of {devices[0].platform} only"
    return (), cpus[0], f"no GPU or TPU: {only}"


def check_all(sides: Any, budget: Budget) -> list[Outcome]:
    """Run all checks, and print a line for each."""
    from benchmarks.device_results import CHECKS, check

    checks = []
    for name in CHECKS:
        late = Outcome(name, LATE, "time was up")
        checks.append(check(name, sides) if budget.allows() else late)
        print(f"{checks[-1].status:8}{name}: {checks[-1].detail}", flush=True)
    return checks


def time_all(
    cases: Iterable[Any], checks: Sequence[Outcome], budget: Budget
) -> tuple[list[Timing], list[str]]:
    """Measure all cases, and return the times, and a line for each case that is left out."""
    from benchmarks.device_times import measure

    failed = [check.name for check in checks if check.status == FAILED]
    if failed:
        return [], [f"Nothing was timed, because results are wrong: {', '.join(failed)}."]
    timings, left_out, longest = [], [], 0.0
    for case in cases:
        start, title = budget.spent, f"{case.kind}, {case.title}"
        if not budget.allows(2 * longest):  # a longer sequence takes longer
            left_out.append(f"Not timed, because time was up: {title}.")
            continue
        timings.append(measure(case))
        longest = max(longest, budget.spent - start)
        print(f"timed   {title}", flush=True)
    return timings, left_out


def describe(devices: Sequence[Any]) -> dict[str, Any]:
    """Return the kind, platform, number, runtime and driver of devices."""
    first = devices[0]
    return {
        "kind": first.device_kind,
        "platform": first.platform,
        "number": len(devices),
        "runtime": " ".join(str(first.client.platform_version).split()),
        "driver": _driver() if first.platform == "gpu" else "",
    }


def _driver() -> str:
    """Return the version of NVIDIA's driver; empty if it is unknown."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return found.stdout.partition("\n")[0].strip()


if __name__ == "__main__":
    output.run(main)
