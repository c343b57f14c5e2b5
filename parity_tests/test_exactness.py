"""The optimizers over 1,000 steps with 10,062 parameters, and planted defects."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import optax
import pytest
import torch

import regjax.optim
from parity_tests import exactness, optimizers
from parity_tests.compare import FLOAT64, assert_same_at_every_step, deviation
from parity_tests.exactness import SETTINGS, STEPS, Setting, measure, settings
from parity_tests.instructions import fuse_alike
from parity_tests.optimizers.case import Case
from parity_tests.trajectories import synthetic, walk_torch
from regjax.optim import _descent

SYNTHETIC, RECORDED = Setting("float32", "synthetic"), Setting("float32", "recorded")
ADAM = Case("adam", "Adam", {"lr": 0.01})
ADAMW = Case("adamw", "AdamW", {"lr": 0.01})
MOMENTUM = Case("momentum", "SGD", {"lr": 0.1, "momentum": 0.9}, float32=None)
NESTEROV = Case(
    "nesterov",
    "SGD",
    {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    float32=None,
)
RPROP = Case("rprop", "Rprop", {"lr": 0.01}, float32=None)

EVERY = (*optimizers.CASES, *optimizers.CASES_2D)
# Those of equal bits that sum most, over steps and sizes that test_optimizers.py does not have.
LONG = ("sgd-dampening", "sgd-nesterov", "sgd-all", "rprop", "rprop-sizes")
FAST = [
    *[(case, SYNTHETIC) for case in EVERY if case.name in LONG],
    (NESTEROV, RECORDED),
    (RPROP, RECORDED),
    (ADAM, Setting("float64", "trained")),
    (ADAM, RECORDED),
    (ADAMW, SYNTHETIC),
    (Case("nadam", "NAdam", {"lr": 0.01}), RECORDED),
    (Case("asgd", "ASGD", {"lr": 0.1, "t0": 10}), Setting("float64", "recorded")),
]


@pytest.fixture
def equal_bits() -> None:
    """Skip a test of equal bits where SGD and Rprop do not promise them."""
    if not fuse_alike():
        pytest.skip("one framework fuses products with sums, the other does not")


@pytest.mark.parametrize(("case", "setting"), FAST, ids=str)
@pytest.mark.sample(2)
def test_a_thousand_steps(case, setting):
    found = measure(case, setting, STEPS)
    assert not found.broken, found
    assert found.elements == 10_062


@pytest.mark.slow
@pytest.mark.parametrize("case", EVERY, ids=str)
def test_every_case_in_every_setting(case):
    broken = [f for f in (measure(case, s, STEPS) for s in settings(case)) if f.broken]
    assert not broken, "\n".join(map(str, broken))


def _averages_of_jax(problem, options):
    with jax.enable_x64(True):
        optimizer = regjax.optim.asgd(**options)
        params = {name: jax.numpy.asarray(leaf) for name, leaf in problem.params.items()}
        state = optimizer.init(params)
        for gradient in problem.gradients:
            updates, state = optimizer.update(
                jax.tree.map(jax.numpy.asarray, gradient), state, params
            )
            params = optax.apply_updates(params, updates)
            yield {name: np.asarray(leaf) for name, leaf in optax.tree.get(state, "ax").items()}


def _averages_of_torch(problem, lr, options):
    params = {name: torch.tensor(leaf, requires_grad=True) for name, leaf in problem.params.items()}
    optimizer = torch.optim.ASGD(params.values(), lr, **options)
    for gradient in problem.gradients:
        for name, p in params.items():
            p.grad = torch.tensor(gradient[name])
        optimizer.step()
        yield {name: optimizer.state[p]["ax"].numpy().copy() for name, p in params.items()}


def test_asgd_keeps_the_average_of_torch():
    problem, lr = synthetic("float64"), 0.1
    options: dict[str, Any] = {"lambd": 1e-2, "t0": 10.0, "weight_decay": 0.1}
    in_jax = [*_averages_of_jax(problem, {"learning_rate": lr, **options})]
    in_torch = [*_averages_of_torch(problem, lr, options)]
    gradient = lambda params, step: problem.gradients[step]
    walk = optimizers.asgd(problem.params, gradient, lr=lr, **options, averaged=True)
    reference = [next(walk) for _ in problem.gradients]
    assert_same_at_every_step(in_jax, in_torch, FLOAT64, names=("regjax", "torch"))
    assert_same_at_every_step(reference, in_torch, FLOAT64, names=("NumPy", "torch"))
    last = walk_torch(Case("asgd", "ASGD", {"lr": lr, **options}), problem)
    assert deviation(last, in_torch) > 1e-3  # the average differs from the last parameters


def _small_eps(learning_rate, *, mask):
    return regjax.optim.adam(learning_rate, eps=1e-7, mask=mask)


def _late(learning_rate, *, mask, **options):
    """Return SGD with another learning rate in the last of a thousand steps only."""
    rate = lambda count: jax.numpy.where(count == STEPS - 1, 1.01, 1.0) * learning_rate
    return regjax.optim.sgd(rate, mask=mask, **options)


def _optax_sgd(learning_rate, *, momentum, mask):
    del mask
    return optax.sgd(learning_rate, momentum)


def _optax_adamw(learning_rate, *, mask):
    del mask
    return optax.adamw(learning_rate, weight_decay=0.01)


def _optax_rprop(learning_rate):
    return optax.rprop(learning_rate)


# A planted defect in JAX, and the bound that it must break.
PLANTED = {
    "eps 1e-7 for 1e-8": (ADAM, Setting("float64", "synthetic"), _small_eps),
    "fused where torch rounds": (MOMENTUM, SYNTHETIC, _optax_sgd),
    "update of the step before": (RPROP, SYNTHETIC, _optax_rprop),
    "last step off": (MOMENTUM, SYNTHETIC, _late),
}


@pytest.mark.parametrize(("case", "setting", "make"), PLANTED.values(), ids=PLANTED)
@pytest.mark.sample(2)
def test_planted_defect_is_caught(case, setting, make, contracts):
    found = measure(case, setting, STEPS, make)
    # Without fused multiply-adds this defect has no effect, and without equal bits no bound.
    assert found.broken == ((contracts and fuse_alike()) or make is not _optax_sgd), found


@pytest.mark.usefixtures("equal_bits")
def test_bits_differ_without_the_rounding_guard(monkeypatch, contracts):
    monkeypatch.setattr(_descent, "rounded_product", lambda x, factor: factor * x)
    found = measure(MOMENTUM, SYNTHETIC, STEPS)
    # Fused sums differ from rounded ones in few bits, and only where XLA fuses.
    assert found.broken == contracts
    assert (found.mismatches > 1000) == contracts
    assert found.deviation < 1e-6


def test_optax_rounds_the_decay_elsewhere():
    # A measurement without a bound; regjax is within 1e-6, as FAST verifies.
    with jax.numpy_dtype_promotion("standard"):
        found = measure(replace(ADAMW, float32=1.0), SYNTHETIC, STEPS, _optax_adamw)
    assert 1e-5 < found.deviation < 3e-5


def test_settings_cover_both_dtypes_and_fused_kernels():
    assert len(SETTINGS) == len(set(SETTINGS)) == 5
    assert [*settings(MOMENTUM)] == [*SETTINGS]
    assert sum(setting.fused for setting in settings(ADAM)) == 2


@pytest.mark.usefixtures("equal_bits")
def test_command_writes_its_findings(tmp_path, capsys):
    arguments = ["--quick", "--only", "sgd-nesterov-m", "--out", str(tmp_path)]
    assert exactness.main(arguments) == 0
    table = (tmp_path / "exactness.md").read_text()
    assert "| sgd-nesterov-maximize | 1e-12 | 0 | 0 |" in table
    record = json.loads((tmp_path / "exactness.json").read_text())
    assert {finding["case"] for finding in record["findings"]} == {"sgd-nesterov-maximize"}
    assert "torch" in record["versions"]
    assert "5 of 5 comparisons within bounds" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.usefixtures("equal_bits")
def test_command_fails_where_a_bound_is_broken(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(_descent, "rounded_product", lambda x, factor: 1.001 * factor * x)
    arguments = ["--quick", "--only", "sgd-momentum", "--out", str(tmp_path)]
    assert exactness.main(arguments) == 1
    printed = capsys.readouterr().out
    assert "broken: sgd-momentum, float32 synthetic: equal bits required" in printed
    assert "**" in (tmp_path / "exactness.md").read_text()


def test_command_lists_its_cases(capsys):
    assert exactness.main(["--list", "--only", "rprop"]) == 0
    assert "rprop-etas" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        exactness.main(["--only", "nothing"])
    assert "must begin the name of a case; got 'nothing'. Choose: sgd," in capsys.readouterr().err
