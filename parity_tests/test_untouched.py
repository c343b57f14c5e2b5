"""A PyTorch model that draws from PyTorch's own generator is compared as it is."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import regjax
import regtorch
from parity_tests import replays, seeded
from parity_tests.harness import JaxSide, JaxStep, TorchSide, TorchStep, compare_training
from parity_tests.recording import Recorder
from regjax import torch_random
from regjax.torch_random import dropout

SGD = optax.sgd(0.1)
NAMES = {"scale": "scale"}


class Perceptron(torch.nn.Module):
    """Two dropouts, as a user writes them, and one of rate 0 between them."""

    def __init__(self, rates=(0.25, 0.0, 0.5), between=lambda: None, last=lambda: None):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(8))
        self.first, self.idle, self.second = map(torch.nn.Dropout, rates)
        self.between, self.last = between, last

    def forward(self, x):
        x = torch.tanh(self.first(x * self.scale))
        self.between()
        x = self.second(self.idle(x))
        self.last()
        return x


def original(model=None, **options):
    torch.manual_seed(7)
    model = Perceptron(**options) if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    loss = lambda model, x, step: (model(torch.from_numpy(x)) ** 2).mean()
    return TorchSide(model, loss, optimizer, generator=torch.default_generator)


def twice(x, g, rates=(0.25, 0.5), between=lambda g: g, **options):
    x, g = dropout(x, rates[0], g, **options)
    return dropout(jnp.tanh(x), rates[1], between(g), **options)


def port(forward=twice, seed=7, **options):
    def loss(params, x, step, g):
        x, g = forward(x * params["scale"].reshape(1, 8, *[1] * (x.ndim - 2)), g, **options)
        return (x**2).mean(), g

    return JaxSide({"scale": jnp.ones(8)}, loss, SGD, generator=torch_random.generator(seed))


def batches(*shape, count=5):
    rng = np.random.default_rng(0)
    return [rng.normal(size=shape or (4, 8)).astype("float32") for _ in range(count)]


def test_an_untouched_model_agrees():
    found = compare_training(port(), original(), batches(), NAMES)
    found.raise_if_different()
    assert found.sites == {"first": 5, "second": 5}
    assert (found.mask_elements, found.different_mask_elements) == (5 * 64, 0)
    assert found.deviations["generator"] == [0.0] * 5
    assert max(found.deviations["activation"]) < 1e-6
    assert not [note for note in found.notes if "generator" in note]


def draws(model, x):
    """Return the masks and all draws of a PyTorch function, and the states around it."""
    torch.manual_seed(7)
    recorder = Recorder(torch.nn.Module(), torch.default_generator)
    if isinstance(model, torch.nn.Module):
        recorder = Recorder(model, torch.default_generator)
    start = torch.get_rng_state().numpy()
    with recorder.watching():
        model(torch.from_numpy(x))
        return recorder.taken()[1], recorder.draws, start, torch.get_rng_state().numpy()


def replayed(in_port, model, x):
    """Compare two functions of PyTorch, the first of which takes the part of JAX."""
    here, _, _, end = draws(in_port, x)
    here = [
        dataclasses.replace(each, site=f"dropout {i}", where="port.py:7", memory_order=())
        for i, each in enumerate(here, 1)
    ]
    masks, everything, start, end_in_torch = draws(model, x)
    return replays.replay(here, masks, everything, start, (end, end_in_torch))


def chain(*calls):
    """Return a function of dropouts, by their rates, and of other calls."""

    def forward(x):
        for call in calls:
            x = F.dropout(x, call) if isinstance(call, float) else (call(), x)[1]

    return forward


def numbers(count):
    return lambda: torch.rand(count)


def skip_back():
    torch.manual_seed(7)


BEHIND = (
    "JAX is 12 words of 32 bits behind in the stream, as many as PyTorch draws by rand of shape"
)
# For each mistake: the port, the original, the site, and a part of the report.
MISTAKES = {
    "none": (chain(0.25, 0.5), {}, None, None),
    "swapped": (
        chain(0.5, 0.25),
        {},
        "first",
        "JAX draws the masks of 'first' and 'second' in the other order; the generators agree",
    ),
    "first is missing": (
        chain(0.5),
        {},
        "first",
        "JAX skips this draw of a mask of shape [4, 8] at rate 0.25: its next mask has the form of "
        "'second'; the generators differ at the end of the step",
    ),
    "last is missing": (
        chain(0.25),
        {},
        "second",
        "PyTorch draws a mask of shape [4, 8] at rate 0.5 here, and JAX does not; the generators",
    ),
    "one of two alike is missing": (
        chain(0.25),
        {"rates": (0.25, 0.0, 0.25)},
        "second",
        "and JAX does not, unless it skips one of the same form: 'first'",
    ),
    "all are missing": (
        chain(),
        {},
        "first",
        "PyTorch draws a mask of shape [4, 8] at rate 0.25 here, and JAX does not",
    ),
    "one too many": (
        chain(0.25, 0.5, 0.1),
        {},
        "dropout 3",
        "JAX draws a mask of shape [4, 8] at rate 0.1 at port.py:7, and PyTorch does not; the",
    ),
    "rate": (
        chain(0.25, 0.4),
        {},
        "second",
        "rate 0.4 in JAX and 0.5 in PyTorch; the generators agree",
    ),
    "a mask where PyTorch has rate 0": (
        chain(0.25, 0.1, 0.5),
        {},
        "second",
        "JAX draws a mask of shape [4, 8] at rate 0.1 at port.py:7 before this one: PyTorch draws "
        "nothing at rate 0 in 'idle'",
    ),
    "a mask where PyTorch has rate 0 at the end": (
        chain(0.25, 0.5, 0.5),
        {"rates": (0.25, 0.5, 0.0)},
        "second",
        "and PyTorch does not: PyTorch draws nothing at rate 0 in 'second'; the generators differ",
    ),
    "numbers where PyTorch has rate 0": (
        chain(0.25, numbers(64), 0.5),
        {},
        "second",
        "JAX is 64 words of 32 bits ahead in the stream, as many as a mask of shape [4, 8] takes: "
        "PyTorch draws nothing at rate 0 in 'idle'",
    ),
    "numbers in JAX only": (
        chain(0.25, numbers(3), 0.5),
        {},
        "second",
        "JAX is 3 words of 32 bits ahead in the stream; the generators differ",
    ),
    "numbers between": (
        chain(0.25, 0.5),
        {"between": numbers(12)},
        "second",
        f"{BEHIND} [12] in 'Perceptron'; the generators differ",
    ),
    "numbers at the end": (
        chain(0.25, 0.5),
        {"last": numbers(12)},
        "state",
        f"masks agree, and at the end of the step {BEHIND} [12] in 'Perceptron'",
    ),
    "state used twice": (
        chain(0.25, skip_back, 0.5),
        {},
        "second",
        "JAX draws it from the state that the mask of 'first' was drawn from; pass each call",
    ),
    "seed": (
        chain(lambda: torch.manual_seed(8), 0.25, 0.5),
        {},
        "first",
        "JAX draws from another stream than PyTorch",
    ),
}


@pytest.mark.parametrize(("port", "options", "site", "detail"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_reported_with_its_cause(port, options, site, detail):
    step = replayed(port, Perceptron(**options), batches()[0])
    found = step.difference() or step.end_difference()
    if site is None:
        assert found is None
    else:
        assert found is not None
        assert found.site == site
        assert detail in found.detail


ROWS, LAST = torch.contiguous_format, torch.channels_last
# For each layout of PyTorch: the array in JAX, as a tensor of the same order in memory.
LAYOUTS = {
    "rows": (ROWS, lambda x: x, ""),
    "channels last": (LAST, lambda x: x.contiguous(memory_format=LAST), ""),
    "channels last in both": (LAST, lambda x: x.permute(0, 2, 3, 1).contiguous(), ""),
    "channels last in JAX": (ROWS, lambda x: x.permute(0, 2, 3, 1), ""),
    "forgotten": (LAST, lambda x: x, "pass memory_order=(0, 2, 3, 1) in JAX"),
    "too much": (
        ROWS,
        lambda x: x.contiguous(memory_format=LAST),
        "pass no memory_order in JAX",
    ),
    "forgotten in JAX": (
        ROWS,
        lambda x: x.permute(0, 2, 3, 1).contiguous(),
        "pass memory_order=(0, 3, 1, 2) in JAX",
    ),
}


@pytest.mark.parametrize("sizes", [(8, 2, 3), (8, 8, 8)], ids=["sizes", "equal sizes"])
@pytest.mark.parametrize(("layout", "array", "detail"), LAYOUTS.values(), ids=LAYOUTS)
def test_the_order_of_strides_is_recognized(layout, array, detail, sizes):
    model = Channels(layout)
    step = replayed(lambda x: F.dropout(array(x)), model, batches(2, *sizes)[0])
    found = step.difference()
    if not detail:
        assert found is None
        return
    assert found is not None
    assert found.site == "drop"
    assert "the order of the strides explains it" in found.detail
    assert detail in found.detail


def uniforms(count):
    return lambda g: torch_random.uniform(g, (count,))[1]


def test_a_mistake_in_a_later_step_is_found_there():
    """Both sides draw 2 numbers in each step, and PyTorch draws 3 more in the third."""
    steps = iter(range(5))
    side = original(between=lambda: torch.rand(5 if next(steps) == 2 else 2))
    first = compare_training(port(between=uniforms(2)), side, batches(), NAMES).first
    assert first is not None
    assert (first.step, first.name) == (3, "second")
    assert "JAX is 3 words of 32 bits behind in the stream; the generators differ" in first.detail


def test_a_port_that_begins_elsewhere_in_the_stream():
    side = original()
    torch.rand(5)  # as for initial weights
    first = compare_training(port(), side, batches(), NAMES).first
    assert first is not None
    assert first.name == "first"
    assert "JAX is 5 words of 32 bits behind in the stream from the beginning" in first.detail


class Channels(torch.nn.Module):
    def __init__(self, layout, kind: Any = torch.nn.Dropout):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(8))
        self.drop, self._layout = kind(0.5), layout

    def forward(self, x):
        x = x * self.scale[:, None, None]
        return self.drop(x.contiguous(memory_format=self._layout))


def pictures(kind=dropout, **options):
    return port(lambda x, g: kind(x, 0.5, g, **options))


def test_a_layout_is_recognized_in_a_training():
    shape = (2, 8, 2, 3)
    right, wrong = pictures(memory_order="channels_last"), pictures()
    sides = original(Channels(torch.channels_last)), original(Channels(torch.channels_last))
    torch.manual_seed(7)
    compare_training(right, sides[0], batches(*shape), NAMES).raise_if_different()
    torch.manual_seed(7)
    first = compare_training(wrong, sides[1], batches(*shape), NAMES).first
    assert first is not None
    assert (first.step, first.quantity, first.name) == (1, "mask", "drop")
    assert "pass memory_order=(0, 2, 3, 1) in JAX" in first.detail


@pytest.mark.slow
def test_whole_channels():
    side = pictures(torch_random.feature_dropout)
    model = Channels(torch.channels_last, torch.nn.Dropout2d)
    compare_training(side, original(model), batches(2, 8, 3, 3), NAMES).raise_if_different()


def test_whole_steps():
    """A whole step in each framework, the generator in JAX's state; then without it."""
    torch_side = original()

    def in_torch(model, x, i):
        torch_side.optimizer.zero_grad()
        loss = torch_side.loss(model, x, i)
        loss.backward()
        torch_side.optimizer.step()
        return loss

    loss = port().loss

    @jax.jit
    def step(state, x, i):
        (value, g), gradient = jax.value_and_grad(loss, has_aux=True)(
            state["params"], x, i, state["g"]
        )
        params = jax.tree.map(lambda p, d: p - 0.1 * d, state["params"], gradient)
        return {"params": params, "g": g}, value

    state = {"params": {"scale": jnp.ones(8)}, "g": torch_random.generator(7)}
    there = TorchStep(
        torch_side.model, in_torch, torch_side.optimizer, generator=torch.default_generator
    )
    found = compare_training(JaxStep(state, step), there, batches(), NAMES)
    found.raise_if_different()
    assert found.sites == {"first": 5, "second": 5}
    assert found.deviations["generator"] == [0.0] * 5

    state["again"] = torch_random.generator(7)
    kept = lambda state, x, i: (
        step(state, x, i)[0] | {"again": state["again"]},
        step(state, x, i)[1],
    )
    torch.manual_seed(7)
    found = compare_training(JaxStep(state, kept), there, batches(count=1), NAMES, record=False)
    assert not found.deviations["generator"]


