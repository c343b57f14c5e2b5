"""One mask for all timesteps, of inputs and of the state inside a recurrence."""

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

TIME, BATCH, FEATURES, HIDDEN = 7, 3, 5, 4
XS = np.random.default_rng(0).normal(size=(TIME, BATCH, FEATURES))


@pytest.mark.parametrize("rate", [0.1, 0.5])
@pytest.mark.parametrize("axis", [0, 1, -2])
def test_the_mask_is_that_of_dropout_shared_along_time(axis, rate):
    """Results and gradients are bitwise identical in both frameworks."""
    x, ct = (np.random.default_rng(i).normal(size=(5, 6, 7)).astype(np.float32) for i in range(2))
    shared = (axis % 3,)
    results = []
    for framework in FRAMEWORKS:
        drops = (
            functools.partial(framework.library.variational_dropout, time_axis=axis),
            functools.partial(framework.library.dropout, broadcast_dims=shared),
        )
        for drop in drops:
            f = functools.partial(drop, rate=rate, key=framework.key(2))
            results.append(
                [*map(framework.numpy, framework.vjp(f, framework.array(x), framework.array(ct)))]
            )
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])
    kept = np.moveaxis(results[0][0] != 0, axis, 0)
    assert (kept == kept[0]).all()
    assert 0 < kept.sum() < kept.size


@both_frameworks
def test_the_corners_are_those_of_dropout(framework: Framework):
    drop = framework.library.variational_dropout
    x = framework.array(np.full((5, 6, 7), np.inf, np.float32))
    assert drop(x, 0) is x
    assert drop(x, 0.5, deterministic=True) is x
    assert not framework.numpy(drop(x, 1)).any()
    assert (framework.numpy(drop(x, 0.5, key=framework.key(0))) == 0).any()
    with pytest.raises(ValueError, match="key must be a random key in training"):
        drop(x, 0.5)
    for axis in (3, -4):
        with pytest.raises(ValueError, match=rf"time_axis .* has 3; got {axis}"):
            drop(x, 0.5, key=framework.key(0), time_axis=axis)
    with pytest.raises(TypeError, match="integer"):
        drop(x, 0.5, key=framework.key(0), time_axis=1.0)


def torch_states(
    cell: torch.nn.Module, xs: torch.Tensor, rate: float, keys: list[torch.Tensor]
) -> torch.Tensor:
    """Loop over a cell, with dropout of the hidden state by the key of each step."""
    h, c = (xs.new_zeros(xs.shape[1], HIDDEN) for _ in range(2))
    states = []
    for x, key in zip(xs, keys, strict=True):
        h, c = cell(x, (regtorch.dropout(h, rate, key=key), c))
        states.append(h)
    return torch.stack(states)


def test_dropout_of_the_state_of_a_recurrence_agrees():
    """States and gradients agree within 1e-12 in norm; every step has the same mask."""
    torch.manual_seed(0)
    cell = torch.nn.LSTMCell(FEATURES, HIDDEN).double()
    drawn: dict[str, list[Any]] = {"jax": [], "torch": []}
    with regtorch.observing(drawn["torch"].append):
        in_torch = torch_states(cell, to_torch(XS), 0.4, [TORCH.key(5)] * TIME)
    slopes = torch.autograd.grad((in_torch**2).sum(), list(cell.parameters()))
    with jax.enable_x64(True):
        weights = {f"{n}_l0": jnp.array(from_torch(p)) for n, p in cell.named_parameters()}

        def loss(weights):
            drop = functools.partial(regjax.dropout, rate=0.4, key=JAX.key(5))
            states = lstm(weights, jnp.asarray(XS), drop)
            return (states**2).sum(), states

        with regjax.observing(drawn["jax"].append):
            loss(weights)
            jax.effects_barrier()
        (_, in_jax), gradients = jax.value_and_grad(loss, has_aux=True)(weights)
    assert_close(in_jax, in_torch)
    for (name, _), slope in zip(cell.named_parameters(), slopes, strict=True):
        assert_close(gradients[f"{name}_l0"], slope)
    masks = [np.asarray(draw.mask) for draws in drawn.values() for draw in draws]
    assert len(masks) == 2 * TIME
    assert all((mask == masks[0]).all() for mask in masks)
    assert masks[0].shape == (BATCH, HIDDEN)
    assert 0 < masks[0].sum() < masks[0].size
    # Planted: another key for each step.
    apart = torch_states(cell, to_torch(XS), 0.4, list(regtorch.split(TORCH.key(5), TIME)))
    with pytest.raises(AssertionError):
        assert_close(in_jax, apart)


