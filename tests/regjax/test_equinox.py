"""Equinox's layers: the drop-in layer is bitwise identical, and the family has the same API.

This file is long because one table of situations compares every layer with the layer of Equinox.
"""

from __future__ import annotations

import inspect
import io
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import regjax
import regjax.equinox
from tests.regjax.training import assert_same_training, digits, filled, same_bits, text, train
from tests.regjax.versions import CONVOLUTIONS_MAY_FUSE_WITH_MASKS, assert_same_eagerly

KEY = jax.random.key(11)
KEYS = jax.random.split(KEY, 33)
X, RESIDUAL = jax.random.normal(jax.random.key(1), (2, 33, 65))
both = pytest.mark.parametrize(
    "Dropout", [eqx.nn.Dropout, regjax.equinox.Dropout], ids=["equinox", "regjax"]
)


def array(layer: eqx.nn.Dropout) -> eqx.nn.Dropout:
    return eqx.tree_at(lambda layer: layer.p, layer, jnp.float32(layer.p))


def call(layer, x=X, key=KEY):
    return layer(x, key=key)


def slope(layer, x):
    """Return the gradient of a layer between operations that XLA could contract with it."""
    return jax.grad(lambda x: jnp.sin(x * RESIDUAL + layer(x * 2, key=KEY) + x).sum())(x)


def deep(layer, x):
    step = lambda x, key: (jnp.tanh(RESIDUAL + layer(x, key=key)), None)
    return jax.grad(lambda x: lax.scan(step, x, KEYS[:3])[0].sum())(x)


def mapped(layer, x):
    one = lambda x, key: x + layer(x, key=key)
    return jax.grad(lambda x: jnp.sin(jax.vmap(one)(x, KEYS)).sum())(x)


def again(layer, x):
    return jax.grad(lambda x: jnp.sin(jax.checkpoint(lambda x: x + layer(x, key=KEY))(x)).sum())(x)


def sums(layer, x):
    """A sum of few elements, which XLA computes in the loop that draws the mask."""
    one = lambda x, key: (x + layer(x, key=key)).sum()
    return layer(x[:6, :8], key=KEY).sum(axis=1), jax.vmap(one)(x[:6, :8], KEYS[:6])


def traced(f: Callable[..., Any]) -> Callable[..., Any]:
    """Return a layer as `jax.jit` passes it, with a tracer as `p`."""
    active = lambda layer: eqx.tree_at(lambda layer: layer.inference, layer, False)
    return lambda layer, x: jax.jit(lambda layer, x: f(active(layer), x))(layer, x)


SITUATIONS = {
    "eager": call,
    "eager, array": lambda layer, x: call(array(layer), x),
    "eager vmap": lambda layer, x: jax.vmap(lambda x, key: layer(x, key=key))(x, KEYS),
    "closed over": lambda layer, x: jax.jit(lambda x: call(layer, x))(x),
    "closed over, array": lambda layer, x: jax.jit(lambda x: call(array(layer), x))(x),
    "traced": traced(call),
}
for f in (call, slope, deep, mapped, again, sums):
    jitted = eqx.filter_jit(f)
    SITUATIONS[f"filter_jit, {f.__name__}"] = jitted
    SITUATIONS[f"filter_jit, array, {f.__name__}"] = lambda layer, x, f=jitted: f(array(layer), x)


@pytest.mark.parametrize("name", ["eager", "eager vmap", "closed over", "filter_jit, call"])
@pytest.mark.sample(3)
def test_where_1_minus_p_rounds_otherwise_the_bits_are_theirs(name):
    # Under jit Equinox subtracts in float32, which changes the last bit and its inverse.
    assert 1 / np.float32(1 - 0.285) != 1 / (1 - np.float32(0.285))
    of_equinox, of_regjax = (
        SITUATIONS[name](Dropout(0.285), X) for Dropout in (eqx.nn.Dropout, regjax.equinox.Dropout)
    )
    if name.startswith("eager"):
        assert_same_eagerly(of_regjax, of_equinox)
    else:
        assert same_bits(of_regjax, of_equinox)


