"""Unmodified models in Linen, NNX and Equinox draw from the keys of their sites."""

from __future__ import annotations

import copy
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import regjax
import regjax.equinox
import regjax.linen
import regjax.nnx

ROOT = jax.random.key(0)
X = jnp.arange(1.0, 25.0).reshape(4, 6)


class LinenNet(linen.Module):
    rate: float = 0.4
    train: bool = True

    def setup(self):
        self.a = linen.Dropout(self.rate, deterministic=not self.train)
        self.b = [linen.Dropout(self.rate, deterministic=not self.train)]

    def __call__(self, x):
        return self.a(self.b[0](self.a(x)))


class NnxNet(nnx.Module):
    def __init__(self, rate=0.4, *, train=True):
        self.a = nnx.Dropout(rate, deterministic=not train)
        self.b = nnx.List([nnx.Dropout(rate, deterministic=not train)])

    def __call__(self, x):
        return self.a(self.b[0](self.a(x)))


class EquinoxNet(eqx.Module):
    a: eqx.nn.Dropout
    b: list[eqx.nn.Dropout]

    def __init__(self, rate=0.4, *, train=True):
        self.a = eqx.nn.Dropout(rate, inference=not train)
        self.b = [eqx.nn.Dropout(rate, inference=not train)]

    def __call__(self, x):
        return self.a(self.b[0](self.a(x)))


# Each model, the path of its second site, and the arguments by which `sites` reaches it.
NETS = [(LinenNet, "b_0", (X,)), (NnxNet, "b/0", ()), (EquinoxNet, "b/0", ())]
every_net = pytest.mark.parametrize(("net", "second", "given"), NETS)


def call(model, x, step, **options):
    bound = regjax.keyed.bind(model, ROOT, step, **options)
    return bound.apply({}, x) if isinstance(model, linen.Module) else bound(x)


def expected(x, step, second, rate=0.4):
    for name in ("a", second, "a#1"):
        x = regjax.dropout(x, rate, key=regjax.site_key(ROOT, step, name))
    return x


@every_net
def test_each_call_of_a_site_has_its_key(net, second, given):
    model = net()
    assert regjax.keyed.sites(model, *given) == ["a", second.replace("/", ".")]
    names = {"": "model", second: "second:1"}
    assert sorted(regjax.keyed.sites(model, *given, names=names)) == ["model.a", "second:1"]
    name = second.replace("/", ".")
    y = expected(X, 3, name)
    np.testing.assert_array_equal(call(model, X, 3), y)
    np.testing.assert_array_equal(call(model, X, 3), y)  # each binding counts from 0
    renamed = call(model, X, 3, names={"a": "a", second: "other"})
    np.testing.assert_array_equal(renamed, expected(X, 3, "other"))


@every_net
@pytest.mark.parametrize("wrap", [lambda f: f, jax.checkpoint], ids=["plain", "checkpoint"])
@pytest.mark.sample(3)
def test_under_jit_grad_and_vmap_the_batch_has_one_mask(net, second, given, wrap):
    model, name = net(), second.replace("/", ".")

    @jax.jit
    def run(x, step):
        whole = jax.grad(wrap(lambda x: call(model, x, step).sum()))(x)
        rows = jax.grad(wrap(lambda x: jax.vmap(lambda row: call(model, row, step))(x).sum()))(x)
        return whole, rows

    for step in (2, 5):
        y = jax.grad(lambda x, step=step: expected(x, step, name).sum())(X)
        for gradient in run(X, step):
            np.testing.assert_array_equal(gradient, y)


