"""Build the distributions, check them, and test them in clean environments.

    python -m distributions               # build, check and test; minutes
    python -m distributions --no-tests    # build and check only
    python -m distributions --tag v0.2.0  # also fail unless this is the tag of the version

Each distribution is built from a folder with its own files only: first the sdist, then the wheel
from the sdist. The tests install the wheels into new environments, alone and together, run a smoke
test and the quick tests of each sdist, and uninstall one distribution to verify that the others
still work. pip needs a package index, or its cache, for JAX and PyTorch.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from distributions.staging import DISTRIBUTIONS, ROOT, Distribution, stage, version, wheel_files
from parity_tests import output

SMOKE = ROOT / "distributions/smoke.py"
CONSTRAINTS = ROOT / "constraints.txt"

Step = tuple[str, Callable[[], None]]


class StepError(Exception):
    """A step that failed, with the reason."""


def main(argv: Sequence[str] | None = None) -> int:
    """Build, check and test, and return the exit code."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.tag not in (None, f"v{version()}"):
        parser.error(
            f"argument --tag: must be v{version()}, the version in regshared/__init__.py; got "
            f"{options.tag!r}. Change the tag or the version."
        )
    from rich.console import Console
    from rich.progress import Progress

    console = Console(highlight=False, soft_wrap=True)
    with tempfile.TemporaryDirectory() as scratch, Progress(console=console) as progress:
        steps = [*_builds(options.out, Path(scratch))]
        steps += [] if options.no_tests else _tests(options.out, Path(scratch))
        task = progress.add_task("", total=len(steps))
        for name, run in steps:
            progress.update(task, description=name)
            try:
                run()
            except StepError as failure:
                console.print(f"failed: {name}\n{failure}", markup=False)
                return 1
            console.print(f"passed: {name}", markup=False)
            progress.advance(task)
    for path in sorted(options.out.iterdir()):
        console.print(f"{path}, {path.stat().st_size / 1000:,.0f} kB", markup=False)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = output.Parser("python -m distributions", __doc__)
    parser.add_argument("--no-tests", action="store_true", help="build and check only")
    text = "the tag of the release, which must be v and the version (default: not checked)"
    parser.add_argument("--tag", metavar="TAG", help=text)
    parser.add_out("dist", "wheels and sdists")
    return parser


def _builds(out: Path, scratch: Path) -> Iterator[Step]:
    """Yield the steps that build and check, without network access but for build requirements."""
    yield "remove the products of an earlier version", partial(_clear, out)
    for each in DISTRIBUTIONS:
        yield f"build {each.name}", partial(_build, each, out, scratch / each.name)
    yield "check the contents", partial(_check_contents, out)
    yield "check the metadata", partial(_check_metadata, out)


def _tests(out: Path, scratch: Path) -> Iterator[Step]:
    """Yield the steps that test the wheels and the sdists in two clean environments."""
    shared, in_torch, in_jax = (_wheel(out, each.name) for each in DISTRIBUTIONS)
    jax, torch = scratch / "env-jax", scratch / "env-torch"
    yield "environment 1: regjax", partial(_create, jax, shared, in_jax)
    yield "regjax alone", partial(_smoke, jax, "regjax")
    sdists = {each.name: each for each in DISTRIBUTIONS}
    yield "tests of the sdist of regjax", partial(_quick, jax, out, scratch, sdists["regjax"])
    together = [shared, in_torch, f"{in_jax}[torch]"]
    yield "environment 1: regjax[torch]", partial(_install, jax, *together)
    yield "regjax and regtorch together", partial(_smoke, jax, "regjax", "regtorch")
    yield "regtorch is uninstalled", partial(_uninstall, jax, "regtorch")
    yield "regjax after that", partial(_smoke, jax, "regjax", foreign=True)
    yield "environment 2: regtorch", partial(_create, torch, shared, in_torch)
    yield "regtorch alone", partial(_smoke, torch, "regtorch")
    yield "tests of the sdist of regtorch", partial(_quick, torch, out, scratch, sdists["regtorch"])