def test_without_recording_the_generators_are_compared():
    found = compare_training(
        port(lambda x, g: dropout(jnp.tanh(x), 0.25, g)), original(), batches(), NAMES, record=False
    )
    assert found.first is not None
    assert found.first.quantity == "generator"


def test_draws_of_torch_random_are_events():
    """The key is that of the stream; a state that is used twice gives two events."""
    g = torch_random.generator(0)

    def draw(x, g):
        y, following = torch_random.alpha_dropout(x, 0.25, g)
        keep, _ = torch_random.bernoulli(following, 0.75, (2, 1))
        return [y, keep, dropout(x, 0.5, g)[0], dropout(x, 0.0, g)[0]]

    x = jnp.asarray(batches(2, 3)[0])
    recorder, events = Recorder(torch.nn.Module(), torch.default_generator), []
    with recorder.watching(), regjax.observing(events.append):
        _, keep, y, _ = jax.jit(draw)(x, g)
        masks, _ = recorder.taken()
    events.sort(key=lambda event: event.order)
    assert [event.function.partition(".")[2] for event in events] == [
        *("alpha_dropout", "bernoulli", "dropout")
    ]
    assert [each.rate for each in masks] == [0.25, 0.25, 0.5]
    stream = seeded.words(torch_random.to_torch(g), 14).tolist()
    assert [[*each.key] for each in masks] == [stream[:2], stream[12:], stream[:2]]
    np.testing.assert_array_equal(masks[1].mask, keep)
    np.testing.assert_array_equal(masks[2].mask, y != 0)
    np.testing.assert_array_equal(masks[2].entering, x)
    assert masks[1].entering is None
    assert "callback" not in str(jax.make_jaxpr(draw)(x, g))


