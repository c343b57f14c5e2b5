"""Recipes for recurrent networks: one mask for all timesteps, and another for each sequence."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from examples.recurrent_dropout import __main__ as program
from examples.recurrent_dropout import cells as recipes

XS = jnp.linspace(-1.0, 1.0, recipes.TIME * recipes.FEATURES).reshape(1, recipes.TIME, -1)


@pytest.fixture(scope="module")
def drawn():
    return recipes.masks()


def test_every_timestep_draws_the_mask_of_the_first(drawn):
    for name, mask in drawn.items():
        assert mask.shape == (recipes.TIME, recipes.BATCH, recipes.HIDDEN), name
        assert (mask == mask[0]).all(), name
        assert 0 < mask.sum() < mask.size, name


def test_the_program_prints_a_line_for_each_timestep(drawn, capsys, monkeypatch):
    monkeypatch.setattr(recipes, "masks", lambda: drawn)
    program.main([])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 * (1 + recipes.TIME)


def test_evaluation_equals_the_cell_alone():
    key = jax.random.key(0)
    network, alone = recipes.linen_lstm(), linen.RNN(linen.OptimizedLSTMCell(recipes.HIDDEN))
    weights = network.init({"params": key, "dropout": key}, XS)
    bare = {"params": weights["params"]["cell"]}
    expected = alone.apply(bare, XS)
    np.testing.assert_allclose(recipes.linen_lstm(True).apply(weights, XS), expected, rtol=1e-6)
    trained = network.apply(weights, XS, rngs={"dropout": key})
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(trained, expected, rtol=1e-6)


def test_the_next_sequence_has_another_mask():
    network = recipes.NnxLstm(nnx.Rngs(0))
    first, second = network(XS), network(XS)
    assert not np.array_equal(first, second)
    network.eval()
    np.testing.assert_array_equal(network(XS), network(XS))