def test_vmap_of_keys_rates_and_shared_arrays():
    layer = eqx.nn.Dropout(0.5)
    steps = jnp.arange(3)
    many = jax.vmap(lambda step: call(layer, X, step))(steps)
    rows = jax.vmap(lambda row: jax.vmap(lambda step: call(layer, row, step))(steps))(X)
    for step in range(3):
        y = regjax.dropout(X, 0.5, key=regjax.site_key(ROOT, step, ""))
        np.testing.assert_array_equal(many[step], y)
        np.testing.assert_array_equal(rows[:, step], y)
    rates = jnp.array([0.25, 0.5])
    many = jax.vmap(lambda p: call(eqx.nn.Dropout(p), X, 0))(rates)
    for rate, y in zip(rates, many, strict=True):
        key = regjax.site_key(ROOT, 0, "")
        np.testing.assert_array_equal(y, regjax.dropout(X, rate, key=key))
    shared = linen.Dropout(0.5, broadcast_dims=(-1,), deterministic=False)
    y = jax.vmap(lambda row: call(shared, row, 0))(X)
    key = regjax.site_key(ROOT, 0, "")
    np.testing.assert_array_equal(y, regjax.dropout(X, 0.5, key=key, broadcast_dims=(1,)))
    absent = linen.Dropout(0.5, broadcast_dims=(2,), deterministic=False)
    with pytest.raises(IndexError, match=r"broadcast_dims must be dimensions of inputs"):
        call(absent, X, 0)


@every_net
def test_evaluation_and_rate_0_return_the_input(net, second, given):
    for model in (net(train=False), net(0.0)):
        assert call(model, X, 0) is X
    np.testing.assert_array_equal(call(net(1.0), X, 0), jnp.zeros_like(X))


@every_net
def test_the_model_itself_stays_as_it_is(net, second, given):
    if net is LinenNet:
        rngs = {"dropout": ROOT}
        before = net().apply({}, X, rngs=rngs)
        call(net(), X, 0)
        np.testing.assert_array_equal(net().apply({}, X, rngs=rngs), before)
    else:
        model = net()
        call(model, X, 0)
        assert type(model.a) in (nnx.Dropout, eqx.nn.Dropout)
        assert type(model.b[0]) in (nnx.Dropout, eqx.nn.Dropout)


@every_net
@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({}, r"names must have every site; got none for \['a', 'b.0'\]"),
        ({"a": "x"}, r"got none for \['b.0'\]"),
        ({"": "", "c": "x", "a/b": "y"}, r"paths of sites.*got \['a/b', 'c'\]"),
        ({"": "", "b": "x", "a": "x.0"}, r"names must differ.*\['a', 'b.0'\]"),
    ],
    ids=["none", "missing", "unknown", "equal"],
)
def test_errors_list_every_name(net, second, given, names, message):
    if net is LinenNet and "b" in names:
        names = {"": "", "b_0": "x", "a": "x"}
    with pytest.raises(ValueError, match=message):
        regjax.keyed.sites(net(), *given, names=names)
    if net is not LinenNet or "c" not in names:  # a call may reach a part of the sites
        with pytest.raises(ValueError, match=message):
            call(net(), X, 0, names=names)


@every_net
def test_wrong_arguments(net, second, given):
    for names in (["a"], {1: "a"}, {"a": 1}):
        with pytest.raises(TypeError, match="names"):
            regjax.keyed.bind(net(), ROOT, 0, names=names)
    with pytest.raises(TypeError, match="broadcast_dropout must be"):
        regjax.keyed.bind(net(), ROOT, 0, broadcast_dropout="no")
    with pytest.raises(TypeError, match="root must be"):
        regjax.keyed.bind(net(), 0, 0)
    with pytest.raises(ValueError, match="step must"):
        regjax.keyed.bind(net(), ROOT, -1)
    if net is not LinenNet:
        with pytest.raises(TypeError, match="args must be given for a module of Linen only"):
            regjax.keyed.sites(net(), X)


@pytest.mark.parametrize("function", [regjax.keyed.sites, lambda m: regjax.keyed.bind(m, ROOT, 0)])
def test_another_object_is_no_model(function):
    with pytest.raises(TypeError, match=r"model must be a module of flax\.linen, flax\.nnx or"):
        function({"a": 1})


