"""The perceptron of examples.overfit in the harness, with dropout and decay, at every step.

The tests use the functions of the example.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
import torch

import regtorch
from examples.overfit import train_jax, train_torch
from examples.overfit.data import load_problem
from examples.overfit.recipes import recipes
from examples.overfit.settings import OPTIMIZERS, Settings
from parity_tests.compare import FLOAT64
from parity_tests.harness import JaxSide, Leaf, TorchSide, compare_training

# Rounding accumulates over a thousand steps.
TIER = dataclasses.replace(FLOAT64, tolerance=1e-10)


def both_sides(settings, recipe, weights):
    optimizer = train_jax.make_optimizer(settings, recipe)
    root = jax.random.key(settings.seed)

    def jax_loss(params, batch, step):
        return train_jax.training_loss(params, *batch, recipe, root, step)

    def torch_loss(model, batch, step):
        pixels, labels = (torch.from_numpy(array) for array in batch)
        key = regtorch.key(settings.seed)
        return train_torch.training_loss(model, pixels, labels.long(), recipe, key, step)

    model = train_torch.Perceptron(train_torch.load_params(weights), recipe.rate).double()
    return (
        JaxSide(train_jax.load_params(weights), jax_loss, optimizer),
        TorchSide(model, torch_loss, train_torch.make_optimizer(settings, recipe, model)),
    )


@pytest.mark.parametrize(
    "steps", [15, pytest.param(1000, marks=pytest.mark.slow)], ids=["15", "1000"]
)
@pytest.mark.parametrize(
    "optimizer",
    [pytest.param(name, marks=[pytest.mark.slow] * (name == "adamw")) for name in OPTIMIZERS],
)
def test_the_example_trains_the_same_at_every_step(optimizer, steps):
    defaults = OPTIMIZERS[optimizer]
    settings = Settings(
        steps=steps,
        optimizer=optimizer,
        learning_rate=defaults.learning_rate,
        weight_decay=defaults.weight_decay,
    )
    recipe = recipes(settings.weight_decay, settings.rate)[-1]
    assert recipe.rate
    assert recipe.weight_decay
    problem = load_problem(settings)
    pixels = problem.train.pixels.astype(np.float64)
    batches = [(pixels[batch], problem.train.labels[batch]) for batch in problem.batches]
    with jax.enable_x64(True):
        weights = jax.tree.map(lambda array: array.astype(np.float64), problem.weights)
        names = {
            path: leaf
            for n in weights
            for path, leaf in {
                f"{n}/kernel": Leaf(f"layers.{n}.weight", (1, 0)),
                f"{n}/bias": Leaf(f"layers.{n}.bias"),
            }.items()
        }
        found = compare_training(*both_sides(settings, recipe, weights), batches, names, tier=TIER)
    found.raise_if_different()
    assert len(found.losses) == steps
    assert found.sites == dict.fromkeys(weights, steps)