@pytest.mark.parametrize("name", SITUATIONS)
@pytest.mark.sample(2)
def test_in_every_situation_the_bits_are_theirs(name, leaning):
    of_equinox, of_regjax = (
        SITUATIONS[name](Dropout(0.1), X) for Dropout in (eqx.nn.Dropout, regjax.equinox.Dropout)
    )
    if name.startswith("eager"):
        assert_same_eagerly(of_regjax, of_equinox)
    else:
        assert same_bits(of_regjax, of_equinox)


def test_a_rate_that_is_a_product_is_subtracted_as_theirs_is():
    """XLA contracts `1 - a * b` in the original; a guard of the product would change a bit."""

    def of(Dropout):
        return jax.jit(
            lambda a, b: eqx.tree_at(lambda layer: layer.p, Dropout(), a * b)(X, key=KEY)
        )

    of_equinox, of_regjax = of(eqx.nn.Dropout), of(regjax.equinox.Dropout)
    for a, b in np.random.default_rng(0).uniform(0.1, 0.9, (20, 2)).astype("float32"):
        assert same_bits(of_regjax(a, b), of_equinox(a, b))


def test_the_constructor_the_call_and_the_leaves_are_theirs():
    for method in ("__init__", "__call__"):
        of_equinox, of_regjax = (
            [
                (p.name, p.default, p.kind)
                for p in inspect.signature(getattr(c, method)).parameters.values()
            ]
            for c in (eqx.nn.Dropout, regjax.equinox.Dropout)
        )
        assert [parameter for parameter in of_regjax if parameter[0] != "sampler"] == of_equinox
    paths = [
        jax.tree_util.tree_leaves_with_path(Dropout(0.3, True))
        for Dropout in (eqx.nn.Dropout, regjax.equinox.Dropout)
    ]
    assert paths[0] == paths[1]
    assert isinstance(regjax.equinox.Dropout(), eqx.nn.Dropout)
    assert regjax.equinox.Dropout().p == 0.5
    assert regjax.equinox.Dropout().inference is False


ERRORS = {
    "no key": (RuntimeError, lambda D: D(0.5)(X)),
    "no key at the array 0": (RuntimeError, lambda D: array(D(0.0))(X)),
    "no key at 1": (RuntimeError, lambda D: D(1.0)(X)),
    "not a key": (TypeError, lambda D: D(0.5)(X, key=3)),
    "a batch of keys": (ValueError, lambda D: D(0.5)(X, key=KEYS)),
    "a wrong word": (TypeError, lambda D: D(rate=0.5)),
}


@both
@pytest.mark.parametrize(("error", "act"), ERRORS.values(), ids=ERRORS)
def test_what_is_wrong_raises_what_theirs_raises(Dropout, error, act):
    with pytest.raises(error):
        act(Dropout)


@both
def test_where_nothing_is_dropped_the_input_is_returned_itself(Dropout):
    for layer in (Dropout(0), Dropout(0.0), Dropout(0.5, inference=True), Dropout(1.0, True)):
        assert layer(X) is X
    assert Dropout(0.5)(X, inference=True) is X
    assert Dropout(0.5, inference=True)(X, key=KEY, inference=False) is not X


@both
def test_the_old_name_of_inference_still_works_and_warns(Dropout):
    with pytest.warns(UserWarning, match="deterministic"):
        layer = Dropout(0.5, deterministic=True)
    assert layer.inference is layer.deterministic is True
    with pytest.warns(UserWarning, match="deterministic"):
        assert Dropout(0.5)(X, deterministic=True) is X


def test_at_1_gradients_are_0_where_theirs_are_nan(leaning):
    gradient = lambda layer: jax.grad(lambda x: layer(x, key=KEY).sum())(X)
    for changed in (lambda layer: layer, array):
        for wrap in (lambda f: f, eqx.filter_jit):
            of_equinox, of_regjax = (
                wrap(gradient)(changed(D(1.0))) for D in (eqx.nn.Dropout, regjax.equinox.Dropout)
            )
            assert jnp.isnan(of_equinox).all()
            assert (of_regjax == 0).all()


