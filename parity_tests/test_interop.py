"""A run that moves from PyTorch to JAX and back agrees with one that stays in PyTorch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from torch.optim import lr_scheduler

from parity_tests.compare import BITWISE, FLOAT64, assert_same_at_every_step
from parity_tests.frameworks import from_torch, to_torch
from parity_tests.harness import Leaf
from parity_tests.optimizers._muon import BFLOAT16
from parity_tests.trajectories import nested
from regjax._decay.paths import named_leaves
from regjax.interop import (
    optimizer_from_torch,
    schedule_from_torch,
    state_from_torch,
    state_to_torch,
)

SHAPES = {
    "conv.weight": (2, 3, 2, 2),
    "dense.weight": (4, 3),
    "dense.bias": (4,),
    "mix.weight": (3, 3),
    "out.bias": (2,),
}
NAMES = {
    "conv/kernel": Leaf("conv.weight", (2, 3, 1, 0)),
    "dense/kernel": Leaf("dense.weight", (1, 0)),
    "dense/bias": "dense.bias",
    "mix/kernel": Leaf("mix.weight", (1, 0)),
    "out/bias": Leaf("out.bias"),
}
# PyTorch factors the last two axes, which must be the last two in JAX, too.
FACTORED = {**NAMES, "conv/kernel": Leaf("conv.weight", (1, 0, 3, 2))}
MATRICES = {"dense/kernel": NAMES["dense/kernel"], "mix/kernel": Leaf("mix.weight")}
STEPS = 12


@dataclass(frozen=True)
class Case:
    """An optimizer with two groups, whose options differ."""

    kind: str
    options: dict[str, Any]
    second: dict[str, Any]
    names: Any = None
    tolerance: float = 1e-12
    scheduler: Any = None
    dtype: str = "float64"
    steps_per_epoch: int = 1
    steps: int | None = None

    @property
    def leaves(self) -> dict[str, Leaf]:
        names = self.names or NAMES
        return {p: n if isinstance(n, Leaf) else Leaf(n) for p, n in names.items()}

    @property
    def keywords(self) -> dict[str, Any]:
        if self.scheduler is None:
            return {}
        return {"steps": self.steps, "steps_per_epoch": self.steps_per_epoch}


ADAM = {"lr": 0.02, "betas": (0.8, 0.99), "eps": 1e-3, "weight_decay": 0.1}
ADAM_2 = {"lr": 0.005, "betas": (0.9, 0.9), "eps": 1e-8, "weight_decay": 0.0}
SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}
CASES = {
    "sgd": Case("SGD", SGD, {"lr": 0.02, "momentum": 0.5, "nesterov": True}),
    "sgd-plain": Case("SGD", {"lr": 0.1}, {"lr": 0.02, "maximize": True}),
    "sgd-dampening": Case("SGD", {**SGD, "dampening": 0.4}, {"momentum": 0.0}),
    "asgd": Case("ASGD", {"lr": 0.1, "t0": 5}, {"lr": 0.02, "lambd": 0.1, "weight_decay": 0.1}),
    "rprop": Case("Rprop", {"lr": 0.01}, {"lr": 0.1, "etas": (0.7, 1.5), "step_sizes": (1e-3, 1)}),
    "adam": Case("Adam", ADAM, ADAM_2),
    "adam-amsgrad": Case("Adam", {**ADAM, "amsgrad": True}, {**ADAM_2, "amsgrad": False}),
    "adamw": Case("AdamW", ADAM, {**ADAM_2, "amsgrad": True}),
    "nadam": Case(
        "NAdam", {**ADAM, "decoupled_weight_decay": True}, {"lr": 0.005, "momentum_decay": 0.1}
    ),
    "radam": Case("RAdam", ADAM, {**ADAM_2, "decoupled_weight_decay": True}),
    "adamax": Case("Adamax", ADAM, ADAM_2),
    "adagrad": Case("Adagrad", {"lr": 0.1, "lr_decay": 0.1}, {"lr": 0.02, "lr_decay": 0.0}),
    "adadelta": Case("Adadelta", {"lr": 1.0, "eps": 1e-3}, {"rho": 0.5, "weight_decay": 0.1}),
    "rmsprop": Case(
        "RMSprop",
        {"lr": 0.01, "momentum": 0.9, "centered": True},
        {"lr": 0.002, "alpha": 0.5, "momentum": 0.0, "centered": False},
    ),
    "adafactor": Case("Adafactor", {"lr": 0.1}, {"weight_decay": 0.1, "d": 2.0}, FACTORED),
    "muon": Case("Muon", {"lr": 0.02}, {"lr": 0.1, "momentum": 0.5}, MATRICES, BFLOAT16),
}


def one_cycle(optimizer, **options):
    return lr_scheduler.OneCycleLR(optimizer, [0.1, 0.02], total_steps=50, **options)


def warm_up(optimizer):
    first = lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 5)
    middle = lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 4, 2)
    last = lr_scheduler.ExponentialLR(optimizer, 0.9)
    return lr_scheduler.SequentialLR(optimizer, [first, middle, last], [6, 30])


SCHEDULED = {
    "sgd-one-cycle": replace(CASES["sgd"], scheduler=one_cycle),
    "rmsprop-one-cycle": replace(CASES["rmsprop"], scheduler=one_cycle),
    "adamw-one-cycle": replace(CASES["adamw"], scheduler=one_cycle),
    "nadam-one-cycle": replace(CASES["nadam"], scheduler=one_cycle),
    "radam-one-cycle": replace(CASES["radam"], scheduler=one_cycle),
    "adamax-one-cycle": replace(CASES["adamax"], scheduler=one_cycle),
    "muon-one-cycle": replace(CASES["muon"], scheduler=one_cycle),
    "sgd-warm-up": replace(CASES["sgd-dampening"], scheduler=warm_up),
    "adam-cosine": replace(
        CASES["adam"], scheduler=lambda o: lr_scheduler.CosineAnnealingLR(o, 10, 1e-3)
    ),
    "adagrad-step": replace(CASES["adagrad"], scheduler=lambda o: lr_scheduler.StepLR(o, 5)),
    "adafactor-linear": replace(
        CASES["adafactor"], scheduler=lambda o: lr_scheduler.LinearLR(o, total_iters=30)
    ),
    "asgd-step": replace(CASES["asgd"], scheduler=lambda o: lr_scheduler.StepLR(o, 5, 0.5)),
    "adadelta-lambda": replace(
        CASES["adadelta"],
        scheduler=lambda o: lr_scheduler.LambdaLR(o, lambda t: 1 / (t + 1)),
        steps=100,
    ),
    # The run moves in the middle of an epoch.
    "adamw-per-epoch": replace(
        CASES["adamw"],
        scheduler=lambda o: lr_scheduler.ExponentialLR(o, 0.5),
        steps_per_epoch=5,
    ),
    "adamw-multiplicative": replace(
        CASES["adamw"],
        scheduler=lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.9),
        steps=100,
    ),
}


class TorchRun:
    """Parameters with a PyTorch optimizer, and optionally a scheduler."""

    def __init__(self, case: Case) -> None:
        rng = np.random.default_rng(0)
        self.case = case
        start = {name: rng.standard_normal(shape) for name, shape in SHAPES.items()}
        used = {leaf.name for leaf in case.leaves.values()}
        self.params = {
            name: to_torch(array.astype(case.dtype)).requires_grad_()
            for name, array in start.items()
            if name in used
        }
        named = list(self.params.items())
        groups = [{"params": named[::2]}, {"params": named[1::2], **case.second}]
        self.optimizer = getattr(torch.optim, case.kind)(groups, **case.options)
        self.scheduler = case.scheduler and case.scheduler(self.optimizer)

    def walk(self, first: int, steps: int) -> list[dict[str, np.ndarray]]:
        visited = []
        for step in range(first, first + steps):
            for name, p in self.params.items():
                p.grad = to_torch(noise(step, name, self.case.dtype)) + 0.5 * p.detach()
            self.optimizer.step()
            if self.scheduler and (step + 1) % self.case.steps_per_epoch == 0:
                self.scheduler.step()
            visited.append({name: from_torch(p).copy() for name, p in self.params.items()})
        return visited

    @property
    def shared(self) -> dict[str, Any]:
        return {"scheduler": self.scheduler, **self.case.keywords}

    def to_jax(self) -> JaxRun:
        arrays = {p: leaf.to_jax(from_torch(self.params[leaf.name])) for p, leaf in self.leaves}
        params = nested({p: jnp.array(array) for p, array in arrays.items()})
        names = self.case.names or NAMES
        optimizer = optimizer_from_torch(self.optimizer, names, **self.shared)
        state = state_from_torch(self.optimizer, names, params, optimizer, **self.shared)
        return JaxRun(self.case, optimizer, params, state)

    def from_jax(self, run: JaxRun) -> None:
        names, options = self.case.names or NAMES, {**self.shared, "step": 2 * STEPS}
        state_to_torch(run.state, self.optimizer, names, **options)
        arrays = dict(named_leaves(run.params))
        with torch.no_grad():
            for path, leaf in self.leaves:
                self.params[leaf.name].copy_(to_torch(leaf.to_torch(np.asarray(arrays[path]))))

    @property
    def leaves(self):
        return self.case.leaves.items()


@dataclass
class JaxRun:
    """The same run in JAX."""

    case: Case
    optimizer: optax.GradientTransformation
    params: Any
    state: Any

    def walk(self, first: int, steps: int) -> list[dict[str, np.ndarray]]:
        leaves, visited = self.case.leaves, []

        @jax.jit
        def train_step(params, state, noises):
            gradient = jax.tree.map(lambda p, n: n + 0.5 * p, params, noises)
            updates, state = self.optimizer.update(gradient, state, params)
            return optax.apply_updates(params, updates), state

        for step in range(first, first + steps):
            noises = nested(
                {p: x.to_jax(noise(step, x.name, self.case.dtype)) for p, x in leaves.items()}
            )
            self.params, self.state = train_step(self.params, self.state, noises)
            arrays = dict(named_leaves(self.params))
            visited.append({x.name: x.to_torch(np.asarray(arrays[p])) for p, x in leaves.items()})
        return visited


def noise(step: int, name: str, dtype: str) -> np.ndarray:
    rng = np.random.default_rng([step, len(name), ord(name[0])])
    return rng.standard_normal(SHAPES[name]).astype(dtype)


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


def states(run: TorchRun) -> dict[str, np.ndarray]:
    """Return the state of PyTorch's optimizer, and the current numbers of its groups."""
    found = {
        f"{key} of {name}": from_torch(value).astype(run.case.dtype)
        for name, p in run.params.items()
        for key, value in run.optimizer.state[p].items()
    }
    for index, group in enumerate(run.optimizer.param_groups):
        numbers = {key: group[key] for key in ("lr", "momentum", "betas") if key in group}
        found |= {f"{key} of group {index}": np.array(value) for key, value in numbers.items()}
    return found