def test_a_scan_and_a_checkpoint_of_layers():
    """PyTorch runs the forward pass again for the backward pass; JAX draws in a loop."""

    class Layers(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(8))
            self.a, self.b = torch.nn.Dropout(0.25), torch.nn.Dropout(0.5)

        def forward(self, x):
            for _ in range(3):
                x = checkpoint(lambda x: self.b(self.a(x * self.scale)), x, use_reentrant=False)
            return x

    def loss(params, x, step, g):
        def layer(carry, _):
            x, g = dropout(carry[0] * params["scale"][None], 0.25, carry[1])
            return dropout(x, 0.5, g), None

        (x, g), _ = jax.lax.scan(layer, (x, g), length=3)
        return (x**2).mean(), g

    side = JaxSide({"scale": jnp.ones(8)}, loss, SGD, generator=torch_random.generator(7))
    found = compare_training(side, original(Layers()), batches(), NAMES)
    found.raise_if_different()
    assert found.sites == {
        **{f"{name}{more}": 5 for more in ("", ", mask 2", ", mask 3") for name in "ab"}
    }


def test_a_loss_that_differs_is_repeated_in_float64_with_the_same_masks():
    right, side = port(), original()

    def loss(*args):
        value, g = right.loss(*args)
        return value * 1.01, g

    wrong = JaxSide(right.params, loss, SGD, generator=right.generator)
    found = compare_training(wrong, side, batches(), NAMES)
    assert found.first is not None
    assert found.first.quantity == "loss"
    assert "the sides differ in float64 too" in found.first.detail
    end = torch.get_rng_state()
    torch.manual_seed(7)
    torch.empty(2, 4, 8).bernoulli_(0.5)
    assert torch.equal(end, torch.get_rng_state())


