"""A PyTorch model that draws from PyTorch's own generator is compared as it is."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from torch.nn import functional as F

import regtorch
from parity_tests.harness import JaxSide, JaxStep, TorchSide, TorchStep, compare_training
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
        x, g = forward(x * params["scale"].reshape(8, *[1] * (x.ndim - 2)), g, **options)
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
    assert not [note for note in found.notes if "asks" in note or "generator" in note]


def reused(x, g):
    return dropout(jnp.tanh(dropout(x, 0.25, g)[0]), 0.25, g)


def idle(x, g):
    x, g = dropout(x, 0.25, g)
    keep, g = torch_random.bernoulli(g, 0.9, x.shape)
    return dropout(jnp.tanh(x) * keep, 0.5, g)


def once(rate):
    return lambda x, g: dropout(jnp.tanh(x), rate, g)


def thrice(x, g):
    x, g = twice(x, g)
    return dropout(x, 0.1, g)


def numbers(count):
    return lambda: torch.rand(count)


def uniforms(count):
    return lambda g: torch_random.uniform(g, (count,))[1]


BEHIND = "JAX is 12 words of 32 bits behind in the stream, as many as PyTorch draws by rand of shape"
# For each mistake: the port, the original, the quantity, the place, and a part of the report.
MISTAKES = {
    "swapped": (
        {"rates": (0.5, 0.25)},
        {},
        ("mask", "first"),
        "JAX draws the masks of 'first' and 'second' in the other order; the generators agree",
    ),
    "first is missing": (
        {"forward": once(0.5)},
        {},
        ("mask", "first"),
        "JAX skips this draw of a mask of shape [4, 8] at rate 0.25: its next mask has the form of "
        "'second'; the generators differ at the end of the step",
    ),
    "last is missing": (
        {"forward": once(0.25)},
        {},
        ("mask", "second"),
        "PyTorch draws a mask of shape [4, 8] at rate 0.5 here, and JAX does not; the generators",
    ),
    "one of two alike is missing": (
        {"forward": once(0.25)},
        {"rates": (0.25, 0.0, 0.25)},
        ("mask", "second"),
        "and JAX does not, unless it skips one of the same form: 'first'",
    ),
    "all are missing": (
        {"forward": lambda x, g: (jnp.tanh(x), g)},
        {},
        ("mask", "first"),
        "PyTorch draws a mask of shape [4, 8] at rate 0.25 here, and JAX does not",
    ),
    "one too many": (
        {"forward": thrice},
        {},
        ("mask", "dropout 3"),
        "JAX draws a mask of shape [4, 8] at rate 0.1 at test_untouched.py:",
    ),
    "rate": (
        {"rates": (0.25, 0.4)},
        {},
        ("mask", "second"),
        "rate 0.4 in JAX and 0.5 in PyTorch; the generators agree",
    ),
    "a mask where PyTorch has rate 0": (
        {"forward": idle},
        {},
        ("mask", "second"),
        "JAX draws a mask of shape [4, 8] at rate 0.1 at test_untouched.py:",
    ),
    "numbers where PyTorch has rate 0": (
        {"between": uniforms(64)},
        {},
        ("mask", "second"),
        "JAX is 64 words of 32 bits ahead in the stream, as many as a mask of shape [4, 8] takes: "
        "PyTorch draws nothing at rate 0 in 'idle'",
    ),
    "numbers between": (
        {},
        {"between": numbers(12)},
        ("mask", "second"),
        f"{BEHIND} [12] in 'Perceptron'; the generators differ",
    ),
    "numbers at the end": (
        {},
        {"last": numbers(12)},
        ("generator", "state"),
        f"masks agree, and at the end of the step {BEHIND} [12] in 'Perceptron'",
    ),
    "state used twice": (
        {"forward": reused},
        {},
        ("mask", "second"),
        "JAX draws it from the state that the mask of 'first' was drawn from; pass each call",
    ),
    "seed": ({"seed": 8}, {}, ("mask", "first"), "JAX draws from another stream than PyTorch"),
}


@pytest.mark.parametrize(("change", "options", "place", "detail"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_reported_with_its_cause(change, options, place, detail):
    found = compare_training(port(**change), original(**options), batches(), NAMES)
    assert found.first is not None
    assert (found.first.step, found.first.quantity, found.first.name) == (1, *place)
    assert detail in found.first.detail


def test_numbers_that_both_sides_draw_are_no_difference():
    both = port(between=uniforms(12)), original(between=numbers(12))
    compare_training(*both, batches(), NAMES).raise_if_different()


def test_a_mistake_in_a_later_step_is_found_there():
    """PyTorch draws numbers in the third step only."""
    steps = iter(range(5))
    side = original(between=lambda: torch.rand(3) if next(steps) == 2 else None)
    first = compare_training(port(), side, batches(), NAMES).first
    assert first is not None
    assert (first.step, first.name) == (3, "second")
    assert "as many as PyTorch draws by rand of shape [3]" in first.detail


def test_a_port_that_begins_elsewhere_in_the_stream():
    side = original()
    torch.rand(5)
    first = compare_training(port(), side, batches(), NAMES).first
    assert first is not None
    assert first.name == "first"
    assert "JAX is 5 words of 32 bits behind in the stream from the beginning" in first.detail


class Channels(torch.nn.Module):
    def __init__(self, layout, kind=torch.nn.Dropout):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(8))
        self.drop, self._layout = kind(0.5), layout

    def forward(self, x):
        x = x * self.scale[:, None, None]
        return self.drop(x.contiguous(memory_format=self._layout))


def pictures(memory_order, kind=dropout, last=False):
    """Return a port for arrays of PyTorch's axes, or with channels last."""
    options = {} if memory_order is None else {"memory_order": memory_order}

    def forward(x, g):
        return kind(x.transpose(0, 2, 3, 1) if last else x, 0.5, g, **options)

    return port(forward)


