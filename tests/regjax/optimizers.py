"""Code that the tests of regjax.optim share: the optimizers, small parameters, and steps."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from regjax import optim

# Each optimizer, as a function of a learning rate and options.
MAKE = {
    "sgd": optim.sgd,
    "momentum": partial(optim.sgd, momentum=0.9),
    "asgd": optim.asgd,
    "rprop": optim.rprop,
    "adam": partial(optim.adam, amsgrad=True),
    "adamw": optim.adamw,
    "nadam": optim.nadam,
    "radam": optim.radam,
    "adamax": optim.adamax,
    "adagrad": optim.adagrad,
    "adadelta": optim.adadelta,
    "rmsprop": partial(optim.rmsprop, momentum=0.9, centered=True),
    "adafactor": optim.adafactor,
    "muon": partial(optim.muon, ns_dtype="float32"),
}
PARAMS = {
    "kernel": jnp.array([[1.0, -2.0, 0.5], [0.5, 3.0, -1.0]]),
    "bias": jnp.array([1.0, 2.0, -0.5]),
}
GRADIENT = {
    "kernel": jnp.array([[0.5, 1.0, -0.25], [-1.0, 0.0, 2.0]]),
    "bias": jnp.array([0.5, -1.0, 0.25]),
}
NO_BIAS = {"kernel": True, "bias": False}


def matrices(tree):
    """Return a mask that is True for kernels, a common mask."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, tree)


def first_update(optimizer, params=PARAMS, gradient=GRADIENT):
    """Return what the optimizer adds to the parameters in its first step."""
    return optimizer.update(gradient, optimizer.init(params), params)[0]


def walk(optimizer, gradients, params=PARAMS):
    """Apply the gradients; return the parameters after each step, and the last state."""
    state, visited = optimizer.init(params), []
    for gradient in gradients:
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        visited.append(params)
    return visited, state


def scalar_updates(optimizer, gradients):
    """Return what each step adds to a parameter that starts at 0, and the last state."""
    param, updates = jnp.array(0.0), []
    state = optimizer.init(param)
    for gradient in gradients:
        update, state = optimizer.update(jnp.asarray(gradient), state, param)
        param = param + update
        updates.append(float(update))
    return updates, state


def assert_close(ours, theirs, atol=0.0, rtol=0.0):
    """Assert that two trees are equal, or close with tolerances."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), ours, theirs)


def in_dtype(tree, dtype):
    """Cast every leaf, under x64 also to float64."""
    return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)).astype(dtype), tree)


def dtypes(tree):
    """Return the tree of dtypes."""
    return jax.tree.map(lambda leaf: leaf.dtype, tree)
