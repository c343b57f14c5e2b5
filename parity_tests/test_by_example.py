"""Masks by example: however a batch is split, both packages draw the bits of the whole batch."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parity_tests.frameworks import FRAMEWORKS, JAX, TORCH, Framework
from parity_tests.tables import both_frameworks

BATCH = np.random.default_rng(0).normal(size=(12, 3, 4, 5)).astype(np.float32)
# Every function that takes a sampler, of a batch. Those that share the mask of all examples refuse.
FUNCTIONS: dict[str, dict[str, Any]] = {
    "dropout": {},
    "dropout of shared dimensions": {"broadcast_dims": (1, 3)},
    "alpha_dropout": {},
    "feature_dropout": {"channel_axis": -1},
    "feature_alpha_dropout": {"channel_axis": 1},
    "drop_path": {},
    "variational_dropout": {},
}
SPLITS = {
    "whole": [range(12)],
    "micro-batches of 1": [[i] for i in range(12)],
    "micro-batches of 4": [range(4), range(4, 8), range(8, 12)],
    "ragged": [range(5), range(5, 10), range(10, 12)],
    "shuffled": [[7, 0, 11, 2], [5, 4, 10, 9], [1, 3, 8, 6]],
    "repeated, as padding": [[3, 3, 3, 0]],
}


def call(framework: Framework, name: str, x: np.ndarray, sampler: Any, **options: Any) -> Any:
    """Return the result of a function of a batch, with the key of seed 4."""
    options = {"key": framework.key(4), "sampler": sampler} | FUNCTIONS.get(name, {}) | options
    function = getattr(framework.library, name.partition(" ")[0])
    return framework.numpy(function(framework.array(x), 0.4, **options))


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.sample(2)
def test_every_split_of_a_batch_draws_the_masks_of_the_whole(name):
    whole = [call(each, name, BATCH, each.library.bernoulli) for each in FRAMEWORKS]
    np.testing.assert_array_equal(*whole)
    for framework in FRAMEWORKS:
        for parts in SPLITS.values():
            for part in map(list, parts):
                sampler = framework.library.by_example(framework.array(np.array(part)))
                y = call(framework, name, BATCH[part], sampler)
                np.testing.assert_array_equal(y, whole[0][part])


@both_frameworks
def test_the_number_of_examples_does_not_matter(framework: Framework):
    """A batch of 12 rows has the masks of the first rows of a longer one."""
    y = call(framework, "dropout", BATCH, framework.library.by_example(np.arange(12)))
    longer = np.concatenate([BATCH, BATCH])
    whole = call(framework, "dropout", longer, framework.library.bernoulli)
    np.testing.assert_array_equal(y, whole[:12])


@both_frameworks
@pytest.mark.parametrize("axis", [0, 1, 3, -2])
def test_the_axis_of_the_examples(framework: Framework, axis):
    """The mask is that of x with the axis of the examples in front."""
    by_example, rows = framework.library.by_example, [8, 3]
    whole = call(framework, "dropout", BATCH, framework.library.bernoulli)
    moved = np.moveaxis(BATCH[rows], 0, axis)
    y = call(framework, "dropout", moved, by_example(rows, axis=axis))
    np.testing.assert_array_equal(y, np.moveaxis(whole[rows], 0, axis))


@both_frameworks
def test_a_single_example_has_no_axis(framework: Framework):
    whole = call(framework, "dropout", BATCH, framework.library.bernoulli)
    for i in (0, 7):
        y = call(framework, "dropout", BATCH[i], framework.library.by_example(i))
        np.testing.assert_array_equal(y, whole[i])
    number = framework.array(np.full((), 3, np.float32))
    rows = framework.library.dropout(
        framework.array(np.full(9, 3, np.float32)),
        0.5,
        key=framework.key(4),
        sampler=framework.library.by_example(np.arange(9)),
    )
    for i in range(9):
        sampler = framework.library.by_example(i)
        y = framework.library.dropout(number, 0.5, key=framework.key(4), sampler=sampler)
        assert framework.numpy(y) == framework.numpy(rows)[i]


LARGE = np.ones((6, 64, 72), np.float32)  # 64 packs, in the batch and in one example
SMALL = np.ones((64, 4, 20), np.float32)  # the batch packs along its rows, one example does not


@pytest.mark.parametrize("bits", [5, 16])
@pytest.mark.sample(1)
def test_packed_masks(bits):
    results = []
    for framework in FRAMEWORKS:
        packed = functools.partial(framework.library.packed_bernoulli, bits=bits)
        by_example = functools.partial(framework.library.by_example, sampler=packed)
        whole = call(framework, "dropout", LARGE, packed)
        for rows in ([4, 1], [2], list(range(6))):
            y = call(framework, "dropout", LARGE[rows], by_example(rows))
            np.testing.assert_array_equal(y, whole[rows])
        # Here the mask differs from that of the plain sampler, but still not by the split.
        whole = call(framework, "dropout", SMALL, by_example(range(64)))
        y = call(framework, "dropout", SMALL[[40, 3]], by_example([40, 3]))
        np.testing.assert_array_equal(y, whole[[40, 3]])
        assert (whole != call(framework, "dropout", SMALL, packed)).any()
        results.append((whole, y))
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_a_user_s_function_draws_each_example_with_a_key_of_its_own():
    in_jax = lambda key, share, shape, out_sharding=None: jax.random.uniform(key, shape) < share
    in_torch = lambda key, share, shape: TORCH.library.bernoulli(key, share, shape)
    rows = [3, 10, 0]
    expected = np.stack([
        call(JAX, "dropout", BATCH[i], in_jax, key=jax.random.fold_in(JAX.key(4), i))
        for i in rows
    ])  # fmt: skip
    for framework, sampler in ((JAX, in_jax), (TORCH, in_torch)):
        y = call(framework, "dropout", BATCH[rows], framework.library.by_example(rows, sampler))
        np.testing.assert_array_equal(y, expected)
        y = call(framework, "dropout", BATCH[3], framework.library.by_example(3, sampler))
        np.testing.assert_array_equal(y, expected[0])
        empty = framework.library.by_example(np.zeros(0, int), sampler)
        assert call(framework, "dropout", BATCH[:0], empty).shape == (0, 3, 4, 5)


def test_numbers_of_64_bits():
    """NumPy's integers exceed 32 bits; both words count."""
    rows = np.array([5, 2**32 + 5, 2**40])
    masks = [
        each.numpy(each.library.by_example(rows)(each.key(0), 0.5, (3, 40))) for each in FRAMEWORKS
    ]
    np.testing.assert_array_equal(masks[0], masks[1])
    assert len({row.tobytes() for row in masks[0]}) == 3
    with jax.enable_x64(True):
        mask = JAX.library.by_example(jnp.asarray(rows))(JAX.key(0), 0.5, (3, 40))
    np.testing.assert_array_equal(np.asarray(mask), masks[0])


