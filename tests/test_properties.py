"""Properties of both packages for random shapes, dtypes, rates, keys, trees and options.

Hypothesis draws the same examples in every run; with `PROPERTIES=thorough`, which `make test-all`
sets, it draws twenty times as many.
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
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import regjax
import regtorch
from parity_tests.compare import FLOAT64, assert_same_at_every_step
from parity_tests.frameworks import FRAMEWORKS, JAX, TORCH, Framework
from parity_tests.instructions import float16_error
from parity_tests.optimizers.case import Case
from parity_tests.trajectories import WALKS, synthetic
from regjax._decay.paths import named_leaves
from regshared.globs import matches

TIMES = 20 if os.environ.get("PROPERTIES") == "thorough" else 1
# XLA compiles float16 only if the CPU has its conversions.
DTYPES = (np.float32, *([] if float16_error() else [np.float16]), ml_dtypes.bfloat16)


def examples(number: int) -> Callable[[Any], Any]:
    """Return the settings with a number of examples."""
    return settings(
        max_examples=number * TIMES,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


seeds = st.integers(0, 2**32 - 1)
rates = st.one_of(st.sampled_from([0.0, 0.5, 1.0, 1e-9]), st.floats(0.01, 0.99))
shapes_from = lambda ndim: st.lists(st.integers(0, 5), min_size=ndim, max_size=4).map(tuple)
shapes = shapes_from(0)


@st.composite
def arrays(draw: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Draw values of every magnitude, including zeros, infinities and NaNs."""
    rng = np.random.default_rng(draw(seeds))
    values = rng.normal(size=shape) * 10.0 ** rng.integers(-3, 4, shape)
    special = rng.choice([0.0, -0.0, np.inf, np.nan], shape)
    return np.where(rng.random(shape) < 0.1, special, values).astype(draw(st.sampled_from(DTYPES)))


def bits_of(array: np.ndarray) -> np.ndarray:
    """Return the bits of each element, with one representation of NaN."""
    array = np.where(np.isnan(array), np.zeros((), array.dtype) + np.nan, array)
    return array.view(f"u{array.dtype.itemsize}")


@st.composite
def calls(draw: Any, name: str) -> tuple[str, np.ndarray, float, dict[str, Any]]:
    """Draw a function of the family with a valid input, rate and options."""
    shape = draw(shapes_from(DIMENSIONS.get(name, 1)))
    rate = draw(RATES.get(name, rates))
    drawn = {option: draw(values(shape)) for option, values in OPTIONS[name].items()}
    return name, draw(arrays(shape)), rate, drawn


RATES = {"gaussian_noise": st.floats(0.0, 3.0), "gaussian_dropout": st.floats(0.0, 0.99)}
# An input with fewer dimensions is an error.
DIMENSIONS = {"dropout": 0, "drop_block": 3, "feature_dropout": 2, "feature_alpha_dropout": 2}
Options = dict[str, Callable[[tuple[int, ...]], st.SearchStrategy]]
flag = lambda shape: st.booleans()
an_axis = lambda shape: st.integers(-len(shape), len(shape) - 1)
a_later_axis = lambda shape: st.integers(1, len(shape) - 1)
some_axes = lambda shape: st.sets(st.sampled_from(range(len(shape)))).map(sorted)
OPTIONS: dict[str, Options] = {
    "dropout": {"broadcast_dims": lambda shape: some_axes(shape) if shape else st.just(())},
    "feature_dropout": {"channel_axis": a_later_axis},
    "alpha_dropout": {},
    "feature_alpha_dropout": {"channel_axis": a_later_axis},
    "gaussian_dropout": {},
    "gaussian_noise": {},
    "drop_path": {"mode": lambda shape: st.sampled_from(["batch", "row"]), "scale_by_keep": flag},
    "drop_block": {
        "block_size": lambda shape: st.integers(1, 4),
        "channel_axis": a_later_axis,
        "share_channels": flag,
        "scale_by_keep": flag,
        "with_noise": flag,
    },
    "drop_connect": {"rule": lambda shape: st.sampled_from(["**", "default"])},
    "embedding_dropout": {
        "ids": lambda shape: seeds.map(
            lambda seed: np.random.default_rng(seed).integers(0, 4, shape[:-1])
        )
    },
    "variational_dropout": {"time_axis": an_axis},
}