def places(scheduler: Any) -> dict[Any, Any]:
    """Return the progress of a scheduler and of its nested schedulers."""
    if scheduler is None:
        return {}
    own = {k: v for k, v in vars(scheduler).items() if k in ("last_epoch", "T_cur")}
    return {"": own, **{i: places(s) for i, s in enumerate(getattr(scheduler, "_schedulers", ()))}}


# Muon in bfloat16 takes long to compile.
SLOW = pytest.param("muon-one-cycle", marks=pytest.mark.slow)


@pytest.mark.parametrize("name", [*CASES, *(n for n in SCHEDULED if n != "muon-one-cycle"), SLOW])
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
    _, visited = there_and_back(case)
    assert_same_at_every_step(visited, alone(case, 3 * STEPS), BITWISE, names=names)


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


def test_steps_that_contradict_the_scheduler():
    run = TorchRun(SCHEDULED["adamw-per-epoch"])
    run.walk(0, STEPS)
    run.case = replace(run.case, steps_per_epoch=4)
    message = r"of group 0 are, at step 12; got epoch 2, which is step 8 with steps_per_epoch=4"
    with jax.enable_x64(True), pytest.raises(ValueError, match=message):
        run.to_jax()


def test_a_count_that_contradicts_the_scheduler():
    run = TorchRun(SCHEDULED["asgd-step"])
    run.walk(0, 2)
    run.scheduler.step()
    message = "of group 0 are, at step 2; got epoch 3"
    with jax.enable_x64(True), pytest.raises(ValueError, match=message):
        run.to_jax()


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