def _clear(out: Path) -> None:
    for pattern in ("*.whl", "*.tar.gz"):
        for path in out.glob(pattern):
            path.unlink()


def _build(distribution: Distribution, out: Path, folder: Path) -> None:
    stage(distribution, folder)
    _python("-m", "build", "--outdir", str(out.resolve()), str(folder))


def _wheel(out: Path, name: str) -> str:
    return str(out.resolve() / f"{name}-{version()}-py3-none-any.whl")


def _sdist(out: Path, name: str) -> Path:
    return out / f"{name}-{version()}.tar.gz"


def _check_contents(out: Path) -> None:
    """Check that wheels contain the intended files, share none, and include the license.

    Raises:
        StepError: One of them does not.
    """
    owners: dict[str, str] = {}
    for each in DISTRIBUTIONS:
        with zipfile.ZipFile(_wheel(out, each.name)) as wheel:
            names = set(wheel.namelist())
        info = f"{each.name}-{version()}.dist-info/"
        expected = wheel_files(each) | {
            info + name for name in ("METADATA", "RECORD", "WHEEL", "licenses/LICENSE")
        }
        if names != expected:
            raise StepError(f"{each.name}: the wheel must have other files: {names ^ expected}")
        for name in names:
            if owners.setdefault(name, each.name) != each.name:
                raise StepError(f"{name} must be in one wheel; got {owners[name]} and {each.name}")
        with tarfile.open(_sdist(out, each.name)) as sdist:
            inside = {name.partition("/")[2] for name in sdist.getnames()}
        if missing := {*wheel_files(each), "LICENSE", "README.md", *each.quick} - inside:
            raise StepError(f"{each.name}: the sdist must have {missing}")


def _check_metadata(out: Path) -> None:
    _python("-m", "twine", "check", "--strict", *sorted(map(str, out.iterdir())))


def _create(folder: Path, *requirements: str) -> None:
    venv.create(folder, with_pip=True)
    _install(folder, *requirements, "pytest")


def _install(folder: Path, *requirements: str) -> None:
    _pip(folder, "install", "--quiet", "--constraint", str(CONSTRAINTS), *requirements)
    _pip(folder, "check")


def _uninstall(folder: Path, name: str) -> None:
    _pip(folder, "uninstall", "--quiet", "--yes", name)


def _smoke(folder: Path, *packages: str, foreign: bool = False) -> None:
    call = f"({packages}, {version()!r}, foreign={foreign})"
    _inside(folder, "-c", f"import runpy; runpy.run_path({str(SMOKE)!r})['smoke']{call}")


def _quick(folder: Path, out: Path, scratch: Path, distribution: Distribution) -> None:
    """Run the quick tests of an sdist, without its packages: those of the wheel are tested."""
    unpacked = scratch / f"sdist-{distribution.name}"
    with tarfile.open(_sdist(out, distribution.name)) as sdist:
        sdist.extractall(unpacked, filter="data")
    (root,) = unpacked.iterdir()
    for package in distribution.packages:
        shutil.rmtree(root / package)
    options = [
        "-q",
        "-p",
        "no:cacheprovider",
        "--import-mode=importlib",
        "-m",
        "not slow",
        "--cases",
        "2",
    ]
    _inside(folder, "-m", "pytest", *options, *distribution.quick, cwd=root, isolated=False)


def _pip(folder: Path, *arguments: str) -> None:
    _inside(folder, "-m", "pip", "--disable-pip-version-check", *arguments)


def _inside(folder: Path, *arguments: str, cwd: Path | None = None, isolated: bool = True) -> None:
    """Run Python in an environment, by default without PYTHONPATH and the current folder."""
    bin_folder = "Scripts" if sys.platform == "win32" else "bin"
    python = str(folder / bin_folder / "python")
    _run([python, *(["-I"] if isolated else []), *arguments], cwd or folder)


def _python(*arguments: str) -> None:
    _run([sys.executable, *arguments], ROOT)


def _run(command: Sequence[str], cwd: Path) -> None:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        raise StepError(f"{' '.join(command)}\n{done.stdout[-5000:]}{done.stderr[-5000:]}")


if __name__ == "__main__":
    output.run(main)
