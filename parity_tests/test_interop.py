"""A run that moves from PyTorch to JAX and back agrees with one that stays in PyTorch.

`test_interop_schedules.py` has the schedulers, `test_interop_refusals.py` the errors.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from parity_tests.compare import BITWISE, FLOAT32, FLOAT64, assert_same_at_every_step
from parity_tests.frameworks import from_torch
from parity_tests.harness import Leaf
from parity_tests.instructions import fuse_alike
from parity_tests.moved_runs import CASES, NAMES, SCHEDULED, STEPS, Case, JaxRun, TorchRun
from parity_tests.trajectories import nested
from regjax._decay.paths import named_leaves
from regjax.interop import optimizer_from_torch, state_from_torch


def alone(case: Case, steps: int) -> list[dict[str, np.ndarray]]:
    return TorchRun(case).walk(0, steps)


def there_and_back(case: Case) -> tuple[TorchRun, list[dict[str, np.ndarray]]]:
    """Train a third in PyTorch, a third in JAX, and a third with a new PyTorch optimizer."""
    with jax.enable_x64(case.dtype == "float64"):
        first, last = TorchRun(case), TorchRun(case)
        visited = first.walk(0, STEPS)
        middle = first.to_jax()
        visited += middle.walk(STEPS, STEPS)
        last.from_jax(middle)
    return last, visited + last.walk(2 * STEPS, STEPS)


MOVED = ("lr", "momentum", "betas", "weight_decay")


def states(run: TorchRun) -> dict[str, np.ndarray]:
    """Return the state of PyTorch's optimizer, and the current numbers of its groups."""
    found = {
        f"{key} of {name}": from_torch(value).astype(run.case.dtype)
        for name, p in run.params.items()
        for key, value in run.optimizer.state[p].items()
    }
    for index, group in enumerate(run.optimizer.param_groups):
        numbers = {key: group[key] for key in MOVED if key in group}
        found |= {f"{key} of group {index}": np.array(value) for key, value in numbers.items()}
    return found


def places(scheduler: Any) -> dict[Any, Any]:
    """Return the progress of a scheduler and of its nested schedulers."""
    if scheduler is None:
        return {}
    kept = ("last_epoch", "T_cur", "best", "num_bad_epochs")
    own = {k: v for k, v in vars(scheduler).items() if k in kept}
    return {"": own, **{i: places(s) for i, s in enumerate(getattr(scheduler, "_schedulers", ()))}}


# Muon in bfloat16 takes long to compile.
SLOW = pytest.param("muon-one-cycle", marks=pytest.mark.slow)


@pytest.mark.parametrize("name", [*CASES, *(n for n in SCHEDULED if n != "muon-one-cycle"), SLOW])
@pytest.mark.sample(4)
def test_a_run_continues_in_jax_and_back(name):
    case = (CASES | SCHEDULED)[name]
    tier = replace(FLOAT64, tolerance=case.tolerance)
    names = ("there and back", "PyTorch alone")
    (last, visited), whole = there_and_back(case), TorchRun(case)
    assert_same_at_every_step(visited, whole.walk(0, 3 * STEPS), tier, names=names)
    assert_same_at_every_step([states(last)], [states(whole)], tier, names=names)
    assert places(last.scheduler) == places(whole.scheduler)


@pytest.mark.parametrize("name", ["sgd", "sgd-dampening", "rprop"])
def test_the_same_bits_in_float32(name):
    case = replace(CASES[name], dtype="float32")
    names = ("there and back", "PyTorch alone")
    # Where only one framework fuses products with sums, 1e-6 is promised.
    tier = BITWISE if fuse_alike() else replace(FLOAT32, tolerance=1e-6)
    _, visited = there_and_back(case)
    assert_same_at_every_step(visited, alone(case, 3 * STEPS), tier, names=names)


