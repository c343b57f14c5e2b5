"""Muon: regjax.optim and torch.optim agree with NumPy at every step.

Torch iterates in bfloat16, in which each implementation rounds differently. Every case therefore
runs twice: with a bound for bfloat16, and with float64 instead of bfloat16 within 1e-12.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from parity_tests.compare import FLOAT64, Tier, assert_same_at_every_step, deviation
from parity_tests.optimizers import CASES_2D
from parity_tests.optimizers._muon import BFLOAT16, MATRICES
from parity_tests.trajectories import (
    Run,
    synthetic,
    walk_jax,
    walk_jax_together,
    walk_numpy,
    walk_torch,
)
from regjax import optim

PROBLEMS = {dtype: synthetic(dtype, MATRICES) for dtype in ("float32", "float64")}
MUON, WITHOUT = CASES_2D[:2]


def _with(case, **options):
    return replace(case, options={**case.options, **options})


@functools.cache
def jax_runs(dtype: str, **options: str) -> dict[str, Run]:
    """The runs of every case by its name, with further options."""
    runs = walk_jax_together([_with(case, **options) for case in CASES_2D], PROBLEMS[dtype])
    return dict(zip(map(str, CASES_2D), runs, strict=True))


@functools.cache
def right() -> Run:
    return walk_torch(MUON, PROBLEMS["float32"])


def _assert_three_agree(reference, in_jax, in_torch, tier):
    assert_same_at_every_step(in_torch, reference, tier, names=("torch", "NumPy"))
    assert_same_at_every_step(in_jax, reference, tier, names=("regjax", "NumPy"))
    assert_same_at_every_step(in_jax, in_torch, tier, names=("regjax", "torch"))


@pytest.mark.parametrize("dtype", PROBLEMS)
@pytest.mark.parametrize("case", CASES_2D, ids=str)
@pytest.mark.sample(2)
def test_three_parties_take_the_same_steps(case, dtype):
    bound = case.float64 if dtype == "float64" else case.float32
    reference, in_torch = (walk(case, PROBLEMS[dtype]) for walk in (walk_numpy, walk_torch))
    in_jax = jax_runs(dtype)[case.name]
    _assert_three_agree(reference, in_jax, in_torch, Tier(dtype, bound, in_norm=True))


@pytest.fixture
def torch_in_float64(monkeypatch):
    """Make torch's Muon compute in float64; it modifies the rounded tensor, hence the copy."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)


@pytest.mark.usefixtures("torch_in_float64")
@pytest.mark.parametrize("case", CASES_2D, ids=str)
@pytest.mark.sample(3)
def test_only_bfloat16_sets_them_apart(case):
    reference = walk_numpy(_with(case, ns_dtype="float64"), PROBLEMS["float64"])
    in_jax = jax_runs("float64", ns_dtype="float64")[case.name]
    _assert_three_agree(reference, in_jax, walk_torch(case, PROBLEMS["float64"]), FLOAT64)


@pytest.mark.parametrize(
    "run",
    [
        lambda case: walk_numpy(case, PROBLEMS["float32"]),
        lambda case: jax_runs("float32")[case.name],
        lambda case: walk_torch(case, PROBLEMS["float32"]),
    ],
    ids=["numpy", "jax", "torch"],
)
def test_decay_is_far_larger_than_the_tolerance(run):
    assert WITHOUT.options["weight_decay"] == 0
    assert deviation(run(MUON), run(WITHOUT)) > 50 * BFLOAT16


PLANTED = {
    "decay forgotten": {"weight_decay": 0.0},
    "a tenth of the decay missing": {"weight_decay": 0.09},
    "nesterov forgotten": {"nesterov": False},
    "momentum": {"momentum": 0.9},
    "a step of the iteration missing": {"ns_steps": 4},
    "a coefficient": {"ns_coefficients": (3.4, -4.7750, 2.0315)},
    "scale": {"adjust_lr_fn": "match_rms_adamw"},
    "rows for columns": {"transposed": True},
}


@functools.cache
def planted_runs() -> dict[str, Run]:
    cases = [_with(MUON, **wrong) for wrong in PLANTED.values()]
    return dict(zip(PLANTED, walk_jax_together(cases, PROBLEMS["float32"]), strict=True))


@pytest.mark.parametrize("name", PLANTED)
def test_planted_defect_is_caught(name):
    tier, in_jax = Tier("float32", BFLOAT16, in_norm=True), planted_runs()[name]
    with pytest.raises(AssertionError, match=r"regjax and torch diverge at step \d+ in '"):
        assert_same_at_every_step(in_jax, right(), tier, names=("regjax", "torch"))


@pytest.mark.usefixtures("torch_in_float64")
def test_optax_itself_is_caught():
    """Optax's Nesterov momentum differs, so regjax.optim has its own Muon."""

    def make(learning_rate, *, mask):
        # Square matrices need no scale by the shape, which Optax 0.2.6 does not separate.
        dimensions = lambda tree: jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(), tree)
        muon = optax.contrib.scale_by_muon(eps=1e-7, weight_dimension_numbers=dimensions)
        decay = optax.add_decayed_weights(0.1, mask)
        return optax.chain(muon, decay, optax.scale_by_learning_rate(learning_rate))

    shapes = {name: shape for name, shape in MATRICES.items() if shape[0] == shape[1]}
    problem = synthetic("float64", shapes)
    with jax.numpy_dtype_promotion("standard"):
        in_jax = walk_jax(MUON, problem, make)
    # At the first step both kinds of momentum are the same.
    with pytest.raises(AssertionError, match="diverge at step 2"):
        assert_same_at_every_step(
            in_jax, walk_torch(MUON, problem), Tier("float64", 1e-6, in_norm=True)
        )


@pytest.mark.usefixtures("torch_in_float64")
@pytest.mark.parametrize("scale", ["original", "match_rms_adamw"])
def test_transposed_matrices_walk_as_torch_does_on_its_own_layout(scale):
    weight, *gradients = np.random.default_rng(0).standard_normal((6, 12, 5))
    in_torch = torch.tensor(weight, requires_grad=True)
    torch_optimizer = torch.optim.Muon([in_torch], lr=0.1, adjust_lr_fn=scale)
    optimizer = optim.muon(0.1, adjust_lr_fn=scale, ns_dtype="float64", transposed=True)
    runs = [], []
    with jax.enable_x64(True):
        in_jax = jnp.asarray(weight.T)
        state = optimizer.init(in_jax)
        for gradient in gradients:
            updates, state = optimizer.update(jnp.asarray(gradient.T), state, in_jax)
            in_jax = optax.apply_updates(in_jax, updates)
            in_torch.grad = torch.tensor(gradient)
            torch_optimizer.step()
            runs[0].append({"w": np.asarray(in_jax).T})
            runs[1].append({"w": in_torch.detach().numpy().copy()})
    assert_same_at_every_step(*runs, FLOAT64, names=("regjax", "torch"))
