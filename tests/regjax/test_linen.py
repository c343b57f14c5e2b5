"""The layers for Flax Linen are bitwise identical to Linen's, with the same public API.

The file has the sections of `test_nnx.py` in the same order, so that both are read side by side.
"""

from __future__ import annotations

import functools
import inspect

import chex
import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import regjax
import regjax.linen
from tests.regjax.family import AMOUNT, FAMILY, X
from tests.regjax.training import assert_same_training, digits, filled, text, train
from tests.regjax.versions import assert_same_eagerly

KEY = jax.random.key(3)
RNGS = {"dropout": KEY}
REGJAX, FLAX = regjax.linen.Dropout, nn.Dropout
both = pytest.mark.parametrize("Dropout", [REGJAX, FLAX], ids=["regjax", "flax"])


@pytest.fixture(autouse=True)
def _standard_promotion():
    """Allow promotion, which Flax's own layers require."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def models(Dropout):
    """Return models that differ in the import of the layer only."""

    class MLP(nn.Module):
        @nn.compact
        def __call__(self, images, train):
            x = images.reshape(len(images), -1)
            for width in (256, 24):
                x = nn.relu(nn.Dense(width)(x))
                x = Dropout(0.2, deterministic=not train)(x)
            return nn.Dense(10)(x)

    class CNN(nn.Module):
        def setup(self):
            self.convolution = nn.Conv(8, (3, 3))
            self.channels = Dropout(0.1, broadcast_dims=(1, 2))
            self.features = Dropout(0.3)
            self.out = nn.Dense(10)

        def __call__(self, images, train):
            x = self.channels(nn.relu(self.convolution(images)), deterministic=not train)
            x = nn.avg_pool(x, (2, 2), strides=(2, 2))
            return self.out(self.features(x.reshape(len(x), -1), not train))

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            mask = nn.make_causal_mask(jnp.ones(x.shape[:2]))
            y = nn.LayerNorm()(x)
            y = nn.MultiHeadDotProductAttention(2)(y, mask=mask)
            x = x + Dropout(0.1, deterministic=not train)(y)
            y = nn.gelu(nn.Dense(4 * x.shape[-1])(nn.LayerNorm()(x)))
            y = Dropout(0.1, deterministic=not train)(y)
            y = nn.Dense(x.shape[-1])(y)
            return x + Dropout(0.1, deterministic=not train)(y)

    class Transformer(nn.Module):
        @nn.compact
        def __call__(self, tokens, train):
            places = self.param("places", nn.initializers.normal(0.02), (1, tokens.shape[1], 16))
            x = Dropout(0.1, deterministic=not train)(nn.Embed(128, 16)(tokens) + places)
            x = Block()(x, train)
            return nn.Dense(128)(nn.LayerNorm()(x))

    return {"mlp": MLP(), "cnn": CNN(), "transformer": Transformer()}


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
    def walk(Dropout):
        model, optimizer, data = models(Dropout)[name], optax.adam(2e-2), batches(steps=25)
        params = filled(jax.eval_shape(lambda: model.init(KEY, data[0][0], train=False)))

        def step(state, batch, number):
            def loss(params):
                rngs = {"dropout": jax.random.fold_in(KEY, number)}
                logits = model.apply(params, batch[0], train=True, rngs=rngs)
                return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

            params, state = state
            value, gradient = jax.value_and_grad(loss)(params)
            updates, state = optimizer.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), value

        return train(step, (params, optimizer.init(params)), data)

    assert_same_training(walk(REGJAX), walk(FLAX))


def places(Dropout):
    """Return the positions of a layer in a model, which determine its path and key."""

    class Inner(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Dropout(0.4, deterministic=False)(Dropout(0.3, (0,), False)(x))

    class Named(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Dropout(0.4, name="a")(Dropout(0.3, name="b")(x, False), deterministic=False)

    class Assigned(nn.Module):
        def setup(self):
            self.inner, self.drop = Inner(), Dropout(0.4)

        def __call__(self, x):
            x = self.inner(self.drop(x, deterministic=False))
            return self.drop(x, deterministic=False)  # another key for each call

    class Looped(nn.Module):
        @nn.compact
        def __call__(self, x):
            for rate in (0.0, 0.3, 0.5):  # at 0 no key is derived
                drop = Dropout(rate, deterministic=False)
                x = jnp.hstack([drop(x), drop(x)])
            return x

    class Scanned(nn.Module):
        split: bool

        @nn.compact
        def __call__(self, x):
            class Step(nn.Module):
                @nn.compact
                def __call__(self, x, _):
                    return Dropout(0.2, deterministic=False)(x), None

            rngs = {"dropout": self.split}
            return nn.scan(Step, variable_broadcast=False, split_rngs=rngs, length=3)()(x, None)[0]

    class Shared(nn.Module):
        def setup(self):
            self.inner = Inner()
            nn.share_scope(self, self.inner)

        def __call__(self, x):
            return self.inner(x)

    def mapped(split):
        return nn.vmap(Inner, in_axes=0, split_rngs={"dropout": split}, variable_axes={})()

    one = functools.partial(Dropout, 0.5, deterministic=False)
    return {
        "alone": one(),
        "automatic": Inner(),
        "named": Named(),
        "setup": Assigned(),
        "loop": Looped(),
        "scan": Scanned(split=True),
        "scan, one mask": Scanned(split=False),
        "vmap": mapped(split=True),
        "vmap, one mask": mapped(split=False),
        "remat": nn.remat(Dropout)(0.5, deterministic=False),
        "remat of a model": nn.remat(Assigned)(),
        "jit": nn.jit(Dropout)(0.5, deterministic=False),
        "share_scope": Shared(),
        "sequential": nn.Sequential([one(), one()]),
        "dims": one(broadcast_dims=(0,)),
        "dims from the end": one(broadcast_dims=[-1]),
        "a dim twice": one(broadcast_dims=(1, -1)),
        "collection": one(rng_collection="noise"),
        "a collection that is not there": one(rng_collection="other"),
    }


@pytest.mark.parametrize("place", places(REGJAX))
@pytest.mark.sample(3)
def test_the_same_path_gives_the_same_values(place):
    rngs = {"dropout": KEY, "noise": jax.random.key(4), "params": jax.random.key(5)}
    run = lambda Dropout: places(Dropout)[place].apply({}, X, rngs=rngs)
    of_regjax, of_flax = run(REGJAX), run(FLAX)
    assert_same_eagerly(of_regjax, of_flax, layers=4)  # of one path, at most
    assert (of_regjax == 0).any()
    assert (of_regjax != 0).any()


@pytest.mark.parametrize("key", [KEY, jax.random.PRNGKey(3)], ids=["typed", "raw"])
@pytest.mark.parametrize(("shape", "rate"), [((63, 65), 0.123), ((64, 64), 0.1)], ids=str)
@pytest.mark.sample(2)
def test_a_given_key_gives_the_values_and_gradients(key, shape, rate):
    """Sizes below and above the threshold for the sampler of regjax."""
    x = jnp.linspace(-2.0, 3.0, shape[0] * shape[1]).reshape(shape)

    def run(Dropout):
        layer = lambda x: Dropout(rate).apply({}, x, deterministic=False, rng=key)
        return layer(x), jax.jit(lambda x: (*jax.vjp(layer, x)[1](x), layer(x)))(x)

    (eager, jitted), (their_eager, their_jitted) = run(REGJAX), run(FLAX)
    assert_same_eagerly(eager, their_eager)
    chex.assert_trees_all_equal(jitted, their_jitted)
    of_regjax = lambda x: REGJAX(rate).apply({}, x, deterministic=False, rng=key)
    chex.assert_trees_all_equal(jax.vjp(of_regjax, x)[0], of_regjax(x))  # unlike in Linen


@pytest.mark.slow
def test_a_small_sum_of_what_is_dropped_has_the_same_bits():
    """Compare the gradient of a bias, whose terms XLA sums in the loop that drops them."""
    x = jax.random.normal(KEY, (8, 16, 16))

    def gradient(Dropout):
        drop = lambda x: Dropout(0.1).apply({}, x, deterministic=False, rng=KEY)
        return jax.jit(jax.grad(lambda b, x: (drop(0 * x + b) * x).sum()))(jnp.zeros((1, 1, 16)), x)

    chex.assert_trees_all_equal(gradient(REGJAX), gradient(FLAX))


@both
def test_initialization_needs_no_key_in_evaluation_and_makes_one_in_training(Dropout):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return nn.Dense(2)(Dropout(0.5, deterministic=not train)(x))

    variables = Model().init({"params": KEY}, X, train=False)
    chex.assert_trees_all_equal(variables, Model().init(KEY, X, train=True))
    assert list(variables["params"]) == ["Dense_0"]
    with pytest.raises(flax.errors.InvalidRngError):
        Model().apply(variables, X, train=True)


ERRORS = {
    "outside of a model": (lambda D: D(0.5)(X, True), flax.errors.CallCompactUnboundModuleError),
    "no rngs": (lambda D: D(0.5).apply({}, X, False), flax.errors.InvalidRngError),
    "no mode": (lambda D: D(0.5).apply({}, X, rngs=RNGS), ValueError),
    "two modes": (lambda D: D(0.5, (), True).apply({}, X, False, rngs=RNGS), ValueError),
    "no rate": (lambda D: D(), TypeError),
    "no number": (lambda D: D("0.5").apply({}, X, False, rngs=RNGS), TypeError),
    "a large dim": (lambda D: D(0.5, (2,)).apply({}, X, False, rngs=RNGS), IndexError),
    "a small dim": (lambda D: D(0.5, (-3,)).apply({}, X, False, rngs=RNGS), IndexError),
    "one dim": (lambda D: D(0.5, 1).apply({}, X, False, rngs=RNGS), TypeError),
    "integers": (lambda D: D(0.5).apply({}, X.astype(int), False, rngs=RNGS), TypeError),
    "no key": (lambda D: D(0.5).apply({}, X, False, rng=X), TypeError),
    "many keys": (lambda D: D(0.5).apply({}, X, False, rng=jax.random.split(KEY)), ValueError),
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
        assert Dropout(0.5, deterministic=flag).apply({}, x) is x
        assert Dropout(0.5).apply({}, x, flag) is x
    assert Dropout(0.0).apply({}, X, False) is X
    assert not Dropout(1.0).apply({}, X, False).any()
    assert not jax.grad(lambda x: Dropout(1.0).apply({}, x, False).sum())(X).any()


def test_the_constructor_and_the_call_take_what_the_others_take():
    for ported, original in ((REGJAX, FLAX), (REGJAX.__call__, FLAX.__call__)):
        parameters, expected = (inspect.signature(f).parameters for f in (ported, original))
        assert [name for name in parameters if name in expected] == list(expected)
        for name, parameter in expected.items():
            assert parameters[name].default == parameter.default
            assert parameters[name].kind == parameter.kind
    assert issubclass(REGJAX, FLAX)


WRONG = [-0.1, 1.5, float("nan")]


@pytest.mark.parametrize("rate", WRONG)
def test_a_rate_out_of_range_is_refused_and_a_traced_one_gives_nan(rate):
    with pytest.raises(ValueError, match=r"rate must lie in \[0, 1\]"):
        REGJAX(rate)
    with pytest.raises(ValueError, match=r"rate must lie in \[0, 1\]"):
        REGJAX(0.5).apply({}, X, False, rng=KEY, rate=rate)
    traced = jax.jit(lambda rate: REGJAX(rate).apply({}, X, False, rng=KEY))(rate)
    assert jnp.isnan(traced).all()


@pytest.mark.parametrize("flag", [0, "False", jnp.zeros(2, bool)], ids=str)
def test_a_flag_that_is_no_boolean_is_refused(flag):
    with pytest.raises(TypeError, match="deterministic must be a boolean"):
        REGJAX(0.5).apply({}, X, flag, rng=KEY)


def test_a_changing_rate_and_flag_cost_one_compilation():
    traces = []

    @jax.jit
    def step(rate, flag):
        traces.append(None)
        by_call = REGJAX(0.9).apply({}, X, flag, rng=KEY, rate=rate)
        return by_call, REGJAX(rate, deterministic=flag).apply({}, X, rng=KEY)

    for rate in (0.0, 0.25, 1.0):
        for flag in (False, True):
            expected = X if flag else regjax.dropout(X, rate, key=KEY)
            for y in step(jnp.float32(rate), jnp.bool_(flag)):
                chex.assert_trees_all_equal(y, expected)
    assert len(traces) == 1


def test_each_layer_of_a_scanned_stack_may_have_its_rate():
    class Step(nn.Module):
        @nn.compact
        def __call__(self, x, rate):
            return x, REGJAX(0.1, deterministic=False)(x, rate=rate)

    stack = nn.scan(Step, split_rngs={"dropout": True}, length=3)()
    rates = jnp.array([0.0, 0.5, 1.0])
    dropped = stack.apply({}, jnp.ones(400), rates, rngs=RNGS)[1] == 0
    assert dropped[0].sum() == 0
    assert 100 < dropped[1].sum() < 300  # 10 sigma
    assert dropped[2].all()


def test_half_types_are_rounded_once():
    half = X.astype(jnp.bfloat16)
    run = lambda Dropout: Dropout(0.1).apply({}, half, False, rng=KEY)
    chex.assert_trees_all_equal(run(REGJAX), regjax.dropout(half, 0.1, key=KEY))
    assert (run(REGJAX) != run(FLAX)).any()


def test_a_mask_is_laid_out_as_what_it_masks():
    mesh = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Explicit,))
    x = jnp.ones((16, 4))
    layer = REGJAX(0.5, (0,), deterministic=False)
    with jax.set_mesh(mesh):
        sharded = jax.device_put(x, NamedSharding(mesh, P("a")))
        y = jax.jit(lambda x: layer.apply({}, x, rng=KEY))(sharded)
        assert y.sharding.is_equivalent_to(sharded.sharding, 2)
    np.testing.assert_array_equal(np.asarray(y), np.asarray(layer.apply({}, x, rng=KEY)))


def test_code_that_looks_for_the_replaced_layer_finds_it():
    seen = []

    def intercept(call, args, kwargs, context):
        seen.append((isinstance(context.module, FLAX), context.method_name))
        return call(*args, **kwargs)

    with nn.intercept_methods(intercept):
        places(REGJAX)["automatic"].apply({}, X, rngs=RNGS)
    assert seen[1:] == [(True, "__call__")] * 2  # and no other method


every_layer = pytest.mark.parametrize("name", FAMILY)


class TheKey(nn.Module):
    """Return the key of a layer that is the whole model."""

    def __call__(self):
        return self.make_rng("dropout")


@every_layer
@pytest.mark.sample(7)
def test_a_layer_is_its_function(name):
    settings, inputs, function = FAMILY[name]
    layer = getattr(regjax.linen, name)(0.3, **settings)
    assert not layer.init(KEY, *inputs, deterministic=True)
    assert layer.apply({}, *inputs, deterministic=True) is inputs[0]
    key = TheKey().apply({}, rngs=RNGS)
    by_rngs = layer.apply({}, *inputs, deterministic=False, rngs=RNGS)
    chex.assert_trees_all_equal(by_rngs, function(*inputs, 0.3, key=key, **settings))
    by_key = layer.apply({}, *inputs, deterministic=False, rng=KEY)
    chex.assert_trees_all_equal(by_key, function(*inputs, 0.3, key=KEY, **settings))
    with pytest.raises(AssertionError):
        chex.assert_trees_all_equal(by_key, by_rngs)


def test_noise_of_standard_deviation_1_needs_a_key():
    """A rate of 1 needs no key."""
    with pytest.raises(flax.errors.InvalidRngError):
        regjax.linen.GaussianNoise(1.0).apply({}, X, deterministic=False)


@every_layer
@pytest.mark.sample(6)
def test_the_amount_of_the_call_comes_first(name):
    settings, inputs, function = FAMILY[name]
    amount = AMOUNT[name]
    layer = getattr(regjax.linen, name)(0.9, deterministic=False, **settings)
    call = jax.jit(lambda rate, *inputs: layer.apply({}, *inputs, rng=KEY, **{amount: rate}))
    expected = function(*inputs, 0.3, key=KEY, **settings)
    chex.assert_trees_all_close(call(0.3, *inputs), expected, rtol=1e-6)
    assert layer.apply({}, *inputs, **{amount: 0.0}) is inputs[0]


@every_layer
def test_a_layer_asks_for_what_is_missing(name):
    settings, inputs, _ = FAMILY[name]
    layer = getattr(regjax.linen, name)
    with pytest.raises(flax.errors.InvalidRngError):
        layer(0.3, **settings).apply({}, *inputs, deterministic=False)
    with pytest.raises(ValueError, match="deterministic"):
        layer(0.3, **settings).apply({}, *inputs, rng=KEY)
    with pytest.raises(ValueError, match=f"{AMOUNT[name]} must"):
        layer(-1.0, **settings)