class LinenAttention(linen.Module):
    @linen.compact
    def __call__(self, x, train=True):
        attend = linen.MultiHeadDotProductAttention(2, dropout_rate=0.5, name="a")
        return attend(x, deterministic=not train)


class NnxAttention(nnx.Module):
    def __init__(self):
        self.a = nnx.MultiHeadAttention(
            2, 6, dropout_rate=0.5, deterministic=False, decode=False, rngs=nnx.Rngs(0)
        )

    def __call__(self, x):
        return self.a(x)


def attention_masks(model, **options):
    x = jax.random.normal(ROOT, (3, 5, 6))
    log = []
    with regjax.observing(log.append):
        if isinstance(model, linen.Module):
            variables = model.init({"params": ROOT}, x, train=False)
            regjax.keyed.bind(model, ROOT, 1, **options).apply(variables, x)
        else:
            call(model, x, 1, **options)
        jax.effects_barrier()
    return [event.mask for event in log if hasattr(event, "mask")]


@pytest.mark.parametrize("model", [LinenAttention, NnxAttention])
@pytest.mark.sample(1)
def test_attention_shares_its_mask_unless_told_otherwise(model):
    for broadcast, shape in ((None, (1, 1, 5, 5)), (True, (1, 1, 5, 5)), (False, (3, 2, 5, 5))):
        (mask,) = attention_masks(model(), broadcast_dropout=broadcast)
        assert mask.shape == shape
        key = regjax.site_key(ROOT, 1, "a")
        np.testing.assert_array_equal(mask, regjax.bernoulli(key, 0.5, shape))


@pytest.mark.parametrize("model", [LinenAttention, NnxAttention])
def test_attention_under_vmap_has_the_mask_of_the_batch(model):
    x, model = jax.random.normal(ROOT, (3, 5, 6)), model()
    is_linen = isinstance(model, linen.Module)
    variables = model.init({"params": ROOT}, x, train=False) if is_linen else None

    def attend(x):
        bound = regjax.keyed.bind(model, ROOT, 1, broadcast_dropout=False)
        return bound.apply(variables, x) if is_linen else bound(x)

    np.testing.assert_allclose(jax.vmap(attend)(x), attend(x), rtol=1e-6)


class Draws(linen.Module):
    @linen.compact
    def __call__(self, x):
        keep = jax.random.bernoulli(self.scope.make_rng("dropout"), 0.5, x.shape)
        return jnp.where(keep, x, 0)


class Body(linen.Module):
    @linen.compact
    def __call__(self, x, _):
        return linen.Dropout(0.5, deterministic=False)(x), None


class Repeats(linen.Module):
    how: str

    @linen.compact
    def __call__(self, x):
        rngs = {"dropout": True}
        if self.how == "vmap":
            return linen.vmap(Body, split_rngs=rngs, in_axes=(0, None))()(x, None)[0]
        return {"jit": linen.jit, "remat": linen.remat}[self.how](Body)(name="a")(x, None)[0]


def test_draws_that_cannot_be_keyed_are_errors():
    with pytest.raises(RuntimeError, match=r"module must draw from keyed sites.*'?dropout"):
        regjax.keyed.bind(Draws(), ROOT, 0).apply({}, X, rngs={"params": ROOT})
    with pytest.raises(ValueError, match="rngs must not have 'dropout'"):
        regjax.keyed.bind(Draws(), ROOT, 0).apply({}, X, rngs={"dropout": ROOT})
    for how in ("vmap", "jit"):
        with pytest.raises(ValueError, match=f"Dropout_0' must be called once.*linen.{how}"):
            call(Repeats(how), X, 0)
    y = regjax.dropout(X, 0.5, key=regjax.site_key(ROOT, 0, "a.Dropout_0"))
    np.testing.assert_array_equal(call(Repeats("remat"), X, 0), y)
    copied = regjax.keyed.bind(NnxNet(), ROOT, 0)
    for transform in (nnx.jit, nnx.remat):
        with pytest.raises(ValueError, match=r"module 'a' must be the one that bind returned"):
            transform(lambda model: model(X))(copied)
    with pytest.raises(ValueError, match=r"module 'a' must be the one that bind returned"):
        copy.deepcopy(copied)(X)

    class OwnPath(regjax.equinox.DropPath):
        pass

    model = eqx.nn.Sequential([OwnPath(), regjax.equinox.AlphaDropout()])
    both = re.escape("layers/0 (OwnPath), layers/1 (AlphaDropout)")
    with pytest.raises(TypeError, match=both):
        regjax.keyed.bind(model, ROOT, 0)


