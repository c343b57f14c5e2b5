"""Schedules of rates: equal bits at every step in both frameworks, and one compilation."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import regjax
import regtorch
from parity_tests.frameworks import FRAMEWORKS, JAX, Framework
from parity_tests.harness import compare_training
from parity_tests.models import PERCEPTRON, batches, sides
from parity_tests.tables import both_frameworks

ENDS = [(0.0, 0.5), (0.5, 0.0), (0.123, 0.9), (0.0, 1.0), (0.3, 0.3), (1e-30, 1e-20)]
STEPS = (1, 41, 1000, 10**6, 2**31 - 1)  # 41 * (1 / 41) is below 1 in float32


def formula(name: str, start: float, end: float, progress: np.ndarray) -> np.ndarray:
    waved = (1 - np.cos(math.pi * progress)) / 2
    return start + (end - start) * (progress if name == "linear_rate" else waved)


def rates(framework: Framework, name: str, start: float, end: float, steps: int, at: np.ndarray):
    """Return the rates at several steps, computed in one call."""
    schedule = getattr(framework.library, name)(start, end, steps)
    if framework is JAX:
        return np.asarray(jax.jit(jax.vmap(schedule))(at))
    return torch.func.vmap(schedule)(torch.from_numpy(at)).numpy()


@pytest.mark.parametrize("name", ["linear_rate", "cosine_rate"])
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.sample(3)
def test_the_same_bits_at_every_step(name, steps):
    at = np.unique(np.linspace(-3, min(steps * 1.1, 2**31 - 1), 10_000).astype(np.int32))
    at = np.r_[at, np.int32(steps - 1), np.int32(steps)]
    for start, end in ENDS:
        in_jax, in_torch = (
            rates(framework, name, start, end, steps, at) for framework in FRAMEWORKS
        )
        assert in_jax.dtype == in_torch.dtype == np.float32
        np.testing.assert_array_equal(in_jax.view(np.uint32), in_torch.view(np.uint32))
        expected = formula(name, start, end, np.clip(at / steps, 0, 1))
        np.testing.assert_allclose(in_jax, expected, atol=2e-7, rtol=1e-6)
        np.testing.assert_array_equal(in_jax[at <= 0], np.float32(start))
        np.testing.assert_array_equal(in_jax[at >= steps], np.float32(end))
        low, high = sorted([np.float32(start), np.float32(end)])
        assert low <= in_jax.min() <= in_jax.max() <= high


@both_frameworks
def test_steps_of_every_kind(framework: Framework):
    schedule = framework.library.cosine_rate(0.1, 0.6, 1000)
    expected = np.asarray(jax.jit(regjax.cosine_rate(0.1, 0.6, 1000))(100))
    for kind in (np.uint8, np.int8, np.int32, np.int64):
        with jax.enable_x64(kind is np.int64):
            assert framework.numpy(framework.traced(schedule)(kind(100))) == expected
    assert framework.numpy(schedule(100)) == expected
    assert framework.numpy(schedule(-5)) == np.float32(0.1)
    assert framework.numpy(schedule(2**40)) == np.float32(0.6)
    assert framework.numpy(framework.library.constant_rate(0.3)(7)) == np.float32(0.3)


@both_frameworks
def test_wrong_arguments_are_rejected(framework: Framework):
    library = framework.library
    for name in ("linear_rate", "cosine_rate"):
        schedule = getattr(library, name)
        with pytest.raises(ValueError, match=r"start must lie in \[0, 1\]; got -0.1"):
            schedule(-0.1, 0.5, 10)
        with pytest.raises(ValueError, match=r"end must lie in \[0, 1\]; got 1.5"):
            schedule(0.1, 1.5, 10)
        with pytest.raises(ValueError, match="steps must be at least 1"):
            schedule(0.1, 0.5, 0)
        with pytest.raises(TypeError):
            schedule(0.1, 0.5, 10.0)
    with pytest.raises(ValueError, match=r"rate must lie in \[0, 1\]; got 2"):
        library.constant_rate(2)
    rate = library.linear_rate(0.1, 0.5, 10)
    for step in (1.0, True, framework.array(np.array(1, np.float32))):
        with pytest.raises(TypeError, match="step must be an integer"):
            rate(step)
    with pytest.raises(ValueError, match="step must be a scalar"):
        rate(framework.array(np.zeros(2, np.int32)))


@both_frameworks
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((0.5, 5), (0.0, 0.125, 0.25, 0.375, 0.5)),
        ((0.1, 1), (0.0,)),
        ((0.1, 2), (0.0, 0.1)),
        ((0.0, 3), (0.0, 0.0, 0.0)),
    ],
)
def test_rates_of_depth(framework: Framework, arguments, expected):
    assert framework.library.depth_rates(*arguments) == expected


@pytest.mark.parametrize("depth", [1, 2, 12, 1000])
@pytest.mark.parametrize("rate", [0.1, 0.3, 1.0, 1 / 3])
def test_rates_of_depth_agree_with_timm_in_both_frameworks(rate, depth):
    in_jax = regjax.depth_rates(rate, depth)
    assert in_jax == regtorch.depth_rates(rate, depth)
    assert in_jax[0] == 0
    assert depth == 1 or in_jax[-1] == rate
    np.testing.assert_allclose(in_jax, torch.linspace(0, rate, depth), rtol=1e-6)
    paper = [rate * layer / depth for layer in range(1, depth + 1)]
    np.testing.assert_allclose(regjax.depth_rates(rate, depth + 1)[1:], paper, rtol=1e-15)
    assert regjax.depth_rates(rate, depth, shape="constant") == (rate,) * depth


@both_frameworks
def test_wrong_depths_are_rejected(framework: Framework):
    depth_rates = framework.library.depth_rates
    with pytest.raises(ValueError, match=r"rate must lie in \[0, 1\]"):
        depth_rates(1.1, 3)
    with pytest.raises(ValueError, match="depth must be at least 1"):
        depth_rates(0.1, 0)
    with pytest.raises(TypeError):
        depth_rates(0.1, 3.0)
    with pytest.raises(ValueError, match='shape must be "linear" or "constant"; got \'cubic\''):
        depth_rates(0.1, 3, shape="cubic")


def family(library: Any, x: Any, rate: Any, key: Any, step: Any) -> list[Any]:
    """Call each function with a rate, each with the key of its own site."""
    at = lambda site: library.site_key(key, step, site)
    return [
        library.dropout(x, rate, key=at("dropout")),
        library.drop_path(x, rate, key=at("drop_path")),
        library.gaussian_dropout(x, rate, key=at("gaussian")),
        library.alpha_dropout(x, rate, key=at("alpha")),
    ]


def test_a_changing_rate_needs_one_compilation():
    x = np.random.default_rng(0).normal(size=(32, 8)).astype(np.float32)
    in_jax, in_torch = (framework.library.cosine_rate(0.0, 0.5, 40) for framework in FRAMEWORKS)
    traces = []

    @jax.jit
    def run(x, step):
        traces.append(None)
        return family(regjax, x, in_jax(step), jax.random.key(0), step)

    for step in range(50):
        results = run(x, jnp.int32(step))
        twins = family(regtorch, torch.from_numpy(x), in_torch(step), regtorch.key(0), step)
        for array, twin in zip(results, twins, strict=True):
            word, twin_word = (np.asarray(y).view(np.uint32) for y in (array, twin.numpy()))
            np.testing.assert_array_equal(word, twin_word)
    assert len(traces) == 1


def test_training_with_a_changing_rate_agrees_at_every_step():
    """The harness compares masks bit for bit, then loss, gradients and parameters."""
    in_jax, in_torch = (framework.library.cosine_rate(0.0, 0.4, 40) for framework in FRAMEWORKS)
    traces = []

    def dropped(library: Any, x: Any, site: str, rate: Any, root: Any, step: Any) -> Any:
        at = lambda place: library.site_key(root, step, place)
        if site == "out":
            return library.dropout(x, rate, key=at("out"))
        x = library.gaussian_dropout(x, rate, key=at("noise"))
        return library.drop_path(x, rate, key=at("in"))

    def jax_loss(params: Any, batch: Any, step: Any) -> jax.Array:
        traces.append(None)
        drop = lambda x, site: dropped(regjax, x, site, in_jax(step), jax.random.key(0), step)
        return (PERCEPTRON.forward(params, batch[0], drop) ** 2).mean()

    def torch_loss(model: Any, batch: Any, step: int) -> torch.Tensor:
        drop = lambda x, site: dropped(regtorch, x, site, in_torch(step), regtorch.key(0), step)
        return (model(torch.from_numpy(batch[0]), drop) ** 2).mean()

    jax_side, torch_side = sides(
        PERCEPTRON, regjax.optim.sgd(0.1), lambda m: torch.optim.SGD(m.parameters(), 0.1)
    )
    comparison = compare_training(
        dataclasses.replace(jax_side, loss=jax_loss),
        dataclasses.replace(torch_side, loss=torch_loss),
        batches(50),
        PERCEPTRON.names,
    )
    comparison.raise_if_different()
    assert comparison.sites == {"in": 50, "out": 50}
    assert len(traces) == 1


def test_a_schedule_of_optax_is_a_rate():
    rate, traces = optax.linear_schedule(0.0, 0.5, 40), []

    @jax.jit
    def run(x, step):
        traces.append(None)
        return regjax.dropout(x, rate(step), key=jax.random.key(0))

    for step in (0, 20, 40, 60):
        y = np.asarray(run(jnp.ones((64, 64)), jnp.int32(step)))
        expected = regjax.dropout(jnp.ones((64, 64)), min(step, 40) / 80, key=jax.random.key(0))
        np.testing.assert_array_equal(y, expected)
    assert len(traces) == 1
