from __future__ import annotations

import io
import itertools
import json
import math
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from examples.overfit import train_jax, train_torch
from examples.overfit.cli import main
from examples.overfit.curves import Curve, largest_difference
from examples.overfit.data import draw_batches, load_problem, split_digits, stratified_order
from examples.overfit.plots import PICTURES
from examples.overfit.recipes import recipes
from examples.overfit.report import CURVES_FILE, TABLE_FILE, terminal_table
from examples.overfit.settings import FRAMEWORKS, LARGEST_TRAIN_SIZE, OPTIMIZERS, Settings
from parity_tests.output import INTERRUPTED

ROOT = Path(__file__).parent.parent
TRAINS = {"jax": train_jax.train, "torch": train_torch.train}
NAMES = [recipe.name for recipe in recipes(0.1, 0.1)]
RESULTS = {CURVES_FILE, TABLE_FILE, *PICTURES}
SMALL = ["--steps", "3", "--width", "8", "--train-size", "20", "--batch-size", "5"]
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@cache
def train(framework, name, **settings):
    """Train with a recipe and the defaults of the optimizer."""
    optimizer = settings.get("optimizer", Settings.optimizer)
    defaults = {
        "learning_rate": OPTIMIZERS[optimizer].learning_rate,
        "weight_decay": OPTIMIZERS[optimizer].weight_decay,
    }
    chosen = Settings(**(defaults | settings))
    recipe = next(r for r in recipes(chosen.weight_decay, chosen.rate) if r.name == name)
    return TRAINS[framework](load_problem(chosen), recipe, chosen)


def fails(capsys, *argv):
    """Return the single line that the program prints when it rejects its options."""
    with pytest.raises(SystemExit) as exited:
        main(argv)
    printed = capsys.readouterr()
    assert exited.value.code == 2
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    return printed.err


INTEGERS = ("", "x", "1.5", "nan", "-1", "1e3", "99999999999")
NUMBERS = ("", "x", "nan", "inf", "-inf", "-0.1", "-1e-3", "1001")
BAD_OPTIONS = [
    *(("--steps", value, "integer from 1 to") for value in (*INTEGERS, "0")),
    *(("--seed", value, "integer from 0 to 4294967295") for value in INTEGERS),
    *(("--width", value, "integer from 1 to") for value in (*INTEGERS, "0")),
    *(("--batch-size", value, "integer from 1 to") for value in (*INTEGERS, "0")),
    *(("--train-size", value, "integer from 10 to 1000") for value in (*INTEGERS, "9", "1001")),
    *(("--rate", value, "in [0, 1)") for value in (*NUMBERS, "1", "1.0", "2")),
    *(("--weight-decay", value, "in [0, 1000]") for value in NUMBERS),
    *(("--learning-rate", value, "above 0") for value in (*NUMBERS, "0")),
    ("--optimizer", "lion", "'sgd', 'adam', 'adamw'"),
    ("--framework", "tensorflow", "'both', 'jax', 'torch'"),
    ("--out", "", "must name a folder or a file"),
]


@pytest.mark.parametrize(("option", "value", "allowed"), BAD_OPTIONS)
def test_a_wrong_value_gets_one_line_that_names_it(capsys, option, value, allowed):
    line = fails(capsys, option, value)
    assert option in line
    assert repr(value) in line
    assert allowed in line


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--batch-size", "30", "--train-size", "20"], ["--batch-size", "'30'", "20"]),
        (["--rate"], ["--rate"]),
        (["--verbose"], ["--verbose"]),
        (["--step", "3"], ["--step"]),
        (["--rate", "a\nb"], [r"'a\nb'"]),
    ],
)
def test_options_that_conflict_get_one_line(capsys, argv, expected):
    line = fails(capsys, *argv)
    assert all(word in line for word in expected)