SCHEDULERS = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 7, 0.3),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [5, 5, 20], 0.3),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 25, 1e-3),
    "CosineAnnealingLR to 0": lambda o: lr_scheduler.CosineAnnealingLR(o, 25),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 7, 2),
    "CosineAnnealingWarmRestarts, one length": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(
        o, 10, eta_min=1e-3
    ),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, 0.9, 20),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.25, 20),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 50, 0.9),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, [0.1, 0.2, 0.3], total_steps=60),
    "OneCycleLR, linear": lambda o: lr_scheduler.OneCycleLR(
        o, [0.1, 0.2, 0.3], total_steps=60, anneal_strategy="linear", pct_start=0.37
    ),
    "OneCycleLR, three phases": lambda o: lr_scheduler.OneCycleLR(
        o, [0.1, 0.2, 0.3], total_steps=61, three_phase=True, pct_start=0.27
    ),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(
        o, [lambda t: 0.9**t, lambda t: 1 / (t + 1), lambda t: 1.0]
    ),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.95),
    "SequentialLR": warm_up,
}


def tabulated(name, steps):
    return steps if name in ("LambdaLR", "MultiplicativeLR") else None


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedules(name):
    """Compare within 1e-14 of the largest rate of the group, which scales PyTorch's rounding."""
    rates = (0.1, 0.03, 0.7)
    groups = [{"params": [torch.zeros(1, requires_grad=True)], "lr": lr} for lr in rates]
    optimizer = torch.optim.SGD(groups, momentum=0.5)
    scheduler = SCHEDULERS[name](optimizer)
    schedules, theirs = schedule_from_torch(scheduler, steps=tabulated(name, 60)), []
    for _ in range(60):
        theirs.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    theirs, counts = np.array(theirs), np.arange(60, dtype=np.int32)
    single = np.stack([jax.jit(jax.vmap(s))(counts) for s in schedules], axis=1)
    with jax.enable_x64(True):
        double = np.stack([jax.jit(jax.vmap(s))(counts) for s in schedules], axis=1)
    assert (single.dtype, double.dtype) == (np.float32, np.float64)
    np.testing.assert_array_less(np.abs(double - theirs) / theirs.max(axis=0), 1e-14)
    # Within four units in the last place of each rate in float32.
    np.testing.assert_array_less(np.abs(single - double), 5e-7 * np.abs(double) + 1e-30)
    # The schedule covers the whole run, independent of the progress of the scheduler.
    if "Lambda" not in name and "Multiplicative" not in name:
        again = schedule_from_torch(scheduler)
        assert [np.asarray(s(7)) for s in again] == [np.asarray(s(7)) for s in schedules]


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
def test_a_defect_is_caught(name, change):
    """Test of the tests."""
    planted(name, lambda first, run: None)
    with pytest.raises(AssertionError, match="diverge at step 13"):
        planted(name, change)


