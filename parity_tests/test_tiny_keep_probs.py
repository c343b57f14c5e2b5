"""Keep probabilities near the resolution of a mask, 2**-23, preserve the mean of the input."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest

from parity_tests.frameworks import FRAMEWORKS, JAX, Framework
from parity_tests.tables import both_frameworks
from regjax import equinox, haiku, linen, nnx

LUCKY = 780_233  # element 0 of this key is below every threshold, element 1 is not
RATES = [1 - 1e-10, 1 - 1.5 * 2**-23, 1 - 1e-5, 0.9999, 0.9]


def attend(library, block_size):
    """Return attention of two rows, each of which has one key."""

    def call(x, rate, key):
        query = x.reshape(2, 1, 1, 2)
        options = {"dropout_rng": key, "dropout_rate": rate, "block_size": block_size}
        return library.dot_product_attention(query, query, query, **options)[:, 0, 0, 0]

    return call


def family(framework: Framework):
    """Return functions of x (2, 2) whose two results depend on elements 0 and 1 of the mask."""
    library, ids = framework.library, framework.array(np.arange(2))
    shared = {"broadcast_dims": (1,)}
    return {
        "dropout": lambda x, rate, key: library.dropout(x, rate, key=key, **shared)[:, 0],
        "variational": lambda x, rate, key: library.variational_dropout(x, rate, key=key)[:, 0],
        "drop_path": lambda x, rate, key: library.drop_path(x, rate, key=key)[:, 0],
        "feature": lambda x, rate, key: library.feature_dropout(x, rate, key=key)[0],
        "drop_connect": lambda x, rate, key: library.drop_connect(x, rate, key=key)[0],
        "alpha": lambda x, rate, key: library.alpha_dropout(x, rate, key=key, **shared)[:, 0],
        "feature_alpha": lambda x, rate, key: library.feature_alpha_dropout(x, rate, key=key)[0],
        "embedding": lambda x, rate, key: library.embedding_dropout(x, ids, rate, key=key)[:, 0],
        "attention": attend(library, None),
        "attention-blockwise": attend(library, 1),
    }


LAYERS = {
    "linen": lambda x, rate, key: linen.Dropout(0.0, deterministic=False).apply(
        {}, x, rng=key, rate=rate
    )[0],
    "nnx": lambda x, rate, key: nnx.Dropout(0.0)(x, rngs=key, rate=rate)[0],
    "equinox": lambda x, rate, key: equinox.Dropout(rate)(x, key=key)[0],
    "haiku": lambda x, rate, key: haiku.dropout(key, rate, x)[0],
}
CASES = [(framework, *each) for framework in FRAMEWORKS for each in family(framework).items()]
CASES += [(JAX, *each) for each in LAYERS.items()]
IDS = [f"{framework}-{name}" for framework, name, _ in CASES]


@pytest.mark.parametrize(("framework", "name", "function"), CASES, ids=IDS)
@pytest.mark.sample(5)
def test_the_mean_is_preserved(framework: Framework, name, function):
    """Element 0 is kept and element 1 dropped; weighted by probability, they give the mean."""
    value = 0.0 if "alpha" in name else 1.0  # the mean that alpha dropout preserves
    x = framework.array(np.full((2, 2), value, np.float32))
    at_number = functools.partial(function, x, key=framework.key(LUCKY))
    at_tracer = framework.traced(at_number)
    # One program serves all traced rates, while each number needs its own.
    numbers = [(at_number, rate) for rate in RATES[:2]]
    for drop, rate in numbers + [(at_tracer, np.float32(rate)) for rate in RATES]:
        p = math.ceil(float(np.float32(1 - rate)) * 2**23) / 2**23
        kept, dropped = (float(each) for each in drop(rate))
        assert (kept != dropped) == (p > 0)
        mean = p * kept + (1 - p) * dropped if p else value  # nothing is kept at a rate of 1
        assert mean == pytest.approx(value, rel=2**-10, abs=2**-10)


@both_frameworks
def test_ordinary_scales_are_the_inverse_of_the_keep_probability(framework: Framework):
    for rate in (0.1, 0.5, 0.999, 1 - 2**-12):
        y = framework.dropout(np.ones(1, np.float32), rate, seed=LUCKY)
        assert y[0] == np.float32(1) / np.float32(1 - rate)


@both_frameworks
def test_a_subnormal_probability_keeps_nothing_and_the_smallest_normal_one_does(
    framework: Framework,
):
    smallest = np.finfo(np.float32).smallest_normal
    for keep_prob, is_kept in ((smallest, True), (np.nextafter(smallest, np.float32(0)), False)):
        draw = lambda p: framework.library.bernoulli(framework.key(LUCKY), p, (1,))
        assert framework.numpy(draw(float(keep_prob))).item() is is_kept
        assert framework.numpy(framework.traced(draw)(keep_prob)).item() is is_kept
