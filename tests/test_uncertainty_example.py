"""The example of Monte Carlo dropout: its files, and uncertainty that grows with corruption."""

from __future__ import annotations

import json
from functools import cache

import numpy as np
import pytest

from examples.uncertainty import cli, study
from examples.uncertainty.corruptions import CORRUPTIONS
from examples.uncertainty.plots import PICTURE
from examples.uncertainty.report import RESULTS_FILE, TABLE_FILE
from examples.uncertainty.settings import Settings

SMALL = Settings(steps=300, samples=20, width=64)
BY_NAME = {corruption.name: corruption for corruption in CORRUPTIONS}


STEPS: list[int] = []
SCENES: list[study.Scene] = []


@cache
def small_study() -> study.Study:
    return study.run(SMALL, STEPS.append, SCENES.append)


def test_it_writes_tables_and_a_picture(tmp_path, capsys, monkeypatch):
    chosen = []
    small = small_study()
    monkeypatch.setattr(study, "run", lambda settings, **_: chosen.append(settings) or small)
    argv = ["--steps", "300", "--samples", "20", "--width", "64", "--out", str(tmp_path)]
    assert cli.main(argv) == 0
    assert chosen == [SMALL]
    assert {path.name for path in tmp_path.iterdir()} == {TABLE_FILE, RESULTS_FILE, PICTURE}
    printed = capsys.readouterr().out
    assert "AUROC" in printed
    assert "PyTorch, with the same weights and the same masks" in printed
    results = json.loads((tmp_path / RESULTS_FILE).read_text())
    assert results["settings"]["samples"] == 20
    assert len(results["scenes"]) == sum(len(c.strengths) for c in CORRUPTIONS)
    for scene in results["scenes"]:
        for view in (scene["one_pass"], scene["mc"]):
            assert 0 <= view["accuracy"] <= 1
            assert 0 <= view["entropy"] <= np.log(10) + 1e-6


def test_progress_is_reported():
    small_study()
    assert list(range(50, 301, 50)) == STEPS
    assert small_study().scenes == SCENES


@pytest.mark.parametrize(
    "argv",
    [["--rate", "1"], ["--rate", "x"], ["--samples", "0"], ["--steps", "1.5"], ["--out", ""]],
    ids=" ".join,
)
def test_a_wrong_option_is_refused(argv, capsys, tmp_path):
    (tmp_path / "file").touch()
    argv = ["--out", str(tmp_path / "file")] if argv[0] == "--out" else argv
    with pytest.raises(SystemExit) as exited:
        cli.main(argv)
    assert exited.value.code == 2
    assert argv[0] in capsys.readouterr().err


def test_help_names_every_option_with_its_default(capsys):
    with pytest.raises(SystemExit) as exited:
        cli.main(["--help"])
    assert exited.value.code == 0
    assert " ".join(capsys.readouterr().out.split()).count("(default: ") == 7


@pytest.mark.parametrize(
    ("name", "reach"), [("rotation", 30), ("noise", 0.6), ("occlusion", 5), ("blending", 0.5)]
)
def test_uncertainty_grows_with_corruption_up_to_a_limit(name, reach):
    """Beyond the limit an image may look like another digit, as the table of the example shows."""
    scenes = [s for s in small_study().of(BY_NAME[name]) if s.strength <= reach]
    for values in (
        [s.many.entropy.mean() for s in scenes],
        [s.disagreement.mean() for s in scenes],
    ):
        assert (np.diff(values) > 0).all()
        assert values[-1] > 1.3 * values[0]


def test_many_passes_are_less_confident_than_one():
    for scene in small_study().scenes:
        assert scene.many.confidence.mean() < scene.one.confidence.mean()
        assert (scene.disagreement <= scene.many.entropy + 1e-6).all()


def test_uncertainty_detects_errors():
    auroc = study.detection(small_study().scenes)
    assert min(auroc.values()) > 0.65
    # Test of the test: an uninformative score detects nothing.
    scenes = small_study().of(BY_NAME["noise"])
    blind = [
        study.Scene(**vars(s) | {"disagreement": np.sin(1e4 * np.arange(797))}) for s in scenes
    ]
    assert abs(study.detection(blind)["MI"] - 0.5) < 0.05


def test_pytorch_agrees():
    assert study.distance_to_torch(small_study()) < 1e-5


@pytest.mark.parametrize("corruption", CORRUPTIONS, ids=lambda c: c.name)
def test_corruptions_start_at_zero_and_keep_valid_images(corruption):
    rng = np.random.default_rng(0)
    pixels, labels = rng.random((20, 64), np.float32), np.arange(20) % 10
    assert corruption.strengths[0] == 0
    for strength in corruption.strengths:
        corrupted = corruption.apply(pixels, labels, strength, np.random.default_rng(1))
        assert corrupted.shape == pixels.shape
        assert corrupted.dtype == np.float32
        assert corrupted.min() >= 0
        assert corrupted.max() <= 1 + 1e-6
        assert np.array_equal(corrupted, pixels) == (strength == 0)


def test_the_measures_of_a_known_view():
    probs = np.full((4, 10), 0.1 / 9)
    probs[:, 3] = 0.9
    view = study.View(probs, np.array([3, 3, 3, 0]))
    assert view.right.mean() == 0.75
    assert view.calibration_error == pytest.approx(0.15)
    assert view.log_loss == pytest.approx(-(3 * np.log(0.9) + np.log(0.1 / 9)) / 4)
