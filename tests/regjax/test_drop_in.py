"""A layer may be assigned to the name that it replaces, for models with unchanged code."""

from __future__ import annotations

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import regjax.equinox
import regjax.haiku
import regjax.linen
import regjax.nnx
from tests.regjax.family import FAMILY

KEY = jax.random.key(0)
X = jnp.ones(64)
CASES = {  # the module, the name, its replacement, a use of the name
    "linen": (
        linen,
        "Dropout",
        regjax.linen.Dropout,
        lambda: linen.Dropout(0.5, deterministic=False).apply({}, X, rngs={"dropout": KEY}),
    ),
    "nnx": (
        nnx,
        "Dropout",
        regjax.nnx.Dropout,
        lambda: nnx.Dropout(0.5, rngs=nnx.Rngs(0))(X),
    ),
    "equinox": (
        eqx.nn,
        "Dropout",
        regjax.equinox.Dropout,
        lambda: eqx.nn.Dropout(0.5)(X, key=KEY),
    ),
    "equinox-subclass": (
        eqx.nn,
        "Dropout",
        regjax.equinox.Dropout,
        lambda: type("Own", (eqx.nn.Dropout,), {})(0.5)(X, key=KEY),
    ),
    "haiku": (
        hk,
        "dropout",
        regjax.haiku.dropout,
        lambda: hk.dropout(KEY, 0.5, X),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_layer_may_take_the_place_of_its_original(name, monkeypatch, leaning):
    module, attribute, replacement, use = CASES[name]
    expected = use()
    monkeypatch.setattr(module, attribute, replacement)
    assert getattr(module, attribute) is replacement
    np.testing.assert_array_equal(use(), expected)


@pytest.mark.parametrize("name", ["Dropout", "EmbeddingDropout", "GaussianNoise"])
def test_a_layer_is_one_row_of_nnx_tabulate(name):
    settings, inputs, _ = FAMILY[name]
    layer = getattr(regjax.nnx, name)(0.5, rngs=nnx.Rngs(0), **settings)
    table = nnx.tabulate(layer, *inputs, console_kwargs={"width": 240, "color_system": None})
    assert sum(f"│ {name}" in line for line in table.splitlines()) == 1, table
