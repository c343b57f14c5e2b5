"""Haiku's functions: the drop-in is bitwise identical, and the family has the same API."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import regjax
import regjax.haiku
from tests.regjax.training import assert_same_training, digits, filled, same_bits, text, train
from tests.regjax.versions import assert_same_eagerly

KEY = jax.random.key(11)
KEYS = jax.random.split(KEY, 65)
X, RESIDUAL = jax.random.normal(jax.random.key(1), (2, 65, 66))
both = pytest.mark.parametrize(
    "dropout", [hk.dropout, regjax.haiku.dropout], ids=["haiku", "regjax"]
)


def call(dropout, rate, x, dims=()):
    return dropout(KEY, rate, x, dims)


def slope(dropout, rate, x, dims=()):
    """Return the gradient of a layer between operations that XLA could contract with it."""
    each = lambda x: x * RESIDUAL + dropout(KEY, rate, x * 2, dims) + x
    return each(x), jax.grad(lambda x: jnp.sin(each(x)).sum())(x)


def deep(dropout, rate, x):
    step = lambda x, key: (jnp.tanh(RESIDUAL + dropout(key, rate, x)), None)
    return jax.grad(lambda x: lax.scan(step, x, KEYS[:3])[0].sum())(x)


def mapped(dropout, rate, x):
    one = lambda x, key: x + dropout(key, rate, x)
    return jax.grad(lambda x: jnp.sin(jax.vmap(one)(x, KEYS)).sum())(x)


def again(dropout, rate, x):
    each = jax.checkpoint(lambda x: x + dropout(KEY, rate, x))
    return jax.grad(lambda x: jnp.sin(each(x)).sum())(x)


def sums(dropout, rate, x):
    """A sum of few elements, which XLA computes in the loop that draws the mask."""
    return dropout(KEY, rate, x[:6, :8]).sum(axis=1), dropout(KEY, rate, x[:16, :16]).sum(axis=0)


def rows(f: Callable[..., Any]) -> Callable[..., Any]:
    """One mask for all rows."""
    return lambda dropout, rate, x: f(dropout, rate, x, (0,))


def columns(f: Callable[..., Any]) -> Callable[..., Any]:
    """One mask for all columns, counted from the end."""
    return lambda dropout, rate, x: f(dropout, rate, x, (-1,))


JITTED = {f.__name__: f for f in (call, slope, deep, mapped, again, sums)}
JITTED |= {
    f"{dims.__name__} of {f.__name__}": dims(f) for dims in (rows, columns) for f in (call, slope)
}
SITUATIONS = {
    "eager": call,
    "eager, array": lambda dropout, rate, x: call(dropout, jnp.float32(rate), x),
    "eager vmap": lambda dropout, rate, x: jax.vmap(dropout, (0, None, 0))(KEYS, rate, x),
}
for name, f in JITTED.items():
    SITUATIONS[f"a number, {name}"] = jax.jit(f, static_argnums=(0, 1))
    SITUATIONS[f"traced, {name}"] = jax.jit(f, static_argnums=0)


@pytest.mark.parametrize("name", SITUATIONS)
@pytest.mark.sample(3)
def test_in_every_situation_the_bits_are_theirs(name, leaning):
    of_haiku, of_regjax = (
        SITUATIONS[name](dropout, 0.1, X) for dropout in (hk.dropout, regjax.haiku.dropout)
    )
    if name.startswith("eager"):
        assert_same_eagerly(of_regjax, of_haiku)
    else:
        assert same_bits(of_regjax, of_haiku)


def test_a_rate_that_is_a_product_is_subtracted_as_theirs_is(leaning):
    """XLA contracts `1 - a * b` in the original; a guard of the product would change a bit."""
    of_haiku, of_regjax = (
        jax.jit(lambda a, b, dropout=dropout: dropout(KEY, a * b, X))
        for dropout in (hk.dropout, regjax.haiku.dropout)
    )
    for a, b in np.random.default_rng(0).uniform(0.1, 0.9, (20, 2)).astype("float32"):
        assert same_bits(of_regjax(a, b), of_haiku(a, b))


def test_the_arguments_are_theirs():
    of_haiku, of_regjax = (
        [(p.name, p.default, p.kind) for p in inspect.signature(dropout).parameters.values()]
        for dropout in (hk.dropout, regjax.haiku.dropout)
    )
    assert of_regjax[: len(of_haiku)] == of_haiku
    assert [name for name, _, _ in of_regjax[len(of_haiku) :]] == ["sampler"]


ERRORS = {
    "a negative rate": (ValueError, lambda dropout: dropout(KEY, -0.1, X)),
    "a rate of 1": (ValueError, lambda dropout: dropout(KEY, 1, X)),
    "a rate of 1.0": (ValueError, lambda dropout: dropout(KEY, 1.0, X)),
    "a word for a rate": (TypeError, lambda dropout: dropout(KEY, "0.1", X)),
    "many rates": (ValueError, lambda dropout: dropout(KEY, jnp.ones(3) / 2, X)),
    "no key": (TypeError, lambda dropout: dropout(None, 0.5, X)),
    "not a key": (TypeError, lambda dropout: dropout(jnp.ones(2), 0.5, X)),
    "a batch of keys": (ValueError, lambda dropout: dropout(KEYS, 0.5, X)),
    "no such dimension": (ValueError, lambda dropout: dropout(KEY, 0.5, X, (3,))),
}


@both
@pytest.mark.parametrize(("error", "act"), ERRORS.values(), ids=ERRORS)
def test_what_is_wrong_raises_what_theirs_raises(dropout, error, act, leaning):
    with pytest.raises(error):
        act(dropout)


@both
def test_at_0_the_input_is_returned_itself_and_no_key_is_needed(dropout):
    for rate in (0, 0.0, np.float32(0)):
        assert dropout(None, rate, X) is X


@both
def test_dimensions_count_from_the_end_and_may_come_twice(dropout, leaning):
    expected = dropout(KEY, 0.5, X, (1,))
    for dims in ((-1,), [1, -1], (1, 1)):
        assert same_bits(dropout(KEY, 0.5, X, dims), expected)


def test_where_theirs_errs(leaning):
    """The documented differences from Haiku's function."""
    traced = {dropout: jax.jit(dropout) for dropout in (hk.dropout, regjax.haiku.dropout)}
    assert jnp.isnan(traced[hk.dropout](KEY, 1.0, X)).all()
    for dims in ((), (0,)):
        total = lambda rate, x, dims=dims: regjax.haiku.dropout(KEY, rate, x, dims).sum()
        assert (jax.jit(regjax.haiku.dropout, static_argnums=3)(KEY, 1.0, X, dims) == 0).all()
        assert (jax.jit(jax.grad(total, argnums=1))(1.0, X) == 0).all()
    for rate in (1.5, -0.1, jnp.nan):
        assert jnp.isnan(traced[regjax.haiku.dropout](KEY, rate, X)).all()
    assert (traced[hk.dropout](KEY, 1.5, X) == 0).all()
    with pytest.raises(ValueError, match=r"rate must lie in \[0, 1\]; got nan"):
        regjax.haiku.dropout(KEY, float("nan"), X)
    with pytest.raises(TypeError, match="x must be floating"):
        regjax.haiku.dropout(KEY, 0.5, jnp.arange(3))
    with pytest.raises(IndexError):  # Haiku's check of dimensions is off by one
        hk.dropout(KEY, 0.5, X, (2,))
    with pytest.raises(ValueError, match="broadcast_dims must be dimensions of x, which has 2"):
        regjax.haiku.dropout(KEY, 0.5, X, (2,))
    holes = jnp.full_like(X, jnp.nan)
    shared = {d: jax.jit(d, static_argnums=(1, 3))(KEY, 0.5, holes, (0,)) for d in traced}
    keep = regjax.bernoulli(KEY, 0.5, (1, 66))
    assert jnp.isnan(shared[hk.dropout]).all()
    assert (jnp.isnan(shared[regjax.haiku.dropout]) == keep).all()
    assert (jnp.nan_to_num(shared[regjax.haiku.dropout]) == 0).all()
    low = np.float16(0.1)
    assert same_bits(regjax.haiku.dropout(KEY, low, X), regjax.haiku.dropout(KEY, float(low), X))


