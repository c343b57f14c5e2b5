"""The network in JAX: training with dropout, and predictions with dropout off and on."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import regjax
from examples.overfit.data import draw_batches

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Array, Float, Int, Key, PyTree

    from examples.overfit.data import Images
    from examples.uncertainty.settings import Settings

    Params = PyTree[Float[Array, "..."]]

LAYERS = ("0", "3", "6")  # names in the torch.nn.Sequential of network_torch.py
SITES = ("2", "5", None)  # names of the dropout after each layer
_CHUNK = 50  # steps between two reports


def initial_params(settings: Settings) -> Params:
    """Draw kernels from U(-b, b) with b = 1/sqrt(inputs); biases are zero."""
    rng = np.random.default_rng([settings.seed, 0])
    sizes = (64, settings.width, settings.width, 10)
    return {
        name: {
            "kernel": jnp.asarray(rng.uniform(-1, 1, pair) / pair[0] ** 0.5, jnp.float32),
            "bias": jnp.zeros(pair[1]),
        }
        for name, pair in zip(LAYERS, pairwise(sizes), strict=True)
    }


def apply(
    params: Params,
    pixels: Float[Array, "images 64"],
    *,
    rate: float = 0.0,
    key: Key[Array, ""] | None = None,
    step: Int[Array, ""] | int = 0,
) -> Float[Array, "images 10"]:
    """Compute the logits of a perceptron with dropout after each hidden layer (default: none)."""
    x = pixels
    for name, site in zip(LAYERS, SITES, strict=True):
        x = x @ params[name]["kernel"] + params[name]["bias"][None]
        if site:
            key_here = None if key is None else regjax.site_key(key, step, site)
            x = regjax.dropout(jax.nn.relu(x), rate, key=key_here)
    return x


def train(train_set: Images, settings: Settings, on_step: Callable[[int], None]) -> Params:
    """Train with AdamW and dropout, and return the parameters.

    Args:
        train_set: The images.
        settings: The steps, width, seed and rate.
        on_step: Called with the number of completed steps, at intervals.
    """
    optimizer = regjax.optim.adamw(2e-3, weight_decay=0.1)
    root = jax.random.key(settings.seed)
    pixels, labels = jnp.asarray(train_set.pixels), jnp.asarray(train_set.labels)

    def loss(params: Params, batch: Int[Array, " batch"], step: Int[Array, ""]) -> Any:
        logits = apply(params, pixels[batch], rate=settings.rate, key=root, step=step)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels[batch]).mean()

    def train_step(state: Any, step_and_batch: Any) -> tuple[Any, None]:
        params, moments = state
        step, batch = step_and_batch
        updates, moments = optimizer.update(jax.grad(loss)(params, batch, step), moments, params)
        return (optax.apply_updates(params, updates), moments), None

    params = initial_params(settings)
    state = params, optimizer.init(params)
    train_steps = jax.jit(partial(jax.lax.scan, train_step))
    rng = np.random.default_rng([settings.seed, 1])
    batches = draw_batches(settings.steps, min(64, len(labels)), len(labels), rng)
    for first in range(0, settings.steps, _CHUNK):
        chunk = jnp.asarray(batches[first : first + _CHUNK])
        state, _ = train_steps(state, (jnp.arange(first, first + len(chunk)), chunk))
        on_step(first + len(chunk))
    return state[0]


@jax.jit
def without_dropout(params: Params, pixels: Float[Array, "images 64"]) -> Float[Array, "images 10"]:
    """Return the probabilities of one pass with dropout off."""
    return jax.nn.softmax(apply(params, pixels))


def stochastic_pass(rate: float) -> Callable[..., Float[Array, "images 10"]]:
    """Return the function that `regjax.mc_dropout` calls for each pass."""

    def predict(params: Params, pixels: Any, *, key: Key[Array, ""]) -> Float[Array, "images 10"]:
        return apply(params, pixels, rate=rate, key=key)

    return predict
