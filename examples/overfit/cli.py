"""The command line: options, their validation, and the program."""

from __future__ import annotations

import sys
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from examples.overfit.settings import FRAMEWORKS, LARGEST_TRAIN_SIZE, OPTIMIZERS, Settings
from parity_tests import output

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from examples.overfit.curves import Curve
    from examples.overfit.recipes import Recipe

_ABOUT = """Overfit a small network to handwritten digits, and regularize it with L2 and dropout.

    python -m examples.overfit                            # ten runs; a minute
    python -m examples.overfit --optimizer sgd --rate 0.2 --framework jax

JAX and PyTorch have the same weights, batches and dropout masks.
"""
_RUNS = 5
_PACKAGES = {"jax": ("jax", "optax"), "torch": ("torch",)}


def main(
    argv: Sequence[str] | None = None,
    *,
    on_evaluation: Callable[[Recipe, str, int], None] = lambda recipe, framework, step: None,
) -> int:
    """Run the program.

    Args:
        argv: The options; None for those of the process.
        on_evaluation: Called with the recipe, the framework and the number of completed steps.

    Returns:
        The exit code: 0, 1 if results could not be written, 130 if interrupted.

    Raises:
        SystemExit: After --help (0), or if an option is wrong or a package is missing (2).
    """
    try:
        return _run(*parse(sys.argv[1:] if argv is None else argv), on_evaluation)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return output.INTERRUPTED


def parse(argv: Sequence[str]) -> tuple[Settings, tuple[str, ...], Path]:
    """Return the settings, the frameworks and the output folder, which is created and checked.

    Raises:
        SystemExit: An option is wrong (2), or it is --help (0).
    """
    parser = make_parser()
    options = parser.read_args(argv)
    defaults = OPTIMIZERS[options.optimizer]
    if options.learning_rate is None:
        options.learning_rate = defaults.learning_rate
    if options.weight_decay is None:
        options.weight_decay = defaults.weight_decay
    if options.batch_size > options.train_size:
        parser.error(
            f"argument --batch-size: must be at most --train-size, {options.train_size}; got "
            f"'{options.batch_size}'"
        )
    frameworks = FRAMEWORKS if options.framework == "both" else (options.framework,)
    output.prepare(parser, options.out)
    try:
        require(*(p for f in frameworks for p in _PACKAGES[f]), "sklearn", "matplotlib", "rich")
    except ImportError as error:
        parser.error(f"{error}. Run: pip install 'regjax[examples]'")
    settings = Settings(**{field.name: getattr(options, field.name) for field in fields(Settings)})
    return settings, frameworks, options.out


def make_parser() -> output.Parser:
    """Return the parser of all options."""
    parser = output.Parser("python -m examples.overfit", _ABOUT)

    def add(name: str, kind: Callable[[str], object], text: str, default: object = None) -> None:
        parser.add_argument(
            f"--{name}",
            type=kind,
            metavar=name.rpartition("-")[2].upper(),
            help=f"{text} (default: {default or '%(default)s'})",
            default=getattr(Settings, name.replace("-", "_")) if default is None else None,
        )

    add("steps", output.integer(1, 100_000), "optimizer steps of each run")
    add("seed", output.integer(0, 2**32 - 1), "seed of images, initial weights, batches and masks")
    add("rate", output.number("in [0, 1)", lambda x: 0 <= x < 1), "dropout rate")
    add(
        "weight-decay",
        output.number("in [0, 1000]", lambda x: 0 <= x <= 1000),
        "weight decay of the optimizer; L2 in the loss has half this coefficient",
        ", ".join(f"{d.weight_decay:g} for {name}" for name, d in OPTIMIZERS.items()),
    )
    add(
        "learning-rate",
        output.number("above 0, up to 1000", lambda x: 0 < x <= 1000),
        "learning rate",
        ", ".join(f"{d.learning_rate:g} for {name}" for name, d in OPTIMIZERS.items()),
    )
    parser.add_argument(
        "--optimizer",
        **output.one_of(OPTIMIZERS),
        default=Settings.optimizer,
        help="optimizer; sgd has momentum 0.9, and its decay and that of adam are coupled "
        "(default: %(default)s)",
    )
    add(
        "train-size",
        output.integer(10, LARGEST_TRAIN_SIZE),
        "training images; few, so as to overfit",
    )
    add("batch-size", output.integer(1, LARGEST_TRAIN_SIZE), "images in each step")
    add("width", output.integer(1, 4096), "units of each hidden layer")
    parser.add_argument(
        "--framework",
        **output.one_of(["both", *FRAMEWORKS]),
        default="both",
        help="framework to run (default: %(default)s)",
    )
    parser.add_out("outputs/overfit", "curves, table and pictures")
    return parser


def require(*packages: str) -> None:
    """Import packages, to report a missing one before the work.

    Raises:
        ImportError: One of them cannot be imported.
    """
    for package in packages:
        try:
            import_module(package)
        except ImportError as error:
            raise ImportError(f"package {package} must be importable; got {error}") from error


def _run(
    settings: Settings,
    frameworks: Sequence[str],
    folder: Path,
    on_evaluation: Callable[[Recipe, str, int], None],
) -> int:
    # These modules need the packages that `require` has checked.
    from examples.overfit.progress import RunProgress
    from examples.overfit.report import save_curves
    from examples.overfit.runner import run_all

    curves: list[Curve] = []
    progress = RunProgress(_RUNS * len(frameworks), settings.steps)

    def evaluated(recipe: Recipe, framework: str, step: int) -> None:
        progress.show(recipe, framework, step)
        on_evaluation(recipe, framework, step)

    def finished(curve: Curve) -> None:
        if not curves:
            _clear(folder)
        curves.append(curve)
        save_curves(folder, settings, frameworks, curves)
        progress.finish(curve)

    code = 0
    try:
        try:
            with progress:
                run_all(settings, frameworks, on_evaluation=evaluated, on_finished=finished)
        except KeyboardInterrupt:
            code = output.INTERRUPTED
            print(f"interrupted: {len(curves)} runs have finished", file=sys.stderr)
        if curves:
            _present(settings, frameworks, folder, curves)
    except OSError as error:
        print(f"error: cannot write to {str(folder)!r}: {error}", file=sys.stderr)
        return 1
    return code


def _clear(folder: Path) -> None:
    """Remove the results of an earlier call from the folder."""
    from examples.overfit.plots import PICTURES
    from examples.overfit.report import CURVES_FILE, TABLE_FILE

    for name in (CURVES_FILE, TABLE_FILE, *PICTURES):
        (folder / name).unlink(missing_ok=True)


def _present(
    settings: Settings, frameworks: Sequence[str], folder: Path, curves: Sequence[Curve]
) -> None:
    """Save table and pictures, and print the table and the folder."""
    from rich.console import Console

    from examples.overfit.plots import save_pictures
    from examples.overfit.report import captions, save_curves, save_table, terminal_table

    save_curves(folder, settings, frameworks, curves)  # an interrupt may have prevented a write
    save_table(folder, curves, settings)
    save_pictures(folder, curves, settings)
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = 100
    console.print(terminal_table(curves))
    for line in captions(curves, settings):
        console.print(f"\n{line}")
    console.print(f"\nCurves, table and pictures: {folder}", soft_wrap=True)
