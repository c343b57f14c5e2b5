"""Measure how exactly regjax.optim reproduces the steps of torch.optim, case by case.

    python -m parity_tests.exactness            # every case, 1,000 steps; minutes
    python -m parity_tests.exactness --quick    # 100 steps
    python -m parity_tests.exactness --list     # the cases and their bounds
    python -m parity_tests.exactness --only sgd adamw

Each case trains 10,062 parameters on random gradients (synthetic), on those of a perceptron that
torch trained with the same optimizer (recorded), and on gradients that each side computes itself
(trained). A deviation is in norm: the largest difference of two parameters, divided by the largest
parameter of that step.

Exit code: 0 if every bound holds at every required step, otherwise 1.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress

from parity_tests import optimizers, output
from parity_tests.compare import FLOAT64, deviation
from parity_tests.instructions import fuse_alike
from parity_tests.optimizers.case import Case
from parity_tests.optimizers.horizons import horizon
from parity_tests.perceptron import SHAPES, recorded, training
from parity_tests.trajectories import LARGE, Problem, Run, synthetic, walk_jax, walk_torch
from regshared.versions import versions

STEPS, QUICK = 1000, 100
FUSED = ("Adam", "AdamW")


@dataclass(frozen=True)
class Setting:
    """The source of the gradients of a comparison, and its dtype.

    Attributes:
        dtype: Dtype of parameters and gradients.
        source: `synthetic`, `recorded` or `trained`.
        fused: Whether torch runs its fused kernel.
    """

    dtype: str
    source: str
    fused: bool = False

    def __str__(self) -> str:
        return f"{self.dtype} {self.source}" + (", torch fused" if self.fused else "")


SETTINGS = (
    Setting("float64", "synthetic"),
    Setting("float64", "recorded"),
    Setting("float64", "trained"),
    Setting("float32", "synthetic"),
    Setting("float32", "recorded"),
)


@dataclass(frozen=True)
class Finding:
    """The deviation of regjax and torch in one case and setting.

    Attributes:
        case: Its name.
        setting: Its description.
        bound: The deviation in norm that the case allows; None requires equal bits.
        steps: The number of steps.
        required: The number of steps that must be within the bound.
        holds: The number of steps before the first that exceeds the bound.
        deviation: The largest deviation in norm of these steps.
        mismatches: Elements with different bits after the last step.
        elements: The number of elements.
    """

    case: str
    setting: str
    bound: float | None
    steps: int
    required: int
    holds: int
    deviation: float
    mismatches: int
    elements: int

    @property
    def broken(self) -> bool:
        """Return whether fewer steps than required are within the bound."""
        return self.holds < self.required

    def __str__(self) -> str:
        bound = "equal bits" if self.bound is None else f"{self.bound:g} in norm"
        return (
            f"{self.case}, {self.setting}: {bound} required to step {self.required}, satisfied to "
            f"step {self.holds}; deviation {self.deviation:.1e}"
        )


def compare(
    run: Run, reference: Run, bound: float | None, required: int | None = None
) -> dict[str, Any]:
    """Compare two runs at every step, and return the figures of a `Finding`, by name.

    Args:
        run: Parameters by name after each step.
        reference: The same for the other run.
        bound: The largest deviation in norm that passes; None requires equal bits.
        required: Steps that must pass; None for all.

    Example:
        >>> runs = [{"w": np.array([1.0, 2.0])}], [{"w": np.array([1.0, 2.5])}]
        >>> compare(*runs, bound=0.1)["holds"], compare(*runs, bound=0.2)["holds"]
        (0, 1)
    """
    steps = len(reference)
    required = steps if required is None else min(required, steps)
    apart, holds = np.empty(steps), steps
    for step, (left, right) in enumerate(zip(run, reference, strict=True)):
        apart[step] = deviation([left], [right])
        # `<=` is False for NaN, which therefore fails.
        passes = not mismatches(left, right) if bound is None else apart[step] <= bound
        if not passes:
            holds = min(holds, step)
    return {
        "bound": bound,
        "steps": steps,
        "required": required,
        "holds": holds,
        "deviation": float(apart[: max(holds, 1)].max()),
        "mismatches": mismatches(run[-1], reference[-1]),
        "elements": sum(leaf.size for leaf in reference[-1].values()),
    }


def mismatches(run: Mapping[str, np.ndarray], reference: Mapping[str, np.ndarray]) -> int:
    """Count the elements with different bits.

    Example:
        >>> mismatches({"w": np.array([0.0, np.nan])}, {"w": np.array([-0.0, np.nan])})
        1
    """
    return sum(
        int(np.count_nonzero(_bits(leaf) != _bits(reference[name]))) for name, leaf in run.items()
    )


def _bits(leaf: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(leaf).view(f"u{leaf.dtype.itemsize}")


def measure(
    case: Case, setting: Setting, steps: int, make: Callable[..., Any] | None = None
) -> Finding:
    """Run one case in one setting on both sides.

    Equal bits are required only where both frameworks fuse products with sums, or neither does.

    Args:
        case: The optimizer and its options.
        setting: The source of the gradients, and the dtype.
        steps: The number of steps.
        make: A replacement for the JAX optimizer's constructor, for the tests of the tests.
    """
    with _one_thread():
        problem = _problem(case, setting, steps)
        in_torch = walk_torch(case, problem, **({"fused": True} if setting.fused else {}))
    in_jax = walk_jax(case, problem, make)
    bound = case.float64 if setting.dtype == FLOAT64.dtype else case.float32
    if bound is None and not fuse_alike():
        bound = Case.float32  # as for the other optimizers
    required = horizon(case.name, f"{setting.dtype} {setting.source}", steps)
    return Finding(case.name, str(setting), **compare(in_jax, in_torch, bound, required))


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    # With small matrices, torch's threads wait longer than they compute.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _problem(case: Case, setting: Setting, steps: int) -> Problem:
    if setting.source == "synthetic":
        return _synthetic(setting.dtype, steps, tuple(_fitting(case, LARGE).items()))
    make = recorded if setting.source == "recorded" else training
    return make(case, setting.dtype, steps, _fitting(case, SHAPES))


# Both dtypes of one case; each takes up to 80 MB.
@functools.lru_cache(maxsize=2)
def _synthetic(dtype: str, steps: int, shapes: tuple[tuple[str, tuple[int, ...]], ...]) -> Problem:
    return synthetic(dtype, dict(shapes), steps)


def _fitting(case: Case, shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, tuple[int, ...]]:
    if case not in optimizers.CASES_2D:
        return shapes
    return {name: shape for name, shape in shapes.items() if len(shape) == 2}


def settings(case: Case) -> Iterator[Setting]:
    """Yield the settings of a case, including torch's fused kernels if it has any.

    Example:
        >>> [str(setting) for setting in settings(Case("adam", "Adam", {"lr": 0.1}))][-1]
        'float32 recorded, torch fused'
    """
    yield from SETTINGS
    if case.optimizer in FUSED:
        yield from (Setting("float32", source, fused=True) for source in ("synthetic", "recorded"))


HEADINGS = (
    "case",
    "float64 bound",
    "synthetic",
    "recorded",
    "trained",
    "float32 bound",
    "synthetic",
    "recorded",
)


def as_markdown(findings: Sequence[Finding]) -> str:
    """Return the table, with one row for each case, and a second for torch's fused kernels.

    A float32 cell has the number of elements whose bits differ after the last step. A broken bound
    is set in bold.
    """
    rows: dict[str, dict[str, Finding]] = {}
    for finding in findings:
        rows.setdefault(finding.case, {})[finding.setting] = finding
    elements = f"{max(finding.elements for finding in findings):,}"
    lines = [
        f"Largest deviation in norm over {findings[0].steps:,} steps, {elements} parameters; in "
        'float32 after the number of elements whose bits differ at the end. "to N": the bound '
        "holds for N steps, after which the recursion amplifies rounding.",
        "",
        "| " + " | ".join(HEADINGS) + " |",
        "|---" * len(HEADINGS) + "|",
    ]
    for name, row in rows.items():
        wide = [row[str(setting)] for setting in SETTINGS if setting.dtype == "float64"]
        narrow = [row[str(setting)] for setting in SETTINGS if setting.dtype == "float32"]
        cells = [name, _bound(wide[0]), *map(_cell, wide), _bound(narrow[0]), *map(_cell, narrow)]
        lines.append("| " + " | ".join(cells) + " |")
        fused = [finding for finding in row.values() if finding.setting.endswith("fused")]
        if fused:
            cells = [f"{name}, torch `fused=True`", "", "", "", "", _bound(fused[0])]
            lines.append("| " + " | ".join([*cells, *map(_cell, fused)]) + " |")
    return "\n".join(lines) + "\n"


def _bound(finding: Finding) -> str:
    return "equal bits" if finding.bound is None else f"{finding.bound:g}"


def _cell(finding: Finding) -> str:
    text = f"{finding.deviation:.1e}" if finding.deviation else "0"
    if finding.setting.startswith("float32"):
        text = f"{finding.mismatches:,}; {text}"
    if finding.holds < finding.steps:
        text += f" to {finding.holds:,}"
    return f"**{text}**" if finding.broken else text


def write(folder: Path, findings: Sequence[Finding]) -> list[Path]:
    """Write `exactness.md` and `exactness.json`; return the paths."""
    paths = [folder / "exactness.md", folder / "exactness.json"]
    output.write_atomically(paths[0], as_markdown(findings))
    record = {
        "versions": versions(),
        "findings": [{**asdict(finding), "broken": finding.broken} for finding in findings],
    }
    output.write_atomically(paths[1], json.dumps(record, indent=1) + "\n")
    return paths


def main(argv: Sequence[str] | None = None) -> int:
    """Run the cases and return the exit code."""
    options = _parser().parse_args(argv)
    console = Console()
    cases = [case for case in _every() if _wanted(case, options.only)]
    if options.list:
        for case in cases:
            narrow = "equal bits" if case.float32 is None else f"{case.float32:g}"
            console.print(f"{case.name:24} float64 {case.float64:g}, float32 {narrow}")
        return 0
    findings, paths = [], []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("comparing", total=len(cases))
        for case in cases:
            progress.update(task, description=case.name)
            steps = QUICK if options.quick else STEPS
            findings += [measure(case, setting, steps) for setting in settings(case)]
            paths = write(options.out, findings)  # keep the results of an interrupted run
            progress.advance(task)
    for path in paths:
        console.print(f"written: {path}", soft_wrap=True)
    broken = [finding for finding in findings if finding.broken]
    for finding in broken:
        console.print(f"broken: {finding}", style="bold red", soft_wrap=True, markup=False)
    console.print(f"{len(findings) - len(broken)} of {len(findings)} comparisons within bounds")
    return 1 if broken else 0


def _parser() -> argparse.ArgumentParser:
    parser = output.Parser("python -m parity_tests.exactness", __doc__)
    parser.add_quick(f"{QUICK} steps instead of {STEPS:,}")
    parser.add_selection("case", lambda: (case.name for case in _every()))
    parser.add_out("outputs/exactness", "Markdown and JSON")
    return parser


def _every() -> tuple[Case, ...]:
    return (*optimizers.CASES, *optimizers.CASES_2D)


def _wanted(case: Case, only: Sequence[str]) -> bool:
    return not only or any(case.name.startswith(name) for name in only)


if __name__ == "__main__":
    output.run(main)
