"""Dropout of words: equal bits in both frameworks, as in dropout of the rows of the table."""

from __future__ import annotations

import functools
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
import torch

from parity_tests import reference
from parity_tests.frameworks import FRAMEWORKS, JAX, TORCH, Framework
from parity_tests.tables import both_frameworks

CASES = [
    (np.dtype(np.float32), 0.1),
    (np.dtype(np.float64), 0.123),
    (np.dtype(ml_dtypes.bfloat16), 0.5),
    (np.dtype(np.float16), 0.9),
]
VOCABULARY = 30


def table(dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(VOCABULARY, 5)).astype(dtype)


def words(shape: tuple[int, ...] = (6, 11), dtype: Any = np.int32) -> np.ndarray:
    return np.random.default_rng(1).integers(0, VOCABULARY, shape).astype(dtype)


def of_words(framework: Framework, ids: np.ndarray, rate: Any, weights: Any) -> Any:
    """Return the rows of the table for each word, with dropout of words."""
    there = framework.array(ids)
    rows = weights[there.long() if framework is TORCH else there]
    return framework.library.embedding_dropout(rows, there, rate, key=framework.key(11))


def of_rows(framework: Framework, ids: np.ndarray, rate: Any, weights: Any) -> Any:
    """Return the same by dropout of the whole table."""
    there = framework.array(ids)
    dropped = framework.library.dropout(weights, rate, key=framework.key(11), broadcast_dims=(1,))
    return dropped[there.long() if framework is TORCH else there]


@pytest.mark.parametrize(("dtype", "rate"), CASES, ids=str)
@pytest.mark.sample(2)
def test_forward_and_backward_are_those_of_dropout_of_the_table(dtype, rate):
    """Results are bitwise identical; gradients sum rows in another order and agree to rounding."""
    ids = words()
    ct = np.random.default_rng(2).normal(size=(*ids.shape, 5)).astype(dtype)
    with jax.enable_x64(dtype.itemsize == 8):
        results = [
            [
                *map(
                    framework.numpy,
                    framework.vjp(functools.partial(of, framework, ids, rate), *arrays),
                )
            ]
            for framework in FRAMEWORKS
            for arrays in [[framework.array(array) for array in (table(dtype), ct)]]
            for of in (of_words, of_rows)
        ]
    expected, gradient = results[0]
    keep = reference.bernoulli((0, 11), 1 - rate, (VOCABULARY, 1))[ids]
    np.testing.assert_array_equal(expected != 0, np.broadcast_to(keep, expected.shape))
    limit = 20 * float(ml_dtypes.finfo(dtype).eps)
    for y, dw in results[1:]:
        assert y.dtype == dtype
        np.testing.assert_array_equal(y, expected)
        difference = (dw.astype(np.float64) - gradient.astype(np.float64)).ravel()
        assert np.linalg.norm(difference) <= limit * np.linalg.norm(gradient.astype(np.float64))


@both_frameworks
@pytest.mark.parametrize("shape", [(), (7,), (2, 3, 4), (0,)], ids=str)
def test_ids_of_any_shape(framework: Framework, shape):
    ids = words(shape)
    weights = framework.array(table())
    y = framework.numpy(of_words(framework, ids, 0.5, weights))
    np.testing.assert_array_equal(y, framework.numpy(of_rows(framework, ids, 0.5, weights)))
    assert y.shape == (*shape, 5)


@both_frameworks
@pytest.mark.parametrize("dtype", [np.int8, np.int64, np.uint8], ids=str)
def test_ids_of_any_integer_type(framework: Framework, dtype):
    with jax.enable_x64(True):
        weights = framework.array(table())
        expected = framework.numpy(of_words(framework, words(), 0.5, weights))
        y = framework.numpy(of_words(framework, words(dtype=dtype), 0.5, weights))
        np.testing.assert_array_equal(y, expected)


@both_frameworks
def test_no_array_has_the_size_of_the_vocabulary(framework: Framework):
    """The ids are so large that no memory could hold a mask of the table."""
    ids = np.array([2**31 - 1, 2**40 + 5, 2**62, *range(2**40 + 6, 2**40 + 40)])
    with jax.enable_x64(True):
        x = framework.array(np.ones((len(ids), 3), np.float32))
        y = framework.library.embedding_dropout(x, framework.array(ids), 0.5, key=framework.key(4))
        keep = reference.bernoulli_at((0, 4), 0.5, ids)
        np.testing.assert_array_equal(framework.numpy(y), np.repeat(2 * keep[:, None], 3, axis=1))


