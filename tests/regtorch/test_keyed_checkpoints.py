"""`regtorch.keyed`: a forward that a checkpoint runs again draws the same masks."""

from __future__ import annotations

import contextlib
import functools
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from regtorch import keyed
from tests.regtorch.test_keyed_draws import ROOT, X, keyed_model


class Block(nn.Module):
    """Draws itself before, in and after a checkpoint, whose function is a closure."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.inner = nn.Linear(8, 8), nn.Dropout(0.5)

    def forward(self, x, run):
        def closure(x):
            x = F.dropout(self.linear(x).tanh(), 0.5)
            return torch.rand_like(x) * self.inner(x)

        return F.dropout(run(closure, F.dropout(x, 0.5)), 0.5)


class Model(nn.Module):
    """The ways in which models use checkpoints; `run` is the checkpoint, or a plain call."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Tanh())
        self.block = Block()
        self.drop = nn.Dropout(0.5)

    def module(self, x, run):
        return self.drop(run(self.layer, x))

    def twice(self, x, run):
        return run(self.layer, self.drop(run(self.layer, x)))

    def closure(self, x, run):
        return self.block(self.block(x, run), run)

    def nested(self, x, run):
        inner = lambda x: self.layer(run(self.layer, x))
        return run(lambda x: self.layer(run(inner, self.layer(x))), self.layer(x))

    def function_only(self, x, run):
        return run(lambda x: F.dropout(x.tanh(), 0.5), self.layer(x))

    def forward(self, x, way, run):
        return getattr(self, way)(x, run)


WAYS = ["module", "twice", "closure", "nested", "function_only"]
plain = lambda function, x: function(x)
CHECKPOINTS = {
    f"reentrant {reentrant}, preserve {preserve}": functools.partial(
        checkpoint, use_reentrant=reentrant, preserve_rng_state=preserve
    )
    for reentrant in (True, False)
    for preserve in (True, False)
}


def gradients(way: str, run, *, late_step: int | None = None, outside: bool = False) -> list:
    """Return the loss and gradients after two micro-batches."""
    torch.manual_seed(0)
    model = keyed_model(Model(), step=3)
    x = X.clone().requires_grad_()
    call = functools.partial(model, way=way, run=plain if outside else run)
    losses = [(run(call, x * n) if outside else call(x * n)).square().sum() for n in (1, 2)]
    if late_step is not None:
        keyed.set_key(model, ROOT, late_step)
    sum(losses).backward()
    return [*losses, x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CHECKPOINTS)
@pytest.mark.parametrize("outside", [False, True])
# From the inner one of two reentrant checkpoints, which runs without gradients at first.
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@pytest.mark.sample(22)
def test_gradients_are_those_without_checkpoints(way, name, outside):
    expected = gradients(way, plain)
    given = gradients(way, CHECKPOINTS[name], late_step=9, outside=outside)
    assert len(given) == len(expected)
    for left, right in zip(given, expected, strict=True):
        assert torch.allclose(left, right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("way", ["twice", "closure"])
def test_a_graph_may_be_repeated_twice(way):
    results = []
    for run in (plain, CHECKPOINTS["reentrant False, preserve True"]):
        torch.manual_seed(0)
        model = keyed_model(Model())
        x = X.clone().requires_grad_()
        y = model(x, way, run).sum()
        results += [torch.autograd.grad(y, x, retain_graph=True)[0] for _ in range(2)]
    assert all(torch.equal(result, results[0]) for result in results)


def test_segments_and_wrappers_of_checkpoints():
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)) for _ in range(3)]
    results, x = [], X.clone().requires_grad_()
    for make in (
        lambda: nn.Sequential(*layers),
        lambda: nn.Sequential(*map(checkpoint_wrapper, layers)),
    ):
        model = keyed_model(keyed.revert(make()))
        assert keyed.sites(model) == ["0.1", "1.1", "2.1"]
        results += torch.autograd.grad(model(x).square().sum(), x)
    keyed.set_key(model, ROOT, 0)
    y = checkpoint_sequential(layers, 2, x, use_reentrant=False).square().sum()
    results += torch.autograd.grad(y, x)
    assert all(torch.equal(result, results[0]) for result in results)


class Unknown(torch.autograd.Function):
    """A checkpoint of another library: it runs the function again, in its own way."""

    @staticmethod
    def forward(ctx, function, x):
        ctx.function = function
        ctx.save_for_backward(x)
        with torch.no_grad():
            return function(x)

    @staticmethod
    def backward(ctx, gradient):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.function(x)
        return None, torch.autograd.grad(y, x, gradient)[0]


def test_an_unknown_checkpoint_may_repeat_what_was_called_once():
    assert torch.equal(
        gradients_of_layer(lambda layer, x: Unknown.apply(layer, x)), gradients_of_layer(plain)
    )


def gradients_of_layer(run, calls=1, late=None):
    torch.manual_seed(0)
    layer = keyed_model(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Tanh()))
    x = y = X.clone().requires_grad_()
    for _ in range(calls):
        y = run(layer, y)
    if late is not None:
        keyed.set_key(layer, ROOT, late)
    return torch.autograd.grad(y.square().sum(), x)[0]


@pytest.mark.parametrize(("calls", "late"), [(2, None), (1, 5)])
def test_otherwise_it_needs_replay(calls, late):
    with pytest.raises(
        RuntimeError, match=r"site '1' must be called once .* got \d calls.*keyed\.replay"
    ):
        gradients_of_layer(lambda layer, x: Unknown.apply(layer, x), calls, late)
    contexts = lambda layer, x: checkpoint(
        layer, x, use_reentrant=False, context_fn=lambda: keyed.replay(layer)
    )
    assert torch.equal(gradients_of_layer(contexts, calls, late), gradients_of_layer(plain, calls))


def test_replay_repeats_the_draws_of_an_unknown_checkpoint():
    def run(layer, x):
        first, again = keyed.replay(layer)
        calls = []

        def function(x):
            calls.append(1)
            with first if len(calls) == 1 else again:
                return layer(x)

        return Unknown.apply(function, x)

    assert torch.equal(gradients_of_layer(run, 2, 9), gradients_of_layer(plain, 2))


def failing(error, function, x):
    with contextlib.suppress(error):
        function(x, error)
    return x


class Failing(nn.Sequential):
    def forward(self, x, error=None):
        x = F.dropout(super().forward(x), 0.5)
        if error:
            raise error
        return x


RUNS = {
    "plain": plain,
    "error": functools.partial(failing, ValueError),
    "interrupt": functools.partial(failing, KeyboardInterrupt),
    **CHECKPOINTS,
}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.sample(3)
def test_nothing_keeps_the_tensors_of_a_step_or_the_model(name):
    """Count tensors without garbage collection, which would hide a cycle of references."""

    def step(model: nn.Module, number: int) -> int:
        keyed.set_key(model, ROOT, number)
        x = X.clone().requires_grad_()
        (RUNS[name](model, x) + RUNS[name](model, x)).sum().backward()
        keyed.set_key(model, ROOT, number + 1)  # an interrupt leaves its mode until then
        del x
        return sum(type(each) is torch.Tensor for each in gc.get_objects())

    layer = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)
    model = keyed.convert(Failing(nn.Linear(8, 8), nn.Dropout(0.5), layer))
    step(model, 0)
    gc.disable()
    gc.freeze()  # `get_objects` leaves out the older objects
    try:
        assert len({step(model, number) for number in (1, 2, 3)}) == 1
        alive = weakref.ref(model)
        del model, layer
        assert alive() is None
    finally:
        gc.unfreeze()
        gc.enable()
