"""Training runs with dropout in both frameworks, and planted defects that are located."""

from __future__ import annotations

import dataclasses
import math

import jax
import numpy as np
import optax
import pytest
import torch

import regjax
from parity_tests import models
from parity_tests.compare import BITWISE, FLOAT32, FLOAT64, Tier
from parity_tests.harness import (
    Comparison,
    Divergence,
    Leaf,
    compare_forward,
    compare_step,
    compare_training,
)
from parity_tests.models import DROPPED_BEFORE, PAIRS, PERCEPTRON, batches, sides

OPTIMIZERS = {
    "sgd": (
        regjax.optim.sgd(0.05, momentum=0.9, weight_decay=1e-3),
        lambda m: torch.optim.SGD(m.parameters(), 0.05, momentum=0.9, weight_decay=1e-3),
    ),
    "adam": (
        regjax.optim.adam(1e-3, weight_decay=1e-3),
        lambda m: torch.optim.Adam(m.parameters(), 1e-3, weight_decay=1e-3),
    ),
    "adamw": (
        regjax.optim.adamw(1e-3, weight_decay=0.1),
        lambda m: torch.optim.AdamW(m.parameters(), 1e-3, weight_decay=0.1),
    ),
}
# Rounding accumulates over a thousand steps; this is the bound in norm of the longest recursion.
THOUSAND_STEPS = dataclasses.replace(FLOAT64, tolerance=1e-10)
# Over hundreds of steps rounding accumulates in float32, so only losses are compared.
LOSSES = Tier("float32", tolerance=math.inf)


def first_of(found: Comparison) -> Divergence:
    assert found.first is not None
    return found.first


def run(name: str, optimizer: str, steps: int, tier: Tier, **options):
    pair = PAIRS[name]
    with jax.enable_x64(tier.dtype == "float64"):
        both = sides(pair, *OPTIMIZERS[optimizer], dtype=tier.dtype)
        return compare_training(*both, batches(steps, tier.dtype), pair.names, tier=tier, **options)


# Every optimizer with the smallest model, and every model with one optimizer; the others are slow.
RUNS = [
    pytest.param(
        name,
        optimizer,
        marks=[] if name == "perceptron" or optimizer == "adamw" else pytest.mark.slow,
    )
    for name in PAIRS
    for optimizer in OPTIMIZERS
]


@pytest.mark.parametrize(("name", "optimizer"), RUNS)
@pytest.mark.sample(2)
def test_float64_runs_are_the_same(name, optimizer):
    found = run(name, optimizer, 20, FLOAT64)
    found.raise_if_different()
    assert all(len(values) == 20 for values in found.deviations.values() if values)
    assert found.deviations["mask"] == [0.0] * 20
    assert found.deviations["state"]


@pytest.mark.parametrize(
    "name",
    [
        "perceptron",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("convolutional", "encoder")),
    ],
)
def test_float32_runs_are_the_same(name):
    found = run(name, "adamw", 30, FLOAT32)
    found.raise_if_different()
    assert found.deviations["mask"] == [0.0] * 30


@pytest.mark.parametrize(
    "steps", [15, pytest.param(1000, marks=pytest.mark.slow)], ids=["15", "1000"]
)
def test_an_unmodified_transformer_layer_of_pytorch_trains_the_same(steps):
    """Compare a converted torch.nn.TransformerEncoderLayer with attention in JAX."""
    pair = models.UNMODIFIED_ENCODER
    with jax.enable_x64(True):
        both = sides(pair, *OPTIMIZERS["adamw"], dtype="float64")
        found = compare_training(*both, batches(steps, "float64"), pair.names, tier=THOUSAND_STEPS)
    found.raise_if_different()


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", PAIRS)
def test_a_thousand_steps_in_float64(name, optimizer):
    found = run(name, optimizer, 1000, THOUSAND_STEPS, record=False)
    found.raise_if_different()
    losses = [ours for ours, _ in found.losses]
    assert np.mean(losses[-100:]) < np.mean(losses[:100])  # the model learned


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", PAIRS)
def test_three_hundred_losses_in_float32(name, optimizer):
    found = run(name, optimizer, 300, LOSSES, record=False)
    assert len(found.losses) == 300
    assert max(found.deviations["loss"]) < 1e-4


def with_options(make_ours, make_theirs):
    return {"jax_optimizer": make_ours, "torch_optimizer": make_theirs}


def decayed_kernels(model):
    kernels = [p for p in model.parameters() if p.ndim > 1]
    biases = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": kernels}, {"params": biases, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, 0.1, weight_decay=0.1)


SGD = dict(zip(("jax_optimizer", "torch_optimizer"), OPTIMIZERS["sgd"], strict=True))
PLANTED = {
    "a key off by one step": (PERCEPTRON, {**SGD, "plant": "key"}, ("mask", "out")),
    "rate .11 for .1": (PERCEPTRON, {**SGD, "plant": "rate"}, ("mask", "out")),
    "dropout before the activation": (DROPPED_BEFORE, SGD, ("activation", "out")),
    "bias decayed on one side": (
        PERCEPTRON,
        with_options(regjax.optim.sgd(0.1, weight_decay=0.1), decayed_kernels),
        ("update", "bias"),
    ),
    "nesterov on one side": (
        PERCEPTRON,
        with_options(
            regjax.optim.sgd(0.1, momentum=0.9, nesterov=True),
            lambda m: torch.optim.SGD(m.parameters(), 0.1, momentum=0.9),
        ),
        ("update", ""),
    ),
    "eps 1e-7 for 1e-8": (
        PERCEPTRON,
        with_options(
            regjax.optim.adam(1e-3, eps=1e-7), lambda m: torch.optim.Adam(m.parameters(), 1e-3)
        ),
        ("update", ""),
    ),
    "another learning rate": (
        PERCEPTRON,
        with_options(optax.sgd(0.1), lambda m: torch.optim.SGD(m.parameters(), 0.11)),
        ("update", ""),
    ),
}


