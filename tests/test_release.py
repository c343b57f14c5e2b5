"""The published distributions, the workflow that publishes them, and the only version number.

`make dist` builds and installs the distributions; these tests are about its parts.
"""

from __future__ import annotations

import importlib
import re
import runpy
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import regjax
import regtorch
from distributions import __main__ as program
from distributions import smoke, staging
from parity_tests.golden import MASKS
from regshared import __version__ as VERSION
from regshared import versions

ROOT = Path(__file__).parent.parent
CHECKOUT = tomllib.loads((ROOT / "pyproject.toml").read_text())
NAMES = [each.name for each in staging.DISTRIBUTIONS]
each_distribution = pytest.mark.parametrize("each", staging.DISTRIBUTIONS, ids=NAMES)


def project_of(each: staging.Distribution) -> dict:
    return tomllib.loads(staging.project_file(each))


def read(path: str) -> str:
    return (ROOT / path).read_text()


def test_the_version_comes_from_one_place():
    assert staging.version() == VERSION == regjax.__version__ == regtorch.__version__
    assert "version" in CHECKOUT["project"]["dynamic"]
    assert CHECKOUT["tool"]["hatch"]["version"]["path"] == "regshared/__init__.py"
    assert "release = version = __version__" in read("docs/conf.py")
    heading = re.search(
        r"^## (\S+) \((not yet released|\d{4}-\d\d-\d\d)\)$", read("CHANGELOG.md"), re.M
    )
    assert heading
    assert heading[1] == VERSION


@pytest.mark.skipif(not (ROOT / "CITATION.cff").exists(), reason="there is no CITATION.cff")
def test_the_citation_has_the_version():
    assert re.search(rf'^version: "?{re.escape(VERSION)}"?$', read("CITATION.cff"), re.M)


@each_distribution
def test_a_published_project_requires_the_others_at_its_own_version(each):
    project = project_of(each)["project"]
    assert project["version"] == VERSION
    assert "version" not in project.get("dynamic", [])
    extras = project.get("optional-dependencies", {})
    required = [*project.get("dependencies", []), *extras.get("torch", [])]
    own = [r for r in required if r.startswith("reg")]
    expected = {"regshared": [], "regtorch": ["regshared"], "regjax": ["regshared", "regtorch"]}
    assert own == [f"{name}=={VERSION}" for name in expected[each.name]]
    for package in each.packages:
        assert (ROOT / package / "py.typed").is_file()


@each_distribution
def test_all_projects_have_the_same_metadata(each):
    project = project_of(each)["project"]
    for name in ("license", "requires-python", "authors", "classifiers", "urls"):
        assert project[name] == CHECKOUT["project"][name], name


def test_no_package_is_in_two_distributions_and_each_is_in_one():
    packages = [package for each in staging.DISTRIBUTIONS for package in each.packages]
    assert sorted(packages) == sorted(
        CHECKOUT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    )
    assert len(packages) == len(set(packages))
    for each in staging.DISTRIBUTIONS:
        wheel = project_of(each)["tool"]["hatch"]["build"]["targets"]["wheel"]
        assert wheel["packages"] == list(each.packages)


@each_distribution
def test_the_folder_of_a_build_has_its_files_only(each, tmp_path):
    staging.stage(each, tmp_path / each.name)
    staged = {
        p.relative_to(tmp_path / each.name).parts[0] for p in (tmp_path / each.name).rglob("*")
    }
    tests = {name.partition("/")[0] for name in each.tests}
    assert staged == {*each.packages, *tests, "LICENSE", "README.md", "pyproject.toml"}
    assert not list(tmp_path.rglob("__pycache__"))
    for name in (*staging.wheel_files(each), *each.quick):
        assert (tmp_path / each.name / name).is_file(), name


def test_a_change_of_pyproject_that_staging_does_not_know_is_an_error():
    changed = staging.Distribution("regjax", ("regjax",), ".", changes={"no such line": ""})
    with pytest.raises(ValueError, match=r"must have 'no such line' once; got it 0 times"):
        staging.project_file(changed)


