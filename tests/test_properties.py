"""Properties of both packages, over shapes, dtypes, rates, keys, trees and options that are drawn.

Hypothesis draws the examples, the same ones in every run; `PROPERTIES=thorough`, which
`make test-all` sets, draws twenty times as many.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import regjax
import regtorch
from parity_tests.compare import FLOAT64, assert_same_at_every_step
from parity_tests.optimizers.case import Case
from parity_tests.trajectories import WALKS, synthetic
from parity_tests.wings import JAX, TORCH, WINGS, Wing
from regjax._decay.paths import named_leaves

TIMES = 20 if os.environ.get("PROPERTIES") == "thorough" else 1
DTYPES = (np.float32, np.float16, ml_dtypes.bfloat16)


def examples(number: int) -> Callable[[Any], Any]:
    """How many examples a property is tried on."""
    return settings(
        max_examples=number * TIMES,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


seeds = st.integers(0, 2**32 - 1)
rates = st.one_of(st.sampled_from([0.0, 0.5, 1.0, 1e-9]), st.floats(0.01, 0.99))
shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)


@st.composite
def arrays(draw: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Values of every size, zeros, infinities and NaNs among them."""
    rng = np.random.default_rng(draw(seeds))
    values = rng.normal(size=shape) * 10.0 ** rng.integers(-3, 4, shape)
    special = rng.choice([0.0, -0.0, np.inf, np.nan], shape)
    return np.where(rng.random(shape) < 0.1, special, values).astype(draw(st.sampled_from(DTYPES)))


def bits_of(array: np.ndarray) -> np.ndarray:
    """The bits of each element; any NaN is as good as another."""
    array = np.where(np.isnan(array), np.zeros((), array.dtype) + np.nan, array)
    return array.view(f"u{array.dtype.itemsize}")


def axis(draw: Any, ndim: int) -> int:
    return draw(st.integers(-ndim, ndim - 1))


@st.composite
def calls(draw: Any) -> tuple[str, np.ndarray, float, dict[str, Any]]:
    """A function of the family with an input, a rate and options that fit it."""
    name = draw(st.sampled_from(sorted(OPTIONS)))
    shape = draw(shapes)
    smallest = {"drop_block": 3, "feature_dropout": 2, "feature_alpha_dropout": 2}.get(name, 1)
    assume(name == "dropout" or len(shape) >= smallest)
    rate = draw(st.floats(0.0, 3.0)) if name == "gaussian_noise" else draw(rates)
    return name, draw(arrays(shape)), rate, OPTIONS[name](draw, len(shape))


def of_drop_path(draw: Any, ndim: int) -> dict[str, Any]:
    del ndim
    return {
        "mode": draw(st.sampled_from(["batch", "row"])),
        "scale_by_keep": draw(st.booleans()),
    }


OPTIONS: dict[str, Callable[[Any, int], dict[str, Any]]] = {
    "dropout": lambda draw, ndim: {
        "broadcast_dims": sorted(draw(st.sets(st.integers(0, ndim - 1)))) if ndim else ()
    },
    "feature_dropout": lambda draw, ndim: {"channel_axis": draw(st.integers(1, ndim - 1))},
    "alpha_dropout": lambda draw, ndim: {},
    "feature_alpha_dropout": lambda draw, ndim: {"channel_axis": draw(st.integers(1, ndim - 1))},
    "gaussian_dropout": lambda draw, ndim: {},
    "gaussian_noise": lambda draw, ndim: {},
    "drop_path": of_drop_path,
    "variational_dropout": lambda draw, ndim: {"time_axis": axis(draw, ndim)},
}


def applied(wing: Wing, call: Any, seed: int, x: np.ndarray | None = None) -> Any:
    name, given_x, rate, options = call
    x = given_x if x is None else x
    function = getattr(wing.library, name)
    return wing.numpy(function(wing.array(x), rate, key=wing.key(seed), **options))


@examples(40)
@given(calls(), seeds)
def test_both_packages_compute_the_same_bits(call, seed):
    ours, theirs = (applied(wing, call, seed) for wing in WINGS)
    assert (
        (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape) == (call[1].dtype, call[1].shape)
    )
    np.testing.assert_array_equal(bits_of(ours), bits_of(theirs))