def apply(framework: Framework, call: Any, **key_or_flag: Any) -> tuple[Any, Any]:
    """Return the input of a call, converted for the package, and the output."""
    name, x, rate, options = call
    function, x = getattr(framework.library, name), framework.array(x)
    if name == "embedding_dropout":
        ids = framework.array(options["ids"].astype(np.int32))
        return x, function(x, ids, rate, **key_or_flag)
    if name == "drop_connect":
        return x, function({"kernel": x}, rate, **options, **key_or_flag)["kernel"]
    return x, function(x, rate, **options, **key_or_flag)


@pytest.mark.parametrize("name", OPTIONS)
@examples(5)
@given(data=st.data(), seed=seeds)
@pytest.mark.sample(2)
def test_both_packages_compute_the_same_bits(name, data, seed):
    call = data.draw(calls(name))
    in_jax, in_torch = (
        framework.numpy(apply(framework, call, key=framework.key(seed))[1])
        for framework in FRAMEWORKS
    )
    assert (
        (in_jax.dtype, in_jax.shape)
        == (in_torch.dtype, in_torch.shape)
        == (call[1].dtype, call[1].shape)
    )
    np.testing.assert_array_equal(bits_of(in_jax), bits_of(in_torch))


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("framework", FRAMEWORKS, ids=str)
@examples(2)
@given(data=st.data())
def test_evaluation_returns_the_input(framework, name, data):
    call = data.draw(calls(name))
    x, y = apply(framework, call, deterministic=True)
    assert y is x


@pytest.mark.parametrize("framework", FRAMEWORKS, ids=str)
@examples(12)
@given(shape=shapes, rate=rates, seed=seeds, dims=st.sets(st.integers(0, 3)))
def test_output_and_gradient_are_the_scaled_mask(framework, shape, rate, seed, dims):
    """Kept elements are divided by their probability, so that the expectation is the input."""
    dims = tuple(dim for dim in sorted(dims) if dim < len(shape))
    x = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    drop = lambda x: framework.library.dropout(
        x, rate, key=framework.key(seed), broadcast_dims=dims
    )
    y, gradient = framework.vjp(drop, framework.array(x), framework.array(np.ones_like(x)))
    smaller = tuple(1 if dim in dims else size for dim, size in enumerate(shape))
    keep = framework.bernoulli(seed, 1 - rate, smaller)
    scale = np.float32(1) / np.float32(1 - rate) if rate < 1 else np.float32(0)
    expected = np.broadcast_to(np.where(keep, scale, np.float32(0)), shape)
    np.testing.assert_array_equal(framework.numpy(gradient), expected)
    np.testing.assert_array_equal(framework.numpy(y), expected * x)


@examples(10)
@given(keep_prob=st.floats(0.05, 0.95), seed=seeds, packed=st.booleans())
def test_a_mask_keeps_the_expected_fraction(keep_prob, seed, packed):
    """Within five standard deviations; one package suffices, since another test compares both."""
    draw = regtorch.packed_bernoulli if packed else regtorch.bernoulli
    mask = draw(regtorch.key(seed), keep_prob, (128, 256)).numpy()
    deviation = (keep_prob * (1 - keep_prob) / mask.size) ** 0.5
    assert abs(mask.mean() - keep_prob) < 5 * deviation + 2.0**-17


@examples(20)
@given(
    seed=seeds,
    shape=st.sampled_from([(64, 64), (4, 32, 40), (33, 7), (4096,), (0, 3)]),
    threshold=st.integers(0, 2**8),
    bits=st.sampled_from([8, 13, 20]),  # each example is compiled
)
def test_both_packages_draw_the_same_packed_mask(seed, shape, threshold, bits):
    keep_prob = threshold / 2**8
    masks = [
        framework.numpy(
            framework.library.packed_bernoulli(framework.key(seed), keep_prob, shape, bits=bits)
        )
        for framework in FRAMEWORKS
    ]
    np.testing.assert_array_equal(*masks)


