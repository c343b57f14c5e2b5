"""The selection of cases by `conftest.py`: what `make test` runs of a table."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TABLE = """
import pytest

@pytest.mark.parametrize("case", range(10))
@pytest.mark.sample(3)
def test_sampled(case):
    pass

@pytest.mark.parametrize("case", [pytest.param(0, marks=pytest.mark.slow), 1, 2])
@pytest.mark.sample(1)
def test_slow_cases_do_not_count(case):
    pass

@pytest.mark.parametrize("case", range(4))
def test_whole(case):
    pass
"""


@pytest.mark.parametrize(
    ("options", "cases"),
    [
        (["-m", "not slow", "--sampled"], [[0, 4, 9], [1], [0, 1, 2, 3]]),
        ([], [[*range(10)], [0, 1, 2], [0, 1, 2, 3]]),
        (["-m", "not slow"], [[*range(10)], [1, 2], [0, 1, 2, 3]]),
        (["--cases", "2"], [[0, 9], [0, 2], [0, 3]]),
        (["-m", "not slow", "--sampled", "--cases", "2"], [[0, 9], [1], [0, 3]]),
    ],
)
def test_the_cases_of_a_table(tmp_path, options, cases):
    root = Path(__file__).parent.parent
    for name in ("conftest.py", "pyproject.toml"):
        shutil.copy(root / name, tmp_path)
    (tmp_path / "tests").mkdir()  # one of the `testpaths`
    (tmp_path / "tests" / "test_table.py").write_text(TABLE)
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *options]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    names = "test_sampled", "test_slow_cases_do_not_count", "test_whole"
    expected = [f"{n}[{case}]" for n, own in zip(names, cases, strict=True) for case in own]
    assert [
        line.partition("::")[2] for line in found.stdout.splitlines() if "::" in line
    ] == expected
