"""Tests of `regjax.interop` alone; parity_tests/test_interop.py compares it with PyTorch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from torch.optim import lr_scheduler

import regjax.optim
from regjax.interop import (
    Leaf,
    leaves_from_torch,
    optimizer_from_torch,
    schedule_from_torch,
    state_from_torch,
    state_to_torch,
)

ROOT = Path(__file__).parents[2]


def torch_sgd(*shapes, dtype=torch.float32, **options):
    named = [(f"p{i}", torch.ones(s, dtype=dtype).requires_grad_()) for i, s in enumerate(shapes)]
    return torch.optim.SGD(named, **options)


def test_axes_are_counted_from_the_front_and_named_once():
    assert Leaf("w", (-1, -2)) == Leaf("w", (1, 0))
    array = np.zeros((2, 3, 5))
    leaf = Leaf("w", (-1, 0, 1))
    assert leaf.to_jax(array).shape == (5, 2, 3)
    assert leaf.to_torch(leaf.to_jax(array)).shape == array.shape
    with pytest.raises(ValueError, match="transpose of 'w' must name each axis once"):
        Leaf("w", (1, 2))


def test_torch_is_not_loaded():
    code = "import sys, regjax.interop; print(*{m.partition('.')[0] for m in sys.modules})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    loaded = set(result.stdout.split())
    assert "optax" in loaded
    assert not loaded & {"torch", "flax", "equinox", "haiku"}


LONG = {
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 1_000_000),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.99999),
    "linear": lambda o: lr_scheduler.LinearLR(o, 1e-4, 1.0, 999_999),
    "polynomial": lambda o: lr_scheduler.PolynomialLR(o, 1_000_000, 2.0),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=1_000_000, pct_start=0.3),
    "one cycle, linear": lambda o: lr_scheduler.OneCycleLR(
        o, 0.1, total_steps=1_000_000, pct_start=0.123456789, anneal_strategy="linear"
    ),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 100, 3),
}


@pytest.mark.parametrize("name", LONG)
def test_a_long_schedule_keeps_its_digits_in_float32(name):
    """Including the end, where the rate is a small difference of large numbers."""
    [schedule] = schedule_from_torch(LONG[name](torch_sgd(2, lr=0.1, momentum=0.9)))
    counts = [0, 1, 2, 999, 123_455, 123_456, 299_999, 300_000, 654_321, 999_990, 999_998, 999_999]
    counts = np.array(counts, np.int32)
    single = np.asarray(jax.jit(jax.vmap(schedule))(counts))
    with jax.enable_x64(True):
        double = np.asarray(jax.jit(jax.vmap(schedule))(counts))
    assert (single.dtype, double.dtype) == (np.float32, np.float64)
    np.testing.assert_allclose(single, double, rtol=6e-7, atol=1e-38)


def test_a_schedule_takes_python_integers_arrays_and_tracers():
    [schedule] = schedule_from_torch(lr_scheduler.StepLR(torch_sgd(2, lr=0.5), 2, 0.5))
    expected = [0.5, 0.5, 0.25]
    assert [float(schedule(t)) for t in range(3)] == expected
    assert [float(schedule(np.int64(t))) for t in range(3)] == expected
    _, scanned = jax.lax.scan(lambda t, _: (t + 1, schedule(t)), jnp.int32(0), length=3)
    assert scanned.tolist() == expected


def test_one_cycle_ends():
    [schedule] = schedule_from_torch(lr_scheduler.OneCycleLR(torch_sgd(2, momentum=0.9), 0.1, 10))
    assert np.isfinite(schedule(10))
    assert np.isnan(schedule(11))


def test_one_group_is_the_plain_chain():
    recipe = torch_sgd((2, 3), lr=0.1, momentum=0.9, weight_decay=0.1)
    params = {"w": jnp.ones((3, 2)), "nothing": None}
    ours = optimizer_from_torch(recipe, {"w": Leaf("p0", (1, 0))})
    plain = regjax.optim.sgd(0.1, momentum=0.9, weight_decay=0.1)
    states = [optimizer.init(params) for optimizer in (ours, plain)]
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
    updates = [o.update(params, s, params)[0] for o, s in zip((ours, plain), states, strict=True)]
    np.testing.assert_array_equal(updates[0]["w"], updates[1]["w"])


@pytest.mark.parametrize("ending", ["", "/value"])
def test_groups_and_a_state_in_an_optimizer_of_nnx(ending):
    """`nnx.Optimizer` passes variables to `init`, and their arrays to `update`."""
    layer = torch.nn.Linear(3, 2)
    named = [("weight", layer.weight), ("bias", layer.bias)]
    groups = [{"params": [pair], "lr": lr} for pair, lr in zip(named, (0.1, 0.5), strict=True)]
    recipe = torch.optim.SGD(groups, momentum=0.9)
    layer(torch.ones(1, 3)).sum().backward()
    recipe.step()
    names = {f"kernel{ending}": Leaf("weight", (1, 0)), f"bias{ending}": "bias"}
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    params = nnx.state(model, nnx.Param)
    nnx.update(model, jax.tree.map(jnp.zeros_like, params))
    optimizer = optimizer_from_torch(recipe, names)
    trained = nnx.Optimizer(model, optimizer, wrt=nnx.Param)
    state = state_from_torch(recipe, names, params, optimizer)
    nnx.update(trained.opt_state, nnx.state(state))
    trained.update(model, jax.tree.map(jnp.ones_like, params))
    np.testing.assert_allclose(model.kernel[...], -0.19, rtol=1e-6)
    np.testing.assert_allclose(model.bias[...], -0.95, rtol=1e-6)
    arrays = nnx.to_pure_dict(params)  # their paths have no `/value`
    assert leaves_from_torch(layer, arrays, names).keys() == {"kernel", "bias"}


def test_under_scan_map_params_and_inside_a_chain():
    recipe = torch_sgd(3, 2, lr=0.1, momentum=0.9)
    recipe.add_param_group({"params": [("more", torch.ones(4, requires_grad=True))], "lr": 1.0})
    names = {"a": "p0", "b": "p1", "c": "more"}
    inner = optimizer_from_torch(recipe, names)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), inner)
    params = {"a": jnp.ones(3), "b": jnp.ones(2), "c": jnp.ones(4)}

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(params, state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, state), _ = jax.lax.scan(step, (params, optimizer.init(params)), length=3)
    doubled = optax.tree.map_params(optimizer, lambda x: 2 * x, state)
    np.testing.assert_array_equal(
        doubled[1].inner_states["group1"].inner_state["moments"].trace["c"],
        2 * state[1].inner_states["group1"].inner_state["moments"].trace["c"],
    )


@pytest.mark.parametrize(("dtype", "order"), [("bfloat16", (1, 0)), ("float32", None)])
def test_a_state_there_and_back_is_a_copy(dtype, order):
    recipe = torch_sgd((2, 3), dtype=getattr(torch, dtype), lr=0.1, momentum=0.9)
    [weight] = recipe.param_groups[0]["params"]
    leaf = Leaf("p0", order)
    names, params = {"w": leaf}, {"w": jnp.ones(leaf.to_jax(np.zeros((2, 3))).shape, dtype)}
    optimizer = optimizer_from_torch(recipe, names)
    state_from_torch(recipe, names, params, optimizer)
    assert not recipe.state  # reading changes nothing
    weight.grad = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]).to(weight.dtype)
    recipe.step()
    before = recipe.state[weight]["momentum_buffer"].clone()
    state = state_from_torch(recipe, names, params, optimizer)
    recipe.state[weight]["momentum_buffer"].zero_()
    trace = state["moments"].trace["w"]
    assert trace.dtype == dtype
    trace = leaf.to_torch(np.asarray(trace.astype("float32")))
    np.testing.assert_array_equal(trace, before.float().numpy())
    recipe.state.clear()
    state_to_torch(state, recipe, names)
    after = recipe.state[weight]["momentum_buffer"]
    assert after.dtype == weight.dtype
    assert torch.equal(before, after)


def test_a_missing_buffer_is_zero_unless_gradients_are_damped():
    for dampening in (0.0, 0.5):
        recipe = torch_sgd(2, 2, lr=0.1, momentum=0.9, dampening=dampening)
        recipe.param_groups[0]["params"][0].grad = torch.ones(2)
        recipe.step()
        names, params = {"a": "p0", "b": "p1"}, {"a": jnp.ones(2), "b": jnp.ones(2)}
        optimizer = optimizer_from_torch(recipe, names)
        if not dampening:
            trace = state_from_torch(recipe, names, params, optimizer)["moments"].trace
            assert jax.tree.map(list, trace) == {"a": [1, 1], "b": [0, 0]}
    with pytest.raises(ValueError, match=r"^state of 'p1' \('b'\) must have 'momentum_buffer'"):
        state_from_torch(recipe, names, params, optimizer)


def test_a_tensor_for_a_rate_and_options_without_effect():
    recipe = torch_sgd(2, lr=torch.tensor(0.5), foreach=True)
    optimizer = optimizer_from_torch(recipe, {"w": "p0"})
    params = {"w": jnp.ones(2)}
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    np.testing.assert_array_equal(updates["w"], -0.5)


@pytest.mark.parametrize("steps_per_epoch", [0, 1.5, True])
def test_steps_per_epoch_is_a_positive_whole_number(steps_per_epoch):
    recipe = torch_sgd(2, lr=0.1)
    scheduler = lr_scheduler.StepLR(recipe, 5)
    options = {"scheduler": scheduler, "steps_per_epoch": steps_per_epoch}
    error = TypeError if steps_per_epoch else ValueError
    with pytest.raises(error, match=r"^steps_per_epoch must be "):
        optimizer_from_torch(recipe, {"w": "p0"}, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 3}, "steps must be None without a scheduler; got 3"),
        ({"steps_per_epoch": 3}, "steps_per_epoch must be 1 without a scheduler; got 3"),
        ({"scheduler": lr_scheduler.StepLR, "steps": 3}, "steps must be None for StepLR, .* got 3"),
    ],
)
@pytest.mark.parametrize("function", ["optimizer", "from", "to"])
def test_an_option_without_effect_is_refused(function, options, message):
    recipe, names, params = torch_sgd(2, lr=0.1), {"w": "p0"}, {"w": jnp.ones(2)}
    if "scheduler" in options:
        options = {**options, "scheduler": options["scheduler"](recipe, 5)}
    optimizer = optax.sgd(0.1)
    calls = {
        "optimizer": lambda: optimizer_from_torch(recipe, names, **options),
        "from": lambda: state_from_torch(recipe, names, params, optimizer, **options),
        "to": lambda: state_to_torch((), recipe, names, **options),
    }
    with pytest.raises(ValueError, match=message):
        calls[function]()


def test_step_counts_that_only_torch_keeps():
    named = [("w", torch.ones(2, requires_grad=True))]
    recipe = torch.optim.RMSprop(named, lr=0.1)
    names, params = {"w": "w"}, {"w": jnp.ones(2)}
    optimizer = optimizer_from_torch(recipe, names)
    state = state_from_torch(recipe, names, params, optimizer)
    state_to_torch(state, recipe, names, step=7)
    assert recipe.state[named[0][1]]["step"] == 7
    state_to_torch(state, recipe, names)
    assert recipe.state[named[0][1]]["step"] == 7


def test_muon_with_both_layouts_in_a_group():
    named = [(name, torch.ones(4, 2, requires_grad=True)) for name in ("left", "right")]
    recipe = torch.optim.Muon(named, lr=0.1, weight_decay=0.0)
    names = {"left": "left", "right": Leaf("right", (1, 0))}
    optimizer = optimizer_from_torch(recipe, names)
    params = {"left": jnp.ones((4, 2)), "right": jnp.ones((2, 4))}
    state = optimizer.init(params)
    assert {"group0", "group0_transposed"} <= set(state.inner_states)
    updates, _ = optimizer.update(params, state, params)
    # The scale of the step is the larger of 1 and outputs / inputs.
    np.testing.assert_array_equal(updates["left"], updates["right"].T)
