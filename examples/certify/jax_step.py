"""The same training in JAX, from the seed alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import regjax.optim
from regjax import torch_random
from regjax.torch_random import Layer

rng = np.random.default_rng(0)
inputs = rng.normal(size=(100, 20)).astype("float32")
labels = rng.integers(0, 3, 100)

layers = {
    "0": Layer("Linear", {"weight": (64, 20), "bias": (64,)}),
    "3": Layer("Linear", {"weight": (3, 64), "bias": (3,)}),
}
adamw = regjax.optim.adamw(1e-2, weight_decay=1e-2)


def forward(params, x, y, g):
    """Return the loss of a batch, and the next state of the generator."""
    x = jnp.tanh(x @ params["0.weight"].T + params["0.bias"])
    x, g = torch_random.dropout(x, 0.5, g)
    x = x @ params["3.weight"].T + params["3.bias"]
    return optax.softmax_cross_entropy_with_integer_labels(x, y).mean(), g


@jax.jit
def step(params, state, g, x, y):
    """Return the parameters after a step, with all that the next one needs, and the loss."""
    (loss, g), grads = jax.value_and_grad(forward, has_aux=True)(params, x, y, g)
    updates, state = adamw.update(grads, state, params)
    return optax.apply_updates(params, updates), state, g, loss


def train(seed):
    """Yield the initial parameters, then the values to compare after each step."""
    params, g = torch_random.init_like(layers, torch_random.generator(seed))
    yield {"params": params, "generator": g}
    state = adamw.init(params)
    for _ in range(3):
        batches, g = torch_random.shuffled_batches(g, 100, 32)
        for batch in batches:
            params, state, g, loss = step(params, state, g, inputs[batch], labels[batch])
            yield {"loss": loss, "params": params, "batch": batch, "generator": g}
