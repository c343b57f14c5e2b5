"""Gaussian dropout and noise: equal bits in both frameworks, and the statistics of Keras."""

from __future__ import annotations

import functools
import json
import math
import os
import subprocess
import sys
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

from parity_tests import tables
from parity_tests.frameworks import FRAMEWORKS, JAX, Framework
from parity_tests.tables import FLOATS, assert_same_bits, both_frameworks, inputs, words

DTYPES = [*FLOATS, np.dtype(ml_dtypes.float8_e5m2)]
AMOUNTS = [
    ("gaussian_dropout", 0.1),
    ("gaussian_dropout", 0.9),
    ("gaussian_noise", 0.123),
    ("gaussian_noise", 7.0),
]
each_amount = pytest.mark.parametrize(("name", "amount"), AMOUNTS)
each_name = pytest.mark.parametrize("name", ["gaussian_dropout", "gaussian_noise"])


SHAPE = (7, 33, 5)


def vjp(framework: Framework, name: str, amount: Any, x: np.ndarray, cotangent: np.ndarray):
    function = functools.partial(getattr(framework.library, name), key=framework.key(11))
    return tables.vjp(framework, function, amount, x, cotangent)


@pytest.mark.parametrize(
    ("name", "amount", "dtype"),
    [(*pair, DTYPES[0]) for pair in AMOUNTS]
    + [(*pair, dtype) for pair in AMOUNTS[::2] for dtype in DTYPES[1:]],
    ids=str,
)
@pytest.mark.sample(2)
def test_forward_and_backward_agree_in_every_bit(name, amount, dtype):
    for value in (amount, np.float32(amount)):
        with jax.enable_x64(dtype.itemsize == 8):
            runs = (vjp(framework, name, value, *inputs(SHAPE, dtype)) for framework in FRAMEWORKS)
            assert_same_bits(dtype, *runs)


@both_frameworks
@each_amount
def test_the_formula(framework: Framework, name, amount):
    x, cotangent = inputs(SHAPE)
    y, gradient = vjp(framework, name, amount, x, cotangent)
    n = framework.numpy(framework.library.normal(framework.key(11), x.shape)).astype(np.float64)
    if name == "gaussian_dropout":
        factor = 1 + math.sqrt(amount / (1 - amount)) * n
        expected, slope = x * factor, cotangent * factor
    else:
        expected, slope = x + amount * n, cotangent
    np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(gradient, slope, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "before",
    [lambda x: x * x, lambda x: 1 - x, lambda x: (x * 100).round() * (1 / 255)],
    ids=["square", "difference", "image"],
)
@each_amount
@pytest.mark.sample(7)
def test_fused_with_arithmetic_before_and_after(name, amount, before):
    """Equal bits require that XLA contracts no product with a sum."""
    x, bias = inputs(SHAPE)

    def run(framework: Framework) -> np.ndarray:
        function = getattr(framework.library, name)
        whole = lambda x, b: function(before(x), amount, key=framework.key(3)) + b
        whole = jax.jit(whole) if framework is JAX else whole
        return framework.numpy(whole(framework.array(x), framework.array(bias)))

    in_jax, in_torch = map(run, FRAMEWORKS)
    np.testing.assert_array_equal(words(in_jax), words(in_torch))


def test_noise_on_bytes_scaled_in_the_same_function():
    """LLVM infers that a product of converted integers is not NaN."""
    images = np.random.default_rng(0).integers(0, 256, (8, 16, 16), dtype=np.uint8)
    scaled = lambda x: (x.astype(np.float32) if isinstance(x, jax.Array) else x.float()) * (1 / 255)

    def run(framework: Framework) -> np.ndarray:
        whole = lambda x: framework.library.gaussian_noise(scaled(x), 0.1, key=framework.key(3))
        return framework.numpy(
            (jax.jit(whole) if framework is JAX else whole)(framework.array(images))
        )

    in_jax, in_torch = map(run, FRAMEWORKS)
    np.testing.assert_array_equal(words(in_jax), words(in_torch))


@both_frameworks
@each_name
def test_corners(framework: Framework, name):
    function = getattr(framework.library, name)
    x = framework.array(inputs(SHAPE)[0])
    assert function(x, 0) is x
    assert function(x, 0.5, deterministic=True) is x
    assert function(
        framework.array(np.zeros((0, 3), np.float32)), 0.5, key=framework.key(0)
    ).shape == (0, 3)
    assert function(framework.array(np.array(1, np.float32)), 0.5, key=framework.key(0)).shape == ()
    with pytest.raises(ValueError, match="key must be a random key in training"):
        function(x, 0.5)
    with pytest.raises(TypeError, match="x must be floating"):
        function(framework.array(np.ones(3, np.int32)), 0.5, key=framework.key(0))
    with pytest.raises(TypeError, match="x must be real for Gaussian noise; got dtype"):
        function(framework.array(np.ones(3, np.complex64)), 0.5, key=framework.key(0))
    with pytest.raises(TypeError, match="deterministic must be a boolean"):
        function(x, 0.5, key=framework.key(0), deterministic=1)
    bad = np.array([np.nan, np.inf, -np.inf], np.float32)
    y = framework.numpy(function(framework.array(bad), 0.1, key=framework.key(0)))
    np.testing.assert_array_equal(np.isfinite(y), False)