@pytest.mark.parametrize(("pair", "options", "where"), PLANTED.values(), ids=PLANTED)
@pytest.mark.sample(2)
def test_a_planted_defect_is_named_at_its_step_and_place(pair, options, where):
    with jax.enable_x64(True):
        both = sides(pair, **options, dtype="float64")
        found = compare_training(*both, batches(5, "float64"), pair.names, tier=FLOAT64)
    assert first_of(found).step == 1
    assert first_of(found).quantity == where[0]
    assert where[1] in first_of(found).name
    with pytest.raises(AssertionError, match=r"JAX and PyTorch diverge at step 1, in the"):
        found.raise_if_different()


def test_a_defect_that_comes_late_is_named_at_its_step():
    """Change the learning rate on one side after three steps."""
    schedule = lambda count: jax.numpy.where(count < 3, 0.1, 0.2)
    both = sides(PERCEPTRON, optax.sgd(schedule), lambda m: torch.optim.SGD(m.parameters(), 0.1))
    found = compare_training(*both, batches(6), PERCEPTRON.names)
    assert (first_of(found).step, first_of(found).quantity) == (4, "update")
    assert len(found.losses) == 4  # it stops at the divergence


@pytest.fixture(scope="module")
def wrong_rate() -> Comparison:
    return compare_step(*sides(PERCEPTRON, **SGD, plant="rate"), batches(1)[0], PERCEPTRON.names)


def test_different_masks_are_told_with_their_rates(wrong_rate):
    assert "rate 0.11 in JAX and 0.1 in PyTorch; 9 of 1024 elements" in first_of(wrong_rate).detail


def test_progress_table_and_plot(tmp_path):
    both, steps = sides(PERCEPTRON, **SGD), []
    found = compare_training(*both, batches(3), PERCEPTRON.names, progress=steps.append)
    assert steps == [1, 2, 3]
    assert "JAX and PyTorch agree." in str(found)
    assert "| parameter | 3 |" in found.table()
    found.plot(tmp_path / "runs.png")
    assert (tmp_path / "runs.png").stat().st_size > 10_000


def test_a_run_of_one_step_can_be_seen(wrong_rate):
    """A run that diverges at the first step has one point, which needs a marker."""
    losses, apart = wrong_rate.figure().axes
    drawn = [line for line in apart.lines if not line.get_label().startswith("bound")]
    for line in [*losses.lines, *drawn]:
        assert np.size(line.get_xdata()) == 1
        assert line.get_marker() == "o"


def test_compare_forward():
    x = np.linspace(0, 1, 5).astype(np.float32)
    assert compare_forward(jax.numpy.asarray(x), torch.from_numpy(x), BITWISE) == 0
    with pytest.raises(AssertionError, match=r"outputs differ: deviation 1\.000e"):
        compare_forward(jax.numpy.asarray(x), torch.from_numpy(x + 1))
    with pytest.raises(
        AssertionError, match=r"differ in form: JAX float32\[5\], PyTorch float32\[4"
    ):
        compare_forward(jax.numpy.asarray(x), torch.from_numpy(x[:4]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hiden/kernel": Leaf("hidden.weight")}, "JAX parameters that do not exist: hiden/kernel"),
        ({"hidden/bias": Leaf("hidden.b")}, "PyTorch parameters that do not exist: hidden.b"),
        ({"hidden/kernel": Leaf("hidden.weight")}, r"'hidden/kernel' must be float32\[32, 64\]"),
    ],
)
def test_names_that_do_not_fit_are_refused(change, message):
    names = {**PERCEPTRON.names, **change}
    names = {path: leaf for path, leaf in names.items() if leaf is not None}
    with pytest.raises(ValueError, match=message):
        compare_training(*sides(PERCEPTRON, **SGD), batches(1), names)


def test_no_batches_are_refused():
    with pytest.raises(ValueError, match="batches must have at least one batch"):
        compare_training(*sides(PERCEPTRON, **SGD), [], PERCEPTRON.names)


def test_an_optimizer_that_was_not_created_is_refused():
    port, original = sides(PERCEPTRON, **SGD)
    with pytest.raises(
        TypeError, match=r"optimizer of JaxSide must be an optax .*; got .*function"
    ):
        compare_training(
            dataclasses.replace(port, optimizer=optax.sgd), original, batches(1), PERCEPTRON.names
        )


def test_a_nan_on_one_side_is_a_difference():
    both = sides(PERCEPTRON, optax.sgd(np.nan), lambda m: torch.optim.SGD(m.parameters(), 0.1))
    found = compare_training(*both, batches(1), PERCEPTRON.names)
    assert first_of(found).quantity == "update"


@pytest.mark.parametrize("name", ["RMSprop", "Adagrad", "Adamax", "Adadelta", "NAdam", "ASGD"])
@pytest.mark.sample(2)
def test_the_state_of_other_optimizers_is_compared_too(name):
    make = getattr(regjax.optim, name.lower())
    theirs = lambda m: getattr(torch.optim, name)(m.parameters(), 1e-2)
    with jax.enable_x64(True):
        both = sides(PERCEPTRON, make(1e-2), theirs, dtype="float64")
        found = compare_training(
            *both, batches(5, "float64"), PERCEPTRON.names, tier=FLOAT64, record=False
        )
        found.raise_if_different()
        assert max(found.deviations["state"]) > 0  # rounding shows that it was compared
