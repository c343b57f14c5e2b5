"""The report: its contents, and its exit code when something differs."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from parity_tests import __main__ as program
from parity_tests import checks, report
from parity_tests.checks import Check, Outcome, ulps
from parity_tests.report import Entry
from tests.regjax.versions import EAGER_DIVISION_IS_EXACT

AGREES = Check("fine", "It holds.", lambda quick: Outcome(3, "steps", "equal", True), ())
DIFFERS = Check(
    "broken",
    "It does <not>.",
    lambda quick: Outcome(2, "steps", "1e-12", False, difference=1.0, series={"run": [0.0, 1.0]}),
    (),
)
ABSENT = dataclasses.replace(AGREES, name="absent", needs=("no_such_package",))


def run_with(monkeypatch, tmp_path, *found: Check, options=()) -> int:
    monkeypatch.setattr(program, "all_checks", lambda: list(found))
    return program.main(["--quick", "--out", str(tmp_path), *options])


@pytest.mark.parametrize(
    ("found", "code"),
    [((AGREES,), 0), ((AGREES, DIFFERS), 1), ((AGREES, ABSENT), 0), ((ABSENT,), 1)],
    ids=["agrees", "differs", "skipped", "nothing ran"],
)
def test_the_exit_code(monkeypatch, tmp_path, found, code):
    assert run_with(monkeypatch, tmp_path, *found) == code


def test_a_missing_framework_is_one_line(monkeypatch, tmp_path, capsys):
    run_with(monkeypatch, tmp_path, AGREES, ABSENT)
    lines = [line for line in capsys.readouterr().out.splitlines() if "no_such_package" in line]
    assert len(lines) == 1
    assert "skipped" in lines[0]


def test_the_page_and_the_json_tell_everything(monkeypatch, tmp_path):
    run_with(monkeypatch, tmp_path, AGREES, DIFFERS, ABSENT)
    page = (tmp_path / "parity.html").read_text()
    assert "1 agrees, 1 differs, 1 skipped" in page
    assert "It does &lt;not&gt;." in page
    assert "data:image/png;base64," in page
    record = json.loads((tmp_path / "parity.json").read_text())
    assert [check["result"] for check in record["checks"]] == ["agrees", "differs", "skipped"]
    assert record["checks"][1]["outcome"]["series"] == {"run": [0.0, 1.0]}
    assert record["versions"]["jax"]


def test_the_markdown_has_a_row_for_each_check(monkeypatch, tmp_path):
    distant = dataclasses.replace(DIFFERS, name="far", promise="A | B.")
    near = Check(
        "near",
        "It holds.",
        lambda quick: Outcome(2, "steps", "float64 within 1e-12 in norm", True, difference=2e-13),
        (),
    )
    far = dataclasses.replace(
        near,
        name="farther",
        run=lambda quick: dataclasses.replace(near.run(quick), difference=3e-13),
    )
    run_with(monkeypatch, tmp_path, near, far, distant, ABSENT)
    text = (tmp_path / "parity.md").read_text()
    assert text.startswith("2 agree, 1 differs, 1 skipped. python ")
    assert "near has the smallest deviation (2.0e-13) and farther the largest (3.0e-13)." in text
    assert "| `near` | It holds. | 2 steps | float64 within 1e-12 in norm | 2.0e-13 apart |" in text
    assert "| `far` | A / B. | 2 steps | 1e-12 | **differs**: 1.0e+00 apart |" in text
    assert "| `absent` | It holds. |  |  | **skipped**: no_such_package is not installed |" in text


def test_list_and_only(monkeypatch, tmp_path, capsys):
    assert run_with(monkeypatch, tmp_path, AGREES, DIFFERS, options=["--list"]) == 0
    assert "It holds." in capsys.readouterr().out
    assert run_with(monkeypatch, tmp_path, AGREES, DIFFERS, options=["--only", "fin"]) == 0
    with pytest.raises(SystemExit):
        run_with(monkeypatch, tmp_path, AGREES, options=["--only", "typo"])
    line = "argument --only: must begin the name of a check; got 'typo'. Choose: fine\n"
    assert capsys.readouterr().err.endswith(line)


# `test_harness.py` trains the same models, so one of them suffices here.
SLOW = ("training/convolutional", "training/encoder")


@pytest.mark.parametrize(
    "check",
    [
        pytest.param(check, id=check.name, marks=[pytest.mark.slow] * (check.name in SLOW))
        for check in checks.all_checks()
    ],
)
@pytest.mark.sample(2)
def test_every_check_passes(check):
    entry = program.run(check, quick=True)
    assert entry.outcome is not None
    if check.name.startswith("peer/") and EAGER_DIVISION_IS_EXACT:
        assert entry.outcome.ulp in (0, 1)
    else:
        assert entry.result == "agrees", report.found(entry)
    assert entry.outcome.compared > 0


@pytest.mark.parametrize("name", ["masks/jax", "dropout/float32", "peer/nnx"])
@pytest.mark.sample(2)
def test_a_planted_error_fails_a_check(monkeypatch, name):
    """Test of the tests: JAX draws with another key."""
    import jax

    import regjax

    original = regjax.bernoulli
    other = lambda key, *args, **options: original(jax.random.fold_in(key, 1), *args, **options)
    drop = regjax.dropout
    monkeypatch.setattr(regjax, "bernoulli", other)
    monkeypatch.setattr(regjax, "dropout", lambda x, rate, **o: drop(x, rate, sampler=other, **o))
    (check,) = [check for check in checks.all_checks() if check.name == name]
    assert not check.run(True).passed


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_ulps(dtype):
    one, tiny = dtype(1), np.finfo(dtype).smallest_subnormal
    assert ulps(np.array([one]), np.array([np.nextafter(one, dtype(2))])) == 1
    assert ulps(np.array([-tiny, one]), np.array([tiny, one])) == 2
    assert ulps(np.array([one]), np.array([one])) == 0
    assert Entry(AGREES, None).result == "skipped"