def test_a_generator_off_the_cpu_is_refused():
    class Elsewhere(torch.Generator):  # PyTorch makes none without a GPU
        @property
        def device(self):  # pyright: ignore[reportIncompatibleVariableOverride]
            return torch.device("cuda", 1)

    with pytest.raises(ValueError, match=r"must be on the CPU; got one on cuda:1\. Compare on"):
        compare_training(port(), with_generator(Elsewhere()), batches(), NAMES)


def not_threaded(x, g):
    return twice(x, g)[0], g


def used_twice(x, g):
    x, _ = dropout(x, 0.25, g)
    return dropout(jnp.tanh(x), 0.5, g)


def of_the_first_dropout(x, g):
    y, following = dropout(x, 0.25, g)
    return dropout(jnp.tanh(y), 0.5, following)[0], following


# For each mistake with the generator in a training: the step, the quantity, its name, and words.
THREADS = {
    "the generator as it was": (
        not_threaded,
        (1, "generator", "state", "JAX is 128 words of 32 bits behind in the stream, as many as"),
    ),
    "one state for two dropouts": (
        used_twice,
        (
            1,
            "mask",
            "second",
            "JAX draws it from the state that the mask of 'first' was drawn from",
        ),
    ),
    "the generator after the first of two dropouts": (
        of_the_first_dropout,
        (1, "generator", "state", "as many as PyTorch draws by bernoulli_ of shape [4, 8] in 'sec"),
    ),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if number else ())
        for number, name in enumerate(THREADS)
    ],
)
def test_a_generator_that_is_not_threaded_is_found(name):
    forward, (*place, words) = THREADS[name]
    first = compare_training(port(forward), original(), batches(), NAMES).first
    assert first is not None
    assert [first.step, first.quantity, first.name] == place
    assert words in first.detail


