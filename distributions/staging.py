"""The folders from which the distributions are built.

`pip install .` in a copy of the repository installs everything as one distribution. Published
distributions must not share files, or the removal of one would break the others. Therefore regjax,
regtorch and the code that both share are three distributions; this module writes their folders.
"""

from __future__ import annotations

import ast
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Distribution:
    """The contents and the sources of a distribution.

    Attributes:
        name: Its name on a package index.
        packages: Its import packages.
        project: The folder of its `pyproject.toml` and its README.
        tests: Other files and folders of its sdist: tests that need none of the other packages.
        quick: The tests that are run from the sdist.
        changes: Replacements in `pyproject.toml`, each of which must occur once; `{version}` is the
            version.
    """

    name: str
    packages: tuple[str, ...]
    project: str
    tests: tuple[str, ...] = ()
    quick: tuple[str, ...] = ()
    changes: Mapping[str, str] | None = None


def _own_files(name: str) -> dict[str, str]:
    """Return the changes of a project whose package is elsewhere in the repository."""
    included = f'[tool.hatch.build.targets.wheel.force-include]\n"../../{name}" = "{name}"\n'
    return {
        'dynamic = ["version"]': 'version = "{version}"',
        '[tool.hatch.version]\npath = "../../regshared/__init__.py"\n\n': "",
        f"bypass-selection = true\n\n{included}": f'packages = ["{name}"]\n',
    }


DISTRIBUTIONS = (
    Distribution(
        "regshared",
        ("regshared",),
        "distributions/regshared",
        changes=_own_files("regshared"),
    ),
    Distribution(
        "regtorch",
        ("regtorch",),
        "distributions/regtorch",
        tests=("conftest.py", "tests/shared.py", "tests/regtorch"),
        quick=("tests/regtorch/test_dropout.py", "tests/regtorch/test_rules.py"),
        changes={**_own_files("regtorch"), '"regshared"': '"regshared=={version}"'},
    ),
    Distribution(
        "regjax",
        ("regjax", "parity_tests"),
        ".",
        tests=("conftest.py", "CHANGELOG.md", "tests/shared.py", "tests/regjax"),
        quick=("tests/regjax/test_optim_rms.py", "tests/regjax/test_xla.py"),
        changes={
            'dynamic = ["readme", "version"]': 'version = "{version}"\ndynamic = ["readme"]',
            'dependencies = ["jax': 'dependencies = ["regshared=={version}", "jax',
            'torch = ["torch>=2.13"]': 'torch = ["regtorch=={version}"]',
            '[tool.hatch.version]\npath = "regshared/__init__.py"\n\n': "",
            'packages = ["regjax", "regtorch", "regshared", "parity_tests"]': (
                'packages = ["regjax", "parity_tests"]'
            ),
        },
    ),
)


def version() -> str:
    """Return the version of all distributions, without an import of the package."""
    tree = ast.parse((ROOT / "regshared/__init__.py").read_text())
    (found,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__"
    )
    return found


def project_file(distribution: Distribution) -> str:
    """Return the `pyproject.toml` of a published distribution.

    Raises:
        ValueError: The file of the repository lacks a text that is to be replaced.
    """
    text = (ROOT / distribution.project / "pyproject.toml").read_text()
    for before, after in (distribution.changes or {}).items():
        if text.count(before) != 1:
            raise ValueError(
                f"{distribution.project}/pyproject.toml must have {before!r} once; got it "
                f"{text.count(before)} times. Update distributions/staging.py."
            )
        text = text.replace(before, after.format(version=version()))
    return text


def stage(distribution: Distribution, folder: Path) -> None:
    """Write the folder from which a distribution is built.

    Args:
        distribution: The distribution.
        folder: A folder that does not exist.
    """
    folder.mkdir()
    for name in (*distribution.packages, *distribution.tests, "LICENSE"):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, target)
    shutil.copy(ROOT / distribution.project / "README.md", folder)
    (folder / "pyproject.toml").write_text(project_file(distribution))


def wheel_files(distribution: Distribution) -> set[str]:
    """Return the files of a wheel, without its metadata: code and data, but no tests."""
    left_out = tuple(f"parity_tests/{n}.py" for n in ("conftest", "tables", "train_steps"))
    names = {
        path.relative_to(ROOT).as_posix()
        for package in distribution.packages
        for pattern in ("*.py", "py.typed", "*.mplstyle")
        for path in (ROOT / package).rglob(pattern)
    }
    return {n for n in names if n not in left_out and not n.startswith("parity_tests/test_")}