@pytest.mark.parametrize("name", ["sgd-dampening", "adagrad", "nadam", "sgd-one-cycle"])
def test_before_the_first_step_the_state_is_that_of_init(name):
    case = (CASES | SCHEDULED)[name]
    with jax.enable_x64(True):
        run = TorchRun(case).to_jax()
        start = run.optimizer.init(run.params)
        jax.tree.map(np.testing.assert_array_equal, run.state, start)
        other = TorchRun(case)
        other.from_jax(run)
    # The order of sums in PyTorch's kernels may depend on the address of an array.
    tier = replace(FLOAT64, tolerance=1e-14)
    assert_same_at_every_step(other.walk(0, STEPS), alone(case, STEPS), tier)


def test_names_by_the_model_one_group_and_frozen_parameters():
    first, last = torch.nn.Linear(3, 3), torch.nn.Linear(3, 2)
    model = torch.nn.Sequential(first, last).double()
    first.bias.requires_grad_(False)
    names = {
        f"{i}/{kind}": Leaf(f"{i}.{name}", order)
        for i in range(2)
        for kind, name, order in (("kernel", "weight", (1, 0)), ("bias", "bias", None))
    }
    # The bias of the last layer is in no group, so PyTorch does not train it.
    optimizer = torch.optim.Adam([*first.parameters(), last.weight], lr=0.1)
    tensors = dict(model.named_parameters())
    with jax.enable_x64(True):
        arrays = {p: jnp.array(x.to_jax(from_torch(tensors[x.name]))) for p, x in names.items()}
        params = nested(arrays)
        ours = optimizer_from_torch(optimizer, names, model=model)
        state = state_from_torch(optimizer, names, params, ours, model=model)
        for _ in range(3):
            optimizer.zero_grad()
            torch.stack([(p**2).sum() for p in model.parameters()]).sum().backward()
            optimizer.step()
            updates, state = ours.update(jax.tree.map(lambda p: 2 * p, params), state, params)
            params = optax.apply_updates(params, updates)
    for path, array in named_leaves(params):
        theirs = names[path].to_jax(from_torch(tensors[names[path].name]))
        np.testing.assert_allclose(array, theirs, rtol=0, atol=1e-12)
        moved = not np.array_equal(array, arrays[path])
        assert moved == path.endswith("kernel")


def planted(name: str, change: Any) -> None:
    case = CASES[name]
    with jax.enable_x64(True):
        first = TorchRun(case)
        visited = first.walk(0, STEPS)
        run = first.to_jax()
        change(first, run)
        visited += run.walk(STEPS, STEPS)
    assert_same_at_every_step(visited, alone(case, 2 * STEPS), FLOAT64)


def second_rate_ignored(first: TorchRun, run: JaxRun) -> None:
    first.optimizer.param_groups[1]["lr"] = first.optimizer.param_groups[0]["lr"]
    run.optimizer = optimizer_from_torch(first.optimizer, NAMES)


def transpose_forgotten(first: TorchRun, run: JaxRun) -> None:
    # The matrix is square, so its shape does not reveal the error.
    names = {**NAMES, "mix/kernel": Leaf("mix.weight")}
    run.state = state_from_torch(first.optimizer, names, run.params, run.optimizer)


def count_off_by_one(first: TorchRun, run: JaxRun) -> None:
    del first
    is_count = lambda path: getattr(path[-1], "name", "") == "count"
    run.state = jax.tree.map_with_path(lambda p, x: x + 1 if is_count(p) else x, run.state)


def started_anew(first: TorchRun, run: JaxRun) -> None:
    del first
    run.state = run.optimizer.init(run.params)


@pytest.mark.parametrize(
    "change", [second_rate_ignored, transpose_forgotten, count_off_by_one, started_anew]
)
@pytest.mark.parametrize("name", ["adam", "nadam"])
@pytest.mark.sample(4)
def test_a_defect_is_caught(name, change):
    """Test of the tests."""
    planted(name, lambda first, run: None)
    with pytest.raises(AssertionError, match="diverge at step 13"):
        planted(name, change)
