"""`regtorch.keyed`: a draw without a key is an error that names the module, and leaves no mode."""

from __future__ import annotations

import contextlib
import copy
import random
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import _get_current_function_mode_stack as modes

import regtorch
from regtorch import keyed
from tests.regtorch.test_keyed_draws import ROOT, Forward, X, at, keyed_model

UNKNOWN = {
    r"torch\.poisson, .*register\(torch\.poisson, replacement\)": torch.poisson,
    r"torch\.Tensor\.geometric_": lambda x: x.clone().geometric_(0.5),
    r"torch\.Tensor\.log_normal_": lambda x: x.clone().log_normal_(),
    r"torch\.native_dropout": lambda x: torch.native_dropout(x, 0.5, True)[0],
    r"aten\.native_dropout\.default": lambda x: torch.ops.aten.native_dropout.default(x, 0.5, True)[
        0
    ],
    r"torch\.randn": lambda x: torch.randn(3, dtype=torch.complex64),
    r"torch\.multinomial": lambda x: torch.multinomial(x, 9, replacement=True),
    r"torch\.Tensor\.random_": lambda x: torch.empty(3).random_(),
    r"torch\.nn\.init\.normal_": lambda x: nn.init.normal_(x.clone()),
}


@pytest.mark.parametrize(("named", "function"), UNKNOWN.items(), ids=UNKNOWN)
def test_an_unknown_function_is_named_on_the_first_forward(named, function):
    model = keyed_model(nn.ModuleDict({"a": nn.Sequential(nn.Identity(), Forward(function))}))
    with pytest.raises(RuntimeError, match=r"module 'a\.1' must draw from keys; got .*" + named):
        model["a"](X.abs())
    assert modes() == []
    model.eval()["a"](X.abs())  # a model that samples in evaluation


def draw_hidden(x):
    with torch._C.DisableTorchFunction():  # as TorchScript and extensions do
        return x + torch.rand(3, 8)


GLOBAL = {
    "PyTorch's generator, not by a function of torch": draw_hidden,
    r"the global generator of numpy\.random": lambda x: x * np.random.uniform(),  # noqa: NPY002 - the draw to find
}


@pytest.mark.parametrize(("source", "function"), GLOBAL.items(), ids=GLOBAL)
def test_a_draw_from_another_generator_is_an_error_of_its_module(source, function):
    model = keyed_model(nn.Sequential(nn.Identity(), Forward(function)))
    with pytest.raises(RuntimeError, match=rf"module '1' must draw from keys; got .*{source}"):
        model(X)
    assert modes() == []
    model.eval()(X)
    # Also before the forward of a child.
    parent = nn.ModuleDict({"parent": Forward(lambda x: parent["child"](function(x)))})
    parent["parent"].child = parent["child"] = nn.Sequential(nn.Dropout(0.5))
    keyed_model(parent)
    with pytest.raises(RuntimeError, match=rf"module 'parent' must draw .*{source}"):
        parent["parent"](X)
    assert modes() == []


