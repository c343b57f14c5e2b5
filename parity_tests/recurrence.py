"""An LSTM in JAX with the equations of PyTorch's, to compare dropout inside recurrences."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
import torch

from parity_tests.frameworks import from_torch

if TYPE_CHECKING:
    from jaxtyping import Array, Float

    Weights = dict[str, Array]


def lstm(
    weights: Weights,
    xs: Float[Array, "time batch features"],
    drop: Callable[[Float[Array, "batch hidden"]], Float[Array, "batch hidden"]] = lambda h: h,
) -> Float[Array, "time batch hidden"]:
    """Return the hidden states of `torch.nn.LSTM`, from an initial state of zeros.

    Args:
        weights: The weights of one layer, by the names of `torch.nn.LSTM`.
        xs: The sequences.
        drop: A function that is applied to the hidden state at the start of each step.
    """
    hidden = weights["weight_hh_l0"].shape[1]
    bias = weights["bias_ih_l0"] + weights["bias_hh_l0"]

    def step(
        carry: tuple[Array, Array], x: Float[Array, "batch features"]
    ) -> tuple[tuple[Array, Array], Array]:
        h, c = carry
        z = x @ weights["weight_ih_l0"].T + drop(h) @ weights["weight_hh_l0"].T + bias[None]
        i, f, g, o = jnp.split(z, 4, axis=1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    zeros = jnp.zeros((xs.shape[1], hidden), xs.dtype)
    return jax.lax.scan(step, (zeros, zeros), xs)[1]


def assert_close(in_jax: Array, in_torch: torch.Tensor) -> None:
    """Assert that the difference is at most 1e-12 in norm, relative to the norm or to 1."""
    array, twin = np.asarray(in_jax), from_torch(in_torch)
    assert np.linalg.norm(array - twin) <= 1e-12 * max(1, np.linalg.norm(twin))
