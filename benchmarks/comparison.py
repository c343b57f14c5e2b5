"""Check each property of the table that compares regjax with other libraries.

    python -m benchmarks.comparison                      # writes comparison.md and comparison.json
    python -m benchmarks.comparison --out docs/benchmarks

A probe is a program that has a property or not. A library that is not installed keeps the cells of
docs/benchmarks/comparison.json; cells that no program can decide are in `STATED`.
"""

from __future__ import annotations

import datetime
import functools
import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from benchmarks.probes import attention, decay, in_jax, in_torch, offers
from benchmarks.probes.in_jax import DROPOUTS, Apply, holds, mask
from parity_tests import output

RECORD = Path(__file__).parent.parent / "docs" / "benchmarks" / "comparison.json"
# The heading of a column, the module, and the distribution.
LIBRARIES = {
    "regjax": ("regjax", "regjax"),
    "Flax": ("flax", "flax"),
    "Equinox": ("equinox", "equinox"),
    "Haiku": ("haiku", "dm-haiku"),
    "Keras": ("keras", "keras"),
    "PyTorch": ("torch", "torch"),
    "timm": ("timm", "timm"),
    "Optax": ("optax", "optax"),
}

YES, NO, NOT_APPLICABLE = "yes", "no", "-"
Cell = Callable[[], Any] | str


def _dropout_row(probe: Callable[[Apply], bool], **others: Cell | None) -> dict[str, Cell]:
    cells: dict[str, Cell] = {}
    for library, applies in DROPOUTS.items():
        cells[library] = functools.partial(_all_hold, probe, applies)
    return {**cells, **{name: cell for name, cell in others.items() if cell is not None}}


def _all_hold(probe: Callable[[Apply], bool], applies: Sequence[Apply]) -> bool:
    for apply in applies:
        mask(apply)
    return all(holds(functools.partial(probe, apply)) for apply in applies)


def _same(cell: Callable[[str], Any], *libraries: str) -> dict[str, Cell]:
    return {library: functools.partial(cell, library) for library in libraries}


def _stated(default: str, **cells: str) -> dict[str, Cell]:
    return {**dict.fromkeys(LIBRARIES, default), **cells}


_DROPPING = ("regjax", "Flax", "Equinox", "Haiku", "Keras", "PyTorch", "timm")
# Cells that no program can decide; docs/comparison.md states the reasons.
STATED: Mapping[str, Mapping[str, Cell]] = {
    "frameworks": _stated("1", regjax="2", Keras="3"),
    "in wide use": _stated(YES, regjax=NO),
    "timed on GPUs or TPUs": _stated(YES, regjax=NO),
    "kernels written for GPUs": _stated(NO, regjax="not run yet", PyTorch=YES),
}
PROPERTIES: Mapping[str, Mapping[str, Cell]] = {
    "key or seed in each call": _same(offers.takes_key, *_DROPPING),
    "same mask in JAX and PyTorch": {
        **dict.fromkeys(("Flax", "Equinox", "Haiku", "PyTorch", "timm"), NO),
        "regjax": offers.agrees_with_torch,
        "Keras": offers.keras_agrees,
    },
    "mask independent of JAX's settings": _dropout_row(in_jax.ignores_configuration),
    "no mask stored for the backward pass": _dropout_row(
        in_jax.stores_no_mask, PyTorch=in_torch.torch_stores_no_mask
    ),
    "traced rate": _dropout_row(in_jax.takes_traced_rate),
    "traced mode": {
        **_dropout_row(in_jax.takes_traced_mode),
        "Haiku": NOT_APPLICABLE,  # has no mode: evaluation is rate 0
    },
    "a dropped NaN is 0": _dropout_row(
        in_jax.drops_nan, PyTorch=in_torch.torch_drops_nan, timm=in_torch.timm_drops_nan
    ),
    "rate 1: zeros, gradients of zero": _dropout_row(
        in_jax.is_zero_at_one,
        PyTorch=in_torch.torch_is_zero_at_one,
        timm=in_torch.timm_is_zero_at_one,
    ),
    "no bias in bfloat16": _dropout_row(
        in_jax.is_unbiased_in_bfloat16,
        PyTorch=in_torch.torch_is_unbiased,
        timm=in_torch.timm_is_unbiased,
    ),
    "other kinds of dropout": _same(offers.count_kinds, *_DROPPING),
    "attention dropout without a weight matrix": {
        "regjax": attention.regjax_attention,
        "Flax": attention.flax_attention,
        "Equinox": attention.equinox_attention,
        "Haiku": attention.haiku_attention,
        "Keras": attention.keras_attention,
        "PyTorch": "on GPUs",
    },
    "PyTorch's optimizers with decay": _same(
        decay.count_optimizers, "regjax", "Keras", "PyTorch", "Optax"
    ),
    "default choice of the weights that decay": {
        **dict.fromkeys(("Keras", "PyTorch", "Optax"), NO),
        "regjax": decay.regjax_rule,
        "timm": decay.timm_rule,
    },
    "ready-made models": _same(offers.count_models, *_DROPPING),
    **STATED,
}


def is_installed(library: str) -> bool:
    """Return whether the module of a library can be imported."""
    return importlib.util.find_spec(LIBRARIES[library][0]) is not None


def version(library: str) -> str:
    """Return the installed version of a library, without a local part such as `+cpu`."""
    return metadata.version(LIBRARIES[library][1]).partition("+")[0]


def measured(name: str, library: str) -> str:
    """Return the cell of a row and a column, by running its probe."""
    cell = PROPERTIES[name].get(library, NOT_APPLICABLE)
    if isinstance(cell, str):
        return cell
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        result = cell()
    return result if isinstance(result, str) else YES if result else NO


def table(cells: Mapping[str, Mapping[str, str]]) -> str:
    """Return the table in Markdown."""
    lines = [
        f"| | {' | '.join(LIBRARIES)} |",
        "| --- |" + " :---: |" * len(LIBRARIES),
        *(
            f"| {name} | {' | '.join(row[lib] for lib in LIBRARIES)} |"
            for name, row in cells.items()
        ),
    ]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the probes of the installed libraries, and write the table."""
    parser = output.Parser("python -m benchmarks.comparison", __doc__)
    parser.add_out("outputs/benchmarks", "table and JSON")
    options = parser.parse_args(argv)
    console = Console()
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {"columns": {}, "cells": {}}
    columns, cells = record["columns"], {name: {} for name in PROPERTIES}
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    for library in LIBRARIES:
        installed = is_installed(library)
        if installed:
            columns[library] = {"version": version(library), "jax": jax.__version__, "date": today}
        console.print(f"{library}: {'checked' if installed else 'not installed, kept'}")
        for name in PROPERTIES:
            kept = record["cells"].get(name, {}).get(library, "?")
            cells[name][library] = measured(name, library) if installed else kept
    stem = options.out / "comparison"
    output.write_atomically(
        stem.with_suffix(".json"), json.dumps({"columns": columns, "cells": cells}, indent=1) + "\n"
    )
    output.write_atomically(stem.with_suffix(".md"), table(cells))
    console.print(table(cells), soft_wrap=True, markup=False)
    console.print(f"Table and cells: {stem}.{{md,json}}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    output.run(main)
