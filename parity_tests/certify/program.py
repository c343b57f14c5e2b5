"""Certify that a JAX program trains as an untouched PyTorch script does, from its seed.

    python -m parity_tests certify torch_script.py jax_step.py
    python -m parity_tests certify torch_script.py jax_step.py --steps 100 -- --lr 0.1

The script runs as it is, as the main program, with the options after `--`. It is ended after the
last step. The program in JAX defines `train(seed)`, which yields a dictionary before the first
step, and one after each step, with the keys

    params       parameters by PyTorch's names, or any pytree if it defines `names`
    generator    the TorchGenerator
    loss         the loss of the step
    batch        the indices of the batch

Compared are the seed, the initial weights, the order of batches, the masks, the generator after
each step, losses, buffers, updates and parameters. A key that is missing is not compared.

Exit code: 0 if everything agrees, 1 if anything differs or is not compared, 2 if a program
cannot be certified.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from parity_tests import output

if TYPE_CHECKING:
    from parity_tests.certify.certificate import Certificate

COMMAND = "python -m parity_tests certify"
_STYLES = {"agrees": "green", "differs": "bold red", "not compared": "yellow", "none": "dim"}


def main(argv: Sequence[str]) -> int:
    """Certify a port, and return the exit code."""
    words = list(argv)
    end = words.index("--") if "--" in words else len(words)
    parser = _parser()
    options = parser.parse_args(words[:end])
    console = Console()
    # After the options are read, since the frameworks take seconds to import.
    from parity_tests.certify import writing
    from parity_tests.certify.errors import InputError, ProgramError

    # Before the runs, which may take so long that someone edits a file.
    digests = {path: writing.digest(path) for path in (options.script, options.port)}
    try:
        certificate = _certified(options, words[end + 1 :], console)
    except InputError as error:
        if isinstance(error, ProgramError):
            print(error.traceback(), file=sys.stderr, end="")
        parser.error(str(error))
    console.print(_table(certificate))
    missing = [f"{r.name}: {r.detail}" for r in certificate.rows if r.result == "not compared"]
    for line in (*missing, *certificate.notes, certificate.conclusion):
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    for path in writing.write(options.out, certificate, digests, [*COMMAND.split(), *words]):
        console.print(f"written: {path}", soft_wrap=True)
    return 0 if certificate.result == "agrees" else 1


def _certified(options: argparse.Namespace, args: Sequence[str], console: Console) -> Certificate:
    from parity_tests.certify.comparison import certify
    from parity_tests.certify.port import run_port
    from parity_tests.certify.script import run_script

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(options.script.name, total=options.steps)
        script = run_script(
            *(options.script, args),
            steps=options.steps,
            seed=options.seed,
            progress=lambda step: progress.update(task, completed=step),
        )
        task = progress.add_task(options.port.name, total=len(script.steps))
        with contextlib.closing(run_port(options.port, script)) as port:
            return certify(
                *((options.script, options.port), script, port),
                tolerance=options.tolerance,
                progress=lambda step: progress.update(task, completed=step),
            )


def _parser() -> output.Parser:
    parser = output.Parser(COMMAND, __doc__)
    parser.add_argument("script", type=_file, metavar="SCRIPT", help="the PyTorch script")
    parser.add_argument("port", type=_file, metavar="PORT", help="the program in JAX")
    parser.add_argument(
        "--steps",
        type=output.integer(1),
        default=20,
        help="the largest number of steps of the optimizer (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=output.integer(0, 2**63 - 1),
        help="the seed, for a script that sets none (default: the script's own)",
    )
    parser.add_argument(
        "--tolerance",
        type=output.number("of at least 0", lambda value: value >= 0),
        help="the largest difference of losses, buffers and parameters, relative to the largest "
        "number of an array or to 1 (default: 1e-05 for float32, 1e-10 for float64, else 0.01)",
    )
    parser.add_out("outputs/certificate", "JSON and HTML")
    return parser


def _file(text: str) -> Path:
    path = Path(text)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"must be a file; got {text!r}")
    return path


def _table(certificate: Certificate) -> Table:
    from parity_tests.certify import writing

    table = Table(box=None, pad_edge=False)
    # A terminal of 80 characters has no place for all.
    shown = [heading for heading in writing.HEADINGS if heading != "not equal"]
    for heading in shown:
        is_number = heading in ("differ", "largest", "bound")
        # Of all columns, only the last one is folded if the terminal is narrow.
        justify, no_wrap = "right" if is_number else "left", heading != "where"
        table.add_column(heading, justify=justify, no_wrap=no_wrap, overflow="fold")
    for row in certificate.rows:
        written = zip(writing.HEADINGS, writing.cells(row), strict=True)
        table.add_row(*(c for heading, c in written if heading in shown), style=_STYLES[row.result])
    return table
