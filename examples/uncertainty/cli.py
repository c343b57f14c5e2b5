"""The command line: options, and the program."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING

from examples.overfit.cli import require
from examples.uncertainty.settings import Settings
from parity_tests import output

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from rich.console import Console

    from examples.uncertainty.study import Study


_ABOUT = """Compare predictions of one pass without dropout with those of many passes with dropout.

    python -m examples.uncertainty
    python -m examples.uncertainty --samples 20 --rate 0.3

A network learns handwritten digits with dropout, and predicts increasingly corrupted ones.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program.

    Args:
        argv: The options; None for those of the process.

    Returns:
        The exit code, 0.

    Raises:
        SystemExit: After --help (0), or if an option is wrong or a package is missing (2).
    """
    parser = make_parser()
    options = parser.parse_args(argv)
    try:
        require("jax", "optax", "torch", "scipy", "sklearn", "matplotlib", "rich")
    except ImportError as error:
        parser.error(f"{error}. Run: pip install 'regjax[examples]'")
    settings = Settings(**{field.name: getattr(options, field.name) for field in fields(Settings)})
    _run(settings, options.out)
    return 0


def make_parser() -> output.Parser:
    """Return the parser of all options."""
    parser = output.Parser("python -m examples.uncertainty", _ABOUT)
    for name, low, high, text in (
        ("steps", 1, 100_000, "number of optimizer steps"),
        ("samples", 1, 10_000, "number of stochastic forward passes of each prediction"),
        ("width", 1, 4096, "number of units of each hidden layer"),
        ("train-size", 10, 1000, "number of training images"),
        ("seed", 0, 2**31 - 1, "seed of images, initial weights, masks and corruptions"),
    ):
        parser.add_argument(
            f"--{name}",
            type=output.integer(low, high),
            metavar="N",
            default=getattr(Settings, name.replace("-", "_")),
            help=f"{text}, {low} to {high} (default: %(default)s)",
        )
    parser.add_argument(
        "--rate",
        type=output.number("above 0 and below 1", lambda rate: 0 < rate < 1),
        metavar="RATE",
        default=Settings.rate,
        help="dropout rate, above 0 and below 1 (default: %(default)s)",
    )
    parser.add_out("outputs/uncertainty", "tables and picture")
    return parser


def _run(settings: Settings, folder: Path) -> None:
    # These modules need the packages that `require` has checked.
    from rich.console import Console
    from rich.progress import Progress

    from examples.uncertainty import plots, report, study
    from examples.uncertainty.corruptions import CORRUPTIONS

    messages = Console(stderr=True)
    with Progress(console=messages, transient=True, disable=not messages.is_terminal) as progress:
        training = progress.add_task("training", total=settings.steps)
        looking = progress.add_task("corruptions", total=sum(len(c.strengths) for c in CORRUPTIONS))
        found = study.run(
            settings,
            on_step=lambda step: progress.update(training, completed=step),
            on_scene=lambda scene: progress.advance(looking),
        )
    report.save(folder, found)
    plots.save_picture(folder, found)
    _present(Console(highlight=False, markup=False), found, folder)


def _present(console: Console, study: Study, folder: Path) -> None:
    from examples.uncertainty.report import sentences, terminal_tables
    from examples.uncertainty.study import distance_to_torch

    if not console.is_terminal:
        console.width = 120
    for table in terminal_tables(study):
        console.print(table)
        console.print()
    for line in sentences(study):
        console.print(line)
    console.print(
        "PyTorch, with the same weights and the same masks: mean probabilities and mutual "
        f"information on clean images differ by at most {distance_to_torch(study):.0e}."
    )
    console.print(f"\nTables and picture: {folder}", soft_wrap=True)