@pytest.mark.parametrize("wing", WINGS, ids=str)
@examples(15)
@given(call=calls())
def test_evaluation_returns_the_input(wing, call):
    name, x, rate, options = call
    x = wing.array(x)
    assert getattr(wing.library, name)(x, rate, deterministic=True, **options) is x


@pytest.mark.parametrize("wing", WINGS, ids=str)
@examples(12)
@given(shape=shapes, rate=rates, seed=seeds, dims=st.sets(st.integers(0, 3)))
def test_output_and_gradient_are_the_scaled_mask(wing, shape, rate, seed, dims):
    """So that the expectation is the input: kept elements are divided by their probability."""
    dims = tuple(dim for dim in sorted(dims) if dim < len(shape))
    x = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    drop = lambda x: wing.library.dropout(x, rate, key=wing.key(seed), broadcast_dims=dims)
    y, gradient = wing.vjp(drop, wing.array(x), wing.array(np.ones_like(x)))
    smaller = tuple(1 if dim in dims else size for dim, size in enumerate(shape))
    keep = wing.bernoulli(seed, 1 - rate, smaller)
    scale = np.float32(1) / np.float32(1 - rate) if rate < 1 else np.float32(0)
    expected = np.broadcast_to(np.where(keep, scale, np.float32(0)), shape)
    np.testing.assert_array_equal(wing.numpy(gradient), expected)
    np.testing.assert_array_equal(wing.numpy(y), expected * x)


@examples(10)
@given(keep_prob=st.floats(0.05, 0.95), seed=seeds, packed=st.booleans())
def test_a_mask_keeps_its_share(keep_prob, seed, packed):
    """Within five standard deviations, in one package: another test compares them."""
    draw = regtorch.packed_bernoulli if packed else regtorch.bernoulli
    mask = draw(regtorch.key(seed), keep_prob, (128, 256)).numpy()
    deviation = (keep_prob * (1 - keep_prob) / mask.size) ** 0.5
    assert abs(mask.mean() - keep_prob) < 5 * deviation + 2.0**-17


@examples(20)
@given(
    seed=seeds,
    shape=st.sampled_from([(64, 64), (4, 32, 40), (33, 7), (4096,), (0, 3)]),
    threshold=st.integers(0, 2**8),
    bits=st.integers(8, 20),
)
def test_both_packages_draw_the_same_packed_mask(seed, shape, threshold, bits):
    keep_prob = threshold / 2**8
    masks = [
        wing.numpy(wing.library.packed_bernoulli(wing.key(seed), keep_prob, shape, bits=bits))
        for wing in WINGS
    ]
    np.testing.assert_array_equal(*masks)


@examples(50)
@given(seed=seeds, step=st.integers(0, 2**64 - 1), site=st.text(max_size=20))
def test_site_keys_agree_and_differ_from_their_neighbours(seed, step, site):
    site = site.encode("utf-8", "ignore").decode()
    words = [
        wing.words(wing.library.site_key(wing.key(seed), wing_step(wing, step), site))
        for wing in WINGS
    ]
    assert words[0] == words[1]
    others = ((seed, step, site + "x"), (seed, step ^ 1, site), (seed ^ 1, step, site))
    assert words[1] not in [
        TORCH.words(regtorch.site_key(regtorch.key(a), b, c)) for a, b, c in others
    ]


def wing_step(wing: Wing, step: int) -> Any:
    return np.uint64(step) if wing is JAX else step


names = st.sampled_from(["weight", "bias", "scale", "kernel", "embedding", "lora_a", "norm"])
trees = st.recursive(
    st.lists(st.integers(1, 3), max_size=3).map(lambda shape: np.zeros(shape, np.float32)),
    lambda children: st.dictionaries(names, children, min_size=1, max_size=4),
    max_leaves=12,
).filter(lambda tree: isinstance(tree, dict))
patterns = st.sampled_from(
    ["**/weight", "**/bias", "norm/**", "*/kernel", "**/{bias,scale}", "**", "weight", "**/norm*/*"]
)
rules = st.one_of(
    patterns,
    st.lists(st.tuples(patterns, st.booleans()), min_size=1, max_size=4).map(
        lambda pairs: [*pairs, ("**", True)]
    ),
)


