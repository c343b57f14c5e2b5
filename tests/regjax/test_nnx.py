"""The layers for Flax NNX are bitwise identical to NNX's, with the same public API.

The file has the sections of `test_linen.py` in the same order, so that both are read side by side.
"""

from __future__ import annotations

import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import regjax
import regjax.nnx
from tests.regjax.family import AMOUNT, FAMILY, X
from tests.regjax.training import assert_same_training, digits, filled, snapshot, text
from tests.regjax.versions import assert_same_eagerly

KEY = jax.random.key(3)
REGJAX, FLAX = regjax.nnx.Dropout, nnx.Dropout
both = pytest.mark.parametrize("Dropout", [REGJAX, FLAX], ids=["regjax", "flax"])


@pytest.fixture(autouse=True)
def _standard_promotion():
    """Allow promotion, which Flax's own layers require."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def models(Dropout):
    """Return models that differ in the import of the layer only."""

    class MLP(nnx.Module):
        def __init__(self, rngs):
            self.first, self.second = nnx.Linear(64, 256, rngs=rngs), nnx.Linear(256, 24, rngs=rngs)
            self.dropout, self.out = Dropout(0.2, rngs=rngs), nnx.Linear(24, 10, rngs=rngs)

        def __call__(self, images):
            x = self.dropout(nnx.relu(self.first(images.reshape(len(images), -1))))
            return self.out(self.dropout(nnx.relu(self.second(x))))

    class CNN(nnx.Module):
        def __init__(self, rngs):
            self.convolution = nnx.Conv(1, 8, (3, 3), rngs=rngs)
            self.channels = Dropout(0.1, broadcast_dims=(1, 2), rngs=rngs)
            self.features = Dropout(0.3, rngs=rngs)
            self.out = nnx.Linear(128, 10, rngs=rngs)

        def __call__(self, images):
            x = self.channels(nnx.relu(self.convolution(images)))
            x = nnx.avg_pool(x, (2, 2), strides=(2, 2))
            return self.out(self.features(x.reshape(len(x), -1)))

    class Block(nnx.Module):
        def __init__(self, rngs, width=16):
            self.norm1, self.norm2 = (nnx.LayerNorm(width, rngs=rngs) for _ in range(2))
            self.attention = nnx.MultiHeadAttention(
                2, width, dropout_rate=0.1, decode=False, rngs=rngs
            )
            self.up = nnx.Linear(width, 4 * width, rngs=rngs)
            self.down = nnx.Linear(4 * width, width, rngs=rngs)
            self.drop1, self.drop2, self.drop3 = (Dropout(0.1, rngs=rngs) for _ in range(3))

        def __call__(self, x):
            mask = nnx.make_causal_mask(jnp.ones(x.shape[:2]))
            x = x + self.drop1(self.attention(self.norm1(x), mask=mask))
            return x + self.drop3(self.down(self.drop2(nnx.gelu(self.up(self.norm2(x))))))

    class Transformer(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(128, 16, rngs=rngs)
            self.places = nnx.Param(0.02 * rngs.params.normal((1, 16, 16)))
            self.dropout, self.block = Dropout(0.1, rngs=rngs), Block(rngs)
            self.norm, self.out = nnx.LayerNorm(16, rngs=rngs), nnx.Linear(16, 128, rngs=rngs)

        def __call__(self, tokens):
            x = self.dropout(self.embed(tokens) + self.places[...])
            return self.out(self.norm(self.block(x)))

    return {"mlp": MLP, "cnn": CNN, "transformer": Transformer}


@pytest.mark.parametrize(
    ("name", "batches"),
    [
        ("mlp", digits),
        ("cnn", digits),
        pytest.param("transformer", text, marks=pytest.mark.slow),
    ],
)
@pytest.mark.sample(1)
def test_a_run_of_training_has_the_same_bits(name, batches):
    @nnx.jit
    def step(model, optimizer, batch):
        def loss(model):
            logits = model(batch[0])
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

        value, gradient = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradient)
        return value

    def walk(Dropout):
        model = nnx.eval_shape(lambda: models(Dropout)[name](nnx.Rngs(0)))
        graph, state = nnx.split(model)
        model = nnx.merge(graph, filled(state))
        model.train()
        optimizer = nnx.Optimizer(model, optax.adam(2e-2), wrt=nnx.Param)
        state = lambda: nnx.to_pure_dict(nnx.state((model, optimizer)))
        return [snapshot((step(model, optimizer, batch), state())) for batch in batches(steps=25)]

    assert_same_training(walk(REGJAX), walk(FLAX))


def rngs():
    return nnx.Rngs(0, dropout=1, noise=2)


class Sampled(nnx.Module):
    """A model with two layers, one of which is called twice."""

    def __init__(self, Dropout, rngs):
        self.first = Dropout(0.3, broadcast_dims=(-1,), rngs=rngs)
        self.second = Dropout(0.4, rng_collection="noise", rngs=rngs)

    def __call__(self, x):
        return jnp.stack([self.first(x), self.second(x), self.second(x)])


def looped(Dropout):
    layers = [
        Dropout(rate, rngs=rngs()) for rate in (0.0, 1.0, 0.3)
    ]  # at 0 and 1 no key is consumed
    return jnp.stack([layer(X) for layer in layers for _ in range(2)])


def scanned(Dropout):
    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=0, out_axes=0)
    def layers(rngs):
        return Dropout(0.2, rngs=rngs)

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def stack(x, layer):
        return layer(x)

    return stack(X, layers(rngs()))


def mapped(Dropout):
    @nnx.split_rngs(splits=6)
    @nnx.vmap(in_axes=(0, 0))
    def each(layer, x):
        return layer(x)

    return each(Dropout(0.5, rngs=rngs()), X)


def split_and_merged(Dropout):
    graph, state = nnx.split(Sampled(Dropout, rngs()))
    model = nnx.merge(graph, state)
    return jnp.stack([model(X), nnx.clone(model)(X), model(X)])


def in_evaluation(Dropout):
    model = Sampled(Dropout, rngs())
    model.eval()
    still = model(X)
    view = nnx.view(model, deterministic=False)
    moving = view(X)
    model.train()
    model.set_attributes(nnx.Dropout, deterministic=True)  # the filter selects both
    also_still = model(X)
    model.set_attributes(deterministic=False)
    return jnp.stack([still, moving, also_still, model(X)])  # views share the streams


one = lambda Dropout, **options: Dropout(0.5, rngs=rngs(), **options)
PLACES = {
    "alone": lambda D: one(D)(X),
    "a stream": lambda D: D(0.5, rngs=rngs().noise)(X),
    "rngs in the call": lambda D: one(D)(X, rngs=nnx.Rngs(7)),
    "a stream in the call": lambda D: one(D)(X, rngs=nnx.Rngs(7).dropout),
    "a key in the call": lambda D: D(0.5)(X, rngs=KEY),
    "a raw key in the call": lambda D: D(0.5)(X, rngs=jax.random.PRNGKey(3)),
    "collection": lambda D: one(D, rng_collection="noise")(X),
    "the default stream": lambda D: one(D, rng_collection="other")(X),
    "mode in the call": lambda D: one(D, deterministic=True)(X, deterministic=False),
    "dims": lambda D: one(D, broadcast_dims=(1, -1))(X),
    "two layers": lambda D: Sampled(D, rngs())(X),
    "jit": lambda D: nnx.jit(lambda model, x: model(x))(Sampled(D, rngs()), X),
    "remat": lambda D: nnx.remat(lambda model, x: model(x))(Sampled(D, rngs()), X),
    "sequential": lambda D: nnx.Sequential(one(D), one(D))(X),
    "loop": looped,
    "scan": scanned,
    "vmap": mapped,
    "split and merge": split_and_merged,
    "evaluation": in_evaluation,
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.sample(4)
def test_the_same_streams_give_the_same_values(place):
    of_regjax, of_flax = PLACES[place](REGJAX), PLACES[place](FLAX)
    assert_same_eagerly(of_regjax, of_flax)
    assert (of_regjax == 0).any()
    assert (of_regjax != 0).any()


@pytest.mark.parametrize(("shape", "rate"), [((63, 65), 0.123), ((64, 64), 0.1)], ids=str)
def test_a_given_key_gives_the_values_and_gradients(shape, rate):
    """Sizes below and above the threshold for the sampler of regjax."""
    x = jnp.linspace(-2.0, 3.0, shape[0] * shape[1]).reshape(shape)

    def run(Dropout):
        layer = lambda x: Dropout(rate)(x, rngs=KEY)
        return layer(x), jax.jit(lambda x: (*jax.vjp(layer, x)[1](x), layer(x)))(x)

    (eager, jitted), (their_eager, their_jitted) = run(REGJAX), run(FLAX)
    assert_same_eagerly(eager, their_eager)
    chex.assert_trees_all_equal(jitted, their_jitted)


@pytest.mark.slow
def test_a_small_sum_of_what_is_dropped_has_the_same_bits():
    """Compare the gradient of a bias, whose terms XLA sums in the loop that drops them."""
    x = jax.random.normal(KEY, (8, 16, 16))

    def gradient(Dropout):
        drop = lambda x: Dropout(0.1)(x, rngs=KEY)
        return jax.jit(jax.grad(lambda b, x: (drop(0 * x + b) * x).sum()))(jnp.zeros((1, 1, 16)), x)

    chex.assert_trees_all_equal(gradient(REGJAX), gradient(FLAX))


def test_the_state_is_that_of_the_layer_it_replaces_and_is_restored_from_it():
    of_regjax, of_flax = (Sampled(Dropout, rngs()) for Dropout in (REGJAX, FLAX))
    for _ in range(2):
        of_flax(X)
    state = nnx.state(of_flax)
    assert jax.tree.structure(state) == jax.tree.structure(nnx.state(of_regjax))
    nnx.update(of_regjax, nnx.from_flat_state(nnx.to_flat_state(state)))
    assert_same_eagerly(of_regjax(X), of_flax(X))
    chex.assert_trees_all_equal(*(snapshot(nnx.state(model)) for model in (of_regjax, of_flax)))


ERRORS = {
    "no rngs": (lambda D: D(0.5)(X), ValueError),
    "no mode": (lambda D: D(0.5, deterministic=None)(X), ValueError),
    "rngs are a number": (lambda D: D(0.5, rngs=0), TypeError),
    "rngs are a key": (lambda D: D(0.5, rngs=KEY), TypeError),
    "rngs in the call are a number": (lambda D: D(0.5)(X, rngs=0), TypeError),
    "no such stream": (lambda D: D(0.5, rngs=nnx.Rngs(params=0)), KeyError),
    "no rate": (lambda D: D(), TypeError),
    "two numbers": (lambda D: D(0.5, (0,)), TypeError),
    "no number": (lambda D: D("0.5")(X, rngs=KEY), TypeError),
    "a large dim": (lambda D: one(D, broadcast_dims=(2,))(X), IndexError),
    "a small dim": (lambda D: one(D, broadcast_dims=(-3,))(X), IndexError),
    "one dim": (lambda D: one(D, broadcast_dims=1)(X), TypeError),
    "integers": (lambda D: one(D)(X.astype(int)), TypeError),
    "no key": (lambda D: D(0.5)(X, rngs=X), TypeError),
    "many keys": (lambda D: D(0.5)(X, rngs=jax.random.split(KEY)), ValueError),
}


@both
@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_those_of_the_layer_it_replaces(Dropout, case):
    call, error = ERRORS[case]
    with pytest.raises(error):
        call(Dropout)


@pytest.mark.wrong_types
@both
@pytest.mark.parametrize("flag", [True, np.True_, jnp.bool_(True)], ids=["bool", "numpy", "jax"])
def test_evaluation_returns_what_it_is_given(Dropout, flag):
    for x in (X, np.asarray(X), X.astype(int)):
        assert Dropout(0.5, deterministic=flag)(x) is x
        assert Dropout(0.5)(x, deterministic=flag) is x
    assert Dropout(0.0)(X) is X
    assert not Dropout(1.0)(X).any()
    assert not jax.grad(lambda x: Dropout(1.0)(x).sum())(X).any()


def test_the_constructor_and_the_call_take_what_the_others_take():
    for method in ("__init__", "__call__", "set_view"):
        parameters, expected = (
            inspect.signature(getattr(D, method)).parameters for D in (REGJAX, FLAX)
        )
        for name, parameter in expected.items():
            assert parameters[name].default == parameter.default
            assert parameters[name].kind == parameter.kind
    assert vars(REGJAX(0.5)).keys() - vars(FLAX(0.5)).keys() == {"sampler"}
    assert issubclass(REGJAX, FLAX)


@pytest.mark.parametrize("rate", [-0.1, 1.5, float("nan")])
def test_a_rate_out_of_range_is_refused_and_a_traced_one_gives_nan(rate):
    layer = REGJAX(0.5)
    with pytest.raises(ValueError, match=r"rate must lie in \[0, 1\]"):
        REGJAX(rate)
    with pytest.raises(ValueError, match=r"rate must lie in \[0, 1\]"):
        layer(X, rngs=KEY, rate=rate)
    assert jnp.isnan(jax.jit(lambda rate: layer(X, rngs=KEY, rate=rate))(rate)).all()
    layer.rate = rate
    with pytest.raises(ValueError, match=r"rate must lie in \[0, 1\]"):
        layer(X, rngs=KEY)


@pytest.mark.parametrize("flag", [0, "False", jnp.zeros(2, bool)], ids=str)
def test_a_flag_that_is_no_boolean_is_refused(flag):
    with pytest.raises(TypeError, match="deterministic must be a boolean"):
        REGJAX(0.5)(X, deterministic=flag, rngs=KEY)


def test_a_changing_rate_and_flag_cost_one_compilation():
    traces = []

    @nnx.jit
    def step(layer, rate, flag):
        traces.append(None)
        by_call = layer(X, deterministic=flag, rngs=KEY, rate=rate)
        return by_call, nnx.view(layer, rate=rate)(X, deterministic=flag, rngs=KEY)

    for rate in (0.0, 0.25, 1.0):
        for flag in (False, True):
            expected = X if flag else regjax.dropout(X, rate, key=KEY)
            for y in step(REGJAX(0.9), jnp.float32(rate), jnp.bool_(flag)):
                chex.assert_trees_all_equal(y, expected)
    assert len(traces) == 1


def test_the_rate_may_be_a_variable_of_the_model():
    layer = REGJAX(nnx.Variable(jnp.float32(0.25)))
    step = nnx.jit(lambda layer: layer(X, rngs=KEY))
    for rate in (0.25, 0.75):
        layer.rate[...] = jnp.float32(rate)
        for y in (step(layer), layer(X, rngs=KEY)):
            chex.assert_trees_all_equal(y, regjax.dropout(X, rate, key=KEY))


def test_half_types_are_rounded_once():
    half = X.astype(jnp.bfloat16)
    of_regjax, of_flax = (Dropout(0.1)(half, rngs=KEY) for Dropout in (REGJAX, FLAX))
    chex.assert_trees_all_equal(of_regjax, regjax.dropout(half, 0.1, key=KEY))
    assert (of_regjax != of_flax).any()


def test_a_mask_is_laid_out_as_what_it_masks():
    mesh = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Explicit,))
    x = jnp.ones((16, 4))
    layer = REGJAX(0.5, broadcast_dims=(0,))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(x, NamedSharding(mesh, P("a")))
        y = jax.jit(lambda x: layer(x, rngs=KEY))(sharded)
        assert y.sharding.is_equivalent_to(sharded.sharding, 2)
    np.testing.assert_array_equal(np.asarray(y), np.asarray(layer(x, rngs=KEY)))


every_layer = pytest.mark.parametrize("name", FAMILY)


@every_layer
def test_a_layer_is_its_function(name):
    settings, inputs, function = FAMILY[name]
    layer = getattr(regjax.nnx, name)(0.3, rngs=rngs(), **settings)
    by_stream = layer(*inputs)
    key = rngs().dropout.fork()()
    chex.assert_trees_all_equal(by_stream, function(*inputs, 0.3, key=key, **settings))
    by_key = layer(*inputs, rngs=KEY)
    chex.assert_trees_all_equal(by_key, function(*inputs, 0.3, key=KEY, **settings))
    with pytest.raises(AssertionError):
        chex.assert_trees_all_equal(by_key, by_stream)
    assert layer(*inputs, deterministic=True) is inputs[0]
    layer.eval()
    assert layer(*inputs) is inputs[0]


def test_noise_of_standard_deviation_1_needs_a_key():
    """A rate of 1 needs no key."""
    with pytest.raises(ValueError, match="rngs must hold a key"):
        regjax.nnx.GaussianNoise(1.0)(X)


@every_layer
@pytest.mark.sample(5)
def test_the_amount_of_the_call_comes_first(name):
    settings, inputs, function = FAMILY[name]
    amount = AMOUNT[name]
    layer = getattr(regjax.nnx, name)(0.9, **settings)
    assert f"{amount}: ArrayLike | None = None" in nnx.view_info(layer)
    view = lambda value, *inputs: nnx.view(layer, **{amount: value})(*inputs, rngs=KEY)
    call = lambda value, *inputs: layer(*inputs, rngs=KEY, **{amount: value})
    expected = function(*inputs, 0.3, key=KEY, **settings)
    for y in jax.jit(lambda *args: (view(*args), call(*args)))(0.3, *inputs):
        chex.assert_trees_all_close(y, expected, rtol=1e-6)
    chex.assert_trees_all_equal(view(0.3, *inputs), expected)
    chex.assert_trees_all_close(view(jnp.float32(0.3), *inputs), expected, rtol=1e-6)
    assert layer(*inputs, **{amount: 0.0}) is inputs[0]


@every_layer
def test_a_layer_asks_for_what_is_missing(name):
    settings, inputs, _ = FAMILY[name]
    layer = getattr(regjax.nnx, name)
    with pytest.raises(ValueError, match=f"rngs must hold a key for {name} in training; got None"):
        layer(0.3, **settings)(*inputs)
    with pytest.raises(ValueError, match=f"deterministic must be a boolean for {name}; got None"):
        layer(0.3, deterministic=None, **settings)(*inputs, rngs=KEY)
    with pytest.raises(ValueError, match=f"{AMOUNT[name]} must"):
        layer(-1.0, **settings)
