"""Dropout of the state of an LSTM with one mask for all timesteps, in Flax and in PyTorch.

Each framework uses the same recipe: `dropout` of the state with one key for the whole sequence. In
Linen, `nn.RNN` does not split the key along time; in NNX, the model creates the key before the loop
and stores it in a variable; in PyTorch, the key is an argument of the loop.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import linen, nnx
from flax.nnx.nn.recurrent import RNNCellBase

import regjax
import regtorch

RATE, BATCH, TIME, FEATURES, HIDDEN = 0.5, 1, 5, 3, 16


class LinenDroppedState(linen.RNNCellBase):
    """A Linen cell with dropout of the hidden state at each step.

    Attributes:
        cell: A cell whose carry is `(c, h)`.
        rate: The probability that an element of the state is zeroed.
        deterministic: True in evaluation.
    """

    cell: linen.RNNCellBase
    rate: float
    deterministic: bool = False

    def __call__(self, carry: Any, inputs: Any) -> Any:
        """Return the carry and the output of one step."""
        c, h = carry
        key = None if self.deterministic else self.make_rng("dropout")
        h = regjax.dropout(h, self.rate, key=key, deterministic=self.deterministic)
        self.sow("intermediates", "state", h)
        return self.cell((c, h), inputs)

    @linen.nowrap
    def initialize_carry(self, rng: Any, input_shape: tuple[int, ...]) -> Any:
        """Return the initial carry of the cell."""
        return self.cell.initialize_carry(rng, input_shape)

    @property
    def num_feature_axes(self) -> int:
        """Return the number of feature axes of the cell."""
        return self.cell.num_feature_axes


def linen_lstm(deterministic: bool = False) -> linen.RNN:
    """Return an LSTM; with `"dropout": True`, every step would draw another mask."""
    cell = LinenDroppedState(linen.OptimizedLSTMCell(HIDDEN), RATE, deterministic)
    return linen.RNN(
        cell,
        variable_axes={"intermediates": 0},
        split_rngs={"params": False, "dropout": False},
    )


class NnxDroppedState(RNNCellBase):
    """An NNX cell with dropout of the hidden state at each step.

    Attributes:
        cell: A cell whose carry is `(c, h)`.
        rate: The probability that an element of the state is zeroed.
        key: The key of the current sequence.
        deterministic: True in evaluation; `nnx.Module.eval` sets it.
    """

    def __init__(self, cell: Any, rate: float, *, rngs: nnx.Rngs) -> None:
        self.cell = cell
        self.rate = rate
        self.key = nnx.Variable(rngs.dropout())
        self.deterministic = False

    def __call__(self, carry: Any, inputs: Any) -> Any:
        """Return the carry and the output of one step."""
        c, h = carry
        h = regjax.dropout(h, self.rate, key=self.key[...], deterministic=self.deterministic)
        return self.cell((c, h), inputs)

    def initialize_carry(
        self, input_shape: tuple[int, ...], rngs: Any = None, carry_init: Any = None
    ) -> Any:
        """Return the initial carry of the cell."""
        return self.cell.initialize_carry(input_shape, rngs, carry_init)

    @property
    def num_feature_axes(self) -> int:
        """Return the number of feature axes of the cell."""
        return self.cell.num_feature_axes


class NnxLstm(nnx.Module):
    """An LSTM with a new key for each batch of sequences.

    Attributes:
        rnn: The loop over time.
        rngs: The source of the keys.
    """

    def __init__(self, rngs: nnx.Rngs) -> None:
        cell = nnx.OptimizedLSTMCell(FEATURES, HIDDEN, rngs=rngs)
        self.rnn = nnx.RNN(NnxDroppedState(cell, RATE, rngs=rngs), rngs=rngs)
        self.rngs = rngs.dropout.fork()

    def __call__(self, xs: Any) -> Any:
        """Map (batch, time, features) to (batch, time, hidden)."""
        cell = self.rnn.cell
        assert isinstance(cell, NnxDroppedState)
        cell.key[...] = self.rngs()
        return self.rnn(xs)


def torch_lstm(
    cell: torch.nn.LSTMCell, xs: torch.Tensor, key: torch.Tensor, deterministic: bool = False
) -> torch.Tensor:
    """Map (time, batch, features) to (time, batch, hidden)."""
    h = c = xs.new_zeros(xs.shape[1], cell.hidden_size)
    states = []
    for x in xs:
        h = regtorch.dropout(h, RATE, key=key, deterministic=deterministic)
        h, c = cell(x, (h, c))
        states.append(h)
    return torch.stack(states)


def masks() -> dict[str, np.ndarray]:
    """Return the masks that each framework draws, one per timestep."""
    xs = jnp.ones((BATCH, TIME, FEATURES))
    drawn: dict[str, list[Any]] = {"NNX": [], "PyTorch": []}
    in_linen, key = linen_lstm(), jax.random.key(0)
    weights = in_linen.init({"params": key, "dropout": key}, xs)
    # The loops of Flax 0.12.12 reject a callback that reads their data, as an observer does.
    ones = jnp.ones((BATCH, HIDDEN))
    options = {"rngs": {"dropout": key}, "mutable": "intermediates"}
    _, sown = in_linen.apply(weights, xs, initial_carry=(ones, ones), **options)
    in_nnx = NnxLstm(nnx.Rngs(0))
    with regjax.observing(drawn["NNX"].append):
        nnx.jit(lambda model, xs: model(xs))(in_nnx, xs)
        jax.effects_barrier()
    cell = torch.nn.LSTMCell(FEATURES, HIDDEN)
    with regtorch.observing(drawn["PyTorch"].append):
        torch_lstm(cell, torch.ones(TIME, BATCH, FEATURES), regtorch.key(0))
    stacked = {name: np.stack([d.mask for d in draws]) for name, draws in drawn.items()}
    return {"Linen": np.asarray(sown["intermediates"]["cell"]["state"][0]) != 0, **stacked}