def module_of(tree: Any) -> torch.nn.Module:
    """The tree as a module without layers, so that only paths and shapes count."""
    module = torch.nn.Module()
    for name, value in tree.items():
        if isinstance(value, dict):
            module.add_module(name, module_of(value))
        else:
            module.register_parameter(name, torch.nn.Parameter(torch.from_numpy(value)))
    return module


def outcome(decide: Callable[[], Any]) -> Any:
    try:
        return decide()
    except ValueError:
        return "refused"


@examples(120)
@given(tree=trees, rule=rules)
def test_rules_choose_the_same_leaves(tree, rule):
    ours = outcome(lambda: dict(named_leaves(regjax.decay_mask(tree, rule))))
    theirs = outcome(lambda: regtorch.decay_mask(module_of(tree), rule))
    if theirs != "refused":
        theirs = {name.replace(".", "/"): decision for name, decision in theirs.items()}
    assert ours == theirs


@pytest.mark.parametrize("name", ["linear_rate", "cosine_rate"])
@examples(8)
@given(
    start=st.floats(0, 1),
    end=st.floats(0, 1),
    steps=st.integers(1, 2**31 - 1),
    at=st.lists(st.integers(0, 2**31 - 1), min_size=5, max_size=5),
)
def test_schedules_have_the_same_bits(name, start, end, steps, at):
    at = np.array([*at, *(number % (steps + 1) for number in at)], np.int32)
    ours = jax.jit(jax.vmap(getattr(regjax, name)(start, end, steps)))(jnp.asarray(at))
    theirs = torch.func.vmap(getattr(regtorch, name)(start, end, steps))(torch.from_numpy(at))
    np.testing.assert_array_equal(np.asarray(ours).view("u4"), theirs.numpy().view("u4"))


positive = lambda low, high: st.floats(np.log(low), np.log(high)).map(lambda x: float(np.exp(x)))
betas = st.tuples(st.floats(0, 0.99), st.floats(0.5, 0.9999))
FLAGS = {"maximize": st.booleans(), "weight_decay": st.just(0.0) | st.floats(0, 0.5)}
MOMENTS = {"betas": betas, "eps": positive(1e-8, 1e-2)}
OPTIMIZERS: dict[str, dict[str, st.SearchStrategy]] = {
    "SGD": {"momentum": st.just(0.0) | st.floats(0.1, 0.99), "dampening": st.floats(0, 0.9)},
    "Adam": MOMENTS | {"amsgrad": st.booleans(), "decoupled_weight_decay": st.booleans()},
    "AdamW": MOMENTS | {"amsgrad": st.booleans()},
    "NAdam": MOMENTS | {"momentum_decay": st.floats(0, 0.01)},
    "RAdam": MOMENTS | {"decoupled_weight_decay": st.booleans()},
    "Adamax": MOMENTS,
    "RMSprop": {
        "alpha": st.floats(0.1, 0.999),
        "eps": positive(1e-6, 1e-2),
        "momentum": st.just(0.0) | st.floats(0.1, 0.9),
        "centered": st.booleans(),
    },
    "Adagrad": {"lr_decay": st.floats(0, 0.1), "eps": positive(1e-8, 1e-2)},
    "Adadelta": {"rho": st.floats(0.1, 0.99), "eps": positive(1e-6, 1e-2)},
    "ASGD": {"lambd": st.floats(0, 0.1), "alpha": st.floats(0.1, 1.0), "t0": st.floats(0, 20)},
}
PROBLEM = synthetic("float64", {"dense/bias": (3,), "dense/kernel": (2, 3)}, steps=12)


@st.composite
def cases(draw: Any) -> Case:
    """An optimizer of torch with options drawn at random."""
    name = draw(st.sampled_from(sorted(OPTIMIZERS)))
    options = {option: draw(values) for option, values in (OPTIMIZERS[name] | FLAGS).items()}
    options["lr"] = draw(positive(1e-4, 0.1))
    if name == "SGD" and not options["dampening"] and options["momentum"]:
        options["nesterov"] = draw(st.booleans())
    return Case(name, name, options)


@examples(20)
@given(case=cases())
def test_an_optimizer_takes_the_steps_of_torch(case):
    ours, theirs = (WALKS[side](case, PROBLEM) for side in ("jax", "torch"))
    assert_same_at_every_step(ours, theirs, FLOAT64, names=("regjax", "torch"))