def sgd(**options: Any) -> torch.optim.Optimizer:
    named = [(name, torch.ones(shape, requires_grad=True)) for name, shape in SHAPES.items()]
    return torch.optim.SGD(named, **options)


def other_home(optimizer):
    return type("SGD", (torch.optim.SGD,), {"__module__": "mine"})(optimizer.param_groups)


def entry(**entries):
    return lambda optimizer: optimizer.param_groups[0].update(entries)


# By the error, a change of an optimizer, or another one.
REFUSED = {
    r"^torch_optimizer must be one of torch\.optim: .*; got .*SparseAdam": lambda o: (
        torch.optim.SparseAdam([torch.zeros(1, requires_grad=True)])
    ),
    r"^torch_optimizer must be one of .*; got mine\.SGD": other_home,
    "^model must be given if group 0 has no names .* Pass the model": lambda o: torch.optim.SGD(
        o.param_groups[0]["params"]
    ),
    "^differentiable of group 0 must be False; got True": entry(differentiable=True),
    r"^group 0 must not have lr_scale; got .*torch\.optim\.SGD": entry(lr_scale=0.5),
    "^lr of group 0 must not require a gradient": entry(lr=torch.tensor(0.1, requires_grad=True)),
    "^momentum must be a real number": entry(momentum="much"),
    "^group 0 must have nesterov; got": lambda o: o.param_groups[0].pop("nesterov"),
    "^torch_optimizer must have no hooks": lambda o: o.register_step_post_hook(print),
    "^scheduler must be given if .* 'initial_lr'; got None": lambda o: lr_scheduler.StepLR(o, 5),
}