ROWS, LAST = torch.contiguous_format, torch.channels_last
LAYOUTS = {
    "rows": (ROWS, pictures(None), ""),
    "channels last": (LAST, pictures("channels_last"), ""),
    "channels last in both": (LAST, pictures(None, last=True), ""),
    "channels last in JAX": (ROWS, pictures((0, 3, 1, 2), last=True), ""),
    "forgotten": (LAST, pictures(None), "pass memory_order=(0, 2, 3, 1) in JAX"),
    "too much": (ROWS, pictures("channels_last"), "pass no memory_order in JAX"),
    "forgotten in JAX": (ROWS, pictures(None, last=True), "pass memory_order=(0, 3, 1, 2) in JAX"),
}


@pytest.mark.parametrize("sizes", [(8, 2, 3), (8, 8, 8)], ids=["sizes", "equal sizes"])
@pytest.mark.parametrize(("layout", "side", "detail"), LAYOUTS.values(), ids=LAYOUTS)
def test_the_order_of_strides_is_recognized(layout, side, detail, sizes):
    found = compare_training(side, original(Channels(layout)), batches(2, *sizes, count=1), NAMES)
    if not detail:
        found.raise_if_different()
        assert found.different_mask_elements == 0
        return
    assert found.first is not None
    assert found.first.name == "drop"
    assert "the order of the strides explains it" in found.first.detail
    assert detail in found.first.detail


@pytest.mark.parametrize("last", [False, True])
def test_whole_channels(last):
    if last:
        pytest.skip("regjax.torch_random.feature_dropout has channels first")
    side = pictures(None, torch_random.feature_dropout)
    model = Channels(LAST, torch.nn.Dropout2d)
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
    kept = lambda state, x, i: (step(state, x, i)[0] | {"again": state["again"]}, step(state, x, i)[1])
    torch.manual_seed(7)
    found = compare_training(JaxStep(state, kept), there, batches(count=1), NAMES, record=False)
    assert not found.deviations["generator"]


def test_without_recording_the_generators_are_compared():
    found = compare_training(port(), original(), batches(), NAMES, record=False)
    assert found.agrees
    assert not found.sites
    found = compare_training(port(forward=once(0.25)), original(), batches(), NAMES, record=False)
    assert found.first is not None
    assert found.first.quantity == "generator"


def test_a_scan_and_a_checkpoint_of_layers():
    """PyTorch runs the forward pass again for the backward pass; JAX draws in a loop."""

    class Layers(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(8))
            self.a, self.b = torch.nn.Dropout(0.25), torch.nn.Dropout(0.5)

        def forward(self, x):
            for _ in range(3):
                x = torch.utils.checkpoint.checkpoint(
                    lambda x: self.b(self.a(x * self.scale)), x, use_reentrant=False
                )
            return x

    def loss(params, x, step, g):
        def layer(carry, _):
            x, g = dropout(carry[0] * params["scale"], 0.25, carry[1])
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
    wrong = JaxSide(
        right.params,
        lambda *args: (right.loss(*args)[0] * 1.01, right.loss(*args)[1]),
        SGD,
        generator=right.generator,
    )
    found = compare_training(wrong, side, batches(), NAMES)
    assert found.first is not None
    assert found.first.quantity == "loss"
    assert "the sides differ in float64 too" in found.first.detail
    end = torch.get_rng_state()
    torch.manual_seed(7)
    torch.empty(2, 4, 8).bernoulli_(0.5)
    assert torch.equal(end, torch.get_rng_state())


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
    "keys": (port, converted, ValueError, "generator must be None for a model that draws from keys"),
    "JAX only": (port, lambda: without(original()), ValueError, "got it in JAX only"),
    "kind": (port, lambda: with_generator(7), TypeError, "must be a torch.Generator; got"),
    "not returned": (returning, original, ValueError, "got 1 values"),
    "other": (lambda: returning(1.0), original, TypeError, "must return the next generator last"),
}


@pytest.mark.parametrize(("here", "there", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_compared_is_refused(here, there, error, message):
    with pytest.raises(error, match=message):
        compare_training(here(), there(), batches(), NAMES)


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