@both_frameworks
@pytest.mark.parametrize(
    ("name", "amount", "error", "message"),
    [
        ("gaussian_dropout", 1, ValueError, "rate must be below 1, where the variance is infinite"),
        ("gaussian_dropout", 1.5, ValueError, r"rate must lie in \[0, 1\]; got 1.5"),
        ("gaussian_dropout", math.nan, ValueError, "rate must lie in"),
        ("gaussian_dropout", "a", TypeError, "rate must be a real number"),
        ("gaussian_noise", -0.1, ValueError, "stddev must be finite and at least 0; got -0.1"),
        ("gaussian_noise", math.inf, ValueError, "stddev must be finite and at least 0; got inf"),
        ("gaussian_noise", math.nan, ValueError, "stddev must be finite and at least 0; got nan"),
        ("gaussian_noise", 1j, TypeError, "stddev must be a real number"),
        ("gaussian_noise", True, TypeError, "stddev must be a real number"),
    ],
)
def test_amounts_that_are_refused(framework: Framework, name, amount, error, message):
    x = framework.array(inputs(SHAPE)[0])
    for options in ({"key": framework.key(0)}, {"deterministic": True}):
        with pytest.raises(error, match=message):
            getattr(framework.library, name)(x, amount, **options)


@both_frameworks
@pytest.mark.parametrize(
    ("name", "amount", "finite"),
    [
        ("gaussian_dropout", 0.0, True),
        ("gaussian_dropout", 1.0, False),
        ("gaussian_dropout", -0.1, False),
        ("gaussian_dropout", math.nan, False),
        ("gaussian_noise", 0.0, True),
        ("gaussian_noise", -0.1, False),
        ("gaussian_noise", math.inf, False),
        ("gaussian_noise", math.nan, False),
    ],
)
def test_a_changing_amount_out_of_range_gives_nan(framework: Framework, name, amount, finite):
    x, _ = inputs(SHAPE)
    y, gradient = vjp(framework, name, np.float32(amount), x, x)
    if finite:
        np.testing.assert_array_equal(y, x)
        np.testing.assert_array_equal(gradient, x)
    else:
        assert np.isnan(y).all()


@both_frameworks
@each_name
def test_no_gradient_flows_to_a_changing_amount(framework: Framework, name):
    x = framework.array(inputs(SHAPE)[0])
    loss = lambda amount: (
        getattr(framework.library, name)(x, amount, key=framework.key(0)) ** 2
    ).sum()
    if framework is JAX:
        assert jax.grad(loss)(0.3) == 0
    else:
        assert not loss(framework.array(np.array(0.3, np.float32)).requires_grad_()).requires_grad


# Mean and standard deviation of the outputs of Keras at x = 2.
KERAS = """
import json, sys
import keras, numpy as np
x, outputs = np.full((512, 1024), 2.0, "float32"), {}
for name, amount in json.loads(sys.argv[1]):
    layer = {"gaussian_dropout": keras.layers.GaussianDropout,
             "gaussian_noise": keras.layers.GaussianNoise}[name](amount, seed=1)
    y = np.asarray(layer(x, training=True), np.float64)
    outputs[f"{name} {amount}"] = y.mean(), y.std()
print(json.dumps(outputs))
"""


def figures(name: str, amount: float, mean: float, std: float, size: int) -> list[float]:
    """Return the z-scores of mean and standard deviation of `size` outputs at x = 2."""
    true = 2 * math.sqrt(amount / (1 - amount)) if name == "gaussian_dropout" else amount
    return [(mean - 2) / true * math.sqrt(size), (std / true - 1) * math.sqrt(2 * size)]


@pytest.mark.slow
def test_mean_and_deviation_are_those_of_keras():
    """Test 18 figures at 5 sigma: a false alarm in 95,000 runs, and none with fixed seeds."""
    size, amounts = 512 * 1024, [(name, amount) for name, amount in AMOUNTS if amount < 1]
    result = subprocess.run(
        [sys.executable, "-c", KERAS, json.dumps(amounts)],
        env=os.environ | {"KERAS_BACKEND": "jax"},
        capture_output=True,
        text=True,
        check=True,
    )
    moments = json.loads(result.stdout.splitlines()[-1])
    for name, amount in amounts:
        mean, std = moments[f"{name} {amount}"]
        found = [figures(name, amount, mean, std, size)]
        for framework in FRAMEWORKS:
            x = framework.array(np.full((512, 1024), 2, np.float32))
            y = framework.numpy(getattr(framework.library, name)(x, amount, key=framework.key(0)))
            found.append(figures(name, amount, y.mean(dtype=float), y.std(dtype=float), size))
        assert np.abs(found).max() < 5, (name, amount, found)
