"""Bound models with layers that a loop or `vmap` repeats: each has its own keys, or is an error."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import regjax
import regjax.keyed

ROOT = jax.random.key(0)
X = jnp.linspace(0.5, 2, 12).reshape(2, 6)
NAMES = {"": "", "layers": "h.{}"}
SPLIT = {"params": True, "dropout": True}


class LinenBlock(linen.Module):
    @linen.compact
    def __call__(self, x, _=None):
        drop = linen.Dropout(0.5, deterministic=False, name="drop")
        scale = self.param("scale", linen.initializers.ones, (1, 6))
        return drop(drop(x) * scale), None


class LinenStack(linen.Module):
    block: Any = LinenBlock
    split: Any = dataclasses.field(default_factory=SPLIT.copy)
    options: Any = dataclasses.field(default_factory=dict)
    calls: int = 1

    @linen.compact
    def __call__(self, x):
        axes = {"params": 0}
        options = {"length": 3, **self.options}
        scan = linen.scan(self.block, variable_axes=axes, split_rngs=self.split, **options)
        layers = scan(name="layers")
        for _ in range(self.calls):
            x = layers(x, None)[0]
        return x


class Pair(linen.Module):
    """A block with a carry of a Python number, whose weak type makes JAX trace it twice."""

    @linen.compact
    def __call__(self, carry, _):
        x, loss = carry
        return (LinenBlock(name="inner")(x)[0], loss + x.sum()), None


class PairStack(linen.Module):
    @linen.compact
    def __call__(self, x):
        scan = linen.scan(Pair, variable_axes={"params": 0}, split_rngs=SPLIT, length=3)
        return scan(name="layers")((x, 0.0), None)[0][0]


class FunctionStack(linen.Module):
    """A scan of a function, with a second one of the same module."""

    calls: int = 1

    @linen.compact
    def __call__(self, x):
        def body(module, x, _):
            return LinenBlock(name="inner")(x)[0], None

        options = {"variable_axes": {"params": 0}, "split_rngs": SPLIT, "length": 3}
        for _ in range(self.calls):
            x = linen.scan(body, **options)(self, x, None)[0]
        return x


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.scale = nnx.Param(jnp.ones((1, 6)))
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.drop(self.drop(x) * self.scale)


class NnxStack(nnx.Module):
    def __init__(self):
        split = nnx.split_rngs(splits=3)
        self.layers = split(nnx.vmap(NnxBlock))(nnx.Rngs(0))

    def __call__(self, x):
        return nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(
            x, self.layers
        )


class EquinoxBlock(eqx.Module):
    scale: jax.Array
    drop: eqx.nn.Dropout

    def __call__(self, x):
        return self.drop(self.drop(x) * self.scale)


class EquinoxStack(eqx.Module):
    layers: EquinoxBlock

    def __init__(self):
        make = eqx.filter_vmap(lambda scale: EquinoxBlock(scale, eqx.nn.Dropout(0.5)))
        self.layers = make(jnp.ones((3, 1, 6)))

    def __call__(self, x):
        arrays, rest = eqx.partition(self.layers, eqx.is_array)
        return jax.lax.scan(lambda x, part: (eqx.combine(part, rest)(x), None), x, arrays)[0]


def call(model, x, step, root=ROOT, **options):
    if isinstance(model, nnx.Module):  # NNX refuses variables from outside a trace
        model = nnx.clone(model)
    bound = regjax.keyed.bind(model, root, step, **options)
    if not isinstance(model, linen.Module):
        return bound(x)
    variables = jax.eval_shape(model.init, {"params": root, "dropout": root}, x)
    return bound.apply(jax.tree.map(lambda p: jnp.ones(p.shape), variables), x)


def expected(x, step, site="h.{}.drop", root=ROOT):
    for layer in range(3):
        for count in ("", "#1"):
            key = regjax.site_key(root, step, site.format(layer) + count)
            x = regjax.dropout(x, 0.5, key=key)
    return x


LINEN = {
    "scan": LinenStack(),
    "remat": LinenStack(block=linen.remat(LinenBlock)),
}
STACKS = [*LINEN.values(), NnxStack(), EquinoxStack()]


@pytest.mark.parametrize("stack", STACKS, ids=[*LINEN, "nnx", "equinox"])
@pytest.mark.sample(2)
def test_each_layer_of_a_scan_has_its_keys(stack):
    given = (X,) if isinstance(stack, linen.Module) else ()
    assert regjax.keyed.sites(stack, *given, names=NAMES) == [f"h.{i}.drop" for i in range(3)]
    np.testing.assert_array_equal(call(stack, X, 2, names=NAMES), expected(X, 2))

    @jax.jit
    def gradient(x, step):
        return jax.grad(lambda x: call(stack, x, step, names=NAMES).sum())(x)

    for step in (2, jnp.asarray(5)):
        want = jax.grad(lambda x, step=step: expected(x, step).sum())(X)
        np.testing.assert_array_equal(gradient(X, step), want)


def test_numbers_of_linen_need_no_names():
    for stack, site in [
        (LinenStack(), "layers.{}.drop"),
        (PairStack(), "layers.{}.inner.drop"),
        (FunctionStack(), "{}.inner.drop"),
    ]:
        np.testing.assert_array_equal(call(stack, X, 1), expected(X, 1, site))
    with jax.disable_jit():  # the body runs for each iteration, and counts calls from 0
        np.testing.assert_array_equal(call(LinenStack(), X, 1), expected(X, 1, "layers.{}.drop"))
    for names, site in [
        ({"layers": "a"}, "a.{}.drop"),
        ({"": "a"}, "a.layers.{}.drop"),
        ({"layers/drop": "x.{}.y:1"}, "x.{}.y:1"),
    ]:
        found = regjax.keyed.sites(LinenStack(), X, names=names)
        assert found == [site.format(number) for number in range(3)]
    for name in ("a", "a.{}.{}"):
        with pytest.raises(ValueError, match=r"names\['layers/drop'\] must have one {} for each"):
            call(LinenStack(), X, 1, names={"layers/drop": name})


class Outer(linen.Module):
    @linen.compact
    def __call__(self, x, _):
        return LinenStack(name="inner")(x), None


def test_observers_record_the_number():
    log = []
    stack = LinenStack(options={"check_constancy_invariants": False})  # for Flax 0.12.12
    with regjax.observing(log.append):
        call(stack, X, 1)
        jax.effects_barrier()
    keys = {event.key: event.site for event in log if hasattr(event, "site")}
    drawn = [keys[event.key] for event in log if hasattr(event, "mask")]
    assert sorted(drawn) == [f"layers.{n}.drop{c}" for n in range(3) for c in ("", "#1")]


def test_scans_inside_scans():
    nested = LinenStack(block=Outer, options={"length": 2})
    x = X
    for layer in range(2):
        x = expected(x, 1, f"layers.{layer}.inner.layers.{{}}.drop")
    np.testing.assert_array_equal(call(nested, X, 1), x)
    names = regjax.keyed.sites(nested, X, names={"layers/inner/layers": "b.{}.c.{}"})
    assert names[:4] == ["b.0.c.0.drop", "b.0.c.1.drop", "b.0.c.2.drop", "b.1.c.0.drop"]


@pytest.mark.parametrize("stack", [NnxStack(), EquinoxStack()], ids=["nnx", "equinox"])
def test_stacked_layers_under_vmap(stack):
    layers = regjax.keyed.bind(stack, ROOT, 1, names=NAMES).layers
    if isinstance(stack, nnx.Module):
        y = nnx.vmap(lambda layer: layer.drop(X))(layers)
    else:
        y = eqx.filter_vmap(lambda layer: layer.drop(X), in_axes=eqx.if_array(0))(layers)
    for layer in range(3):
        key = regjax.site_key(ROOT, 1, f"h.{layer}.drop")
        np.testing.assert_array_equal(y[layer], regjax.dropout(X, 0.5, key=key))


DROPS = [linen.Dropout(0.5, deterministic=False), nnx.Dropout(0.5), eqx.nn.Dropout(0.5)]
LOOPS = {
    "scan": lambda f: jax.lax.scan(lambda x, _: (f(x), None), X, None, length=2),
    "map": lambda f: jax.lax.map(f, X[None]),
    "fori_loop": lambda f: jax.lax.fori_loop(0, 2, lambda _, x: f(x), X),
    "while_loop": lambda f: jax.lax.while_loop(lambda x: x.sum() < 9, f, X),
}


@pytest.mark.parametrize("drop", DROPS, ids=["linen", "nnx", "equinox"])
@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
def test_a_loop_that_would_share_a_mask_is_an_error(drop, loop):
    def bound_inside(x):
        return call(drop, x, 0)

    errors = [bound_inside]
    if not isinstance(drop, linen.Module):
        bound = regjax.keyed.bind(drop, ROOT, 0)
        errors.append(lambda x: bound(x))
    for function in errors:
        with pytest.raises(ValueError, match=r"must not be .* inside .*loop.*would share a mask"):
            loop(function)
    steps = jax.lax.scan(lambda c, step: (c, call(drop, X, step)), None, jnp.arange(3))[1]
    for step in range(3):
        key = regjax.site_key(ROOT, step, "")
        np.testing.assert_array_equal(steps[step], regjax.dropout(X, 0.5, key=key))


def shared_root(function, root):
    return jax.lax.map(lambda x: function(x, 0, root), X[None])


MICROBATCHES = {
    "scan": lambda f, step: jax.lax.scan(lambda c, x: (c, f(x, step)), 0, X[None])[1],
    "root": lambda f, step: shared_root(f, jax.random.fold_in(ROOT, step)),
    "gradient": lambda f, step: jax.lax.map(
        jax.grad(jax.checkpoint(lambda x: f(x, step).sum())), X[None]
    ),
    "inner": lambda f, step: jax.lax.scan(
        lambda step, x: (step, jax.lax.map(lambda x: f(x, step), x)), step, X[None, None]
    )[1],
}


@pytest.mark.parametrize("drop", DROPS, ids=["linen", "nnx", "equinox"])
def test_microbatches_that_would_share_a_traced_step_are_errors(drop):
    def function(x, step, root=ROOT):
        return call(drop, x, step, root)

    for loop in MICROBATCHES.values():
        with pytest.raises(ValueError, match=r"must not be .* microbatches, with a step or root"):
            jax.jit(functools.partial(loop, function))(2)

    def accumulate(first):
        def body(step, x):
            return step + 1, jax.vmap(lambda step: jax.jit(function)(x, step))(step[None])[0]

        return jax.lax.scan(body, 2 * first, jnp.stack([X, X]))[1]

    for step, y in zip((6, 7), jax.jit(accumulate)(3), strict=True):
        key = regjax.site_key(ROOT, step, "")
        np.testing.assert_array_equal(y, regjax.dropout(X, 0.5, key=key))


class JaxLoop(linen.Module):
    @linen.compact
    def __call__(self, x):
        drop = linen.Dropout(0.5, deterministic=False)
        return jax.lax.scan(lambda x, _: (drop(x), None), x, None, length=2)[0]


def test_scans_that_would_share_a_mask_are_errors():
    with pytest.raises(ValueError, match=r"must not be called inside jax\.lax\.scan"):
        jax.jit(lambda step: regjax.keyed.bind(JaxLoop(), ROOT, step).apply({}, X))(0)
    variables = {"params": {"layers": {"scale": jnp.ones((3, 1, 6))}}}
    for split in ({"params": True, "dropout": False}, {"params": True}):
        stack = LinenStack(split=split)
        with pytest.raises(ValueError, match="must be in a scan that splits the rngs 'dropout'"):
            regjax.keyed.bind(stack, ROOT, 0).apply(variables, X)
    for stack in (LinenStack(calls=2), FunctionStack(calls=2)):
        with pytest.raises(ValueError, match="must be called once in each step"):
            call(stack, X, 0)


@pytest.mark.parametrize("stack", [NnxStack(), EquinoxStack()], ids=["nnx", "equinox"])
def test_errors_of_stacked_layers(stack):
    with pytest.raises((ValueError, IndexError)):
        call(stack, X, 0)  # no number in the name
    bound = regjax.keyed.bind(stack, ROOT, 0, names=NAMES)
    with pytest.raises(ValueError, match="must be called for one of its stacked layers"):
        bound.layers.drop(X)
    for _ in range(2):  # two bindings
        bound = regjax.keyed.bind(stack, ROOT, 0, names=NAMES)
        if isinstance(stack, nnx.Module):
            bound = nnx.view(bound)
        bound(X)
    with pytest.raises(ValueError, match=r"'h.{}.drop' must be in one loop of each binding"):
        bound(X)
    for names in ({"layers": "h.{}.{}.{}.{}"}, {"layers/drop": "h.{}"}):
        with pytest.raises(ValueError, match=r"must be the name of stacked layers if it has {}"):
            regjax.keyed.sites(stack, names=names)
