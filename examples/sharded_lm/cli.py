"""The command line: options, their validation, and the start of one process or several."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from examples.sharded_lm import launch
from examples.sharded_lm.settings import (
    DTYPES,
    InputError,
    Plan,
    Recipe,
    RunError,
    check_mesh,
    parse_mesh,
)
from parity_tests import output

if TYPE_CHECKING:
    from jax.sharding import Mesh

_ABOUT = """Train a small language model on Python's standard library, on one device or on many.

    python -m examples.sharded_lm                              # one device; minutes
    python -m examples.sharded_lm --devices 8 --mesh 2x4       # data x fsdp, simulated on the CPU
    python -m examples.sharded_lm --devices 8 --mesh 2x2x2 --spawn 2   # two processes, four each
    python -m examples.sharded_lm --resume --steps 2000        # continue from the last checkpoint

On a cluster, run the same command on every host, with its number:

    python -m examples.sharded_lm --coordinator host0:1234 --processes 16 --process-id 3

Losses, dropout masks and checkpoints are the same on every mesh, up to the rounding of sums.
"""
_CHECKPOINTS = "checkpoints"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    parser = make_parser()
    options = parser.parse_args(argv)
    try:
        _check_packages()
        recipe, plan = _read(options)
        if options.spawn and options.coordinator:
            raise InputError(
                "argument --spawn: must be given without --coordinator; got both. Omit one of them"
            )
        # JAX counts the devices of a machine later, in `work`.
        if devices := options.devices or options.spawn:
            _check_mesh(recipe, plan, devices)
        # Process 0 writes for all.
        with contextlib.nullcontext() if options.process_id else launch.only_job(plan.out):
            _check_out(plan)
            return _start(argv, options)
    except InputError as error:
        parser.error(str(error))
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _start(argv: Sequence[str], options: argparse.Namespace) -> int:
    """Train in this process or in children, and return the exit code."""
    if options.spawn:
        address = launch.free_address()
        return launch.supervise(argv, range(options.spawn), options.spawn, address)
    if options.coordinator:
        if options.process_id:
            launch.check_coordinator(options.coordinator, options.timeout)
        one = [options.process_id]
        return launch.supervise(argv, one, options.processes, options.coordinator)
    work(argv)
    return 0


def work(argv: Sequence[str]) -> None:
    """Train in this process, which may be one of several.

    Raises:
        RunError: The run cannot start or continue.
    """
    options = make_parser().read_args(argv)
    recipe, plan = _read(options)
    # Settings of JAX that it reads when it is imported.
    if devices := options.devices or options.spawn:
        flag = f"--xla_force_host_platform_device_count={devices // (options.processes or 1)}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}"
        os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_ENABLE_X64"] = str(recipe.dtype == "float64")
    if options.coordinator:
        launch.connect(options.coordinator, options.processes, options.process_id, options.timeout)
    import jax

    from examples.sharded_lm import mesh

    sizes = _check_mesh(recipe, plan, jax.device_count())
    _train(recipe, plan, mesh.make_mesh(sizes))


def _train(recipe: Recipe, plan: Plan, mesh: Mesh) -> None:
    """Train, and write picture and results."""
    import jax

    from examples.sharded_lm import masks, report
    from examples.sharded_lm.data import read_corpus, training_batch
    from examples.sharded_lm.mesh import shard_batch
    from examples.sharded_lm.train import train

    corpus = read_corpus()
    folder = plan.out / _CHECKPOINTS
    with report.Report(plan.steps, recipe.batch * recipe.context) as progress:
        state, history = train(
            recipe, plan, mesh, corpus, folder, progress.step, progress.evaluation, progress.print
        )
    results: dict[str, Any] = {
        "recipe": dataclasses.asdict(recipe),
        "mesh": dict(mesh.shape),
        "processes": jax.process_count(),
        "micro_batches": plan.micro_batches,
        "parameters": report.digest(state.params),
        **dataclasses.asdict(history),
    }
    if plan.masks:
        batch = shard_batch(training_batch(corpus, recipe, plan.steps, plan.micro_batches), mesh)
        results["masks"] = masks.digests(recipe, mesh, batch, plan.steps)
    progress.print(f"parameters: SHA-256 {results['parameters']}")
    if jax.process_index() == 0:
        try:
            report.write(plan.out, history, results)
        except OSError as error:
            raise RunError(
                f"results could not be written to {plan.out} ({error.strerror}). The checkpoints "
                "are complete: make space and run the command again with --resume."
            ) from error
    progress.print(f"picture: {plan.out / report.PICTURE}")


def make_parser() -> output.Parser:
    """Return the parser of all options."""
    parser = output.Parser("python -m examples.sharded_lm", _ABOUT)

    def add(name: str, kind: Callable[[str], object], about: str, default: object = None) -> None:
        shown = "none" if default is None else "%(default)s"
        metavar = name.rpartition("-")[2].upper()
        text = f"{about} (default: {shown})"
        parser.add_argument(f"--{name}", type=kind, default=default, metavar=metavar, help=text)

    count = output.integer(1)
    add("steps", count, "step at which the run ends", 1000)
    add("devices", count, "devices to simulate on the CPU, over all processes")
    add("mesh", _mesh, "sizes: data x fsdp, data x fsdp x tensor, or data=2,tensor=4")
    add("micro-batches", count, "parts of a batch, whose gradients are accumulated", 1)
    add("spawn", output.integer(2), "processes to start on this machine")
    add("coordinator", _address, "host:port of process 0")
    add("processes", count, "processes of the job, with --coordinator")
    add("process-id", output.integer(0), "number of this process, with --coordinator")
    add("timeout", output.integer(1), "seconds to wait for a coordinator or a lost process", 60)
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint")
    add("evaluate-every", count, "steps between evaluations", 50)
    add("save-every", count, "steps between checkpoints", 100)
    add("keep", count, "checkpoints to keep", 3)
    parser.add_argument(
        "--masks", action="store_true", help="write the SHA-256 of dropout masks to the results"
    )
    parser.add_out("outputs/sharded_lm", "checkpoints, picture and results")
    for field in dataclasses.fields(Recipe):
        if field.name != "dtype":
            kind, about = _RECIPE[field.name]
            add(field.name.replace("_", "-"), kind, about, field.default)
    parser.add_argument(
        "--dtype",
        default=Recipe.dtype,
        help="dtype of parameters and computation (default: %(default)s)",
        **output.one_of(DTYPES),
    )
    return parser


_RECIPE: dict[str, tuple[Callable[[str], object], str]] = {
    "width": (output.integer(1), "size of a token's vector"),
    "depth": (output.integer(1), "blocks"),
    "heads": (output.integer(1), "attention heads"),
    "context": (output.integer(1, 4096), "tokens of an example"),
    "batch": (output.integer(1), "examples of a step, over all devices"),
    "rate": (output.number("in [0, 1)", lambda x: 0 <= x < 1), "dropout rate"),
    "weight_decay": (output.number("of at least 0", lambda x: 0 <= x < 1000), "weight decay"),
    "learning_rate": (output.number("above 0", lambda x: 0 < x < 1000), "learning rate"),
    "warmup": (output.integer(1), "steps in which the learning rate rises"),
    "seed": (output.integer(0, 2**32 - 1), "seed of parameters, batches and dropout masks"),
}


def _mesh(text: str) -> dict[str, int]:
    try:
        return parse_mesh(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _address(text: str) -> str:
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise argparse.ArgumentTypeError(f"must be host:port; got {text!r}")
    return text


def _read(options: argparse.Namespace) -> tuple[Recipe, Plan]:
    """Return the settings, after a check of the options that depend on each other."""
    names = [field.name for field in dataclasses.fields(Recipe)]
    recipe = Recipe(**{name: getattr(options, name) for name in names})
    if recipe.width % recipe.heads:
        raise InputError(
            f"argument --heads: must divide --width, {recipe.width}; got '{recipe.heads}'"
        )
    together = (options.coordinator, options.processes, options.process_id)
    if len({value is None for value in together}) > 1:
        raise InputError(
            "arguments --coordinator, --processes and --process-id: must be given together; got "
            + ", ".join(map(str, together))
        )
    if options.process_id is not None and options.process_id >= options.processes:
        raise InputError(
            f"argument --process-id: must be below --processes, {options.processes}; got "
            f"'{options.process_id}'"
        )
    count = options.processes or options.spawn
    if count and options.devices and options.devices % count:
        raise InputError(
            f"argument --devices: must be a multiple of the {count} processes; got "
            f"'{options.devices}'"
        )
    names = [field.name for field in dataclasses.fields(Plan)]
    return recipe, Plan(**{name: getattr(options, name) for name in names})


def _check_packages() -> None:
    """Check that the packages of the example are installed, before any process starts."""
    for package in ("flax", "orbax", "matplotlib", "rich"):
        if importlib.util.find_spec(package) is None:
            raise InputError(
                f"package {package} must be installed. Run: pip install 'regjax[examples]'"
            )


def _check_mesh(recipe: Recipe, plan: Plan, devices: int) -> dict[str, int]:
    """Return the sizes of the mesh; without an option, all devices are along "data"."""
    sizes = plan.mesh or parse_mesh(str(devices))
    try:
        check_mesh(recipe, sizes, plan.micro_batches, devices)
    except ValueError as error:
        raise InputError(f"argument --mesh: {error}") from None
    return dict(sizes)


def _check_out(plan: Plan) -> None:
    """Refuse to mix a new run with the checkpoints of another."""
    if not plan.resume and any((plan.out / _CHECKPOINTS).glob("[0-9]*.json")):
        raise InputError(
            f"argument --out: must be a folder without checkpoints; got '{plan.out}'. Pass "
            "--resume to continue that run, or another folder"
        )
