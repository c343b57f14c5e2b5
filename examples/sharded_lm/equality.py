"""Check that meshes, processes and micro-batches change neither dropout masks nor losses.

    python -m examples.sharded_lm.equality             # 20 runs of 200 steps; minutes
    python -m examples.sharded_lm.equality --quick     # 4 runs of 20 steps

Every run is the command of a user. It also compares the collectives and the temporary memory of a
train step with and without dropout, and with and without weight decay.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from examples.sharded_lm.settings import DTYPES, Recipe, parse_mesh
from parity_tests import output

# The largest difference of a training loss between two runs. In float64 it is a promise; in float32
# it is a bound on the rounding of sums in another order, after 200 steps of training.
BOUNDS = {"float64": 1e-10, "float32": 1e-4}
SLACK = 1.02  # temporary memory with dropout, relative to that without
_RECIPE = Recipe(width=32, depth=1, heads=4, context=64, batch=32, warmup=20)
_STEPS, _QUICK_STEPS = 200, 20
_LAST = 4  # a failed run's lines to print


class Case(NamedTuple):
    """One run: devices over all processes, the mesh, and the numbers of processes and parts."""

    devices: int
    mesh: str
    micro_batches: int = 1
    processes: int = 1


# The first is the reference. Every number of devices, processes and parts occurs, and every axis.
_CASES = (
    Case(1, "1"),
    Case(1, "1", 2),
    Case(1, "1", 4),
    Case(2, "1x1x2"),
    Case(4, "2x2", 2),
    Case(8, "8"),
    Case(8, "1x8", 2),
    Case(8, "2x2x2", 4),
    Case(4, "2x2", 2, processes=2),
    Case(4, "2x1x2", 4, processes=4),
)
_QUICK = (Case(1, "1"), Case(8, "2x2x2", 2))


def main(argv: Sequence[str] | None = None) -> int:
    """Run every case, write the table, and return 0 if all agree."""
    options = _parser().parse_args(argv)
    steps = _QUICK_STEPS if options.quick else options.steps
    cases = _QUICK if options.quick else _CASES
    rows = []
    for dtype in reversed(DTYPES):
        reference: dict[str, Any] | None = None
        for case in cases:
            results = run(case, dtype, steps)
            reference = reference or results
            row = compare(case, dtype, results, reference)
            rows.append(row)
            print(_line(row), flush=True)
    found = costs()
    print(_cost_table(found))
    text = (
        f"{steps} steps, compared with the first line:\n\n{_TITLE}"
        + "\n".join(map(_line, rows))
        + "\n\n"
        + _cost_table(found)
    )
    output.write_atomically(options.out / "equality.md", text)
    report = {"steps": steps, "bounds": BOUNDS, "runs": rows, "costs": found}
    output.write_atomically(options.out / "equality.json", json.dumps(report, indent=1) + "\n")
    agree = all(row["agrees"] for row in rows) and costs_agree(found)
    print("all agree" if agree else "NOT all agree")
    return 0 if agree else 1


def run(case: Case, dtype: str, steps: int) -> dict[str, Any]:
    """Return the results of the program in a process of its own.

    Raises:
        RuntimeError: The program failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {
            **dataclasses.asdict(dataclasses.replace(_RECIPE, dtype=dtype)),
            "steps": steps,
            "evaluate_every": steps,
            "save_every": steps,
            "devices": case.devices,
            "mesh": case.mesh,
            "micro_batches": case.micro_batches,
            "out": folder,
        }
        words = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
        words += ["--spawn", str(case.processes)] if case.processes > 1 else []
        command = [sys.executable, "-m", "examples.sharded_lm", *words, "--masks"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            lines = "\n".join(done.stderr.splitlines()[-_LAST:])
            raise RuntimeError(f"{' '.join(command)} failed:\n{lines}")
        return json.loads(Path(folder, "results.json").read_text())


def compare(
    case: Case, dtype: str, results: Mapping[str, Any], reference: Mapping[str, Any]
) -> dict[str, Any]:
    """Return a row of the table."""
    pairs = zip(results["losses"], reference["losses"], strict=True)
    apart = max(abs(loss - other) for loss, other in pairs)
    masks = results["masks"] == reference["masks"] and len(results["masks"]) > 0
    return {
        **case._asdict(),
        "dtype": dtype,
        "masks_identical": masks,
        "loss_difference": apart,
        "last_loss": results["losses"][-1],
        "agrees": masks and apart <= BOUNDS[dtype],
    }


def costs() -> dict[str, dict[str, Any]]:
    """Return the cost of a train step on 8 devices: as it is, without dropout, without decay."""
    os.environ["XLA_FLAGS"] = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    )
    os.environ["JAX_PLATFORMS"] = "cpu"
    from examples.sharded_lm.data import read_corpus
    from examples.sharded_lm.inspection import cost
    from examples.sharded_lm.mesh import make_mesh

    corpus = read_corpus()
    without = {"": {}, "without dropout": {"rate": 0.0}, "without decay": {"weight_decay": 0.0}}
    return {
        f"{mesh} {label}".strip(): cost(
            dataclasses.replace(Recipe(depth=1), **changes), make_mesh(parse_mesh(mesh)), corpus
        )._asdict()
        for mesh in ("8", "2x2x2")
        for label, changes in without.items()
    }


def costs_agree(found: Mapping[str, Mapping[str, Any]]) -> bool:
    """Return whether dropout and decay add no collective, and no memory beyond the slack."""
    for label, with_both in found.items():
        for other in ("without dropout", "without decay"):
            less = found.get(f"{label} {other}")
            if less and (
                with_both["collectives"] != less["collectives"]
                or with_both["temporary"] > SLACK * less["temporary"]
            ):
                return False
    return True


_TITLE = (
    "| processes | devices | mesh | micro-batches | dtype | masks | difference of losses |\n"
    "| ---: | ---: | --- | ---: | --- | --- | ---: |\n"
)


def _line(row: Mapping[str, Any]) -> str:
    masks = "identical" if row["masks_identical"] else "DIFFERENT"
    cells = (
        *(row["processes"], row["devices"], row["mesh"], row["micro_batches"], row["dtype"]),
        *(masks, f"{row['loss_difference']:.1e}"),
    )
    return f"| {' | '.join(map(str, cells))} |" + ("" if row["agrees"] else " above the bound")


def _cost_table(found: Mapping[str, Mapping[str, Any]]) -> str:
    lines = ["| train step on 8 devices | collectives | temporary memory |", "| --- | --- | ---: |"]
    for label, cost in found.items():
        kinds = ", ".join(f"{count} {kind}" for kind, count in cost["collectives"].items())
        lines.append(f"| {label} | {kinds} | {cost['temporary'] / 2**20:.2f} MiB |")
    return "\n".join(lines) + "\n"


def _parser() -> output.Parser:
    parser = output.Parser("python -m examples.sharded_lm.equality", __doc__)
    parser.add_argument(
        "--steps",
        type=output.integer(1),
        metavar="STEPS",
        default=_STEPS,
        help="steps of each run (default: %(default)s)",
    )
    parser.add_quick(f"run 4 cases, {_QUICK_STEPS} steps each")
    parser.add_out("outputs/sharded_lm_equality", "the tables")
    return parser


if __name__ == "__main__":
    output.run(main)
