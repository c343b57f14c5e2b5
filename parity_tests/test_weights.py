"""DropConnect: masks by the names of weights, and training, agree in both frameworks."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import regjax
import regtorch
from parity_tests.frameworks import FRAMEWORKS, JAX, TORCH, Framework, from_torch, to_torch
from parity_tests.recurrence import assert_close, lstm
from parity_tests.tables import both_frameworks

SHAPES = {
    "dense/kernel": (4, 6),
    "dense/bias": (6,),
    "norm/scale": (6,),
    "cells/0/kernel": (2, 6, 3),
    "embedder/embedding": (5, 6),
}
KERNELS = {"dense/kernel", "cells/0/kernel"}


def a_tree(framework: Framework) -> Any:
    """Return the same weights, with the names of each framework."""
    rng = np.random.default_rng(0)
    flat = {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
    if framework is TORCH:
        return {name.replace("/", "."): to_torch(array) for name, array in flat.items()}
    arrays = {name: jnp.asarray(array) for name, array in flat.items()}
    return {
        "dense": {"kernel": arrays["dense/kernel"], "bias": arrays["dense/bias"]},
        "norm": {"scale": arrays["norm/scale"]},
        "cells": [{"kernel": arrays["cells/0/kernel"]}],
        "embedder": {"embedding": arrays["embedder/embedding"]},
    }


def flat(framework: Framework, tree: Any) -> dict[str, Any]:
    if framework is TORCH:
        return {name.replace(".", "/"): leaf for name, leaf in tree.items()}
    named = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in named}


@both_frameworks
@pytest.mark.parametrize("name", ["bernoulli", "packed_bernoulli"])
def test_only_kernels_are_dropped(framework: Framework, name):
    weights = a_tree(framework)
    key, sampler = framework.key(3), getattr(framework.library, name)
    dropped = flat(
        framework, framework.library.drop_connect(weights, 0.5, key=key, sampler=sampler)
    )
    for path, leaf in flat(framework, weights).items():
        if path in KERNELS:
            its_key = framework.library.site_key(key, 0, path)
            expected = framework.library.dropout(leaf, 0.5, key=its_key, sampler=sampler)
            np.testing.assert_array_equal(framework.numpy(dropped[path]), framework.numpy(expected))
            assert (framework.numpy(expected) == 0).any()
        else:
            assert dropped[path] is leaf


@pytest.mark.parametrize("rule", ["default", "**", "cells/**", [("bias", True), ("**", False)]])
def test_both_frameworks_drop_the_same_weights(rule):
    in_jax, in_torch = (
        flat(
            framework,
            framework.library.drop_connect(a_tree(framework), 0.3, key=framework.key(3), rule=rule),
        )
        for framework in FRAMEWORKS
    )
    assert in_jax.keys() == in_torch.keys()
    for path, leaf in in_jax.items():
        np.testing.assert_array_equal(np.asarray(leaf), from_torch(in_torch[path]))


@both_frameworks
def test_a_single_array_is_dropped_as_by_dropout(framework: Framework):
    kernel = framework.array(np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32))
    y = framework.library.drop_connect(kernel, 0.3, key=framework.key(3))
    expected = framework.library.dropout(kernel, 0.3, key=framework.key(3))
    np.testing.assert_array_equal(framework.numpy(y), framework.numpy(expected))


@both_frameworks
def test_the_corners_are_those_of_dropout(framework: Framework):
    weights = a_tree(framework)
    drop = functools.partial(framework.library.drop_connect, weights)
    assert drop(0) is weights
    assert drop(0.5, deterministic=True) is weights
    emptied = flat(framework, drop(1))
    assert {path for path, leaf in emptied.items() if not framework.numpy(leaf).any()} == KERNELS
    for rate in (np.float32(0.25), np.float32(2)):
        at = framework.traced(lambda rate: drop(rate, key=framework.key(3)))
        leaf = framework.numpy(flat(framework, at(rate))["dense/kernel"])
        number = flat(framework, drop(float(rate), key=framework.key(3))) if rate < 1 else {}
        expected = number.get("dense/kernel", np.full((4, 6), np.nan))
        np.testing.assert_array_equal(leaf, np.asarray(expected))


@both_frameworks
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rule": "decoder/**"}, ValueError, "rule must .* got 'decoder/.*matches none"),
        ({"rule": [("**", False)]}, ValueError, "weights must have a .* selects; got none"),
        ({"rule": [("**", 0.5)]}, TypeError, "rule must return True or False"),
        ({"rate": 1.5}, ValueError, r"rate must lie in \[0, 1\]; got 1\.5"),
        ({"key": None}, ValueError, "key must be a random key in training"),
        ({"deterministic": 1}, TypeError, "deterministic must be a boolean"),
    ],
)
def test_wrong_arguments_are_refused(framework: Framework, options, error, message):
    options = {"rate": 0.5, "key": framework.key(0), **options}
    with pytest.raises(error, match=message):
        framework.library.drop_connect(a_tree(framework), **options)


@both_frameworks
def test_a_weight_of_unknown_kind_is_an_error(framework: Framework):
    weights = {"mystery": framework.array(np.ones((2, 2), np.float32))}
    with pytest.raises(ValueError, match="got none for 'mystery'"):
        framework.library.drop_connect(weights, 0.5, key=framework.key(0))


def test_a_mask_for_each_example():
    """With `vmap` over keys, each row has its own kernel."""
    x, kernel = (np.random.default_rng(i).normal(size=(4, 6)).astype(np.float32) for i in range(2))
    keys = jax.random.split(JAX.key(0), 4)
    row = lambda x, key: (x[None] * regjax.drop_connect(kernel, 0.5, key=key)).sum()
    in_jax = np.asarray(jax.vmap(row)(jnp.asarray(x), keys))
    row = lambda x, key: (x * regtorch.drop_connect(to_torch(kernel), 0.5, key=key)).sum()
    in_torch = torch.func.vmap(row)(to_torch(x), regtorch.split(TORCH.key(0), 4))
    np.testing.assert_allclose(in_jax, from_torch(in_torch), rtol=1e-5)
    assert len(np.unique(in_jax)) == 4


MODULES = {
    "linear": (lambda: torch.nn.Linear(5, 3), "default"),
    "recurrent": (lambda: torch.nn.LSTM(5, 3), "weight_hh_*"),
    "lstm": (lambda: torch.nn.LSTM(5, 3), "default"),
}
XS = np.random.default_rng(0).normal(size=(6, 4, 5))  # time, batch, features


def linear(weights: Any, xs: Any) -> Any:
    return xs @ weights["weight"].T + weights["bias"][None, None]


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.sample(1)
def test_training_with_a_wrapped_module_is_that_of_the_tree(name):
    """Compare states and gradients within 1e-12 in norm over five steps of SGD."""
    make, rule = MODULES[name]
    torch.manual_seed(0)
    layer = regtorch.nn.DropConnect(make().double(), 0.4, rule=rule)
    apply = linear if name == "linear" else lstm
    with jax.enable_x64(True):
        # A copy, since the steps modify the parameters in place.
        weights = {n: jnp.array(from_torch(p)) for n, p in layer.module.named_parameters()}

        @jax.jit
        def loss(weights, key):
            states = apply(regjax.drop_connect(weights, 0.4, key=key, rule=rule), jnp.asarray(XS))
            return (states**2).sum(), states

        for step in range(5):
            (_, states), gradients = jax.value_and_grad(loss, has_aux=True)(
                weights, regjax.site_key(JAX.key(7), step, "layer")
            )
            y = layer(to_torch(XS), key=regtorch.site_key(TORCH.key(7), step, "layer"))
            y = y[0] if isinstance(y, tuple) else y
            slopes = torch.autograd.grad((y**2).sum(), list(layer.parameters()))
            assert_close(states, y)
            for (leaf, parameter), slope in zip(
                layer.module.named_parameters(), slopes, strict=True
            ):
                assert_close(gradients[leaf], slope)
                parameter.data -= 0.1 * slope
            weights = jax.tree.map(lambda w, g: w - 0.1 * g, weights, gradients)
