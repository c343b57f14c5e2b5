"""Optimizer classes that are not of `torch.optim`: registered ones, and ones that are refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from torch.optim import lr_scheduler

from parity_tests.compare import FLOAT64, assert_same_at_every_step
from parity_tests.harness import JaxSide, Leaf, TorchSide, compare_training
from parity_tests.moved_runs import (
    ADAM,
    ADAM_2,
    NAMES,
    STEPS,
    Case,
    TorchRun,
    cycle,
    entry,
    sgd,
)
from parity_tests.test_interop import alone, places, states, there_and_back
from regjax.interop import optimizer_from_torch, register_optimizer, state_from_torch
from regjax.interop._registry import find_record


class Same(torch.optim.AdamW):
    """A subclass with the same steps."""


class Renamed(torch.optim.Optimizer):
    """Adam with names of its own, and Python numbers in its state."""

    def __init__(self, params, lr, beta, decay):
        extra = {"cautious": False, "verbose": True}
        super().__init__(params, {"lr": lr, "beta": beta, "decay": decay, **extra})

    @torch.no_grad()
    def step(self, closure=None):  # pyright: ignore[reportIncompatibleMethodOverride]  # unused
        """Take a step."""
        for group in self.param_groups:
            first, second = group["beta"]
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update(t=0, m=torch.zeros_like(p), v=torch.zeros_like(p))
                state["t"] += 1
                gradient = p.grad + group["decay"] * p
                state["m"].lerp_(gradient, 1 - first)
                state["v"].lerp_(gradient**2, 1 - second)
                mean = state["m"] / (1 - first ** state["t"])
                root = (state["v"] / (1 - second ** state["t"])).sqrt()
                p -= group["lr"] * mean / (root + 1e-8)


class Lion(torch.optim.Optimizer):
    """An algorithm that `torch.optim` does not have."""

    def __init__(self, params, lr, betas=(0.9, 0.99), weight_decay=0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):  # pyright: ignore[reportIncompatibleMethodOverride]  # unused
        """Take a step."""
        for group in self.param_groups:
            first, second = group["betas"]
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                p *= 1 - group["lr"] * group["weight_decay"]
                p -= group["lr"] * momentum.lerp(p.grad, 1 - first).sign()
                momentum.lerp_(p.grad, 1 - second)


class CountingLion(Lion):
    """The same, which counts its steps."""

    @torch.no_grad()
    def step(self, closure=None):
        """Take a step."""
        super().step(closure)
        for state in self.state.values():
            state["taken"] = state.get("taken", torch.zeros(())) + 1


def lion(learning_rate, betas, weight_decay):
    """Return optax's counterpart."""
    return optax.lion(learning_rate, *betas, weight_decay=weight_decay)


LION: dict[str, Any] = {"create": lion, "options": ("betas", "weight_decay")}
RENAMED: dict[str, Any] = {
    "like": "Adam",
    "options": {"beta": "betas", "decay": "weight_decay"},
    "defaults": {
        "eps": 1e-8,
        "amsgrad": False,
        "maximize": False,
        "decoupled_weight_decay": False,
    },
    "fixed": {"cautious": False},
    "ignored": ["verbose"],
    "state": {"m": "exp_avg", "v": "exp_avg_sq", "t": "step"},
    "python_numbers": True,
}
register_optimizer(Same, like=torch.optim.AdamW)
register_optimizer(f"{__name__}.Renamed", **RENAMED)
register_optimizer(Lion, **LION, state={"momentum": "mu"})
register_optimizer(CountingLion, **LION, state={"momentum": "mu"}, step="taken")

