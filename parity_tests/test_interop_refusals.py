"""Optimizers, names and states that cannot be converted between PyTorch and JAX."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import optax
import pytest
import torch
from torch.optim import lr_scheduler

from parity_tests.harness import Leaf
from parity_tests.moved_runs import CASES, NAMES, SCHEDULED, SHAPES, TorchRun, entry, sgd
from parity_tests.trajectories import nested
from regjax.interop import optimizer_from_torch, state_from_torch, state_to_torch


def other_home(optimizer):
    return type("SGD", (torch.optim.SGD,), {"__module__": "mine"})(optimizer.param_groups)


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
            "Pass it without other links around it",
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


# The states of Adam and of Adamax have the same fields.
KINDS = ("Adagrad", "Adam", "Adamax", "RMSprop", "SGD")


@pytest.mark.parametrize(("trained", "created"), [*itertools.permutations(KINDS, 2)])
def test_a_state_of_another_optimizer_is_refused(trained, created):
    layer = torch.nn.Linear(3, 2, bias=False)
    layer(torch.ones(3)).sum().backward()
    names, params = {"kernel": Leaf("weight", (1, 0))}, {"kernel": jnp.ones((3, 2))}
    recipe, other = (
        getattr(torch.optim, kind)(layer.named_parameters(), lr=0.1) for kind in (trained, created)
    )
    recipe.step()
    optimizer = optimizer_from_torch(other, names)
    message = rf"optimizer must be .* for torch\.optim\.{trained}; got one for .*\.{created}\."
    with pytest.raises(ValueError, match=message):
        state_from_torch(recipe, names, params, optimizer)