@pytest.mark.parametrize(("message", "change"), REFUSED.items(), ids=range(len(REFUSED)))
def test_optimizers_that_cannot_be_converted(message, change):
    optimizer = sgd(lr=0.1)
    changed = change(optimizer)
    optimizer = changed if isinstance(changed, torch.optim.Optimizer) else optimizer
    with pytest.raises((ValueError, TypeError), match=message):
        optimizer_from_torch(optimizer, NAMES)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"conv/kernel": "conv.weight"}, "that no JAX parameter is: dense.bias, dense.weight, mix"),
        ({**NAMES, "more": "no.weight"}, r"not in the optimizer \(see model=\): no.weight"),
        ({**NAMES, "more": "out.bias"}, "the same PyTorch parameter: more, out/bias"),
    ],
)
def test_wrong_names_are_listed(names, message):
    with pytest.raises(ValueError, match=message):
        optimizer_from_torch(sgd(), names)


def test_wrong_jax_parameters_are_listed():
    params = nested({path: jnp.ones(1) for path in NAMES})
    optimizer = optimizer_from_torch(sgd(), NAMES)
    with pytest.raises(ValueError, match=r"without a name in PyTorch: more; names of .*: out/bias"):
        optimizer.init({**params, "out": {}, "more": jnp.ones(1)})


def test_a_parameter_that_the_model_lacks():
    with pytest.raises(
        ValueError, match=r"^model must have all parameters of torch_optimizer; got one without 5"
    ):
        optimizer_from_torch(sgd(), NAMES, model=torch.nn.Linear(2, 2))


def test_adafactor_of_other_axes():
    named = zip(SHAPES, sgd().param_groups[0]["params"], strict=True)
    optimizer = torch.optim.Adafactor(named)
    with pytest.raises(
        ValueError, match=r"^transpose of 'conv.weight' must keep .* got \(2, 3, 1, 0\)"
    ):
        optimizer_from_torch(optimizer, NAMES)


def overruled(optimizer):
    scheduler = lr_scheduler.StepLR(optimizer, 5)
    optimizer.param_groups[0]["lr"] *= 1.001
    return scheduler


HALF: Any = 2.5  # which lr_scheduler accepts, though not by its types


def in_sequence(inner):
    def make(optimizer):
        first = lr_scheduler.ConstantLR(optimizer)
        return lr_scheduler.SequentialLR(optimizer, [first, inner(optimizer)], [5])

    return make


SCHEDULERS_REFUSED = {
    "^scheduler must be one of .*; got .*ReduceLROnPlateau": lr_scheduler.ReduceLROnPlateau,
    "^scheduler must be one of .*; got .*CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.1, 0.2),
    "^steps must be an integer for LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: 1.0),
    r"^lr of group 0 must be 0\.1 after 0 steps of the StepLR; got 0\.1001": overruled,
    "another optimizer": lambda o: lr_scheduler.StepLR(sgd(), 5),
    "^initial_lr of group 0 must be a number": lambda o: (
        entry(lr=torch.tensor(0.1))(o) or lr_scheduler.StepLR(o, 5)
    ),
    "^total_iters must be .* at least 1; got 0": lambda o: lr_scheduler.ConstantLR(o, 0.5, 0),
    "^T_max must be .* at least 1; got 2.5": lambda o: lr_scheduler.CosineAnnealingLR(o, HALF),
    "^schedulers of SequentialLR must not .* got OneCycleLR": in_sequence(
        lambda o: lr_scheduler.OneCycleLR(o, 0.1, 10)
    ),
    "^schedulers of SequentialLR must not .* got MultiplicativeLR": in_sequence(
        lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.9)
    ),
}


@pytest.mark.parametrize(
    ("message", "make"), SCHEDULERS_REFUSED.items(), ids=range(len(SCHEDULERS_REFUSED))
)
def test_schedulers_that_cannot_be_converted(message, make):
    optimizer = sgd(lr=0.1, momentum=0.9)
    with pytest.raises(ValueError, match=message):
        optimizer_from_torch(optimizer, NAMES, scheduler=make(optimizer))


def test_a_momentum_changed_by_hand():
    optimizer = sgd(lr=0.1, momentum=0.9)
    scheduler = lr_scheduler.OneCycleLR(optimizer, 0.1, 10)
    optimizer.param_groups[0]["momentum"] = 0.9
    with pytest.raises(
        ValueError, match=r"^momentum of group 0 must be 0\.95.* after 0 steps .*got 0\.9\."
    ):
        optimizer_from_torch(optimizer, NAMES, scheduler=scheduler)


