"""A certificate finds every mask that the number of devices or a restart changes."""

import doctest
import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import regjax
from regjax import _certificate as certificate
from tests.regjax import certified_runs

# The sites whose masks differ from those on one device, in each run.
WRONG = {"4 devices": {"hash", "count", "index"}, "restart": {"hash", "counter"}}


@pytest.mark.slow
def test_wrong_keys_are_found_in_every_run():
    runs = []
    found = regjax.certify_masks(certified_runs.train, devices=(1, 4), progress=runs.append)
    assert runs == list(found.runs) == ["1 device", "4 devices", "restart"]
    assert {row.site for row in found.rows} == {
        *("hidden", "features", "layers", "counter", "hash", "count", "index", "rows")
    }
    for run, sites in WRONG.items():
        assert {row.site for row, name in found.differences if name == run} == sites
    assert {row.step for row, _ in found.differences} == {0, 1}
    text = str(found)
    assert "same rows" in next(line for line in text.splitlines() if "rows " in line)
    summary = "7 of 16 masks differ; the first is that of 'hash' in step 0, 4 devices."
    assert summary in text
    with pytest.raises(AssertionError, match=summary):
        found.raise_if_different()


def hashed(*masks):
    return certificate._hash(np.array(mask, bool) for mask in masks)


def row(first, second):
    return certificate.CertificateRow(0, "site", {"1 device": first, "2 devices": second})


MASK = np.random.default_rng(0).integers(0, 2, (4, 64))


@pytest.mark.parametrize(
    ("second", "cell"),
    {
        "equal": (hashed(MASK), "same"),
        "drawn again by a checkpoint": (hashed(MASK, MASK), "same"),
        "in parts": (hashed(MASK[:2], MASK[2:]), "same rows"),
        "one element": (hashed(MASK ^ (np.arange(64) == 5)), None),
        "swapped rows": (hashed(MASK[::-1]), None),
        "another part": (hashed(MASK[:2], MASK[1:3]), None),
        "other shape": (hashed(MASK.reshape(64, 4)), None),
        "nothing": (None, "no mask"),
    }.values(),
    ids=str,
)
def test_comparison_of_hashes(second, cell):
    found = row(hashed(MASK), second)
    assert found.differs("2 devices") == (cell in (None, "no mask"))
    assert found.cell("2 devices") == (cell or second.whole)


def test_masks_agree():
    rows = tuple(row(hashed(MASK), hashed(MASK)) for _ in range(2))
    found = certificate.MaskCertificate(("1 device", "2 devices"), rows, 1)
    found.raise_if_different()
    assert str(found).endswith("2 masks agree in 2 runs.")


def masks(devices, start, stop):
    for step in range(start, stop):
        for rate in (0.5, 0.5, 0.0):
            key = jax.random.fold_in(jax.random.key(0), step)
            regjax.dropout(jnp.ones(8), rate, key=key)
        yield


def test_places_without_names():
    first, second = certificate._hashes(masks, 1, 0, 2)
    place = rf"dropout (test_certificate.py:{masks.__code__.co_firstlineno + 4})"
    assert [*first] == [*second] == [place, f"{place}, mask 2"]
    assert first[place] == first[f"{place}, mask 2"] != second[place]


def test_every_run_is_compared_with_the_first(monkeypatch):
    runs = {(1, 0): "aa", (2, 0): "ab", (1, 1): "c"}
    monkeypatch.setattr(
        certificate,
        "_in_new_process",
        lambda _platform, _train, count, start, _stop: [
            {"site": hashed(MASK ^ (np.arange(64) == ord(mask) - 96))}
            for mask in runs[count, start]
        ],
    )
    found = regjax.certify_masks(masks, devices=(1, 2))
    assert [(row.step, run) for row, run in found.differences] == [(1, "2 devices"), (1, "restart")]


def any_value(value: Any) -> Any:
    return value


def unyielding(devices, start, stop):
    return None


def on_no_platform():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda: jax.local_devices(backend="abacus"))
        certificate._hashes(masks, 1, 0, 1)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: regjax.certify_masks(lambda *_: iter([])), ValueError, "top level of a module"),
        (lambda: regjax.certify_masks(any_value(3)), TypeError, "train"),
        (lambda: regjax.certify_masks(masks, devices=(1, 0)), ValueError, r"devices .* \(1, 0\)"),
        (lambda: regjax.certify_masks(masks, devices=(2, 2)), ValueError, "distinct"),
        (lambda: regjax.certify_masks(masks, devices=()), ValueError, "devices must"),
        (lambda: regjax.certify_masks(masks, steps=1), ValueError, "steps"),
        (lambda: regjax.certify_masks(masks, platform=any_value(None)), TypeError, "platform"),
        (lambda: certificate._hashes(masks, 99, 0, 1), ValueError, "devices must .* got 99"),
        (on_no_platform, ValueError, "platform must be one for which JAX finds devices; got"),
        (lambda: certificate._hashes(unyielding, 1, 0, 1), TypeError, "Add `yield`"),
        (lambda: certificate._hashes(lambda *_: iter([0]), 1, 0, 2), ValueError, "got only 1"),
        (
            lambda: certificate._hashes(lambda *_: itertools.count(), 1, 0, 2),
            ValueError,
            "got more",
        ),
    ],
)
def test_wrong_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.slow
def test_a_process_that_dies_is_an_error():
    with pytest.raises(RuntimeError, match="ended without a result"):
        regjax.certify_masks(certified_runs.dies, devices=(1,))


@pytest.mark.slow
def test_a_step_without_masks_is_an_error():
    with pytest.raises(ValueError, match="train must draw masks"):
        regjax.certify_masks(certified_runs.draws_nothing, devices=(1,))


@pytest.mark.slow
def test_the_example_is_a_script_with_this_output(tmp_path):
    examples = doctest.DocTestParser().get_examples(regjax.certify_masks.__doc__ or "")
    script = tmp_path / "train.py"
    script.write_text("".join(example.source for example in examples))
    run = subprocess.run(
        [sys.executable, script],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path.cwd())},
    )
    assert run.stdout.split() == examples[-1].want.split()