def write_products(folder: Path, *, also: dict[str, str], without: str = "") -> None:
    """Write wheels and sdists with empty files."""
    for each in staging.DISTRIBUTIONS:
        info = f"{each.name}-{VERSION}.dist-info"
        names = [f"{info}/{n}" for n in ("METADATA", "RECORD", "WHEEL", "licenses/LICENSE")]
        names += [*staging.wheel_files(each), *([also[each.name]] if each.name in also else [])]
        with zipfile.ZipFile(folder / f"{each.name}-{VERSION}-py3-none-any.whl", "w") as wheel:
            for name in names:
                if name != without:
                    wheel.writestr(name, "")
        inside = [*staging.wheel_files(each), "LICENSE", "README.md", *each.quick]
        with tarfile.open(folder / f"{each.name}-{VERSION}.tar.gz", "w:gz") as sdist:
            for name in inside:
                if name != without:
                    sdist.addfile(tarfile.TarInfo(f"{each.name}-{VERSION}/{name}"))


def test_intended_contents_pass(tmp_path):
    write_products(tmp_path, also={})
    program._check_contents(tmp_path)


@pytest.mark.parametrize(
    ("also", "without", "error"),
    [
        ({"regjax": "parity_tests/test_masks.py"}, "", "parity_tests/test_masks.py"),
        ({"regjax": "regshared/globs.py"}, "", "regshared/globs.py"),
        ({"regtorch": "docs/index.md"}, "", "docs/index.md"),
        ({}, "regjax/py.typed", "regjax/py.typed"),
        ({}, f"regtorch-{VERSION}.dist-info/licenses/LICENSE", "licenses/LICENSE"),
        ({}, "tests/regtorch/test_dropout.py", "the sdist must have"),
    ],
)
def test_other_contents_are_rejected(tmp_path, also, without, error):
    write_products(tmp_path, also=also, without=without)
    with pytest.raises(program.StepError, match=re.escape(error)):
        program._check_contents(tmp_path)


@pytest.mark.parametrize("tag", [f"v{VERSION}rc1", VERSION, "v9.9.9"])
def test_a_tag_that_is_not_the_version_is_rejected(capsys, tmp_path, tag):
    with pytest.raises(SystemExit) as exited:
        program.main(["--tag", tag, "--out", str(tmp_path)])
    assert exited.value.code == 2
    assert f"argument --tag: must be v{VERSION}" in capsys.readouterr().err


def test_a_step_that_fails_stops_the_program(capsys, monkeypatch, tmp_path):
    ran = []

    def fail():
        raise program.StepError("the reason")

    steps = [("first", lambda: ran.append(1)), ("second", fail), ("third", lambda: ran.append(3))]
    monkeypatch.setattr(program, "_builds", lambda *_: steps)
    assert program.main(["--no-tests", "--out", str(tmp_path)]) == 1
    assert ran == [1]
    assert "failed: second\nthe reason" in capsys.readouterr().out


@pytest.mark.parametrize("package", ["regjax", "regtorch"])
def test_the_smoke_test_compares_golden_masks(monkeypatch, package):
    golden = {(m.sampler, m.seed, m.keep_prob, m.shape, m.digest) for m in MASKS}
    assert golden.issuperset(smoke.MASKS)
    monkeypatch.setattr(sys, "prefix", str(ROOT))
    smoke.check(package, VERSION)
    with pytest.raises(AssertionError, match=re.escape(VERSION)):
        smoke.check(package, "9.9.9")
    monkeypatch.setattr(smoke, "MASKS", [(*smoke.MASKS[0][:-1], "0" * 16)])
    with pytest.raises(AssertionError, match="bernoulli"):
        smoke.check(package, VERSION)
    monkeypatch.setattr(sys, "prefix", "/no/such/folder")
    with pytest.raises(AssertionError, match="__init__"):
        smoke.check(package, VERSION)