def test_a_table_that_is_too_short():
    optimizer = sgd(lr=0.1)
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda t: 1.0)
    for _ in range(3):
        optimizer.step()
        scheduler.step()
    with pytest.raises(ValueError, match=r"^steps must cover .* already taken; got fewer than 4"):
        schedule_from_torch(scheduler, steps=3)
    [schedule] = schedule_from_torch(scheduler, steps=4)
    assert np.asarray(schedule(3)) == np.float32(0.1)
    assert np.isnan(schedule(4))


# By the error, a change of PyTorch's states of dense.bias and dense.weight.
CHANGES = {
    "of group 0 must have one 'step'.*'dense/bias' 3": lambda b, w: b.update(step=b["step"] + 1),
    r"^state of 'dense.bias' \('dense/bias'\) must have 'exp_avg'": lambda b, w: b.pop("exp_avg"),
    r"^state of 'dense.bias' \('dense/bias'\) must have 'step'": lambda b, w: b.clear(),
    r"^state of 'dense.bias' .* must have only .*; got more": lambda b, w: b.update(more=1),
    r"'exp_avg' of 'dense.weight' must be .*\[3, 4\].*; got .*\[4, 3\].*Leaf": lambda b, w: (
        w.update(exp_avg=w["exp_avg"].T.contiguous())
    ),
    "'exp_avg' of 'dense.weight' must be float64.* 'dense/kernel'; got float32": lambda b, w: (
        w.update(exp_avg=w["exp_avg"].float())
    ),
}


@pytest.mark.parametrize(("message", "change"), CHANGES.items(), ids=range(len(CHANGES)))
def test_states_that_cannot_be_converted(message, change):
    run = TorchRun(CASES["adam"])
    run.walk(0, 2)
    change(*(run.optimizer.state[run.params[name]] for name in ("dense.bias", "dense.weight")))
    with jax.enable_x64(True), pytest.raises(ValueError, match=message):
        run.to_jax()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "adam-cosine",
            lambda optimizer: optimizer,
            "^scheduler must be given if group 0 has 'initial_lr'; got None",
        ),
        (
            "adam",
            lambda optimizer: optax.chain(optax.clip(1.0), optimizer),
            "Leave out what is chained to it",
        ),
    ],
)
def test_a_state_of_another_optimizer(name, change, message):
    with jax.enable_x64(True):
        first = TorchRun((CASES | SCHEDULED)[name])
        run = first.to_jax()
        optimizer = change(run.optimizer)
        with pytest.raises(ValueError, match=message):
            state_from_torch(first.optimizer, NAMES, run.params, optimizer)
        with pytest.raises(ValueError, match=message):
            state_to_torch(optimizer.init(run.params), first.optimizer, NAMES)


def test_a_state_without_the_schedule_of_the_scheduler():
    with jax.enable_x64(True):
        first, run = TorchRun(SCHEDULED["adam-cosine"]), TorchRun(CASES["adam"]).to_jax()
        message = "^scheduler must be the one that .*; got CosineAnnealingLR. Pass the same"
        with pytest.raises(ValueError, match=message):
            state_from_torch(
                first.optimizer, NAMES, run.params, run.optimizer, scheduler=first.scheduler
            )
        state = run.optimizer.init(run.params)
        with pytest.raises(ValueError, match=message):
            state_to_torch(state, first.optimizer, NAMES, scheduler=first.scheduler)


def test_everything_is_checked_before_anything_is_assigned():
    with jax.enable_x64(True):
        first = TorchRun(SCHEDULED["adam-cosine"])
        first.walk(0, 2)
        run = first.to_jax()
        before = {name: dict(first.optimizer.state[p]) for name, p in first.params.items()}
        rate = first.optimizer.param_groups[0]["lr"]
        run.walk(2, 2)
        # The last leaf is of another shape.
        bad = {**NAMES, "out/bias": Leaf("dense.bias"), "dense/bias": Leaf("out.bias")}
        with pytest.raises(
            ValueError, match=r"^'mu' of 'dense/bias' must be float64\[2\], .*; got float64\[4\]"
        ):
            state_to_torch(run.state, first.optimizer, bad, **first.shared)
    for name, p in first.params.items():
        for key, value in first.optimizer.state[p].items():
            assert value is before[name][key]
    assert first.optimizer.param_groups[0]["lr"] == rate
    assert first.scheduler.last_epoch == 2