class Later(nn.Module):
    """A module that draws without a key from its second call on."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function, self.calls = function, 0

    def forward(self, x):
        self.calls += 1
        return x if self.calls == 1 else self.function(x)


def test_a_draw_that_the_first_forward_does_not_make_is_found_later():
    model = keyed_model(nn.Sequential(nn.Dropout(0.5), Later(nn.init.normal_)))
    assert torch.equal(model(X), regtorch.dropout(X, 0.5, key=at("0")))
    with pytest.raises(RuntimeError, match=r"module '' .*first call did not make.*Call it again"):
        model(X)
    with pytest.raises(
        RuntimeError,
        match=r"module '1' .*a call of torch\.nn\.init\.normal_",
    ):
        model(X)
    # A function whose tag is known is named at once.
    model[1].function = torch.poisson
    with pytest.raises(RuntimeError, match=r"module '1' .*torch\.poisson"):
        model(X.abs())


@pytest.mark.wrong_types  # the checks of types draw from random, too
def test_python_s_generators_are_watched_in_every_forward():
    model = keyed_model(nn.Sequential(Later(lambda x: x * random.random())))
    model(X)
    with pytest.raises(RuntimeError, match=r"module '' .*global generator of random"):
        model(X)
    keyed.convert(model, allow=["random"])
    model(X)


def test_an_evaluated_part_may_sample_within_a_model_in_training():
    model = nn.Sequential(nn.Dropout(0.5), Forward(torch.rand_like), Forward(torch.poisson))
    keyed_model(model)
    for part in model[1:]:
        part.eval()
    torch.manual_seed(0)
    y = model(X)
    torch.manual_seed(0)
    assert torch.equal(y, torch.poisson(torch.rand_like(X)))


def test_an_interrupt_leaves_nothing_that_later_draws_notice():
    def interrupt(x):
        raise KeyboardInterrupt

    model = keyed_model(nn.Sequential(nn.Dropout(0.5), Forward(interrupt)))
    with pytest.raises(KeyboardInterrupt):
        model(X)
    torch.manual_seed(0)
    drawn = torch.rand(3), torch.poisson(X.abs())
    keyed.set_key(model, ROOT, 0)
    assert modes() == []
    torch.manual_seed(0)
    assert torch.equal(drawn[0], torch.rand(3))
    assert torch.equal(drawn[1], torch.poisson(X.abs()))
    assert torch.equal(model[0](X), regtorch.dropout(X, 0.5, key=at("0")))


def test_an_interrupt_that_a_parent_handles_ends_the_call_of_its_child():
    class Parent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.child = nn.Sequential(nn.Dropout(0.5), Forward(self.interrupt))

        def interrupt(self, x):
            raise KeyboardInterrupt

        def forward(self, x):
            with contextlib.suppress(KeyboardInterrupt):
                self.child(x)
            return F.dropout(x, 0.5)

    model = keyed_model(Parent())
    assert torch.equal(model(X), regtorch.dropout(X, 0.5, key=at("")))
    assert modes() == []


def test_modes_that_a_forward_leaves_entered_stay_in_order():
    class Mode(torch.overrides.BaseTorchFunctionMode):
        pass

    entered = [Mode(), Mode()]

    def enter(x):
        for mode in entered:
            mode.__enter__()
        return x

    keyed_model(nn.Sequential(Forward(enter)))(X)
    try:
        assert modes() == entered
    finally:
        for mode in entered:
            mode.__exit__(None, None, None)


def test_a_hook_of_the_user_that_fails_before_ours_leaves_the_calls_in_order():
    model = nn.Sequential(nn.Identity(), nn.Dropout(0.5))
    failing = True

    def hook(*args):
        if failing:
            raise ValueError("not now")

    model[0].register_forward_pre_hook(hook)
    keyed_model(model)
    with pytest.raises(ValueError, match="not now"):
        model(X)
    assert modes() == []
    failing = False
    assert torch.equal(model(X), regtorch.dropout(X, 0.5, key=at("1")))


def test_a_model_within_a_mode_of_the_user():
    with torch.device("cpu"):
        model = keyed_model(nn.Sequential(nn.Dropout(0.5), Forward(lambda x: x + torch.rand(8))))
        y = model(X)
    keyed.set_key(model, ROOT, 0)
    assert torch.equal(y, model(X))


def test_a_replica_of_data_parallel_is_refused():
    model = keyed_model(nn.Sequential(nn.Dropout(0.5)))
    replica = model._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match=r"module '' .*DistributedDataParallel"):
        replica(X)
    assert modes() == []


@pytest.mark.parametrize("function", [F.dropout, nn.Dropout(0.5)])
def test_a_draw_before_set_key_names_its_site(function):
    model = keyed.convert(nn.ModuleDict({"a": Forward(function)}))
    with pytest.raises(ValueError, match=r"site 'a(\.function)?' must have a key .*set_key"):
        model["a"](X)
    assert modes() == []


def test_a_loop_without_numpy_watches_python_only(monkeypatch):
    monkeypatch.delitem(sys.modules, "numpy.random.mtrand", raising=False)
    y = keyed_model(nn.Dropout(0.5))(X)
    assert torch.equal(y, regtorch.dropout(X, 0.5, key=at("")))


class Hidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * torch.rand(3, 8)


def hooked(x):
    y = x * 1
    y.register_hook(lambda grad: grad + torch.randn(3, 8))
    return y * 2


@pytest.mark.parametrize("function", [Hidden.apply, hooked])
@pytest.mark.parametrize("wrap", [lambda y: y, lambda y: {"logits": [y]}])
def test_a_draw_in_the_backward_pass_is_an_error_in_every_step(function, wrap):
    model = keyed_model(nn.Sequential(nn.Linear(8, 8), Forward(lambda x: wrap(function(x)))))
    for _ in range(2):
        y = model(X)
        with pytest.raises(RuntimeError, match=r"module '' must draw in its forward; .* backward"):
            (y["logits"][0] if isinstance(y, dict) else y).sum().backward()


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("prepend", [True, False])
@pytest.mark.parametrize("kind", ["pre", "post"])
def test_a_draw_of_a_hook_belongs_to_its_module(kind, prepend, early):
    def draw(module, x, *y):
        return F.dropout(*(y or x), 0.5)

    model = nn.Identity() if early else keyed_model(nn.Identity())
    register = model.register_forward_pre_hook if kind == "pre" else model.register_forward_hook
    handle = register(draw, prepend=prepend)
    keyed.convert(model)
    keyed.set_key(model, ROOT, 0)
    assert torch.equal(model(X), regtorch.dropout(X, 0.5, key=at("")))
    handle.remove()
    assert torch.equal(model(X), X)


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

    def encode(self, x, draw=F.dropout):
        return self.last(draw(self.first(x)))


def test_a_draw_in_a_method_outside_of_a_forward_is_found_between_modules():
    model = keyed_model(nn.Sequential(Encoder()))
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"Encoder\.encode .* '0\.first' and '0\.last'"):
            model[0].encode(X)
    copy.deepcopy(model)
    keyed.set_key(model, ROOT, 0)
    for _ in range(2):
        model[0].encode(X, torch.relu)
        torch.rand(3)  # the caller's
    inside = keyed_model(Forward(Encoder().encode))
    inside(X)


def sampling(x):
    return x * np.random.uniform()  # noqa: NPY002 - the draw to find


def test_a_part_in_training_is_watched_within_an_evaluated_model():
    model = keyed_model(nn.Sequential(Forward(sampling), Forward(torch.relu), Forward(sampling)))
    model.eval()[1].train()
    model(X)
    model[2].train()
    with pytest.raises(RuntimeError, match=r"module '2' .*numpy\.random"):
        model(X)


def test_set_key_refuses_a_model_around_a_converted_part():
    part = keyed.convert(nn.Sequential(nn.Dropout(0.5)))
    with pytest.raises(ValueError, match=r"as a whole; got a Sequential .*keyed\.revert"):
        keyed.set_key(nn.Sequential(nn.Linear(8, 8), part), ROOT, 0)


def test_set_key_refuses_parameters_that_a_forward_would_draw():
    model = keyed.convert(nn.Sequential(nn.LazyLinear(8), nn.Dropout(0.5)))
    with pytest.raises(ValueError, match=r"module '0' .* a LazyLinear .* model\.eval\(\)\(batch\)"):
        keyed.set_key(model, ROOT, 0)
    model.eval()(X)
    keyed.set_key(model.train(), ROOT, 0)
    model(X)


@pytest.mark.filterwarnings("ignore:`torch.jit.*is deprecated")
def test_modules_of_torchscript_have_no_names_and_may_not_draw():
    with pytest.raises(ValueError, match="must run in Python; got a RecursiveScriptModule"):
        keyed.convert(torch.jit.script(nn.Dropout(0.5)))
    model = keyed_model(nn.Sequential(torch.jit.script(nn.Tanh()), nn.Dropout(0.5)))
    assert torch.equal(model(X), regtorch.dropout(X.tanh(), 0.5, key=at("1")))
    with pytest.raises(RuntimeError, match=r"module '' must draw from keys; .* TorchScript"):
        keyed_model(nn.Sequential(torch.jit.script(nn.Dropout(0.5))))(X)


@pytest.mark.filterwarnings("ignore:`torch.jit.*is deprecated")
@pytest.mark.parametrize("export", [torch.jit.trace, torch.export.export])
def test_a_mask_is_no_constant_of_an_exported_graph(export):
    model = keyed_model(nn.Sequential(nn.Dropout(0.5)))
    with pytest.raises(RuntimeError, match=r"must not draw .* exported.* model\.eval\(\)"):
        export(model, (X,))
    keyed.set_key(model, ROOT, 0)
    assert modes() == []
    export(model.eval(), (X,))
