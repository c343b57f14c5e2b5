from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from regjax import optim
from tests.regjax.optimizers import GRADIENT, PARAMS, assert_close, first_update, matrices, walk


# The first step from w = -2 with gradient 1, computed by hand: u = 1, RMS(w) = 2.
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, -0.2),
        ({"weight_decay": 0.25}, -0.15),
        ({"weight_decay": 0.25, "maximize": True}, 0.25),
        ({"eps": (2.0, 1e-3)}, -0.1),
        ({"eps": (None, 4.0)}, -0.4),
        # The step is limited to 1 / sqrt(1), the decay is not.
        ({"learning_rate": 3.0, "weight_decay": 0.25}, -0.5),
        ({"learning_rate": 0.0, "weight_decay": 0.25}, 0.0),
        ({"learning_rate": lambda count: jnp.where(count == 0, 0.1, 0.0)}, -0.2),
        ({"weight_decay": lambda count: jnp.where(count == 0, 0.25, 0.0)}, -0.15),
    ],
)
def test_first_step_by_hand(options, expected):
    optimizer = optim.adafactor(**{"learning_rate": 0.1, **options})
    update = first_update(optimizer, jnp.array([-2.0]), jnp.array([1.0]))
    np.testing.assert_allclose(update, [expected], rtol=1e-6)


def test_first_step_of_a_matrix_by_hand():
    params, gradient = jnp.full((2, 2), 2.0), jnp.array([[3.0, 0.0], [0.0, 1.0]])
    # Rows and columns (9/2, 1/2), their mean 5/2: v = ((8.1, 0.9), (0.9, 0.1)), RMS(u) = 5/3.
    u = np.array([[3 / math.sqrt(8.1), 0.0], [0.0, 1 / math.sqrt(0.1)]])
    for d, divisor in ((1.0, 5 / 3), (1.25, 4 / 3), (math.inf, 1.0)):
        update = first_update(optim.adafactor(0.1, d=d), params, gradient)
        np.testing.assert_allclose(update, -0.2 * u / divisor, rtol=1e-6)
    # With the lower bound 5, the mean halves v, and no root is below 5.
    update = first_update(optim.adafactor(0.1, d=math.inf, eps=(5.0, 1e-3)), params, gradient)
    np.testing.assert_allclose(update, -0.2 * gradient / 5, rtol=1e-6)


def test_the_second_moment_follows_the_step():
    optimizer = optim.adafactor(0.1, beta2_decay=-0.5)
    params = jnp.array([1.0])
    state = optimizer.init(params)
    for gradient, expected in ((1.0, 1.0), (2.0, 1 + 3 / math.sqrt(2))):
        _, state = optimizer.update(jnp.array([gradient]), state, params)
        np.testing.assert_allclose(state["moments"][0].v, [expected], rtol=1e-6)


def test_the_learning_rate_is_capped_by_the_root_of_the_step():
    params, gradient = jnp.array([1.0]), jnp.array([1.0])
    optimizer = optim.adafactor(0.6)
    state, visited = optimizer.init(params), []
    for _ in range(4):
        update, state = optimizer.update(gradient, state, params)
        visited.append(-float(update[0]))
    np.testing.assert_allclose(visited, [0.6, 0.6, 1 / math.sqrt(3), 0.5], rtol=1e-6)


def test_state_of_a_matrix_is_its_rows_and_columns():
    params = {"conv": jnp.ones((2, 3, 4, 5)), "kernel": jnp.ones((6, 7)), "bias": jnp.ones(8)}
    optimizer = optim.adafactor(weight_decay=0.1, mask=matrices)
    state = optimizer.init(params)
    factored = state["moments"][0]
    assert isinstance(factored, optax.FactoredState)
    assert not any(leaf.any() for leaf in jax.tree.leaves(state))
    nothing = optax.MaskedNode()
    assert jax.tree.map(jnp.shape, factored._asdict(), is_leaf=lambda leaf: leaf is nothing) == {
        "count": (),
        "v_row": {"conv": (2, 3, 4, 1), "kernel": (6, 1), "bias": nothing},
        "v_col": {"conv": (2, 3, 1, 5), "kernel": (1, 7), "bias": nothing},
        "v": {"conv": nothing, "kernel": nothing, "bias": (8,)},
    }
    kernel_alone = optimizer.init({"kernel": params["kernel"]})
    assert sum(leaf.size for leaf in jax.tree.leaves(kernel_alone) if leaf.ndim) == 6 + 7
    after = jax.eval_shape(optimizer.update, params, state, params)[1]
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
    mapped = optax.tree.map_params(optimizer, lambda leaf: leaf + 1, state)
    assert jax.tree.structure(mapped) == jax.tree.structure(state)
    assert mapped["moments"][0].v_row["kernel"][0, 0] == mapped["moments"][0].v["bias"][0] == 1


def test_the_layout_of_a_matrix_makes_no_difference():
    transposed = [jax.tree.map(jnp.transpose, tree) for tree in (PARAMS, GRADIENT)]
    updates, _ = walk(optim.adafactor(0.1), [GRADIENT] * 3)
    transposed_updates, _ = walk(optim.adafactor(0.1), [transposed[1]] * 3, transposed[0])
    assert_close(updates[-1], jax.tree.map(jnp.transpose, transposed_updates[-1]), atol=1e-6)


def test_scalars_are_vectors():
    scalar = first_update(optim.adafactor(0.1), jnp.array(-2.0), jnp.array(1.0))
    np.testing.assert_allclose(scalar, -0.2, rtol=1e-6)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_update_always_needs_parameters(weight_decay):
    optimizer = optim.adafactor(weight_decay=weight_decay)
    with pytest.raises(
        ValueError, match=r"^params must be given, since Adafactor's step is relative"
    ):
        optimizer.update(GRADIENT, optimizer.init(PARAMS))


def test_the_machine_epsilon_is_that_of_each_leaf():
    # 2**-10 lies below the epsilon of bfloat16, 2**-7, and above that of float32.
    params = {"half": jnp.ones(1, "bfloat16"), "single": jnp.ones(1)}
    gradient = jax.tree.map(lambda p: p * 2**-10, params)
    updates = first_update(optim.adafactor(0.5), params, gradient)
    assert_close(updates, {"half": jnp.full(1, -0.5 / 8, "bfloat16"), "single": jnp.full(1, -0.5)})


def test_bfloat16_is_rounded_once():
    params = jnp.full(1, 1.0, "bfloat16")
    optimizer = optim.adafactor(0.1, eps=(1e-3, 1e-3))
    state = optimizer.init(params)
    held, gradient = jnp.bfloat16(1.0), jnp.bfloat16(1.6171875)
    count = jnp.int32(9)
    factored, *rest = state["moments"]
    factored = factored._replace(count=count, v=held[None])
    state = {**state, "moments": (factored, *rest)}
    v = optimizer.update(gradient[None], state, params)[1]["moments"][0].v[0]
    share = 10**-0.8
    assert v == jnp.bfloat16(1 + share * (1.6171875**2 - 1))
    squared = gradient * gradient
    assert v != held + jnp.bfloat16(share) * (squared - held)