def test_half_types_are_scaled_in_float32():
    x = X.astype(jnp.bfloat16)
    for dims in ((), (0,)):
        expected = regjax.dropout(x, 0.1, key=KEY, broadcast_dims=dims)
        assert (regjax.haiku.dropout(KEY, 0.1, x, dims) == expected).all()


def test_the_sampler_is_an_addition():
    x = jnp.ones((64, 128))
    expected = regjax.dropout(x, 0.3, key=KEY, sampler=regjax.packed_bernoulli)
    draw = lambda rate: regjax.haiku.dropout(KEY, rate, x, sampler=regjax.packed_bernoulli)
    assert same_bits(draw(0.3), expected)
    np.testing.assert_allclose(jax.jit(draw)(0.3), expected, rtol=1e-6)


@pytest.mark.parametrize("rate", [0.25, np.float32(0.25)], ids=["a number", "traced"])
@pytest.mark.parametrize("dims", [(), (0,)], ids=["elements", "rows"])
def test_what_is_drawn_can_be_watched(rate, dims):
    drawn = []
    with regjax.observing(drawn.append):
        f = lambda rate: regjax.haiku.dropout(KEY, rate, X, dims)
        y = jax.jit(f)(rate) if isinstance(rate, np.float32) else f(rate)
        jax.effects_barrier()
    (event,) = drawn
    assert event.rate == 0.25
    assert ((np.asarray(y) != 0) == event.mask).all()