def test_a_rate_out_of_range_is_refused_or_nan():
    for p in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"p must lie in \[0, 1\]"):
            regjax.equinox.Dropout(p)
        wrong = eqx.tree_at(lambda layer: layer.p, regjax.equinox.Dropout(), jnp.float32(p))
        assert jnp.isnan(eqx.filter_jit(call)(wrong)).all()


def test_integers_are_refused():
    with pytest.raises(TypeError, match="x must be floating"):
        regjax.equinox.Dropout()(jnp.arange(3), key=KEY)


def test_a_traced_inference_works():
    layer = regjax.equinox.Dropout(0.5)
    switched = jax.jit(lambda flag: layer(X, key=KEY, inference=flag))
    assert same_bits(switched(True), X)
    assert same_bits(switched(False), layer(X, key=KEY))
    assert "cond" in str(jax.make_jaxpr(switched)(True))  # evaluation spends no random bits
    whole = jax.jit(call)  # every leaf is traced, including the flag
    assert same_bits(whole(layer), eqx.filter_jit(call)(array(layer)))
    assert same_bits(whole(eqx.nn.inference_mode(layer)), X)
    with pytest.raises(jax.errors.TracerBoolConversionError):
        jax.jit(call)(eqx.nn.Dropout(0.5))


def test_half_types_are_scaled_in_float32():
    x = X.astype(jnp.bfloat16)
    expected = regjax.dropout(x, 0.1, key=KEY)
    assert (regjax.equinox.Dropout(0.1)(x, key=KEY) == expected).all()
    assert (eqx.filter_jit(call)(array(regjax.equinox.Dropout(0.1)), x) == expected).all()


def test_the_sampler_is_an_addition():
    x = jnp.ones((64, 128))
    layer = regjax.equinox.Dropout(0.3, sampler=regjax.packed_bernoulli)
    expected = regjax.dropout(x, 0.3, key=KEY, sampler=regjax.packed_bernoulli)
    assert same_bits(layer(x, key=KEY), expected)
    np.testing.assert_allclose(traced(call)(layer, x), expected, rtol=1e-6)


def test_what_is_drawn_can_be_watched():
    drawn = []
    with regjax.observing(drawn.append):
        traced(call)(regjax.equinox.Dropout(0.25), X)
        jax.effects_barrier()
    assert [(event.rate, event.mask.shape) for event in drawn] == [(0.25, X.shape)]


class Model(eqx.Module):
    first: eqx.nn.Linear
    dropout: eqx.nn.Dropout
    nested: list

    def __init__(self, Dropout):
        self.first = eqx.nn.Linear(4, 3, key=KEY)
        self.dropout = Dropout(0.25)
        self.nested = [Dropout(0.5), {"attention": eqx.nn.MultiheadAttention(1, 4, key=KEY)}]


def dropouts(model: Any) -> list[eqx.nn.Dropout]:
    is_dropout = lambda node: isinstance(node, eqx.nn.Dropout)
    return [node for node in jax.tree.leaves(model, is_leaf=is_dropout) if is_dropout(node)]


@both
def test_equinox_s_own_tools_work(Dropout):
    model = Model(Dropout)
    assert [layer.inference for layer in dropouts(eqx.nn.inference_mode(model))] == [True] * 3
    back = eqx.nn.inference_mode(eqx.nn.inference_mode(model), False)
    assert eqx.tree_equal(back, model)
    arrays, rest = eqx.partition(model, eqx.is_array)
    assert eqx.tree_equal(eqx.combine(arrays, rest), model)
    where = lambda model: [layer.p for layer in dropouts(model)]
    assert where(eqx.tree_at(where, model, [0.1, 0.2, 0.3])) == [0.1, 0.2, 0.3]
    ensemble = eqx.filter_vmap(lambda p: Dropout(p))(jnp.array([0.1, 0.9]))
    y = eqx.filter_vmap(lambda layer: layer(X, key=KEY))(ensemble)
    assert (y == 0).mean(axis=(1, 2)).round(1).tolist() == pytest.approx([0.1, 0.9])


