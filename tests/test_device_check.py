"""The check of a device: a rehearsal on the CPU, planted defects, and a lack of time."""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import device_check, device_record, device_results, device_times
from benchmarks.device_record import FAILED, LATE, PASSED, SKIPPED, Outcome, Record
from benchmarks.device_sides import NotApplicableError, Sides, WrongResultError, runner, within
from benchmarks.race import Result

ROOT = Path(__file__).parent.parent
CPU = jax.devices("cpu")[0]
RUN = runner(CPU)
# Those that compile little; the whole rehearsal is slow.
QUICK = ("refusals",)


def sides(device=RUN) -> Sides:
    return Sides(device, RUN, [CPU], is_rehearsal=True)


def flipped(kinds: str, function, *arguments):
    """Run a function, and flip the last bit of one element of each array of some kinds."""

    def flip(x):
        if x.dtype.kind not in kinds or not x.size:
            return x
        bits = np.array(x).reshape(-1).view(np.uint8)
        bits[bits.size // 2 // x.itemsize * x.itemsize] ^= 1
        return bits.view(x.dtype).reshape(x.shape)

    return jax.tree.map(flip, RUN(function, *arguments))


def test_without_a_device_there_is_one_line(capsys, tmp_path):
    assert device_check.main(["--out", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("no GPU or TPU: JAX ")
    assert err.endswith(" has devices of cpu only. Nothing was checked. See --rehearse.\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("missing", "line"),
    [
        ("all", "no GPU or TPU: JAX does not start with JAX_PLATFORMS='cuda' (AssertionError). "),
        ("cpu", "no CPU to compare with: set JAX_PLATFORMS=cuda,cpu; got 'cuda'. "),
    ],
)
def test_a_platform_that_does_not_start_is_one_line(capsys, monkeypatch, tmp_path, missing, line):
    def devices(platform=None):
        if missing == "all":
            raise AssertionError
        if platform:
            raise RuntimeError("Unknown backend cpu")
        return [CPU]

    monkeypatch.setattr(jax, "devices", devices)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    assert device_check.main(["--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"{line}Nothing was checked. See --rehearse.\n"


def rehearse(tmp_path, *options: str) -> Record:
    code = device_check.main(["--rehearse", "--out", str(tmp_path), *options])
    record = device_record.load(tmp_path / "device_check_rehearsal.json")
    assert (tmp_path / "device_check_rehearsal.md").read_text() == device_record.markdown(record)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "device_check_rehearsal.json",
        "device_check_rehearsal.md",
    ]
    assert record.code == code
    return record


def test_a_rehearsal_checks_before_it_measures(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(
        device_results, "CHECKS", {name: device_results.CHECKS[name] for name in QUICK}
    )
    monkeypatch.setattr(device_times, "cases", lambda *_: [case("first"), case("second")])
    record = rehearse(tmp_path)
    assert [(check.name, check.status) for check in record.checks] == [(n, PASSED) for n in QUICK]
    assert [timing.result.title for timing in record.timings] == ["first", "second"]
    assert record.code == 0
    text = device_record.markdown(record)
    assert "**8 x cpu** (cpu), 20" in text
    assert "This is a rehearsal on a CPU: its times have no meaning." in text
    out = capsys.readouterr().out
    assert out.index("refusals") < out.index("timed ")


@pytest.mark.slow
def test_a_whole_rehearsal_passes(tmp_path):
    with jax.numpy_dtype_promotion("standard"):  # as the layers of Flax require
        record = rehearse(tmp_path, "--seconds", "2000")
    outcomes = {check.name: (check.status, check.detail) for check in record.checks}
    assert outcomes.keys() == device_results.CHECKS.keys()
    assert {status for status, _ in outcomes.values()} == {PASSED}, outcomes
    assert not record.left_out
    for timing in record.timings:
        assert not timing.left_out
        names = timing.result.seconds.keys()
        assert {timing.base, "regjax", "regjax, packed", "Flax Linen"} < names
    assert [timing.kind for timing in record.timings] == ["dropout"] * 4 + ["attention"] * 4


PLANTED = {
    "golden vectors": ("b", "is not the golden mask"),
    "masks": ("b", "1 of 1,000 elements differ"),
    "dropout": ("fV", "1 of 65,536 elements differ"),
    "masks of attention": ("b", "1 of 32,768 elements differ"),
}


@pytest.mark.parametrize(
    "name",
    [n if n == "golden vectors" else pytest.param(n, marks=pytest.mark.slow) for n in PLANTED],
)
def test_a_planted_defect_is_found(name):
    kinds, words = PLANTED[name]
    outcome = device_results.check(name, sides(functools.partial(flipped, kinds)))
    assert outcome.status == FAILED
    assert words in outcome.detail


def test_a_wrong_value_or_no_number_is_found():
    zeros = {"x": np.zeros(3, np.float32)}
    assert within(zeros, zeros, 1e-3) == "within 0.0e+00 of at most 1e-03"
    for wrong in (2e-3, np.nan):
        with pytest.raises(WrongResultError, match="x: deviates by"):
            within({"x": np.array([0, wrong, 0], np.float32)}, zeros, 1e-3)
    with pytest.raises(WrongResultError, match="must be float32"):
        within({"x": np.zeros(3)}, zeros, 1e-3)


def test_errors_and_reasons_are_outcomes(monkeypatch):
    def fail(error: Exception):
        def run(_):
            raise error

        return run

    cases = {
        "compiler": (ValueError("no such instruction\nat line 1"), FAILED),
        "none": (NotApplicableError("there is one device"), SKIPPED),
    }
    checks = {name: fail(error) for name, (error, _) in cases.items()}
    monkeypatch.setattr(device_results, "CHECKS", checks)
    found = {name: device_results.check(name, sides()) for name in cases}
    assert {name: x.status for name, x in found.items()} == {n: s for n, (_, s) in cases.items()}
    assert found["compiler"].detail == "ValueError: no such instruction"
    assert found["none"].detail == "there is one device"


def test_wrong_results_have_no_times():
    checks = [Outcome("masks", FAILED, "1 of 3 elements differ"), Outcome("dropout", PASSED, "")]
    found = device_check.time_all([case("first")], checks, device_check.Budget(100))
    assert found == ([], ["Nothing was timed, because results are wrong: masks."])


def test_what_does_not_fit_into_the_time_is_listed(monkeypatch):
    now = iter(range(0, 1000, 30))  # each look at the clock takes 30 seconds
    budget = device_check.Budget(100, clock=lambda: next(now))
    checks = {name: lambda _: "" for name in ("first", "second", "third", "fourth", "fifth")}
    monkeypatch.setattr(device_results, "CHECKS", checks)
    found = device_check.check_all(sides(), budget)
    assert [check.status for check in found] == [PASSED, PASSED, PASSED, LATE, LATE]
    monkeypatch.setattr(device_times, "measure", None)
    late = device_check.Budget(0)
    timings, left_out = device_check.time_all([case("first")], [], late)
    assert (timings, left_out) == ([], ["Not timed, because time was up: dropout, first."])
    assert record(found).code == 1


def case(title: str) -> device_times.Case:
    def fail():
        raise NotImplementedError("cuDNN is not installed\nmore")

    runs = {"copy": lambda: jnp.zeros(3), "regjax": lambda: jnp.ones(3), "other": fail}
    return device_times.Case("dropout", title, "copy", lambda: runs, 3, rounds=2)


def test_a_candidate_that_does_not_run_is_left_out_with_the_reason():
    timing = device_times.measure(case("first"))
    assert timing.result.seconds.keys() == {"copy", "regjax"}
    assert timing.left_out == {"other": "NotImplementedError: cuDNN is not installed"}
    text = device_record.markdown(record([], [timing]))
    assert "| first |" in text
    assert "\n- No time of other: NotImplementedError: cuDNN is not installed\n" in text


def test_a_time_is_that_of_one_call(monkeypatch):
    """A batch of 4 calls of 2.5 ms each, on a clock that the calls advance."""
    now = [0.0]

    def run():
        now[0] += 0.0025
        return jnp.zeros(1)

    one = device_times.Case("dropout", "title", "copy", lambda: {"copy": run}, 1, rounds=3)
    timing = device_times.measure(one, clock=lambda: now[0])
    assert timing.calls == 4
    assert timing.result.seconds["copy"] == pytest.approx([0.0025] * 3)


def record(checks, timings=()) -> Record:
    device = {"kind": "card", "platform": "gpu", "number": 1, "runtime": "", "driver": "1.2"}
    versions = {"versions": {"jax": "1", "torch": None}}
    return Record(device, False, "2026-01-02", versions, checks, timings, [], 12.0)


def test_tables_name_the_card_and_the_date():
    checks = [Outcome("masks", PASSED, "a|b"), Outcome("regtorch", SKIPPED, "no CUDA device")]
    seconds = {"copy": [1e-3, 2e-3, 3e-3], "regjax": [2e-3, 4e-3, 6e-3]}
    timing = device_record.Timing("dropout", "copy", Result("float32", 10, seconds), 1, {})
    text = device_record.markdown(record(checks, [timing]))
    assert text.startswith("**1 x card** (gpu), 2026-01-02; driver 1.2, jax 1. The run took 12 s.")
    assert "rehearsal" not in text
    assert "| masks | passed | a/b |\n| regtorch | skipped | no CUDA device |" in text
    assert "| medians, over a copy | ms | regjax |\n| --- | ---: | ---: |" in text
    assert "| float32 | 2.000 | 2.00 |" in text
    assert record(checks).code == 0


def test_the_documentation_has_the_record_or_says_that_there_is_none():
    page = (ROOT / "docs" / "benchmarks" / "device_check.md").read_text()
    path = ROOT / "docs" / "benchmarks" / "device_check.json"
    if path.exists():
        found = device_record.load(path)
        assert not found.is_rehearsal
        assert page == device_record.markdown(found)
    else:
        assert page == "No run on a GPU or a TPU has been recorded yet.\n"
