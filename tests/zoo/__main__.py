"""Examine models of transformers, timm and torchvision, and write the tables of the docs.

    .nox/zoo/bin/python -m tests.zoo                # every model, minutes
    python -m tests.zoo --only timm/ --out outputs  # some
    python -m tests.zoo --list                      # the models

`make test-zoo` makes the environment. Exit code: 0 if every model is as promised, otherwise 1.
"""

from __future__ import annotations

import datetime
import json
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from parity_tests import output
from parity_tests.instruction_sets import processor
from regshared.versions import versions
from tests.zoo import libraries, rows
from tests.zoo.models import CASES

PACKAGES = ("jax", "flax", "torch", *libraries.NAMES)


def main(args: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    parser = output.Parser("python -m tests.zoo", __doc__)
    parser.add_selection("model", lambda: CASES)
    parser.add_out("docs/zoo", "zoo.json and the tables")
    options = parser.parse_args(args)
    chosen = [n for n in CASES if not options.only or n.startswith(tuple(options.only))]
    if options.list:
        print(*chosen, sep="\n")
        return 0
    libraries.load()
    torch.set_num_threads(1)
    record = {
        "date": datetime.date.today().isoformat(),
        "cpu": processor(),
        "versions": versions(PACKAGES),
        "models": {},
    }
    for name in chosen:
        record["models"][name] = row = examine(name)
        print(name, row.get("error", "as promised"), flush=True)
    output.write_atomically(options.out / "zoo.json", _as_json(record))
    for table in (rows.summary, rows.details, rows.differences, rows.flax_table):
        path = options.out / f"{table.__name__}.md"
        output.write_atomically(path, table(record))
    return int(any("error" in row for row in record["models"].values()))


def examine(name: str) -> dict[str, Any]:
    """Return the row of a model, or its error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries
        try:
            return {aspect: find(CASES[name]) for aspect, find in rows.ASPECTS.items()}
        except Exception as error:  # a newer library may not build the model
            return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}


def _as_json(record: dict[str, Any]) -> str:
    """Return the record with one line for each model, so that a difference shows the models."""
    models = ",\n".join(f'"{name}": {json.dumps(row)}' for name, row in record["models"].items())
    rest = {name: value for name, value in record.items() if name != "models"}
    return f'{json.dumps(rest, indent=1)[:-2]},\n "models": {{\n{models}\n }}\n}}\n'


if __name__ == "__main__":
    output.run(main)
