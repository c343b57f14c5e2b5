"""Code that the tests of regjax.optim share: the optimizers, small parameters, and steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

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


def assert_close(actual, expected, atol=0.0, rtol=0.0):
    """Assert that two trees are equal, or close with tolerances."""
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), actual, expected
    )


def in_dtype(tree, dtype):
    """Cast every leaf, under x64 also to float64."""
    return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)).astype(dtype), tree)


def dtypes(tree):
    """Return the tree of dtypes."""
    return jax.tree.map(lambda leaf: leaf.dtype, tree)


def arrays(state):
    """Return the leaves of a state that are not numbers."""
    return [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]


# Muon accepts matrices only.
MATRICES = [{**tree, "bias": tree["bias"][:, None]} for tree in (PARAMS, GRADIENT)]


@dataclass(frozen=True)
class Variant:
    """An optimizer with its options, and a problem.

    Attributes:
        make: Returns the optimizer for a learning rate.
        close: The allowed difference of an eager run and a compiled one, which fuses sums.
        problem: Parameters and their gradient.
        has_schedule: Whether the learning rate may be a schedule.
    """

    make: Callable[[Any], optax.GradientTransformation]
    close: float = 1e-6
    problem: Any = (PARAMS, GRADIENT)
    has_schedule: bool = True


VARIANTS = {
    "sgd": Variant(lambda r: optim.sgd(r, 0.9, 0.1, 0.1, maximize=True, mask=NO_BIAS)),
    "nesterov": Variant(lambda r: optim.sgd(r, 0.9, weight_decay=0.1, nesterov=True)),
    "asgd": Variant(lambda r: optim.asgd(r, 0.1, 0.5, 1.0, 0.1, maximize=True, mask=NO_BIAS)),
    "rprop": Variant(lambda r: optim.rprop(r), has_schedule=False),
    "adam": Variant(lambda r: optim.adam(r, weight_decay=0.1, maximize=True)),
    "amsgrad": Variant(lambda r: optim.adam(r, weight_decay=0.1, amsgrad=True)),
    "adamw": Variant(lambda r: optim.adamw(r, mask=matrices)),
    "nadam": Variant(lambda r: optim.nadam(r, weight_decay=0.1, maximize=True)),
    "nadamw": Variant(
        lambda r: optim.nadam(r, weight_decay=0.1, decoupled_weight_decay=True, mask=matrices)
    ),
    "radam": Variant(lambda r: optim.radam(r, (0.9, 0.9), weight_decay=0.1)),
    "radamw": Variant(
        lambda r: optim.radam(r, weight_decay=0.1, decoupled_weight_decay=True, mask=matrices)
    ),
    "adamax": Variant(lambda r: optim.adamax(r, weight_decay=0.1, mask=matrices)),
    "adagrad": Variant(lambda r: optim.adagrad(r, weight_decay=0.1, mask=matrices)),
    "adagrad-decayed": Variant(lambda r: optim.adagrad(r, 0.1, 0.1, 0.125)),
    "adadelta": Variant(lambda r: optim.adadelta(r, weight_decay=0.1, maximize=True), close=2e-6),
    "rmsprop": Variant(lambda r: optim.rmsprop(r, weight_decay=0.1, mask=matrices), close=2e-6),
    "rmsprop-momentum": Variant(
        lambda r: optim.rmsprop(r, momentum=0.9, weight_decay=0.1), close=2e-6
    ),
    "rmsprop-centered": Variant(
        lambda r: optim.rmsprop(r, momentum=0.9, centered=True), close=2e-6
    ),
    "adafactor": Variant(
        lambda r: optim.adafactor(r, weight_decay=0.1, maximize=True, mask=matrices)
    ),
    "muon": Variant(lambda r: optim.muon(r, ns_dtype="float32"), close=1e-5, problem=MATRICES),
    "muon-bfloat16": Variant(
        lambda r: optim.muon(r, 0.1, 0.9, False, mask=NO_BIAS), close=0.02, problem=MATRICES
    ),
}
each_variant = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
