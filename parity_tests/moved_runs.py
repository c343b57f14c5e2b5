"""Runs that move from PyTorch to JAX and back, for the tests of `regjax.interop`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from torch.optim import lr_scheduler

from parity_tests.frameworks import from_torch, to_torch
from parity_tests.harness import Leaf
from parity_tests.optimizers._muon import BFLOAT16
from parity_tests.trajectories import nested
from regjax._decay.paths import named_leaves
from regjax.interop import optimizer_from_torch, state_from_torch, state_to_torch
from regjax.interop._schedule_tables import advance

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
    """An optimizer with two groups, whose options differ.

    Its kind is the name of a class of `torch.optim`, or another class.
    """

    kind: Any
    options: dict[str, Any]
    second: dict[str, Any]
    names: Any = None
    tolerance: float = 1e-12
    scheduler: Any = None
    dtype: str = "float64"
    steps_per_epoch: int = 1
    steps: int | None = None
    metrics: tuple[float, ...] | None = None
    gives_step: bool = False  # to state_from_torch

    @property
    def leaves(self) -> dict[str, Leaf]:
        """The parameters, by path in JAX."""
        names = self.names or NAMES
        return {p: n if isinstance(n, Leaf) else Leaf(n) for p, n in names.items()}

    @property
    def keywords(self) -> dict[str, Any]:
        """The options of a conversion with this scheduler."""
        if self.scheduler is None:
            return {}
        keywords = {"steps": self.steps, "steps_per_epoch": self.steps_per_epoch}
        return keywords if self.metrics is None else {**keywords, "metrics": self.metrics}


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
    """Return a schedule of both the rate and the momentum."""
    return lr_scheduler.OneCycleLR(optimizer, [0.1, 0.02], total_steps=50, **options)


def warm_up(optimizer):
    """Return a sequence of three schedulers."""
    first = lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 5)
    middle = lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 4, 2)
    last = lr_scheduler.ExponentialLR(optimizer, 0.9)
    return lr_scheduler.SequentialLR(optimizer, [first, middle, last], [6, 30])


def cycle(optimizer, **options):
    """Return a triangular schedule of both the rate and the momentum, without a formula."""
    return lr_scheduler.CyclicLR(optimizer, 0.01, 0.1, 5, mode="triangular2", **options)


class Decays:
    """A scheduler of no library, which moves the weight decay, too."""

    def __init__(self, optimizer):
        self.optimizer, self.last_epoch = optimizer, 0

    def step(self):
        """Change the rate and the decay of each group."""
        self.last_epoch += 1
        for group in self.optimizer.param_groups:
            group["lr"] *= 0.95
            group["weight_decay"] += 0.01


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
    "sgd-cycle": replace(CASES["sgd"], scheduler=cycle, steps=40),
    "adamw-cycle": replace(CASES["adamw"], scheduler=cycle, steps=40),
    "adamw-decays": replace(CASES["adamw"], scheduler=Decays, steps=40),
    "adam-decays": replace(CASES["adam"], scheduler=Decays, steps=40),
    "rmsprop-plateau": replace(
        CASES["rmsprop"],
        scheduler=lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=1),
        steps_per_epoch=2,
        metrics=(2.0, 1.0, 1.0, 1.5, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0) * 2,
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
        kind = getattr(torch.optim, case.kind) if isinstance(case.kind, str) else case.kind
        self.optimizer = kind(groups, **case.options)
        self.scheduler = case.scheduler and case.scheduler(self.optimizer)
        self.taken = 0

    def walk(self, first: int, steps: int) -> list[dict[str, np.ndarray]]:
        """Take the steps from `first` on; return the parameters after each."""
        visited = []
        for step in range(first, first + steps):
            for name, p in self.params.items():
                p.grad = to_torch(noise(step, name, self.case.dtype)) + 0.5 * p.detach()
            self.optimizer.step()
            if self.scheduler and (step + 1) % self.case.steps_per_epoch == 0:
                epoch = (step + 1) // self.case.steps_per_epoch
                advance(self.scheduler, epoch, self.case.metrics)
            visited.append({name: from_torch(p).copy() for name, p in self.params.items()})
        self.taken = first + steps
        return visited

    @property
    def shared(self) -> dict[str, Any]:
        """The options that every conversion takes."""
        return {"scheduler": self.scheduler, **self.case.keywords}

    def to_jax(self) -> JaxRun:
        """Return the run in JAX, with its parameters and the state of the optimizer."""
        arrays = {p: leaf.to_jax(from_torch(self.params[leaf.name])) for p, leaf in self.leaves}
        params = nested({p: jnp.array(array) for p, array in arrays.items()})
        names = self.case.names or NAMES
        optimizer = optimizer_from_torch(self.optimizer, names, **self.shared)
        options = self.shared
        if self.case.gives_step:
            options["step"] = self.taken
        state = state_from_torch(self.optimizer, names, params, optimizer, **options)
        return JaxRun(self.case, optimizer, params, state)

    def from_jax(self, run: JaxRun) -> None:
        """Continue a run in JAX from its last step."""
        names, options = self.case.names or NAMES, {**self.shared, "step": 2 * STEPS}
        state_to_torch(run.state, self.optimizer, names, **options)
        arrays = dict(named_leaves(run.params))
        with torch.no_grad():
            for path, leaf in self.leaves:
                self.params[leaf.name].copy_(to_torch(leaf.to_torch(np.asarray(arrays[path]))))

    @property
    def leaves(self):
        """Each path in JAX with its parameter."""
        return self.case.leaves.items()


@dataclass
class JaxRun:
    """The same run in JAX."""

    case: Case
    optimizer: optax.GradientTransformation
    params: Any
    state: Any

    def walk(self, first: int, steps: int) -> list[dict[str, np.ndarray]]:
        """Take the steps from `first` on; return the parameters after each."""
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
    """Return the part of a gradient that the parameters do not affect."""
    rng = np.random.default_rng([step, len(name), ord(name[0])])
    return rng.standard_normal(SHAPES[name]).astype(dtype)


def sgd(**options: Any) -> torch.optim.Optimizer:
    """Return SGD of named parameters of ones."""
    named = [(name, torch.ones(shape, requires_grad=True)) for name, shape in SHAPES.items()]
    return torch.optim.SGD(named, **options)


def entry(**entries):
    """Return a function that changes the first group of an optimizer."""
    return lambda optimizer: optimizer.param_groups[0].update(entries)