@pytest.mark.parametrize("below", ["", "deeper/still"])
def test_a_folder_that_cannot_be_written_is_reported_before_training(
    capsys, monkeypatch, tmp_path, below
):
    monkeypatch.setattr("examples.overfit.runner.run_all", None)
    (tmp_path / "file").touch()
    folder = str(tmp_path / "file" / below)
    line = fails(capsys, "--out", folder)
    assert "--out" in line
    assert repr(folder) in line


@pytest.mark.parametrize("package", ["torch", "jax", "matplotlib", "sklearn", "rich"])
def test_a_missing_package_gets_one_line_with_the_command_to_install(
    capsys, monkeypatch, tmp_path, package
):
    monkeypatch.setitem(sys.modules, package, None)
    line = fails(capsys, *SMALL, "--out", str(tmp_path))
    assert package in line
    assert "pip install 'regjax[examples]'" in line


def test_help_shows_every_option_with_its_default(capsys):
    with pytest.raises(SystemExit) as exited:
        main(["--help"])
    assert exited.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert text.count("(default: ") == 11


# The second run is interrupted, after the first has imported everything.
ONE_RUN = """
import sys
from examples.overfit.cli import main

def interrupt(recipe, framework, step):
    if recipe.name != "none":
        raise KeyboardInterrupt

assert main(sys.argv[2:], on_evaluation=interrupt) == 130
assert sys.argv[1] not in sys.modules
"""


@pytest.mark.parametrize(
    ("framework", "absent"),
    [("jax", "torch"), pytest.param("torch", "jax", marks=pytest.mark.slow)],
)
def test_only_the_chosen_framework_is_imported(tmp_path, framework, absent):
    options = [*SMALL, "--framework", framework, "--out", str(tmp_path)]
    argv = [sys.executable, "-c", ONE_RUN, absent, *options]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    curves = json.loads((tmp_path / CURVES_FILE).read_text())
    assert {run["framework"] for run in curves["runs"]} == {framework}
    assert absent not in curves["versions"]
    # Not a terminal: a line for the run, one for the interrupt, and no control characters.
    assert len(done.stderr.splitlines()) == 2
    assert (done.stderr + done.stdout).replace("\n", "").isprintable()