def test_a_changing_rate_costs_one_compilation():
    draw = jax.jit(lambda *args: regjax.haiku.dropout(*args))
    for rate in (0.1, 0.37):
        share = float((draw(KEY, rate, X) == 0).mean())
        assert abs(share - rate) < 5 * (rate * (1 - rate) / X.size) ** 0.5  # 5 sigma: p < 6e-7
    assert draw._cache_size() == 1


# The arguments after the rate and x, and the equivalent call of the library.
IMAGES = jnp.ones((2, 9, 9, 3))
IDS = jnp.arange(65) % 20
FAMILY = {
    "dropout": ((X,), {}, regjax.dropout),
    "feature_dropout": ((IMAGES, 1), {"channel_axis": 1}, regjax.feature_dropout),
    "alpha_dropout": ((X, (-1,)), {"broadcast_dims": (1,)}, regjax.alpha_dropout),
    "feature_alpha_dropout": ((IMAGES, 1), {"channel_axis": 1}, regjax.feature_alpha_dropout),
    "drop_path": ((X, "batch"), {"mode": "batch"}, regjax.drop_path),
    "drop_block": ((IMAGES, 3, 1), {"block_size": 3, "channel_axis": 1}, regjax.drop_block),
    "variational_dropout": ((X, 0), {"time_axis": 0}, regjax.variational_dropout),
    "embedding_dropout": ((X, IDS), {"ids": IDS}, regjax.embedding_dropout),
    "drop_connect": (
        ({"linear": {"w": X, "b": X[0]}}, "**"),
        {"rule": "**"},
        regjax.drop_connect,
    ),
    "gaussian_dropout": ((X,), {}, regjax.gaussian_dropout),
    "gaussian_noise": ((X,), {}, regjax.gaussian_noise),
}


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.sample(3)
def test_a_function_of_the_family_is_that_of_the_library(name):
    inputs, options, function = FAMILY[name]
    amount = {"gaussian_noise": "stddev"}.get(name, "rate")
    of_regjax = getattr(regjax.haiku, name)
    expected = function(inputs[0], **{amount: 0.4}, key=KEY, **options)
    assert same_bits(of_regjax(KEY, 0.4, *inputs), expected)
    assert of_regjax(None, 0, *inputs) is inputs[0]
    traced = jax.jit(lambda rate: of_regjax(KEY, rate, *inputs))(0.4)
    for leaf, other in zip(jax.tree.leaves(traced), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(leaf, other, rtol=2e-6, atol=1e-6)
    with pytest.raises(ValueError, match=f"{amount} must"):
        of_regjax(KEY, -1.0, *inputs)
    names = [*inspect.signature(of_regjax).parameters]
    assert names[:2] == ["rng", amount]
    assert names[2] in ("x", "weights")


def perceptron(dropout, rates, images):
    x = hk.Flatten()(images)
    for width, rate in zip((256, 24), rates, strict=True):
        x = dropout(hk.next_rng_key(), rate, jax.nn.relu(hk.Linear(width)(x)))
    return hk.Linear(10)(x)


def convolutional(dropout, rates, images):
    x = jax.nn.relu(hk.Conv2D(8, 3)(images))
    x = x + dropout(hk.next_rng_key(), rates[0], jax.nn.gelu(hk.Conv2D(8, 3)(x)), (1, 2))
    x = hk.Flatten()(hk.max_pool(x, (2, 2, 1), (2, 2, 1), "VALID"))
    return hk.Linear(10)(dropout(hk.next_rng_key(), rates[1], x))


def transformer(dropout, rates, letters):
    """A block with dropout of embeddings, attention and both residuals."""
    norm = lambda x: hk.LayerNorm(-1, True, True)(x)
    drop = lambda i, x: dropout(hk.next_rng_key(), rates[i], x)
    places = hk.get_parameter("places", (1, 16, 16), init=jnp.zeros)
    x = drop(0, hk.Embed(128, 16)(letters) + places)
    q, k, v = (hk.Linear(16)(norm(x)).reshape(*x.shape[:2], 2, 8) for _ in range(3))
    scores = jnp.einsum("nqhd,nkhd->nhqk", q, k) / 8**0.5
    scores = jnp.where(jnp.tril(jnp.ones((1, 1, 16, 16), bool)), scores, -1e30)
    y = jnp.einsum("nhqk,nkhd->nqhd", drop(1, jax.nn.softmax(scores)), v)
    x = x + drop(2, hk.Linear(16)(y.reshape(x.shape)))
    x = x + drop(3, hk.Linear(16)(jax.nn.gelu(hk.Linear(32)(norm(x)))))
    return hk.Linear(128)(norm(x))


def walk(network, rates, batches, dropout):
    """Return losses and states of a run whose every second rate is traced and changes."""
    optimizer, data = optax.adamw(1e-2), batches(steps=15)
    apart = lambda changing: [r if i % 2 else changing[i // 2] for i, r in enumerate(rates)]
    network = hk.transform(lambda changing, x, f=network: f(dropout, apart(changing), x))
    changing = [[np.float32(rate * step / 15) for rate in rates[::2]] for step in range(15)]
    params = filled(jax.eval_shape(network.init, KEY, changing[0], data[0][0]))

    def step(state, batch, number):
        (x, y), now = batch

        def loss(params):
            logits = network.apply(params, jax.random.fold_in(KEY, number), now, x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        params, state = state
        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), value

    return train(step, (params, optimizer.init(params)), list(zip(data, changing, strict=True)))


@pytest.mark.parametrize(
    ("network", "rates", "batches"),
    [
        (perceptron, (0.1, 0.2), digits),
        (convolutional, (0.15, 0.37), digits),
        pytest.param(transformer, (0.1, 0.1, 0.3, 0.2), text, marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_a_run_of_training_has_the_same_bits(network, rates, batches, leaning):
    of_haiku, of_regjax = (
        walk(network, rates, batches, d) for d in (hk.dropout, regjax.haiku.dropout)
    )
    assert_same_training(of_regjax, of_haiku)