@both_frameworks
def test_weights_of_one_example(framework: Framework):
    """DropConnect with a mask per example: the weights have no axis of examples."""
    by_example, weights = framework.library.by_example, framework.array(BATCH[0, 0])
    drop = functools.partial(framework.library.drop_connect, weights, 0.4, key=framework.key(4))
    whole = framework.numpy(
        framework.library.dropout(framework.array(BATCH[:, 0]), 0.4, key=framework.key(4))
    )
    y = framework.numpy(drop(sampler=by_example(7)))
    np.testing.assert_array_equal(y != 0, whole[7] != 0)
    with pytest.raises(ValueError, match="sampler must draw one mask for all rows"):
        drop(sampler=by_example(np.arange(4)))


WRONG = [
    (0.5, r"examples must be integers; got dtype (torch\.)?float"),
    ([True, False], "examples must be integers; got dtype"),
    ([1.0, 2.0], r"examples must be integers; got dtype (torch\.)?float"),
    (None, "examples must be an? [a-z]+ of integers; got None"),
    ("3", "examples must be (a tensor of )?integers"),
    ([[1, 2]], r"examples must be one number for each row, of shape \(n,\); got shape \(1, 2\)"),
    ([3, -1], "examples must not be negative; got -1"),
    (-2, "examples must not be negative; got -2"),
]


@both_frameworks
@pytest.mark.parametrize(("examples", "message"), WRONG, ids=str)
def test_wrong_examples(framework: Framework, examples, message):
    with pytest.raises((TypeError, ValueError), match=message):
        framework.library.by_example(examples)
    if isinstance(examples, list):
        array = framework.array(np.array(examples))
        with pytest.raises((TypeError, ValueError), match=message):
            framework.library.by_example(array)


@both_frameworks
def test_wrong_uses(framework: Framework):
    library, drop = framework.library, functools.partial(call, framework)
    for rows in (np.arange(11), np.arange(3)):
        with pytest.raises(ValueError, match=r"examples must have one number for each of the 12"):
            drop("dropout", BATCH, library.by_example(rows))
    for axis in (4, -5):
        with pytest.raises(ValueError, match="axis must be a dimension of x, which has 4; got"):
            drop("dropout", BATCH, library.by_example(np.arange(12), axis=axis))
    shared = "sampler must not be by_example where the examples share one mask"
    with pytest.raises(ValueError, match=shared):
        drop("dropout", BATCH, library.by_example(np.arange(12)), broadcast_dims=(0, 2))
    with pytest.raises(ValueError, match=shared):
        drop("drop_path", BATCH, library.by_example(np.arange(12)), mode="batch")
    with pytest.raises(ValueError, match=shared):
        drop("variational_dropout", BATCH, library.by_example(np.arange(3), axis=1))
    with pytest.raises(ValueError, match="sampler must not be by_example itself"):
        library.by_example(3, library.by_example(3))
    with pytest.raises(TypeError, match="axis must be an integer"):
        library.by_example(3, axis=0.5)
    with pytest.raises(TypeError, match="sampler must be a function"):
        library.by_example(3, "bernoulli")