def test_help_is_quick_because_it_imports_nothing_heavy():
    code = (
        "import sys; import examples.overfit.cli; "
        "heavy = {'jax', 'torch', 'sklearn', 'matplotlib', 'numpy'}; "
        "assert not heavy & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_results_are_written(capsys, tmp_path):
    folder = tmp_path / "new" / "folder"
    assert main([*SMALL, "--seed", "3", "--out", str(folder)]) == 0
    assert {path.name for path in folder.iterdir()} == RESULTS
    for picture in PICTURES:
        check_png(folder / picture)
    results = json.loads((folder / CURVES_FILE).read_text())
    assert results["settings"]["seed"] == 3
    assert {"python", "jax", "torch"} <= results["versions"].keys()
    runs = results["runs"]
    assert [(r["recipe_name"], r["framework"]) for r in runs] == list(
        itertools.product(NAMES, ["jax", "torch"])
    )
    for run in runs:
        assert run["steps"] == [0, 1, 2, 3]
        for curve in ("train_loss", "train_accuracy", "validation_loss", "validation_accuracy"):
            assert len(run[curve]) == 4
            assert all(math.isfinite(value) for value in run[curve])
        assert run["seconds"] > 0
    printed = capsys.readouterr().out
    assert str(folder) in printed
    table = (folder / TABLE_FILE).read_text()
    for text in (printed, table):
        assert "gap: valid last - train last" in text
        assert f"{runs[-1]['validation_loss'][-1]:.3f}" in text
    assert table.count("\n| ") == 1 + len(runs)


def test_the_table_fits_a_terminal_of_80_columns():
    curves = []
    for recipe, framework in itertools.product(recipes(0.003, 0.3), FRAMEWORKS):
        curves.append(Curve(recipe, framework))
        for step in (0, 1000):
            curves[-1].record(step, train=(1e-4, 1.0), validation=(0.69, 0.883))
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(terminal_table(curves))
    text = console.export_text()
    assert "…" not in text
    assert text.count("no regularization") == text.count("dropout + decay") == 2


def check_png(path):
    from matplotlib.image import imread

    assert path.read_bytes().startswith(PNG_SIGNATURE)
    pixels = imread(path)
    assert min(pixels.shape[:2]) > 500
    assert pixels.std() > 0.01  # something is drawn


def test_a_run_that_diverges_is_reported_and_leaves_valid_json(capsys, tmp_path):
    argv = [*SMALL, "--steps", "30", "--optimizer", "sgd", "--learning-rate", "1000"]
    assert main([*argv, "--framework", "torch", "--out", str(tmp_path)]) == 0
    assert "diverged" in capsys.readouterr().out
    text = (tmp_path / CURVES_FILE).read_text()
    assert any(None in run["validation_loss"] for run in json.loads(text)["runs"])
    assert "NaN" not in text
    assert {path.name for path in tmp_path.iterdir()} == RESULTS


def interrupt_at(name, framework, step):
    def interrupt(recipe, at_framework, at_step):
        if (recipe.name, at_framework, at_step) == (name, framework, step):
            raise KeyboardInterrupt

    return interrupt


def test_an_interrupt_leaves_finished_results(capsys, tmp_path):
    (tmp_path / "own.txt").write_text("kept")
    interrupt = interrupt_at("l2_in_loss", "torch", 2)
    assert main([*SMALL, "--out", str(tmp_path)], on_evaluation=interrupt) == INTERRUPTED
    runs = json.loads((tmp_path / CURVES_FILE).read_text())["runs"]
    finished = [("none", "jax"), ("none", "torch"), ("l2_in_loss", "jax")]
    assert [(run["recipe_name"], run["framework"]) for run in runs] == finished
    assert {path.name for path in tmp_path.iterdir()} == {*RESULTS, "own.txt"}
    printed = capsys.readouterr()
    assert "interrupted: 3 runs have finished" in printed.err
    assert "Traceback" not in printed.err
    assert "L2 in the loss" in printed.out
    assert str(tmp_path) in printed.out


def test_an_interrupt_before_the_first_result_keeps_earlier_results(capsys, tmp_path):
    earlier = tmp_path / CURVES_FILE
    earlier.write_text("{}")
    interrupt = interrupt_at("none", "jax", 0)
    assert main([*SMALL, "--out", str(tmp_path)], on_evaluation=interrupt) == INTERRUPTED
    assert "interrupted" in capsys.readouterr().err
    assert earlier.read_text() == "{}"
    assert list(tmp_path.iterdir()) == [earlier]


def test_the_first_finished_run_replaces_earlier_results(capsys, tmp_path):
    for name in RESULTS:
        (tmp_path / name).write_text("earlier")
    interrupt = interrupt_at("none", "torch", 0)
    assert main([*SMALL, "--out", str(tmp_path)], on_evaluation=interrupt) == INTERRUPTED
    assert all(path.read_bytes() != b"earlier" for path in tmp_path.iterdir())


def test_results_that_cannot_be_saved_get_one_line(capsys, monkeypatch, tmp_path):
    def full(path, text):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("examples.overfit.report.write_atomically", full)
    assert main([*SMALL, "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("optimizer", "name"),
    [*(("adam", name) for name in NAMES), ("sgd", "weight_decay"), ("adamw", "weight_decay")],
)
@pytest.mark.sample(2)
def test_both_frameworks_agree_at_every_evaluation(name, optimizer):
    """The masks are the same, so the curves differ by float32 rounding only."""
    jax, torch = (
        train(framework, name, steps=60, width=32, optimizer=optimizer)
        for framework in ("jax", "torch")
    )
    assert jax.steps == torch.steps == list(range(61))
    assert largest_difference(jax.train_loss, torch.train_loss) < 1e-4
    assert largest_difference(jax.validation_loss, torch.validation_loss) < 1e-4
    # Rounding may change the class of an image near a decision boundary.
    assert largest_difference(jax.validation_accuracy, torch.validation_accuracy) < 0.005


def test_another_mask_gives_another_curve():
    """Test of the previous test, which would detect different masks."""
    one = train("torch", "dropout", steps=60, width=32, optimizer="adam")
    other = train("torch", "dropout", steps=60, width=32, optimizer="adam", rate=0.31)
    assert largest_difference(one.validation_loss, other.validation_loss) > 1e-3


@pytest.mark.parametrize("framework", TRAINS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.sample(2)
def test_half_the_decay_in_the_loss_is_coupled_weight_decay(framework, optimizer):
    penalty, decay = (
        train(framework, name, steps=60, width=32, optimizer=optimizer).validation_loss
        for name in ("l2_in_loss", "weight_decay")
    )
    if OPTIMIZERS[optimizer].coupled:
        assert largest_difference(penalty, decay) < 1e-4
    else:
        assert largest_difference(penalty, decay) > 1e-2


@pytest.mark.parametrize("framework", TRAINS)
def test_decay_gives_another_curve(framework):
    """Test of the previous test: two runs without decay would agree, too."""
    none, decay = (
        train(framework, name, steps=60, width=32, optimizer="adam").validation_loss
        for name in ("none", "weight_decay")
    )
    assert largest_difference(none, decay) > 1e-2


@pytest.mark.parametrize("framework", TRAINS)
def test_the_loss_reported_is_the_data_loss_without_dropout(framework):
    """Before the first step all recipes have the same network and the same losses."""
    starts = {
        (c.train_loss[0], c.validation_loss[0])
        for c in (train(framework, name, steps=60, width=32, optimizer="adam") for name in NAMES)
    }
    assert len(starts) == 1


def test_the_validation_set_is_the_same_for_every_train_size():
    splits = [split_digits(size, np.random.default_rng(0)) for size in (10, 100, 1000)]
    for train_set, validation in splits:
        np.testing.assert_array_equal(validation.pixels, splits[0][1].pixels)
        counts = np.bincount(train_set.labels, minlength=10)
        assert counts.max() - counts.min() <= 1 + 0.02 * len(train_set.labels)
        assert not {p.tobytes() for p in train_set.pixels} & {
            p.tobytes() for p in validation.pixels
        }
    assert len(splits[0][1].labels) == 1797 - LARGEST_TRAIN_SIZE
    assert sorted(splits[0][0].labels) == list(range(10))


def test_a_stratified_order_contains_every_image_once():
    labels = np.repeat([0, 1, 2], [10, 20, 30])
    order = stratified_order(labels, np.random.default_rng(0))
    assert sorted(order) == list(range(60))
    for prefix in range(6, 61, 6):
        assert (
            np.abs(np.bincount(labels[order[:prefix]]) / prefix - [1 / 6, 2 / 6, 3 / 6]).max() < 0.1
        )


def test_batches_contain_each_image_once_per_epoch():
    batches = draw_batches(7, 5, 20, np.random.default_rng(0))
    assert batches.shape == (7, 5)
    assert sorted(batches[:4].ravel()) == list(range(20))
    assert len(set(batches[4:].ravel().tolist())) == 15


@pytest.mark.slow
@pytest.mark.parametrize("framework", TRAINS)
def test_the_defaults_show_overfitting_and_its_remedies(framework):
    """Without regularization validation loss falls and then rises; each remedy limits the rise."""
    plain, *regularized = (train(framework, name) for name in NAMES)
    lowest = min(plain.validation_loss)
    assert plain.validation_loss[0] > 2 * lowest
    assert plain.validation_loss[-1] > 1.5 * lowest
    assert plain.train_loss[-1] < 1e-3
    assert plain.train_accuracy[-1] == 1.0
    assert plain.validation_accuracy[-1] < 0.95
    for curve in regularized:
        assert curve.validation_loss[-1] < 1.25 * min(curve.validation_loss)
        assert curve.validation_loss[-1] < 0.8 * plain.validation_loss[-1]
        assert curve.gap < 0.8 * plain.gap