@pytest.mark.parametrize(("module", "extra"), smoke.EXTRAS["regjax"].items())
def test_the_smoke_test_checks_the_errors_of_missing_packages(monkeypatch, module, extra):
    with pytest.raises(AssertionError, match="no error"):
        smoke.check_extra("regjax", extra)
    for name in [
        name for name in sys.modules if name == module or name == "parity_tests.frameworks"
    ]:
        monkeypatch.delitem(sys.modules, name)
    missing = "regtorch" if extra == "torch" else extra
    monkeypatch.setitem(sys.modules, missing, None)
    smoke.check_extra(module, extra)


@pytest.mark.parametrize("package", ["regjax", "regtorch"])
def test_the_report_of_versions(capsys, monkeypatch, package):
    monkeypatch.setattr(sys, "argv", [package])
    monkeypatch.setattr(versions, "shared_packages", list)
    with pytest.raises(SystemExit) as exited:
        runpy.run_module(package, run_name="__main__")
    assert exited.value.code == 0
    lines = dict(line.split(" ", 1) for line in capsys.readouterr().out.splitlines())
    assert lines["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"jax", "torch", "platform"} <= lines.keys()
    monkeypatch.setattr(versions, "shared_packages", lambda: ["regtorch must belong"])
    assert versions.main(package) == 1
    monkeypatch.setattr(sys, "argv", [package, "--help"])
    with pytest.raises(SystemExit) as exited:
        runpy.run_module(package, run_name="__main__")
    assert exited.value.code == 0


def test_workflows():
    yaml = pytest.importorskip("yaml")
    flows = {
        p.stem: yaml.safe_load(p.read_text()) for p in (ROOT / ".github/workflows").glob("*.yml")
    }
    for name, flow in flows.items():
        assert flow["permissions"] == {"contents": "read"}, name
        assert "secrets." not in read(f".github/workflows/{name}.yml"), name
    publish = flows["publish"]
    assert publish[True] == {"push": {"tags": ["v*"]}, "workflow_dispatch": None}  # YAML's `on`
    jobs = publish["jobs"]
    commands = [(step.get("if"), step["run"]) for step in jobs["build"]["steps"] if "run" in step]
    assert commands == [
        ("github.ref_type == 'tag'", 'make dist ARGS="--tag $GITHUB_REF_NAME"'),
        ("github.ref_type != 'tag'", "make dist"),
    ]
    assert "permissions" not in jobs["build"]
    for name, condition in (("pypi", "ref_type == 'tag'"), ("testpypi", "workflow_dispatch")):
        job = jobs[name]
        assert job["needs"] == "build"
        assert condition in job["if"]
        assert job["environment"]["name"] == name
        assert job["permissions"] == {"id-token": "write"}
        upload = job["steps"][-1]
        assert upload["uses"].startswith("pypa/gh-action-pypi-publish@")
        assert upload["with"]["attestations"] is True
        assert ("test.pypi.org" in upload["with"].get("repository-url", "")) == (name == "testpypi")


def test_issue_forms():
    yaml = pytest.importorskip("yaml")
    for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"):
        form = yaml.safe_load(path.read_text())
        if path.stem == "config":
            assert form["contact_links"]
            continue
        fields = [field["id"] for field in form["body"]]
        assert len(fields) == len(set(fields))
        assert ("versions" in fields) == (path.stem != "feature")
        for name in re.findall(r"`((?:parity_tests|regjax|regtorch)(?:\.\w+)+)`", path.read_text()):
            module, _, attribute = name.rpartition(".")
            assert hasattr(importlib.import_module(module), attribute), name


def test_the_policy_is_linked_and_its_names_exist():
    assert "\ndeprecation\n" in read("docs/index.md")
    assert "(docs/deprecation.md)" in read("CONTRIBUTING.md")
    policy = read("docs/deprecation.md")
    for name in ("bernoulli", "packed_bernoulli", "normal", "site_key"):
        assert f"`{name}`" in policy
        assert all(hasattr(library, name) for library in (regjax, regtorch))
    for name in ("key", "split", "fold_in", "bits"):
        assert hasattr(regtorch, name)


def test_make_builds_and_removes_the_distributions():
    makefile = read("Makefile")
    assert re.search(r"^dist: \$\(READY_DIST\)  ## ", makefile, re.M)
    assert re.search(r"^\trm -rf .*\bdist\b", makefile, re.M)
