"""The supported versions: pyproject.toml, noxfile.py, the lock and the docs agree."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NOXFILE = ast.parse((ROOT / "noxfile.py").read_text())
DOCS = (ROOT / "docs/supported_versions.md").read_text()
REQUIREMENTS = {
    found["name"]: found["bounds"]
    for requirement in (
        *PROJECT["dependencies"],
        *(each for extra in PROJECT["optional-dependencies"].values() for each in extra),
    )
    if (found := re.fullmatch(r"(?P<name>[\w.-]+)(?P<bounds>[^\[]*)", requirement))
}
TESTED = ["jax", "optax", "flax", "equinox", "dm-haiku", "chex", "torch"]


def constant(name: str):
    """The value of a constant of noxfile.py, which may be read without nox."""
    return next(
        ast.literal_eval(node.value)
        for node in NOXFILE.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name
    )


@pytest.mark.parametrize("name", TESTED)
def test_the_floor_session_tests_the_lower_bounds(name):
    pins = dict(pin.split("==") for pin in [*constant("FLOOR"), constant("TORCH")] if "==" in pin)
    exact = pins[name].removesuffix(".0") if name == "torch" else pins[name]
    assert REQUIREMENTS[name] == f">={exact}"  # and no upper bound


def test_the_sessions_install_the_tools_of_the_tests():
    extra = PROJECT["optional-dependencies"]["test"]
    names = {re.split(r"[>\[]", each)[0] for each in extra} - {"regjax"}
    assert names <= {*constant("TOOLS"), *constant("PACKAGES")}


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
    assert f"{name}{REQUIREMENTS[name]}" in DOCS


def test_the_lock_satisfies_the_lower_bounds():
    pins = dict(re.findall(r"^([\w.-]+)==([\d.]+)$", (ROOT / "constraints.txt").read_text(), re.M))
    number = lambda version: [int(part) for part in version.split(".")]
    for name in TESTED:
        assert number(pins[name]) >= number(REQUIREMENTS[name].removeprefix(">="))


def test_the_distribution_of_regtorch_alone_has_the_same_bounds():
    alone = tomllib.loads((ROOT / "distributions/regtorch/pyproject.toml").read_text())
    assert alone["project"]["dependencies"] == PROJECT["optional-dependencies"]["torch"]
    assert alone["project"]["requires-python"] == PROJECT["requires-python"]
    folders = alone["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert {Path(folder).name for folder in folders} == {"regtorch", "regshared"}