@examples(50)
@given(seed=seeds, step=st.integers(0, 2**64 - 1), site=st.text(max_size=20))
def test_site_keys_agree_and_differ_for_neighboring_sites(seed, step, site):
    site = site.encode("utf-8", "ignore").decode()
    words = [
        framework.words(
            framework.library.site_key(framework.key(seed), as_step(framework, step), site)
        )
        for framework in FRAMEWORKS
    ]
    assert words[0] == words[1]
    others = ((seed, step, site + "x"), (seed, step ^ 1, site), (seed ^ 1, step, site))
    assert words[1] not in [
        TORCH.words(regtorch.site_key(regtorch.key(a), b, c)) for a, b, c in others
    ]


def as_step(framework: Framework, step: int) -> Any:
    """Return a step of 64 bits, which JAX takes as a number of NumPy."""
    return np.uint64(step) if framework is JAX else step


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


def globs_of(path: str) -> set[str]:
    """Return globs that match a path, from a single leaf to all leaves."""
    *owners, name = path.split("/")
    some = {"**", path, name, f"**/{name[:2]}*", "/".join([*"*" * len(owners), name])}
    return some | {f"{owner}/**" for owner in owners[:1]}


@st.composite
def trees_with_rules(draw: Any) -> tuple[Any, Any]:
    """Draw a tree and a rule whose globs all decide a leaf; other rules are mostly errors."""
    tree = draw(trees)
    paths = [path for path, _ in named_leaves(tree)]
    globs = st.sampled_from(sorted(set[str]().union(*map(globs_of, paths))))
    if draw(st.booleans()):
        return tree, draw(globs)
    pairs = []
    for glob in draw(st.lists(globs.filter(lambda glob: glob != "**"), min_size=2, max_size=6)):
        if rest := [path for path in paths if not matches(glob, path)]:
            pairs += [(glob, draw(st.booleans()))] * (len(rest) < len(paths))
            paths = rest
    return tree, [*pairs, ("**", True)]


def module_of(tree: Any) -> torch.nn.Module:
    """Return the tree as a module without layers, for which only paths and shapes matter."""
    module = torch.nn.Module()
    for name, value in tree.items():
        if isinstance(value, dict):
            module.add_module(name, module_of(value))
        else:
            module.register_parameter(name, torch.nn.Parameter(torch.from_numpy(value)))
    return module


def decisions(tree: Any, rule: Any) -> list[dict[str, bool]]:
    """Return the decisions of each package."""
    in_torch = regtorch.decay_mask(module_of(tree), rule)
    return [
        dict(named_leaves(regjax.decay_mask(tree, rule))),
        {name.replace(".", "/"): decision for name, decision in in_torch.items()},
    ]


@examples(100)
@given(trees_with_rules())
def test_rules_choose_the_same_leaves(tree_with_rule):
    in_jax, in_torch = decisions(*tree_with_rule)
    assert in_jax == in_torch


@examples(30)
@given(tree=trees, rule=rules)
def test_both_packages_reject_the_same_rules(tree, rule):
    try:
        in_jax, in_torch = decisions(tree, rule)
    except ValueError:
        for decide, params in ((regjax.decay_mask, tree), (regtorch.decay_mask, module_of(tree))):
            with pytest.raises(ValueError, match=r"^rule must "):
                decide(params, rule)
    else:
        assert in_jax == in_torch


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
    in_jax = jax.jit(jax.vmap(getattr(regjax, name)(start, end, steps)))(jnp.asarray(at))
    in_torch = torch.func.vmap(getattr(regtorch, name)(start, end, steps))(torch.from_numpy(at))
    np.testing.assert_array_equal(np.asarray(in_jax).view("u4"), in_torch.numpy().view("u4"))


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
    """Draw an optimizer of torch with random options."""
    name = draw(st.sampled_from(sorted(OPTIMIZERS)))
    options = {option: draw(values) for option, values in (OPTIMIZERS[name] | FLAGS).items()}
    options["lr"] = draw(positive(1e-4, 0.1))
    if name == "SGD" and not options["dampening"] and options["momentum"]:
        options["nesterov"] = draw(st.booleans())
    return Case(name, name, options)


@examples(8)
@given(case=cases())
def test_an_optimizer_takes_the_steps_of_torch(case):
    in_jax, in_torch = (WALKS[side](case, PROBLEM) for side in ("jax", "torch"))
    assert_same_at_every_step(in_jax, in_torch, FLOAT64, names=("regjax", "torch"))