def converted():
    side = original()
    return TorchSide(
        regtorch.keyed.convert(side.model), side.loss, side.optimizer, generator=side.generator
    )


def without(side):
    return TorchSide(side.model, side.loss, side.optimizer)


def with_generator(generator):
    side = original()
    return TorchSide(side.model, side.loss, side.optimizer, generator=generator)


def returning(*values):
    side = port()
    loss = lambda *args: (side.loss(*args)[0], *values)
    return JaxSide(side.params, loss, SGD, generator=side.generator)


REFUSED = {
    "keys": (
        port,
        converted,
        ValueError,
        "generator must be None for a model that draws from keys",
    ),
    "JAX only": (port, lambda: without(original()), ValueError, "got it in JAX only"),
    "kind": (port, lambda: with_generator(7), TypeError, "must be a torch.Generator; got"),
    "not returned": (returning, original, ValueError, "got 1 values"),
    "other": (lambda: returning(1.0), original, TypeError, "must return the next generator last"),
}


@pytest.mark.parametrize(("here", "there", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_compared_is_refused(here, there, error, message):
    with pytest.raises(error, match=message):
        compare_training(here(), there(), batches(), NAMES)


@pytest.mark.slow
def test_functional_dropout_and_attention_are_named_by_their_modules():
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(8))
            self.attention = Attention()

        def forward(self, x):
            return self.attention(x * self.scale)

    class Attention(torch.nn.Module):
        def forward(self, x):
            x = F.scaled_dot_product_attention(x, x, x, dropout_p=0.25)
            return F.dropout(x, 0.5)

    def forward(x, g):
        weights = jax.nn.softmax(x @ x.mT / jnp.sqrt(8.0), -1)
        weights, g = dropout(weights, 0.25, g)
        return dropout(weights @ x, 0.5, g)

    found = compare_training(port(forward), original(Block()), batches(), NAMES)
    found.raise_if_different()
    assert found.sites == {"attention": 5, "attention, mask 2": 5}