def test_dropout_of_the_state_of_a_gru_agrees():
    """Compare a loop over PyTorch's cell, which has no dropout, with a scan in JAX."""
    torch.manual_seed(0)
    cell = torch.nn.GRUCell(FEATURES, HIDDEN).double()
    h, key = torch.zeros(BATCH, HIDDEN, dtype=torch.float64), TORCH.key(1)
    for x in to_torch(XS):
        h = cell(x, regtorch.dropout(h, 0.3, key=key))
    with jax.enable_x64(True):
        w = {name: jnp.array(from_torch(p)) for name, p in cell.named_parameters()}

        def step(h, x):
            h = regjax.dropout(h, 0.3, key=JAX.key(1))
            of_input, of_state = (
                jnp.split(v @ w[f"weight_{n}"].T + w[f"bias_{n}"][None], 3, axis=1)
                for v, n in ((x, "ih"), (h, "hh"))
            )
            r, z = (jax.nn.sigmoid(a + b) for a, b in zip(of_input[:2], of_state[:2], strict=True))
            n = jnp.tanh(of_input[2] + r * of_state[2])
            return (1 - z) * n + z * h, None

        state, _ = jax.lax.scan(step, jnp.zeros((BATCH, HIDDEN)), jnp.asarray(XS))
    assert_close(state, h)


@pytest.fixture
def keras(monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "jax")  # read when Keras is first imported
    keras = pytest.importorskip("keras")
    if keras.backend.backend() != "jax":
        pytest.skip("Keras runs on another backend here")
    return keras


def a_keras_lstm(keras: Any, rate: float, recurrent_rate: float, units: int = HIDDEN) -> Any:
    layer = keras.layers.LSTM(
        units, dropout=rate, recurrent_dropout=recurrent_rate, return_sequences=True, seed=3
    )
    layer.build((None, None, FEATURES))
    return layer


@pytest.mark.slow
def test_keras_with_masks_of_regjax_is_a_scan_of_regjax(keras, monkeypatch):
    """Keras' `dropout` and `recurrent_dropout` have one mask per gate for all timesteps."""
    keys = jax.random.split(JAX.key(9), 8)
    made = []

    def shared_mask(cell, x, rate):
        """Return a mask for each of the four gates, first of the input, then of the state."""
        of = keys[4 * len(made) : 4 * len(made) + 4]
        made.append(rate)
        return [regjax.dropout(jnp.ones(x.shape), rate, key=key) for key in of]

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        layer = a_keras_lstm(keras, 0.3, 0.5)
        monkeypatch.setattr(type(layer.cell), "_create_dropout_mask", shared_mask)
        xs = jnp.asarray(XS.astype(np.float32))
        in_keras = jnp.moveaxis(layer(jnp.moveaxis(xs, 0, 1), training=True), 1, 0)
    assert made == [0.3, 0.5]
    kernel, recurrent, bias = (jnp.asarray(weight.value) for weight in layer.weights)
    kernels, recurrents = (jnp.split(k, 4, axis=1) for k in (kernel, recurrent))

    def step(carry, gates):
        h, c = carry
        i, f, g, o = (
            x + regjax.dropout(h, 0.5, key=key) @ k
            for x, k, key in zip(gates, recurrents, keys[4:], strict=True)
        )
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    gates = [
        regjax.variational_dropout(xs, 0.3, key=key, time_axis=0) @ k + b[None, None]
        for k, b, key in zip(kernels, jnp.split(bias, 4), keys[:4], strict=True)
    ]
    zeros = jnp.zeros((BATCH, HIDDEN))
    states = jax.lax.scan(step, (zeros, zeros), gates)[1]
    np.testing.assert_allclose(states, in_keras, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_masks_of_keras_have_the_same_statistics(keras):
    """Masks of Keras are constant over time, with the same scale, and rate within 5 sigma."""
    rows, rate, seen = 500, 0.3, []
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        layer = a_keras_lstm(keras, rate, rate, units=8)
        cell = layer.cell
        for draw in (cell.get_dropout_mask, cell.get_recurrent_dropout_mask):
            x = jnp.ones((rows, 8))
            first, again = draw(x), draw(x)  # a step, and the next one
            assert all(one is two for one, two in zip(first, again, strict=True))
            seen.append(np.stack(first))
    in_jax = regjax.variational_dropout(jnp.ones((8 * rows, 3, 8)), rate, key=JAX.key(0))
    assert (in_jax == in_jax[:, :1]).all()
    for masks in (*seen, np.asarray(in_jax[:, 0])):
        sigma = (rate * (1 - rate) / masks.size) ** 0.5
        assert abs((masks == 0).mean() - rate) < 5 * sigma
        np.testing.assert_allclose(np.unique(masks), [0, 1 / (1 - rate)], rtol=1e-6)