@pytest.mark.parametrize("changed", [lambda model: model, lambda model: array(model.dropout)])
def test_a_file_of_theirs_fits_ours_and_the_other_way_round(changed):
    models = [changed(Model(Dropout)) for Dropout in (eqx.nn.Dropout, regjax.equinox.Dropout)]
    for written, like in (models, models[::-1]):
        other = jax.tree.map(lambda leaf: leaf * 0 if eqx.is_array_like(leaf) else leaf, like)
        with io.BytesIO() as file:
            eqx.tree_serialise_leaves(file, written)
            file.seek(0)
            read = eqx.tree_deserialise_leaves(file, other)
        assert jax.tree.all(jax.tree.map(np.array_equal, read, like))


def test_a_changing_rate_costs_one_compilation():
    traces = []

    @eqx.filter_jit
    def run(layer, key):
        traces.append(layer)
        return layer(X, key=key)

    for p in (0.1, 0.37):
        layer = array(regjax.equinox.Dropout(p))
        assert abs(float((run(layer, KEY) == 0).mean()) - p) < 0.06  # 5 sigma: p < 6e-7
    assert len(traces) == 1


# The family: the layer, an input, and its function.


def of_a_batch(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Apply the function to a batch of one example."""
    return lambda x, *rest, **how: function(x[None], *rest, **options, **how)[0]


IDS = jnp.arange(33) % 20
FAMILY = {  # settings, the layer in terms of functions, and the axes that share a decision
    "Dropout": ({}, regjax.dropout, (33, 65)),
    "FeatureDropout": ({}, of_a_batch(regjax.feature_dropout, channel_axis=1), (33, 1)),
    "FeatureDropout, channels last": (
        {"channel_axis": -1},
        of_a_batch(regjax.feature_dropout),
        (1, 65),
    ),
    "AlphaDropout": ({}, regjax.alpha_dropout, (33, 65)),
    "FeatureAlphaDropout": ({}, of_a_batch(regjax.feature_alpha_dropout, channel_axis=1), (33, 1)),
    "DropPath": ({}, of_a_batch(regjax.drop_path), (1, 1)),
    "DropBlock": (
        {"block_size": 3},
        of_a_batch(regjax.drop_block, channel_axis=1, block_size=3),
        (33, 65),
    ),
    "VariationalDropout": ({}, of_a_batch(regjax.variational_dropout), (1, 65)),
    "DropConnect": ({}, regjax.drop_connect, (33, 65)),
    "EmbeddingDropout": (
        {},
        lambda x, rate, **how: regjax.embedding_dropout(x, IDS, rate, **how),
        (33, 1),
    ),
    "GaussianDropout": ({}, regjax.gaussian_dropout, (33, 65)),
    "GaussianNoise": ({}, regjax.gaussian_noise, (33, 65)),
}
every_layer = pytest.mark.parametrize("name", FAMILY)


def a_layer(name: str, amount: Any = 0.4) -> Layer:
    """Return the layer, its call without ids, and the name of its rate or standard deviation."""
    settings, _, _ = FAMILY[name]
    layer = getattr(regjax.equinox, name.partition(",")[0])(amount, **settings)
    inputs = (IDS,) if name == "EmbeddingDropout" else ()
    return Layer(layer, lambda layer, x, **how: layer(x, *inputs, **how))


class Layer(NamedTuple):
    layer: Any
    call: Callable[..., Any]

    @property
    def amount(self) -> str:
        return "stddev" if hasattr(self.layer, "stddev") else "p"

    def at(self, amount: Any) -> Any:
        return eqx.tree_at(lambda layer: getattr(layer, self.amount), self.layer, amount)


@every_layer
@pytest.mark.sample(5)
def test_a_layer_is_its_function(name):
    one, (_, function, together) = a_layer(name), FAMILY[name]
    assert same_bits(one.call(one.layer, X, key=KEY), function(X, 0.4, key=KEY))
    y = one.call(one.layer, jnp.ones_like(X), key=KEY)
    assert (y == jnp.broadcast_to(y[: together[0], : together[1]], X.shape)).all()
    assert together == (1, 1) or len(jnp.unique(y)) > 1
    assert jax.tree.leaves(one.layer) == [0.4, False]


@every_layer
def test_a_layer_evaluates_and_asks_for_what_is_missing(name):
    one = a_layer(name)
    evaluating = eqx.nn.inference_mode(one.layer)
    assert one.call(evaluating, X) is X
    assert one.call(one.layer, X, inference=True) is X
    assert one.call(one.at(0.0), X) is X
    kind = type(one.layer).__name__
    with pytest.raises(RuntimeError, match=f"key must be a random key for {kind} in training"):
        one.call(one.layer, X)
    with pytest.raises(TypeError, match="inference must be a boolean"):
        one.call(one.layer, X, key=KEY, inference="False")
    with pytest.raises(ValueError, match=f"{one.amount} must"):
        a_layer(name, -1.0)


@every_layer
@pytest.mark.sample(6)
def test_mapped_over_a_batch_with_traced_leaves_each_example_draws_for_itself(name):
    one, keys = a_layer(name), jax.random.split(KEY, 8)
    alone = [one.call(one.layer, X, key=key) for key in keys]

    @jax.jit
    def several(layer):
        return jax.vmap(lambda key: one.call(layer, X, key=key))(keys)

    np.testing.assert_allclose(several(one.layer), alone, rtol=2e-6, atol=1e-6)
    assert (several(eqx.nn.inference_mode(one.layer)) == X[None]).all()
    assert len({np.asarray(y).tobytes() for y in alone}) > 1
    assert several._cache_size() == 1


@pytest.mark.parametrize(
    "Kind", [regjax.equinox.FeatureDropout, regjax.equinox.FeatureAlphaDropout]
)
def test_a_wrong_channel_axis_is_refused(Kind):
    for axis in (2, -3):
        with pytest.raises(ValueError, match=rf"channel_axis .* has 2; got {axis}"):
            Kind(0.5, channel_axis=axis)(X, key=KEY)


def test_drop_connect_of_a_layer_leaves_its_bias():
    linear = eqx.nn.Linear(8, 8, key=KEY)
    dropped = regjax.equinox.DropConnect(0.5)(linear, key=KEY)
    assert same_bits(dropped.bias, linear.bias)
    kept = dropped.weight != 0
    assert 0 < kept.sum() < kept.size
    assert same_bits(dropped.weight[kept], 2 * linear.weight[kept])


class Perceptron(eqx.Module):
    layers: list

    def __init__(self, Dropout):
        dense = [eqx.nn.Linear(*n, key=KEY) for n in ((64, 256), (256, 24), (24, 10))]
        relu = eqx.nn.Lambda(jax.nn.relu)
        self.layers = [dense[0], relu, Dropout(0.2), dense[1], relu, Dropout(0.1), dense[2]]

    def __call__(self, image, key):
        return eqx.nn.Sequential(self.layers)(image.ravel(), key=key)


class Convolutional(eqx.Module):
    convolutions: list
    dropouts: list
    out: eqx.nn.Linear

    def __init__(self, Dropout):
        shapes = ((1, 8), (8, 8))
        self.convolutions = [eqx.nn.Conv2d(*n, 3, padding=1, key=KEY) for n in shapes]
        self.dropouts = [Dropout(0.15), Dropout(0.37)]
        self.out = eqx.nn.Linear(8 * 16, 10, key=KEY)

    def __call__(self, image, key):
        keys = jax.random.split(key)
        x = jax.nn.relu(self.convolutions[0](jnp.moveaxis(image, -1, 0)))
        x = x + self.dropouts[0](jax.nn.gelu(self.convolutions[1](x)), key=keys[0])
        x = eqx.nn.MaxPool2d(2, 2)(x)
        return self.out(self.dropouts[1](x.ravel(), key=keys[1]))


class Transformer(eqx.Module):
    """A block with dropout of embeddings, attention and both residuals."""

    embedding: eqx.nn.Embedding
    places: jax.Array
    norms: list
    attention: eqx.nn.MultiheadAttention
    dense: list
    dropouts: list

    def __init__(self, Dropout):
        self.embedding = eqx.nn.Embedding(128, 16, key=KEY)
        self.places = jnp.zeros((16, 16))
        self.norms = [eqx.nn.LayerNorm(16) for _ in range(3)]
        attention = eqx.nn.MultiheadAttention(2, 16, key=KEY)
        self.attention = eqx.tree_at(lambda a: a.dropout, attention, Dropout(0.1))
        self.dense = [eqx.nn.Linear(*n, key=KEY) for n in ((16, 32), (32, 16), (16, 128))]
        self.dropouts = [Dropout(0.1), Dropout(0.3), Dropout(0.2)]

    def __call__(self, letters, key):
        keys = jax.random.split(key, 4)
        x = jax.vmap(self.embedding)(letters) + self.places
        x = self.dropouts[0](x, key=keys[0])
        y = jax.vmap(self.norms[0])(x)
        y = self.attention(y, y, y, mask=jnp.tril(jnp.ones((16, 16), bool)), key=keys[1])
        x = x + self.dropouts[1](y, key=keys[2])
        y = jax.vmap(self.norms[1])(x)
        y = jax.vmap(self.dense[1])(jax.nn.gelu(jax.vmap(self.dense[0])(y)))
        x = x + self.dropouts[2](y, key=keys[3])
        return jax.vmap(self.dense[2])(jax.vmap(self.norms[2])(x))


def walk(Model, batches, Dropout):
    """Return losses and states of a run whose every second rate is an array that changes."""
    like = eqx.filter_eval_shape(Model, Dropout)
    model = filled(eqx.filter(like, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct)))
    params, rest = eqx.partition(eqx.combine(model, like), eqx.is_array)
    where = lambda model: [layer.p for layer in dropouts(model)[::2]]
    optimizer, data = optax.adamw(1e-2), batches(steps=15)
    rates = [[jnp.float32(p * step / 15) for p in where(rest)] for step in range(15)]

    def step(state, batch, number):
        (x, y), rates = batch
        keys = jax.random.split(jax.random.fold_in(KEY, number), len(x))

        def loss(params):
            model = eqx.tree_at(where, eqx.combine(params, rest), rates)
            logits = jax.vmap(model)(x, keys)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        params, state = state
        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state, params)
        return (eqx.apply_updates(params, updates), state), value

    walked = train(step, (params, optimizer.init(params)), list(zip(data, rates, strict=True)))
    return [(loss, jax.tree.leaves(state)) for loss, state in walked]


@pytest.mark.parametrize(
    ("Model", "batches", "tolerance"),
    [
        (Perceptron, digits, 0),
        (Convolutional, digits, 2e-5 if CONVOLUTIONS_MAY_FUSE_WITH_MASKS else 0),
        pytest.param(Transformer, text, 0, marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_a_run_of_training_has_the_same_bits(Model, batches, tolerance, leaning):
    of_equinox, of_regjax = (
        walk(Model, batches, Dropout) for Dropout in (eqx.nn.Dropout, regjax.equinox.Dropout)
    )
    if not tolerance:
        assert_same_training(of_regjax, of_equinox)
        return
    # The first loss does not depend on a gradient.
    assert same_bits(of_regjax[0][0], of_equinox[0][0])
    for one, other in zip(of_regjax, of_equinox, strict=True):
        chex.assert_trees_all_equal_dtypes(one, other)
        for leaf, reference in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
            assert np.abs(leaf - reference).max() <= tolerance * np.abs(reference).max()