@pytest.mark.parametrize("base", [linen.Dropout, nnx.Dropout, eqx.nn.Dropout])
def test_a_subclass_with_its_own_call_is_an_error(base):
    class Own(base):
        def __call__(self, x):
            return x + 1

    class Same(base):
        pass

    options = {} if base is eqx.nn.Dropout else {"deterministic": False}
    y = regjax.dropout(X, 0.5, key=regjax.site_key(ROOT, 0, ""))
    np.testing.assert_array_equal(call(Same(0.5, **options), X, 0), y)
    with pytest.raises(TypeError, match=r"call.*Own"):
        call(Own(0.5, **options), X, 0)


@pytest.mark.parametrize("layer", [regjax.linen.DropPath, regjax.nnx.DropPath])
def test_layers_of_regjax_are_sites(layer):
    model = layer(0.5, deterministic=False)
    y = regjax.drop_path(X, 0.5, key=regjax.site_key(ROOT, 2, ""))
    np.testing.assert_array_equal(call(model, X, 2), y)
    assert call(layer(0.5, deterministic=True), X, 2) is X
    with pytest.raises(ValueError, match="inputs of DropPath must be the whole batch"):
        jax.vmap(lambda row: call(model, row, 2))(X)


@pytest.mark.parametrize("layer", [linen.Dropout, regjax.linen.Dropout])
def test_keys_of_the_call_are_ignored(layer):
    class Keyed(linen.Module):
        @linen.compact
        def __call__(self, x):
            return layer(0.5)(x, False, jax.random.key(9))

    y = regjax.dropout(X, 0.5, key=regjax.site_key(ROOT, 0, "Dropout_0"))
    np.testing.assert_array_equal(call(Keyed(), X, 0), y)


def test_nnx_shares_variables_and_equinox_passes_filter_jit():
    class Net(nnx.Module):
        def __init__(self):
            self.norm = nnx.BatchNorm(6, rngs=nnx.Rngs(0))
            self.drop = nnx.Dropout(0.5)

        def __call__(self, x):
            return self.drop(self.norm(x))

    model = Net()
    gradient = nnx.jit(nnx.grad(lambda model: call(model, X, 0)[:, 0].sum()))(model)
    assert (model.norm.mean[...] != 0).all()
    assert gradient.norm.bias[0] != 0
    bound = regjax.keyed.bind(EquinoxNet(), ROOT, jnp.asarray(1))
    np.testing.assert_array_equal(
        eqx.filter_jit(lambda m, x: m(x))(bound, X), expected(X, 1, "b.0")
    )
    assert eqx.nn.inference_mode(bound)(X) is X


def test_a_function_of_haiku_draws_from_the_key_of_its_module(leaning):
    hk = pytest.importorskip("haiku")

    class Block(hk.Module):
        def __call__(self, x):
            key = regjax.site_key(ROOT, 0, hk.experimental.current_name())
            return hk.dropout(key, 0.5, x)

    network = hk.without_apply_rng(hk.transform(lambda x: Block(name="block")(x)))
    key = regjax.site_key(ROOT, 0, "block")
    np.testing.assert_array_equal(network.apply({}, X), regjax.dropout(X, 0.5, key=key))
