"""The supported versions: pyproject.toml, noxfile.py, the lock and the docs agree."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterable
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
NOXFILE = ast.parse((ROOT / "noxfile.py").read_text())
DOCS = (ROOT / "docs/supported_versions.md").read_text()
LOCK = re.findall(r"^[\w.-]+==.*$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
TESTED = ["jax", "optax", "flax", "equinox", "dm-haiku", "chex", "torch"]


def bounds_of(requirements: Iterable[str]) -> dict[str, str]:
    """Return the bounds of each package by normalized name, which must be unique."""
    found: dict[str, str] = {}
    for requirement in map(Requirement, requirements):
        name, bounds = canonicalize_name(requirement.name), str(requirement.specifier)
        if found.setdefault(name, bounds) != bounds:
            raise ValueError(f"{name} must have one requirement; got {found[name]} and {bounds}.")
    return found


def required() -> dict[str, str]:
    """Return the bounds of the requirements in pyproject.toml, without the project itself."""
    extras = (each for extra in EXTRAS.values() for each in extra)
    every = [*PROJECT["dependencies"], *extras]
    return bounds_of(each for each in every if Requirement(each).name != PROJECT["name"])


def constant(name: str):
    """Return the value of a constant of noxfile.py, without nox."""
    return next(
        ast.literal_eval(node.value)
        for node in NOXFILE.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name
    )


def test_requirements_are_read_as_pip_reads_them():
    assert bounds_of(["Dm_Haiku[jax] >= 1", "dm.haiku>=1", "x"]) == {"dm-haiku": ">=1", "x": ""}
    with pytest.raises(ValueError, match=r"x must have one requirement; got >=1 and >=2\."):
        bounds_of(["x>=1", "x[extra]>=2"])


@pytest.mark.parametrize("name", TESTED)
def test_the_floor_session_tests_the_lower_bounds(name):
    pins = bounds_of([*constant("FLOOR"), constant("TORCH")])
    exact = pins[name].removeprefix("==")
    exact = exact.removesuffix(".0") if name == "torch" else exact
    assert required()[name] == f">={exact}"  # and no upper bound


def test_the_sessions_install_the_tools_of_the_tests():
    names = bounds_of(EXTRAS["test"]).keys() - {PROJECT["name"]}
    assert names <= bounds_of([*constant("TOOLS"), *constant("PACKAGES")]).keys()


def test_the_session_of_the_zoo_pins_the_packages_of_its_extra():
    bounds, pins = bounds_of(EXTRAS["zoo"]), bounds_of(constant("ZOO"))
    assert bounds.keys() - {PROJECT["name"]} == pins.keys()
    for name, pin in pins.items():
        assert pin.removeprefix("==") in Requirement(name + bounds[name]).specifier, name
    workflow = (ROOT / ".github/workflows/versions.yml").read_text()
    assert "session: zoo," in workflow


def test_the_tests_of_the_zoo_are_slow_and_collected_without_its_packages():
    paths = [*(ROOT / "tests/zoo").glob("*.py")]
    assert len(paths) > 2
    for path in paths:
        tree = ast.parse(path.read_text())
        imports = [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
        names = {
            (getattr(node, "module", None) or node.names[0].name).partition(".")[0]
            for node in imports
        }
        assert names.isdisjoint(bounds_of(constant("ZOO"))), path.name
        marked = "pytestmark = pytest.mark.slow" in map(ast.unparse, tree.body)
        assert marked or not path.name.startswith("test_"), path.name


def test_pythons_are_those_of_the_sessions_and_the_docs():
    minor = re.compile(r"Programming Language :: Python :: (3\.\d+)")
    pythons = [found[1] for c in PROJECT["classifiers"] if (found := minor.fullmatch(c))]
    assert PROJECT["requires-python"] == f">={pythons[0]}"
    sessions = ast.unparse(NOXFILE)
    for python in pythons:
        assert f"'{python}'" in sessions
        assert f"| {python} |" in DOCS


@pytest.mark.parametrize("name", TESTED)
def test_the_docs_state_the_lower_bounds(name):
    assert f"{name}{required()[name]}" in DOCS


def test_the_lock_satisfies_the_requirements():
    pins = bounds_of(LOCK)
    for name, bounds in required().items():
        if name in pins:
            assert pins[name].removeprefix("==") in Requirement(name + bounds).specifier, name
    assert set(TESTED) <= pins.keys()


def test_the_distribution_of_regtorch_alone_has_the_same_bounds():
    alone = tomllib.loads((ROOT / "distributions/regtorch/pyproject.toml").read_text())
    torch = PROJECT["optional-dependencies"]["torch"]
    assert alone["project"]["dependencies"] == ["regshared", *torch]
    assert alone["project"]["requires-python"] == PROJECT["requires-python"]


def test_the_tests_of_regjax_alone_need_no_torch():
    """Sessions without PyTorch run them; tests that need it call `pytest.importorskip`."""
    for path in (ROOT / "tests/regjax").glob("*.py"):
        top = [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.Import)]
        modules = {alias.name.partition(".")[0] for node in top for alias in node.names}
        assert "torch" not in modules or path.name == "test_interop.py", path.name
