"""Equinox's layers: ours in place of theirs changes no bit, and the family follows its customs."""

from __future__ import annotations

import codecs
import contextlib
import inspect
import io
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from sklearn.datasets import load_digits

import regjax
from regjax import equinox as ours

KEY = jax.random.key(11)
KEYS = jax.random.split(KEY, 33)
X, RESIDUAL = jax.random.normal(jax.random.key(1), (2, 33, 65))
RATES = (0.1, 0.37)
both = pytest.mark.parametrize("Dropout", [eqx.nn.Dropout, ours.Dropout], ids=["theirs", "ours"])


def same_bits(tree: Any, other: Any) -> bool:
    """Whether two trees of float32 have the same bits, the signs of zeros included."""
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True)
    words = [[np.asarray(leaf).view(np.uint32) for leaf in pair] for pair in pairs]
    return all(np.array_equal(*pair) for pair in words)


@pytest.fixture
def leaning():
    """Theirs leans on promotion."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def array(layer: eqx.nn.Dropout) -> eqx.nn.Dropout:
    return eqx.tree_at(lambda layer: layer.p, layer, jnp.float32(layer.p))


def call(layer, x=X, key=KEY):
    return layer(x, key=key)


def slope(layer, x):
    """The gradient of a layer between arithmetic that XLA could contract with it."""
    return jax.grad(lambda x: jnp.sin(x * RESIDUAL + layer(x * 2, key=KEY) + x).sum())(x)


def deep(layer, x):
    step = lambda x, key: (jnp.tanh(RESIDUAL + layer(x, key=key)), None)
    return jax.grad(lambda x: lax.scan(step, x, KEYS[:3])[0].sum())(x)


def mapped(layer, x):
    one = lambda x, key: x + layer(x, key=key)
    return jax.grad(lambda x: jnp.sin(jax.vmap(one)(x, KEYS)).sum())(x)


def again(layer, x):
    return jax.grad(lambda x: jnp.sin(jax.checkpoint(lambda x: x + layer(x, key=KEY))(x)).sum())(x)


def traced(f: Callable[..., Any]) -> Callable[..., Any]:
    """What `jax.jit` makes of a layer that is its argument: `p` is a tracer."""
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
for f in (call, slope, deep, mapped, again):
    SITUATIONS[f"filter_jit, {f.__name__}"] = eqx.filter_jit(f)
    SITUATIONS[f"filter_jit, array, {f.__name__}"] = lambda layer, x, f=eqx.filter_jit(f): f(
        array(layer), x
    )


@pytest.mark.parametrize("situation", SITUATIONS.values(), ids=SITUATIONS)
def test_in_every_situation_the_bits_are_theirs(situation, leaning):
    for p in RATES:
        layers = [Dropout(p) for Dropout in (eqx.nn.Dropout, ours.Dropout)]
        theirs, mine = (situation(layer, X) for layer in layers)
        assert same_bits(mine, theirs), p


def test_the_constructor_the_call_and_the_leaves_are_theirs():
    for method in ("__init__", "__call__"):
        theirs, mine = (
            [
                (p.name, p.default, p.kind)
                for p in inspect.signature(getattr(c, method)).parameters.values()
            ]
            for c in (eqx.nn.Dropout, ours.Dropout)
        )
        assert [parameter for parameter in mine if parameter[0] != "sampler"] == theirs
    paths = [
        jax.tree_util.tree_leaves_with_path(Dropout(0.3, True))
        for Dropout in (eqx.nn.Dropout, ours.Dropout)
    ]
    assert paths[0] == paths[1]
    assert isinstance(ours.Dropout(), eqx.nn.Dropout)
    assert ours.Dropout().p == 0.5
    assert ours.Dropout().inference is False


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
            theirs, mine = (wrap(gradient)(changed(D(1.0))) for D in (eqx.nn.Dropout, ours.Dropout))
            assert jnp.isnan(theirs).all()
            assert (mine == 0).all()


def test_a_rate_out_of_range_is_refused_or_nan():
    for p in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"p must lie in \[0, 1\]"):
            ours.Dropout(p)
        wrong = eqx.tree_at(lambda layer: layer.p, ours.Dropout(), jnp.float32(p))
        assert jnp.isnan(eqx.filter_jit(call)(wrong)).all()


def test_integers_are_refused():
    with pytest.raises(TypeError, match="x must be floating"):
        ours.Dropout()(jnp.arange(3), key=KEY)


def test_a_traced_inference_works():
    layer = ours.Dropout(0.5)
    switched = jax.jit(lambda flag: layer(X, key=KEY, inference=flag))
    assert same_bits(switched(True), X)
    assert same_bits(switched(False), layer(X, key=KEY))
    assert "cond" in str(jax.make_jaxpr(switched)(True))  # evaluation spends no random bits
    whole = jax.jit(call)  # every leaf is traced, the flag too
    assert same_bits(whole(layer), eqx.filter_jit(call)(array(layer)))
    assert same_bits(whole(eqx.nn.inference_mode(layer)), X)
    with pytest.raises(jax.errors.TracerBoolConversionError):
        jax.jit(call)(eqx.nn.Dropout(0.5))


def test_half_types_are_scaled_in_float32():
    x = X.astype(jnp.bfloat16)
    expected = regjax.dropout(x, 0.1, key=KEY)
    assert (ours.Dropout(0.1)(x, key=KEY) == expected).all()
    assert (eqx.filter_jit(call)(array(ours.Dropout(0.1)), x) == expected).all()


def test_the_sampler_is_an_addition():
    x = jnp.ones((64, 128))
    layer = ours.Dropout(0.3, sampler=regjax.packed_bernoulli)
    expected = regjax.dropout(x, 0.3, key=KEY, sampler=regjax.packed_bernoulli)
    assert same_bits(layer(x, key=KEY), expected)
    np.testing.assert_allclose(traced(call)(layer, x), expected, rtol=1e-6)


def test_what_is_drawn_can_be_watched():
    drawn = []
    with regjax.observing(drawn.append):
        traced(call)(ours.Dropout(0.25), X)
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
    models = [changed(Model(Dropout)) for Dropout in (eqx.nn.Dropout, ours.Dropout)]
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

    for p in RATES:
        layer = array(ours.Dropout(p))
        assert abs(float((run(layer, KEY) == 0).mean()) - p) < 0.06  # 5 sigma: p < 6e-7
    assert len(traces) == 1


# The family: the layer, an input, and the function that it stands for.


def of_a_batch(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """The function on one example: on a batch of one."""
    return lambda x, *rest, **how: function(x[None], *rest, **options, **how)[0]


# The layer, its input, what it does in terms of the functions, and which elements go together.
FAMILY = {
    "Dropout": (ours.Dropout(0.4), (X,), regjax.dropout, (33, 65)),
    "FeatureDropout": (
        ours.FeatureDropout(0.4),
        (X,),
        of_a_batch(regjax.feature_dropout, channel_axis=1),
        (33, 1),
    ),
    "FeatureDropout, channels last": (
        ours.FeatureDropout(0.4, channel_axis=-1),
        (X,),
        of_a_batch(regjax.feature_dropout),
        (1, 65),
    ),
    "AlphaDropout": (ours.AlphaDropout(0.4), (X,), regjax.alpha_dropout, (33, 65)),
    "FeatureAlphaDropout": (
        ours.FeatureAlphaDropout(0.4),
        (X,),
        of_a_batch(regjax.feature_alpha_dropout, channel_axis=1),
        (33, 1),
    ),
    "DropBlock": (
        ours.DropBlock(0.4, block_size=3),
        (X,),
        of_a_batch(regjax.drop_block, channel_axis=1, block_size=3),
        (33, 65),
    ),
    "VariationalDropout": (
        ours.VariationalDropout(0.4),
        (X,),
        of_a_batch(regjax.variational_dropout),
        (1, 65),
    ),
    "EmbeddingDropout": (
        ours.EmbeddingDropout(0.4),
        (X, jnp.arange(33) % 20),
        lambda x, ids, rate, **how: regjax.embedding_dropout(x, ids, rate, **how),
        (33, 1),
    ),
    "DropConnect": (ours.DropConnect(0.4), (X,), regjax.drop_connect, (33, 65)),
}
family = pytest.mark.parametrize(
    ("layer", "inputs", "function", "together"), FAMILY.values(), ids=FAMILY
)


@family
def test_a_layer_does_what_its_function_does(layer, inputs, function, together):
    y = layer(*inputs, key=KEY)
    assert same_bits(y, function(*inputs, 0.4, key=KEY))
    dropped = jnp.broadcast_to((y / X == (y / X)[0, 0]), X.shape)  # alike what the first one is
    units = dropped[: together[0], : together[1]]
    if "Alpha" not in type(layer).__name__:
        assert same_bits(jnp.where(units, 0.0, 1.0) + 0 * X, jnp.where(dropped, 0.0, 1.0))
    # Whatever the layer: its two flags, its missing key, its rate of 0.
    assert eqx.nn.inference_mode(layer)(*inputs) is inputs[0]
    assert layer(*inputs, inference=True) is inputs[0]
    assert eqx.tree_at(lambda layer: layer.p, layer, 0.0)(*inputs) is inputs[0]
    with pytest.raises(RuntimeError, match=f"key is missing: {type(layer).__name__} in training"):
        layer(*inputs)
    with pytest.raises(ValueError, match=r"p must lie in \[0, 1\]; got 2"):
        type(layer)(2)


@family
def test_mapped_over_a_batch_each_example_draws_for_itself(layer, inputs, function, together):
    keys = jax.random.split(KEY, 8)
    alone = [layer(*inputs, key=key) for key in keys]
    several = eqx.filter_jit(lambda layer: jax.vmap(lambda key: layer(*inputs, key=key))(keys))
    np.testing.assert_allclose(several(layer), alone, rtol=1e-6)
    np.testing.assert_allclose(several(array(layer)), alone, rtol=1e-6)
    assert len({np.asarray(y).tobytes() for y in alone}) == len(keys)


@family
def test_an_inference_that_is_traced_serves_every_layer(layer, inputs, function, together):
    switched = jax.jit(lambda flag: layer(*inputs, key=KEY, inference=flag))
    assert same_bits(switched(True), inputs[0])
    np.testing.assert_allclose(switched(False), layer(*inputs, key=KEY), rtol=1e-6)


@pytest.mark.parametrize("Layer", [ours.FeatureDropout, ours.FeatureAlphaDropout])
def test_a_wrong_channel_axis_is_refused(Layer):
    for axis in (2, -3):
        with pytest.raises(ValueError, match=rf"channel_axis .* has 2; got {axis}"):
            Layer(0.5, channel_axis=axis)(X, key=KEY)


def test_drop_connect_of_a_layer_leaves_its_bias():
    linear = eqx.nn.Linear(8, 8, key=KEY)
    dropped = ours.DropConnect(0.5)(linear, key=KEY)
    assert same_bits(dropped.bias, linear.bias)
    kept = dropped.weight != 0
    assert 0 < kept.sum() < kept.size
    assert same_bits(dropped.weight[kept], 2 * linear.weight[kept])


# Whole training runs of real models, ours in the place of theirs.


class Perceptron(eqx.Module):
    layers: list

    def __init__(self, Dropout, key):
        keys = jax.random.split(key, 3)
        linears = [
            eqx.nn.Linear(*n, key=k)
            for n, k in zip([(64, 48), (48, 32), (32, 10)], keys, strict=True)
        ]
        self.layers = [Dropout(0.1), linears[0], Dropout(0.5), linears[1], Dropout(0.3), linears[2]]

    def __call__(self, x, key):
        x = x.ravel()
        for i, layer in enumerate(self.layers):
            key, own = jax.random.split(key)
            x = layer(x, key=own)
            x = jax.nn.relu(x) if i % 2 and i < 5 else x
        return x


class Convolutional(eqx.Module):
    first: eqx.nn.Conv2d
    second: eqx.nn.Conv2d
    linear: eqx.nn.Linear
    dropouts: list

    def __init__(self, Dropout, key):
        keys = jax.random.split(key, 3)
        self.first = eqx.nn.Conv2d(1, 8, 3, padding=1, key=keys[0])
        self.second = eqx.nn.Conv2d(8, 8, 3, padding=1, key=keys[1])
        self.linear = eqx.nn.Linear(8 * 16, 10, key=keys[2])
        self.dropouts = [Dropout(0.15), Dropout(0.37)]

    def __call__(self, x, key):
        keys = jax.random.split(key)
        x = jax.nn.relu(self.first(x[None]))
        x = x + self.dropouts[0](jax.nn.gelu(self.second(x)), key=keys[0])
        x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2), (1, 2, 2), "VALID")
        return self.linear(self.dropouts[1](x.ravel(), key=keys[1]))


class Block(eqx.Module):
    norms: list
    attention: eqx.nn.MultiheadAttention
    up: eqx.nn.Linear
    down: eqx.nn.Linear
    dropouts: list

    def __init__(self, Dropout, key):
        keys = jax.random.split(key, 3)
        self.norms = [eqx.nn.LayerNorm(16), eqx.nn.LayerNorm(16)]
        attention = eqx.nn.MultiheadAttention(2, 16, key=keys[0])
        self.attention = eqx.tree_at(lambda a: a.dropout, attention, Dropout(0.1))
        self.up = eqx.nn.Linear(16, 32, key=keys[1])
        self.down = eqx.nn.Linear(32, 16, key=keys[2])
        self.dropouts = [Dropout(0.1), Dropout(0.2)]

    def __call__(self, x, key):
        keys = jax.random.split(key, 3)
        y = jax.vmap(self.norms[0])(x)
        causal = jnp.tril(jnp.ones((len(x), len(x)), bool))
        y = self.attention(y, y, y, mask=causal, key=keys[0])
        x = x + self.dropouts[0](y, key=keys[1])
        y = jax.vmap(lambda x: self.down(jax.nn.gelu(self.up(x))))(jax.vmap(self.norms[1])(x))
        return x + self.dropouts[1](y, key=keys[2])


class Transformer(eqx.Module):
    embedding: eqx.nn.Embedding
    position: jax.Array
    dropout: eqx.nn.Dropout
    blocks: list
    linear: eqx.nn.Linear

    def __init__(self, Dropout, key):
        keys = jax.random.split(key, 5)
        self.embedding = eqx.nn.Embedding(128, 16, key=keys[0])
        self.position = jax.random.normal(keys[1], (24, 16)) / 4
        self.dropout = Dropout(0.1)
        self.blocks = [Block(Dropout, key) for key in keys[2:4]]
        self.linear = eqx.nn.Linear(16, 128, key=keys[4])

    def __call__(self, ids, key):
        keys = jax.random.split(key, 3)
        x = self.dropout(jax.vmap(self.embedding)(ids) + self.position, key=keys[0])
        for block, key in zip(self.blocks, keys[1:], strict=True):
            x = block(x, key)
        return jax.vmap(self.linear)(x)


def digits() -> tuple[jax.Array, jax.Array]:
    images, labels = load_digits(return_X_y=True)
    return jnp.asarray(images[:64].reshape(64, 8, 8) / 16, jnp.float32), jnp.asarray(labels[:64])


def zen() -> tuple[jax.Array, jax.Array]:
    """Pieces of the Zen of Python, and the same one letter later."""
    with contextlib.redirect_stdout(io.StringIO()):  # importing it prints it
        import this
    text = jnp.asarray(list(codecs.decode(this.s, "rot13").encode()))
    pieces = text[: 25 * 12].reshape(12, 25)
    return pieces[:, :-1], pieces[:, 1:]


MODELS = {
    "perceptron": (Perceptron, digits),
    "convolutional": (Convolutional, digits),
    "transformer": (Transformer, zen),
}


def training(make, data, Dropout, *, changing: bool, steps: int = 12) -> list[Any]:
    """The loss and the model after every step, in bits; `changing`: rates are arrays that grow."""
    model, (x, y) = make(Dropout, jax.random.key(0)), data()
    rates = [layer.p for layer in dropouts(model)]
    optimizer = optax.adamw(1e-2)

    @eqx.filter_jit
    def step(model, state, x, y, factor, key):
        @eqx.filter_value_and_grad
        def loss(model):
            if changing:
                where = lambda model: [layer.p for layer in dropouts(model)]
                model = eqx.tree_at(where, model, [rate * factor for rate in rates])
            logits = jax.vmap(model)(x, jax.random.split(key, len(x)))
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        value, gradients = loss(model)
        updates, state = optimizer.update(gradients, state, eqx.filter(model, eqx.is_array))
        return value, eqx.apply_updates(model, updates), state

    state, history = optimizer.init(eqx.filter(model, eqx.is_array)), []
    for i, key in enumerate(jax.random.split(jax.random.key(1), steps)):
        value, model, state = step(model, state, x, y, jnp.float32((i + 1) / steps), key)
        history.append((value, eqx.filter(model, eqx.is_array)))
    return history


@pytest.mark.parametrize("changing", [False, True], ids=["fixed rates", "changing rates"])
@pytest.mark.parametrize(("make", "data"), MODELS.values(), ids=MODELS)
def test_ours_in_place_of_theirs_changes_no_bit_of_a_training_run(make, data, changing, leaning):
    theirs, mine = (
        training(make, data, Dropout, changing=changing)
        for Dropout in (eqx.nn.Dropout, ours.Dropout)
    )
    for step, pair in enumerate(zip(mine, theirs, strict=True)):
        assert same_bits(*pair), f"at step {step}"
    losses = [float(value) for value, _ in mine]
    assert losses[-1] < 0.9 * losses[0]
