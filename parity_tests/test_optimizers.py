"""Every optimizer: regjax.optim and torch.optim agree with NumPy at every step."""

from __future__ import annotations

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import regjax.optim
from parity_tests.compare import BITWISE, FLOAT32, FLOAT64, assert_same_at_every_step, deviation
from parity_tests.instructions import fuse_alike
from parity_tests.optimizers import CASES
from parity_tests.optimizers.case import Case, no_bias
from parity_tests.trajectories import (
    WALKS,
    Run,
    synthetic,
    walk_jax_together,
    walk_numpy,
    walk_torch,
)

SMALL = {dtype: synthetic(dtype) for dtype in ("float32", "float64")}


@functools.cache
def jax_runs(optimizer: str, dtype: str) -> dict[str, Run]:
    """The runs of every case of an optimizer, by the name of the case."""
    cases = [case for case in CASES if case.optimizer == optimizer]
    runs = walk_jax_together(cases, SMALL[dtype])
    return dict(zip(map(str, cases), runs, strict=True))


@pytest.mark.parametrize("tier", [FLOAT64, FLOAT32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.sample(2)
def test_three_parties_take_the_same_steps(case, tier):
    if tier is FLOAT64:
        tier = replace(tier, tolerance=case.float64)
    reference, in_torch = (walk(case, SMALL[tier.dtype]) for walk in (walk_numpy, walk_torch))
    in_jax = jax_runs(case.optimizer, tier.dtype)[case.name]
    assert_same_at_every_step(in_torch, reference, tier, names=("torch", "NumPy"))
    assert_same_at_every_step(in_jax, reference, tier, names=("regjax", "NumPy"))
    if tier is FLOAT32 and case.float32 is None and fuse_alike():
        tier = BITWISE
    assert_same_at_every_step(in_jax, in_torch, tier, names=("regjax", "torch"))


# The penalty has the gradient 2 * c * w, and weight decay adds d * w: equal if d = 2 * c.
COUPLED = [
    Case("sgd", "SGD", {"lr": 0.1, "momentum": 0.9}, mask=no_bias),
    Case("adam", "Adam", {"lr": 0.01}, mask=no_bias),
]


@pytest.mark.parametrize("walk", WALKS.values(), ids=WALKS)
@pytest.mark.parametrize("case", COUPLED, ids=str)
def test_penalty_is_twice_the_coupled_weight_decay(case, walk):
    in_loss = walk(replace(case, penalty=0.05), SMALL["float64"])
    in_optimizer = walk(_with_decay(case, 0.1), SMALL["float64"])
    assert_same_at_every_step(in_loss, in_optimizer, FLOAT64, names=("loss", "optimizer"))


@pytest.mark.parametrize("walk", WALKS.values(), ids=WALKS)
def test_penalty_is_not_the_decoupled_weight_decay(walk):
    case = Case("adamw", "AdamW", {"lr": 0.01})
    in_loss = walk(_with_decay(replace(case, penalty=0.5), 0.0), SMALL["float64"])
    in_optimizer = walk(_with_decay(case, 1.0), SMALL["float64"])
    assert deviation(in_loss, in_optimizer) > 0.1


DECOUPLED = {"lr": 0.003, "weight_decay": 0.1, "decoupled_weight_decay": True}
SHRINKING = [
    Case("adam", "Adam", DECOUPLED),
    Case("nadam", "NAdam", DECOUPLED),
    Case("radam", "RAdam", DECOUPLED),
    Case("adamw", "AdamW", {"lr": 0.003, "weight_decay": 0.1}),
    Case("adamw-schedule", "AdamW", {"lr": 0.5, "weight_decay": 0.5}, half_life=1),
    Case("adamw-mask", "AdamW", {"lr": 0.003, "weight_decay": 0.1}, mask=no_bias),
    Case("adafactor", "Adafactor", {"lr": 0.003, "weight_decay": 0.1}),
    Case("muon", "Muon", {"lr": 0.003, "weight_decay": 0.1}),
]


# Without a gradient only the decay remains: 1 - lr * wd is rounded, and then the product.
@pytest.mark.parametrize("case", SHRINKING, ids=str)
@pytest.mark.sample(4)
def test_decoupled_decay_has_the_bits_of_torch(case):
    # Muon requires matrices.
    problem = synthetic("float32", {"a/kernel": (40, 50), "a/bias": (1, 9)}, steps=30)
    still = [{name: 0 * g for name, g in step.items()} for step in problem.gradients]
    in_jax, in_torch = (
        WALKS[side](case, replace(problem, gradients=still)) for side in ("jax", "torch")
    )
    for step, (mine, other) in enumerate(zip(in_jax, in_torch, strict=True)):
        for name, leaf in other.items():
            np.testing.assert_array_equal(mine[name], leaf, f"step {step}: {name}", strict=True)
    assert np.abs(in_jax[-1]["a/kernel"]).max() < np.abs(problem.params["a/kernel"]).max()


@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_complex_parameters(name):
    start, gradient = np.array([1 + 2j, -1j, 3]), np.array([0.5 - 1j, 2 + 1j, 1j])
    in_torch = torch.tensor(start, requires_grad=True)
    torch_optimizer = getattr(torch.optim, name)([in_torch], lr=0.1, weight_decay=0.1)
    optimizer = getattr(regjax.optim, name.lower())(0.1, weight_decay=0.1)
    if name == "Adam":
        optimizer = optax.contrib.split_real_and_imaginary(optimizer)
    runs = [], []
    # optax combines real and imaginary parts in a way that strict promotion forbids.
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        in_jax = jnp.asarray(start)
        state = optimizer.init(in_jax)
        for _ in range(5):
            updates, state = optimizer.update(jnp.asarray(gradient), state, in_jax)
            in_jax = optax.apply_updates(in_jax, updates)
            in_torch.grad = torch.tensor(gradient)
            torch_optimizer.step()
            runs[0].append({"w": np.asarray(in_jax)})
            runs[1].append({"w": in_torch.detach().numpy().copy()})
    assert_same_at_every_step(*runs, FLOAT64, names=("regjax", "torch"))


def _with_decay(case: Case, weight_decay: float) -> Case:
    return replace(case, options={**case.options, "weight_decay": weight_decay})