@both_frameworks
def test_a_word_is_dropped_everywhere_or_nowhere(framework: Framework):
    ids = words((40, 50))
    x = framework.array(np.random.default_rng(3).normal(size=(40, 50, 4)).astype(np.float32))
    y = framework.numpy(
        framework.library.embedding_dropout(x, framework.array(ids), 0.5, key=framework.key(0))
    )
    fates = [set((y[ids == word] != 0).ravel()) for word in range(VOCABULARY)]
    assert all(len(fate) == 1 for fate in fates)
    assert {True} in fates
    assert {False} in fates
    # Planted: dropout of positions instead of words.
    z = framework.numpy(
        framework.library.dropout(x, 0.5, key=framework.key(0), broadcast_dims=(2,))
    )
    assert any(len(set((z[ids == word] != 0).ravel())) == 2 for word in range(VOCABULARY))


@both_frameworks
def test_a_traced_rate_gives_the_result_of_the_number(framework: Framework):
    weights = framework.array(table())
    at = framework.traced(lambda rate: of_words(framework, words(), rate, weights))
    for rate in (0.0, 0.25, 0.5, 1.0):  # their arithmetic is exact
        number = framework.numpy(of_words(framework, words(), rate, weights))
        np.testing.assert_array_equal(framework.numpy(at(np.float32(rate))), number)
    assert np.isnan(framework.numpy(at(np.float32(2)))).all()


@both_frameworks
def test_observers_receive_the_mask_of_the_words(framework: Framework):
    drawn = []
    ids = words()
    with framework.library.observing(drawn.append):
        y = framework.numpy(of_words(framework, ids, 0.5, framework.array(table())))
        jax.effects_barrier()
    mask = np.asarray(drawn[0].mask)
    assert mask.shape == (*ids.shape, 1)
    np.testing.assert_array_equal(np.broadcast_to(mask, y.shape), y != 0)


@both_frameworks
def test_the_corners_are_those_of_dropout(framework: Framework):
    drop = functools.partial(framework.library.embedding_dropout, ids=framework.array(words((8,))))
    x = framework.array(np.full((8, 4), np.nan, np.float32))
    assert drop(x, rate=0) is x
    assert drop(x, rate=0.5, deterministic=True) is x
    assert not framework.numpy(drop(x, rate=1)).any()
    assert (framework.numpy(drop(x, rate=0.5, key=framework.key(0))) == 0).any()


@both_frameworks
@pytest.mark.parametrize(
    ("ids", "options", "error", "message"),
    [
        (np.array([0, -1]), {}, ValueError, "ids must not be negative; got -1"),
        (np.array([0.0, 1.0], np.float32), {}, TypeError, "ids must be .*integers.*float32"),
        (np.array([True, False]), {}, TypeError, "ids must be .*integers.*bool"),
        (np.array([0, 1, 2]), {}, ValueError, r"\(2,\); got \(3,\) with x of shape \(2, 4\)"),
        (np.array([0, 1]), {"rate": 2}, ValueError, r"rate must lie in \[0, 1\]; got 2"),
        (np.array([0, 1]), {"key": None}, ValueError, "key must be a random key in training"),
    ],
)
def test_wrong_arguments_are_refused(framework: Framework, ids, options, error, message):
    options = {"rate": 0.5, "key": framework.key(0), **options}
    x = framework.array(np.ones((2, 4), np.float32))
    with pytest.raises(error, match=message):
        framework.library.embedding_dropout(x, framework.array(ids), **options)


def test_ids_are_not_checked_under_transforms():
    """A negative id is a word of its own."""
    ids = np.array([[3, -1, -1], [-1, 3, 2]])
    x = np.ones((2, 3, 4), np.float32)

    def run(framework: Framework, transform: Any) -> np.ndarray:
        drop = functools.partial(
            framework.library.embedding_dropout, rate=0.5, key=framework.key(0)
        )
        return framework.numpy(transform(drop)(framework.array(x), framework.array(ids)))

    in_jax, in_torch = run(JAX, jax.jit), run(TORCH, torch.func.vmap)
    for y in (in_jax, in_torch):
        assert len({tuple(row) for row in y[ids == -1]}) == 1
    np.testing.assert_array_equal(in_jax[ids >= 0], in_torch[ids >= 0])
