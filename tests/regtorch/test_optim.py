"""Decays beyond those of torch.optim, on any optimizer; `test_optim_refusals.py` has errors."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
import torch
from torch import nn

from regtorch import l1_penalty, l2_sp_penalty, optim

# Each decay with a rate of 0.25, and its additional effect on a step of SGD from w = 2 or -2, with
# a learning rate of 0.5 and a gradient of 1.
FORMS = {
    "l1": (lambda o, rate, mask=None: optim.add_l1_decay(o, rate, mask=mask), (0.125, -0.125)),
    "l1 decoupled": (
        lambda o, rate, mask=None: optim.add_l1_decay(o, rate, decoupled=True, mask=mask),
        (0.125, -0.125),
    ),
    "l2_sp": (
        lambda o, rate, mask=None: optim.add_l2_sp_decay(o, _ones(), rate, mask=mask),
        (0.125, -0.375),
    ),
    "l2_sp decoupled": (
        lambda o, rate, mask=None: optim.add_l2_sp_decay(
            o, _ones(), rate, decoupled=True, mask=mask
        ),
        (0.125, -0.375),
    ),
    "independent": (
        lambda o, rate, mask=None: optim.add_independent_weight_decay(o, rate, mask=mask),
        (0.5, -0.5),
    ),
    "cautious": (
        lambda o, rate, mask=None: optim.add_cautious_weight_decay(o, rate, mask=mask),
        (0.25, 0.0),
    ),
}
each_form = pytest.mark.parametrize(("attach", "shrinks"), FORMS.values(), ids=FORMS)
each_attach = pytest.mark.parametrize("attach", [attach for attach, _ in FORMS.values()], ids=FORMS)
each_coupled = pytest.mark.parametrize("form", ["l1", "l2_sp"])


def _ones():
    return {"kernel": torch.ones(2), "bias": torch.ones(1)}


def _module(dtype=torch.float32):
    module = nn.Module()
    module.kernel = nn.Parameter(torch.tensor([2.0, -2.0], dtype=dtype))
    module.bias = nn.Parameter(torch.tensor([2.0], dtype=dtype))
    return module


def _optimizer(module, make=torch.optim.SGD, **options):
    return make(module.named_parameters(), **{"lr": 0.5, **options})


def _step(optimizer, module, gradient=1.0):
    for p in module.parameters():
        p.grad = torch.full_like(p, gradient)
    optimizer.step()


@each_form
def test_rule(attach, shrinks):
    module = _module()
    optimizer = _optimizer(module)
    attach(optimizer, 0.25)
    _step(optimizer, module)
    assert module.kernel.tolist() == [1.5 - shrinks[0], -2.5 - shrinks[1]]
    assert module.bias.tolist() == [1.5 - shrinks[0]]
    assert not module.kernel.grad.requires_grad


@pytest.mark.parametrize(
    "mask",
    [
        {"kernel": True, "bias": False},
        {"kernel": np.True_, "bias": np.False_},
        lambda name, p: name != "bias",
    ],
    ids=["bools", "NumPy's", "function"],
)
@each_form
def test_mask_and_removal(attach, shrinks, mask):
    module = _module()
    optimizer = _optimizer(module)
    handle = attach(optimizer, 0.25, mask)
    _step(optimizer, module)
    assert module.kernel.tolist() == [1.5 - shrinks[0], -2.5 - shrinks[1]]
    assert module.bias.tolist() == [1.5]
    handle.remove()
    handle.remove()
    before = module.kernel.tolist()
    _step(optimizer, module)
    assert module.kernel.tolist() == [w - 0.5 for w in before]


def test_l1_keeps_zeros():
    weight = torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=1.0)
    optim.add_l1_decay(optimizer, 0.5)
    weight.grad = torch.zeros(2)
    optimizer.step()
    assert weight.tolist() == [0, 0]


@each_attach
def test_what_has_no_gradient_does_not_decay(attach):
    module = _module()
    optimizer = _optimizer(module)
    attach(optimizer, 0.25)
    module.kernel.grad = torch.zeros(2)
    optimizer.step()
    assert module.bias.tolist() == [2.0]
    assert module.kernel[0].item() < 2
    module.kernel.grad, module.bias.grad = None, torch.zeros(1)
    before = module.kernel.tolist()
    optimizer.step()
    assert module.kernel.tolist() == before
    assert module.bias.item() < 2


class _Descent(torch.optim.Optimizer):
    """An optimizer without `maximize`."""

    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p.data -= self.defaults["lr"] * p.grad


@each_coupled
def test_an_optimizer_that_cannot_ascend_descends(form):
    module = _module()
    optimizer = _Descent(module.named_parameters(), {"lr": 0.5})
    FORMS[form][0](optimizer, 0.25)
    _step(optimizer, module, 0.0)
    assert module.kernel[0].item() == 1.875


@each_attach
def test_a_schedule_counts_from_zero_and_is_saved(attach):
    asked = []

    def schedule(step):
        asked.append(step)
        return 0.25 / (1 + step)

    module = _module()
    optimizer = _optimizer(module, momentum=0.9)
    attach(optimizer, schedule)
    for _ in range(3):
        _step(optimizer, module)
    assert asked == [0, 1, 2]

    buffer = io.BytesIO()
    torch.save([module.state_dict(), optimizer.state_dict()], buffer)
    buffer.seek(0)
    model_state, state = torch.load(buffer)
    for attach_first in (True, False):
        again = _module()
        again.load_state_dict(model_state)
        resumed = _optimizer(again, momentum=0.9)
        if attach_first:
            attach(resumed, schedule)
        resumed.load_state_dict(copy.deepcopy(state))
        if not attach_first:
            attach(resumed, schedule)
        _step(resumed, again)
        assert asked[-1] == 3
    _step(optimizer, module)
    assert torch.equal(module.kernel, again.kernel)


def test_two_schedules_of_a_kind_have_a_count_each():
    module, asked = _module(), ([], [])
    optimizer = _optimizer(module)
    schedules = [lambda step, i=i: asked[i].append(step) or 0.1 for i in (0, 1)]
    optim.add_l1_decay(optimizer, schedules[0], mask=lambda name, p: name == "kernel")
    second = optim.add_l1_decay(optimizer, schedules[1], mask=lambda name, p: name == "bias")
    for _ in range(2):
        _step(optimizer, module)
    counts = {key: n for key, n in optimizer.param_groups[0].items() if key.endswith("step")}
    assert counts == {"l1_decay_step": 2, "l1_decay_2_step": 2}
    second.remove()
    optim.add_l1_decay(optimizer, schedules[1])
    _step(optimizer, module)
    assert asked == ([0, 1, 2], [0, 1, 0])


@pytest.mark.parametrize(
    "make",
    [
        torch.optim.SGD,
        torch.optim.Adam,
        torch.optim.AdamW,
        torch.optim.RMSprop,
        torch.optim.Adagrad,
        torch.optim.Rprop,
        torch.optim.Adafactor,
    ],
)
@each_attach
def test_any_optimizer_groups_and_scheduler(make, attach):
    module = _module()
    groups = [{"params": [("kernel", module.kernel)]}, {"params": [("bias", module.bias)], "lr": 0}]
    optimizer = make(groups, lr=0.5)
    attach(optimizer, 0.25)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.0)
    _step(optimizer, module)
    scheduler.step()
    assert module.kernel[0].item() != 2
    seen = module.kernel.detach().clone(), module.bias.detach().clone()
    _step(optimizer, module)
    if make is torch.optim.Rprop:
        return  # its step sizes are not learning rates
    independent = attach is FORMS["independent"][0]
    # At a learning rate of 0 only the independent decay has an effect.
    assert torch.equal(module.kernel, seen[0]) != independent
    assert seen[1].item() == (1.5 if independent else 2.0)


def test_groups_decay_by_their_learning_rates():
    module = _module()
    groups = [
        {"params": [("kernel", module.kernel)], "lr": 0.25},
        {"params": [("bias", module.bias)], "lr": 0.5},
    ]
    optimizer = torch.optim.SGD(groups)
    optim.add_l1_decay(optimizer, 1.0, decoupled=True)
    _step(optimizer, module, 0.0)
    assert module.kernel.tolist() == [1.75, -1.75]
    assert module.bias.tolist() == [1.5]


def test_a_group_that_comes_later_decays_too():
    module, late = _module(), nn.Parameter(torch.tensor([4.0]))
    optimizer = _optimizer(module)
    optim.add_l1_decay(optimizer, 1.0)
    optimizer.add_param_group({"params": [("late", late)]})
    late.grad = torch.zeros(1)
    optimizer.step()
    assert late.tolist() == [3.5]


def test_without_names_positions_are_the_names():
    module, seen = _module(), []
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    optim.add_l1_decay(optimizer, 1.0, mask=lambda name, p: seen.append(name) or name == "1")
    _step(optimizer, module, 0.0)
    assert seen[:2] == ["0", "1"]
    assert module.kernel.tolist() == [2.0, -2.0]
    assert module.bias.tolist() == [1.5]
    optim.add_l2_sp_decay(optimizer, [torch.ones(2), torch.ones(1)], 1.0)
    with pytest.raises(ValueError, match=r"reference must have .* got none for '0'"):
        optim.add_l2_sp_decay(optimizer, module, 1.0)


def test_the_reference_is_copied():
    module = _module()
    optimizer = _optimizer(module)
    optim.add_l2_sp_decay(optimizer, module, 0.5, mask={"kernel": True, "bias": True})
    _step(optimizer, module)
    assert module.bias.tolist() == [1.5]
    _step(optimizer, module, 0.0)
    assert module.bias.tolist() == [1.625]


@each_coupled
def test_maximize_still_shrinks(form):
    module = _module()
    optimizer = _optimizer(module, maximize=True)
    FORMS[form][0](optimizer, 0.25)
    _step(optimizer, module, 0.0)
    assert module.kernel[0].item() == 1.875


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.complex64])
@each_attach
def test_dtypes(attach, dtype):
    module = _module(dtype)
    optimizer = _optimizer(module)
    if attach is FORMS["cautious"][0] and dtype.is_complex:
        with pytest.raises(TypeError, match="parameter 'kernel' must be real"):
            attach(optimizer, 0.25)
        return
    attach(optimizer, 0.25)
    _step(optimizer, module, 0.0)
    assert module.kernel.dtype == dtype
    assert 0 < module.kernel[0].abs().item() < 2


def test_half_types_are_rounded_once():
    weight = torch.tensor([1.0], dtype=torch.bfloat16, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=1.0)
    optim.add_l2_sp_decay(optimizer, [torch.tensor([1 + 2**-9])], 1.0)
    weight.grad = torch.zeros(1, dtype=torch.bfloat16)
    optimizer.step()
    assert weight.grad.item() == -(2**-9)


def test_coupled_decay_after_a_real_backward_is_the_penalty():
    runs = []
    for in_loss in (True, False):
        torch.manual_seed(0)
        model, x = nn.Linear(3, 2).double(), torch.randn(5, 3).double()
        start = copy.deepcopy(model)
        optimizer = torch.optim.Adam(model.named_parameters(), lr=0.1)
        if not in_loss:
            optim.add_l1_decay(optimizer, 0.1)
            optim.add_l2_sp_decay(optimizer, start, 0.2)
        for _ in range(20):
            optimizer.zero_grad()
            loss = model(x).square().mean()
            if in_loss:
                loss = loss + l1_penalty(model, 0.1) + l2_sp_penalty(model, start, 0.1)
            loss.backward()
            optimizer.step()
        runs.append([p.detach() for p in model.parameters()])
    torch.testing.assert_close(*runs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", ["l1 decoupled", "independent", "cautious"])
def test_other_decays_work_with_a_closure(form):
    runs = []
    for with_closure in (True, False):
        module = _module()
        optimizer = _optimizer(module)
        FORMS[form][0](optimizer, 0.25)

        def closure(module=module, optimizer=optimizer):
            optimizer.zero_grad()
            (module.kernel.sum() + module.bias.sum()).backward()

        if with_closure:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
        runs.append(module.kernel.tolist())
    assert runs[0] == runs[1]


def test_schedule_weight_decay():
    module = _module()
    groups = [
        {"params": [("kernel", module.kernel)]},
        {"params": [("bias", module.bias)], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.5, weight_decay=0.5)
    handle = optim.schedule_weight_decay(optimizer, lambda step: [0.0, 1.0, 2.0][step])
    visited = []
    for _ in range(3):
        _step(optimizer, module, 0.0)
        visited.append(module.kernel[0].item())
    assert visited == [2.0, 1.5, 0.75]
    assert module.bias.item() == 2
    state = optimizer.state_dict()["param_groups"][0]
    assert (state["initial_weight_decay"], state["scheduled_weight_decay_step"]) == (0.5, 3)
    handle.remove()
    assert optimizer.param_groups[0]["weight_decay"] == 0.5
    assert "initial_weight_decay" not in optimizer.param_groups[0]
    assert "scheduled_weight_decay_step" not in optimizer.param_groups[0]


def test_layerwise_groups():
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    groups = optim.layerwise_groups(
        model,
        lambda name: int(name[0]),
        lr=1.0,
        lr_factor=0.5,
        weight_decay=0.1,
        decay_factor=0.25,
        mask=lambda name, p: p.ndim > 1,
    )
    rates = [([n for n, _ in g["params"]], g["lr"], g["weight_decay"]) for g in groups]
    assert rates == [
        (["0.weight"], 0.5, 0.025),
        (["0.bias"], 0.5, 0.0),
        (["1.weight"], 1.0, 0.1),
        (["1.bias"], 1.0, 0.0),
    ]
    deeper = optim.layerwise_groups(model, lambda name: 0, lr=1.0, lr_factor=0.5, depth=3)
    assert [g["lr"] for g in deeper] == [0.125]
    top = optim.layerwise_groups(model, lambda name: 0, lr=1.0, lr_factor=0.5, depth=0)
    assert [g["lr"] for g in top] == [1.0]
    level = optim.layerwise_groups(model, lambda name: int(name[0]), lr=1.0, depth=1)
    assert [(g["lr"], g["weight_decay"]) for g in level] == [(1.0, 0.0)] * 2
    level = optim.layerwise_groups(model, lambda name: int(name[0]), lr=1.0, weight_decay=0.5)
    assert [(g["lr"], g["weight_decay"]) for g in level] == [(1.0, 0.5)] * 2
    assert optim.layerwise_groups(nn.ReLU(), lambda name: 0, lr=1.0, weight_decay=0.5) == []
