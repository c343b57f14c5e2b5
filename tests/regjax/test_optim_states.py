"""The state of every optimizer: its form and its dtypes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
import pytest

from regjax import optim
from tests.regjax.optimizers import (
    PARAMS,
    arrays,
    assert_close,
    dtypes,
    each_variant,
    first_update,
    in_dtype,
)

LINKS = {"maximize", "weight_decay", "moments", "learning_rate"}


@each_variant
def test_state_has_four_links_that_keep_their_form(variant):
    params, gradient = variant.problem
    optimizer = variant.make(0.1)
    state = optimizer.init(params)
    after = jax.eval_shape(optimizer.update, gradient, state, params)[1]
    assert state.keys() == LINKS
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
    # Optax's tools map the parameters in the state, and nothing else.
    mapped = optax.tree.map_params(optimizer, lambda leaf: leaf + 1, state)
    assert jax.tree.structure(mapped) == jax.tree.structure(state)
    assert jax.tree.map(
        lambda new, old: bool(jnp.all(new == old + (1 if old.ndim else 0))), mapped, state
    ) == jax.tree.map(lambda _: True, state)


# The type of state["moments"], and below of state["learning_rate"].
MOMENTS_STATES = {
    "sgd": (optim.sgd(weight_decay=0.1), optax.EmptyState),
    "momentum": (optim.sgd(momentum=0.9), optax.TraceState),
    "dampened": (
        optim.sgd(momentum=0.9, dampening=0.5),
        (optax.ScaleByScheduleState, optax.TraceState),
    ),
    "adam": (optim.adam(weight_decay=0.1), optax.ScaleByAdamState),
    "amsgrad": (optim.adam(amsgrad=True), optax.ScaleByAmsgradState),
    "adamw": (optim.adamw(), optax.ScaleByAdamState),
    "adamw-amsgrad": (optim.adamw(0.1, amsgrad=True), optax.ScaleByAmsgradState),
    "nadam": (optim.nadam(weight_decay=0.1), optim.ScaleByNadamState),
    "nadamw": (optim.nadam(decoupled_weight_decay=True), optim.ScaleByNadamState),
    "radam": (optim.radam(), optax.ScaleByAdamState),
    "radamw": (optim.radam(decoupled_weight_decay=True), optax.ScaleByAdamState),
    "adamax": (optim.adamax(0.1), optax.ScaleByAdamState),
    "adagrad": (optim.adagrad(weight_decay=0.1), optax.ScaleByRssState),
    "adadelta": (optim.adadelta(weight_decay=0.1), optax.ScaleByAdaDeltaState),
    "rmsprop": (optim.rmsprop(weight_decay=0.1), optax.ScaleByRmsState),
    "rmsprop-centered": (optim.rmsprop(centered=True), optax.ScaleByRStdDevState),
    "rmsprop-momentum": (optim.rmsprop(momentum=0.9), (optax.ScaleByRmsState, optax.TraceState)),
    "rmsprop-both": (
        optim.rmsprop(momentum=0.9, centered=True),
        (optax.ScaleByRStdDevState, optax.TraceState),
    ),
    "adafactor": (optim.adafactor(), (optax.FactoredState, *(optax.EmptyState,) * 2)),
    "muon": (optim.muon(), (optax.EmaState, optax.EmptyState)),
}
RATE_STATES = {
    "adagrad": (optim.adagrad(), optax.EmptyState),
    "adagrad-lr-decay": (optim.adagrad(lr_decay=0.1), optax.ScaleByScheduleState),
    "adadelta-schedule": (optim.adadelta(lambda count: 0.1), optax.ScaleByScheduleState),
}


@pytest.mark.parametrize(
    ("link", "optimizer", "expected"),
    [
        *(("moments", *case) for case in MOMENTS_STATES.values()),
        *(("learning_rate", *case) for case in RATE_STATES.values()),
    ],
    ids=[*MOMENTS_STATES, *RATE_STATES],
)
def test_state_is_what_optax_tools_know(link, optimizer, expected):
    state = optimizer.init(PARAMS["kernel"])[link]
    assert expected == (tuple(map(type, state)) if type(state) is tuple else type(state))


def _rates(variant, dtype):
    yield 0.125
    if dtype != "float64":  # a strongly typed float32, which strict promotion rejects
        yield jnp.float32(0.125)
    if variant.has_schedule:
        yield lambda count: jnp.float32(0.125)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
@each_variant
@pytest.mark.sample(36)
def test_dtypes_are_kept(variant, dtype):
    with jax.enable_x64(dtype == "float64"):
        params, gradient = (in_dtype(tree, dtype) for tree in variant.problem)
        for rate in _rates(variant, dtype):
            optimizer = variant.make(rate)
            state = optimizer.init(params)
            updates, after = jax.eval_shape(optimizer.update, gradient, state, params)
            assert set(jax.tree.leaves(dtypes(updates))) == {jnp.dtype(dtype)}
            assert {leaf.dtype for leaf in arrays(after)} == {jnp.dtype(dtype)}
            assert dtypes(after) == dtypes(state)


@each_variant
def test_trees_of_mixed_dtypes(variant):
    params, gradient = (
        {"kernel": tree["kernel"].astype(jnp.bfloat16), "bias": tree["bias"]}
        for tree in variant.problem
    )
    optimizer = variant.make([*_rates(variant, "float32")][-1])
    updates = jax.eval_shape(lambda: first_update(optimizer, params, gradient))
    assert dtypes(updates) == dtypes(params)


@each_variant
@pytest.mark.sample(13)
def test_half_types_are_rounded_once(variant):
    # Parameters, gradient and initial state are exact in bfloat16, so only the result is rounded.
    optimizer, results = variant.make(0.125), []
    for dtype in ("float32", "bfloat16"):
        params, gradient = (in_dtype(tree, dtype) for tree in variant.problem)
        results.append(optimizer.update(gradient, optimizer.init(params), params))
    rounded = optax.tree.cast_like(results[0], results[1])
    assert_close(*(in_dtype(tree, "float32") for tree in (results[1], rounded)))