CASES = {
    "same": Case(Same, ADAM, {**ADAM_2, "amsgrad": True}),
    "same-cycle": Case(Same, ADAM, ADAM_2, scheduler=cycle, steps=40),
    "renamed": Case(Renamed, {"lr": 0.02, "beta": (0.8, 0.99), "decay": 0.1}, {"decay": 0.0}),
    "lion": Case(Lion, {"lr": 0.02, "betas": (0.8, 0.9), "weight_decay": 0.1}, {"lr": 0.01}),
    "counting-lion": Case(CountingLion, {"lr": 0.02, "betas": (0.8, 0.9)}, {"lr": 0.01}),
}
SCHEDULED = {"scheduler": lambda o: lr_scheduler.StepLR(o, 5)}
CASES["lion-step"] = replace(CASES["lion"], **SCHEDULED)
CASES["lion-cycle"] = replace(CASES["lion"], scheduler=cycle, steps=40)
CASES["counting-lion-step"] = replace(CASES["counting-lion"], **SCHEDULED)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.sample(4)
def test_a_run_continues_in_jax_and_back(name):
    case = CASES[name]
    (last, visited), whole = there_and_back(case), TorchRun(case)
    assert_same_at_every_step(visited, whole.walk(0, 3 * STEPS), FLOAT64)
    assert places(last.scheduler) == places(whole.scheduler)
    numbers = [
        {key: type(value) for key, value in run.optimizer.state[p].items()}
        for run in (last, whole)
        for p in run.params.values()
    ]
    assert numbers[: len(numbers) // 2] == numbers[len(numbers) // 2 :]
    if name != "renamed":  # whose numbers are no tensors
        assert_same_at_every_step([states(last)], [states(whole)], FLOAT64)


@pytest.mark.parametrize(
    "planted",
    [
        {"options": {"beta": "betas"}, "defaults": {**RENAMED["defaults"], "weight_decay": 0.0}},
        {"defaults": {**RENAMED["defaults"], "decoupled_weight_decay": True}},
        {"defaults": {**RENAMED["defaults"], "eps": 1e-3}},
    ],
    ids=["decay", "decoupled", "eps"],
)
def test_a_wrong_registration_is_seen_in_a_run(planted):
    """Test of the test: nothing checks a registration but a run."""
    case = replace(CASES["renamed"], kind=type("Planted", (Renamed,), {}))
    ignored = ["verbose", *({"decay"} if "options" in planted else set())]
    register_optimizer(case.kind, **RENAMED | planted | {"ignored": ignored})
    with pytest.raises(AssertionError, match=f"diverge at step {STEPS + 1}"):
        assert_same_at_every_step(there_and_back(case)[1], alone(case, 3 * STEPS), FLOAT64)


def other(name, base, module="elsewhere"):
    """Return a function that creates an optimizer of an unknown class."""
    return lambda o: type(name, (base,), {"__module__": module})(o.param_groups)


UNKNOWN = {
    r"got elsewhere\.Mine, a subclass of torch\.optim\.AdamW\. If its steps are the same, "
    r"declare it: regjax\.interop\.register_optimizer\(Mine, like=torch\.optim\.AdamW\)\.": other(
        "Mine", torch.optim.AdamW
    ),
    # The name of a class of torch.optim is not enough.
    r"got bitsandbytes\.optim\.adamw\.AdamW\. Declare another class by": lambda o: type(
        "AdamW", (torch.optim.Optimizer,), {"__module__": "bitsandbytes.optim.adamw"}
    )(o.param_groups, {}),
    r"got torch_optimizer\.AdamW, a subclass of torch\.optim\.AdamW": other(
        "AdamW", torch.optim.AdamW, "torch_optimizer"
    ),
    r"got elsewhere\.More, a subclass of torch\.optim\.AdamW": other("More", Same),
    r"^cautious of group 0 must be False for .*\.Renamed, as .*; got True": lambda o: (
        entry(cautious=True)(r := Renamed(o.param_groups, 0.1, (0.9, 0.9), 0.0)) or r
    ),
    r"^group 0 must not have .*more.*; .* Pass the options of .*test_interop_registry\.Lion": (
        lambda o: entry(more=1)(r := Lion(o.param_groups, 0.1)) or r
    ),
}


@pytest.mark.parametrize(("message", "make"), UNKNOWN.items(), ids=range(len(UNKNOWN)))
def test_an_optimizer_that_is_refused(message, make):
    optimizer = make(sgd(lr=0.1))
    with pytest.raises(ValueError, match=message):
        optimizer_from_torch(optimizer, NAMES)


def test_the_harness_knows_classes_not_names():
    assert find_record(other("AdamW", torch.optim.Optimizer)) is None
    impostor = type("AdamW", (torch.optim.AdamW,), {"__module__": "elsewhere"})
    assert find_record(impostor([torch.zeros(1)])) is None


WRONG: dict[str, tuple[Any, dict[str, Any]]] = {
    "^like must be given without create; got None": (Lion, {}),
    "^create must be None with like; got": (Lion, {**LION, "like": "Adam"}),
    "^torch_class must not be one of torch.optim": (torch.optim.Adam, {"like": "Adam"}),
    "^torch_class must be a class or its qualified name; got 'Lion'": ("Lion", LION),
    "^torch_class must be a class or its qualified name; got 3": (3, LION),
    "^like must be one of torch.optim: .*; got Lion": (Lion, {"like": "Lion"}),
    "^like must be one of torch.optim: .*Lion": (Lion, {"like": Lion}),
    "^step must be None with like; got 't'": (Lion, {"like": "Adam", "step": "t"}),
    "^options must be names of torch.optim.Adam: .*; got b": (
        Lion,
        {"like": "Adam", "options": {"beta": "b"}},
    ),
    "^state must be names of torch.optim.Adam: .*; got m": (
        Lion,
        {"like": "Adam", "state": {"a": "m"}},
    ),
    "^state must be a mapping": (Lion, {"like": "Adam", "state": ["m"]}),
    "^create must be a function; got": (Lion, {"create": "lion"}),
    "^ignored must be a list of names; got 'caution'": (Lion, {**LION, "ignored": "caution"}),
    "^options must be a list of names; got 'betas'": (Lion, {**LION, "options": "betas"}),
    "^defaults must be None with create": (Lion, {**LION, "defaults": {"a": 1}}),
}


@pytest.mark.parametrize(("message", "call"), WRONG.items(), ids=range(len(WRONG)))
def test_registrations_that_are_refused(message, call):
    torch_class, keywords = call
    with pytest.raises((ValueError, TypeError), match=message):
        register_optimizer(torch_class, **keywords)


def adam(learning_rate, betas, weight_decay):
    return optax.chain(optax.scale_by_adam(*betas), lion(learning_rate, betas, weight_decay))


UNDESCRIBED: dict[str, tuple[type, dict[str, Any]]] = {
    "^state of 'conv.weight' .* must have only entries of .*; got momentum": (Lion, LION),
    r"^state of .*\.Undescribed must map the field 'nu' of its optax state; got only mu": (
        Lion,
        {**LION, "create": adam, "state": {"momentum": "mu"}},
    ),
    "^python_numbers must be True for .*, whose 'step' is 2; got False": (
        Renamed,
        {**RENAMED, "python_numbers": False},
    ),
}


@pytest.mark.parametrize(("message", "case"), UNDESCRIBED.items(), ids=range(len(UNDESCRIBED)))
def test_a_state_that_a_registration_does_not_describe(message, case):
    kind, keywords = case
    cls = type("Undescribed", (kind,), {})
    register_optimizer(cls, **keywords)
    run = TorchRun(replace(CASES[kind.__name__.lower()], kind=cls))
    run.walk(0, 2)
    with jax.enable_x64(True), pytest.raises(ValueError, match=message):
        run.to_jax()


@pytest.mark.parametrize("beta", [0.9, 0.5])
def test_the_harness_compares_the_state_of_a_registered_class(beta):
    model = torch.nn.Linear(3, 2, bias=False)
    optimizer = Lion(model.named_parameters(), 0.01)
    scheduler = lr_scheduler.CyclicLR(optimizer, 0.01, 0.1, 3, cycle_momentum=False)
    names, params = {"kernel": Leaf("weight", (1, 0))}, {"kernel": jnp.zeros((3, 2))}
    optimizer.param_groups[0]["betas"] = (0.9, beta)
    ours = optimizer_from_torch(optimizer, names, scheduler=scheduler, steps=9)
    state = state_from_torch(optimizer, names, params, ours, scheduler=scheduler, steps=9)
    optimizer.param_groups[0]["betas"] = (0.9, 0.9)
    found = compare_training(
        JaxSide(params, lambda p, x, step: ((x @ p["kernel"]) ** 2).sum(), ours, state),
        TorchSide(
            model,
            lambda model, x, step: (model(torch.from_numpy(x)) ** 2).sum(),
            optimizer,
            scheduler if beta == 0.9 else lambda step: scheduler.step(),
        ),
        [np.full((4, 3), step + 1, "float32") for step in range(6)],
        names,
    )
    assert found.agrees == (beta == 0.9)
    assert found.agrees or "in the state 'momentum of" in str(found)
