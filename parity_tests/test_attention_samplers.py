"""Samplers of attention: both forms and both packages drop the same weights, bit for bit.

The values are one-hot vectors, so that the result of attention is the matrix of dropped weights.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest

from parity_tests.frameworks import FRAMEWORKS, JAX, Framework
from parity_tests.tables import both_frameworks

RATE = 0.375


def arrays(batch: int, queries: int, keys: int, heads: int, kv_heads: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    query, key = (
        rng.normal(size=(batch, length, number, 4)).astype(np.float32)
        for length, number in ((queries, heads), (keys, kv_heads))
    )
    value = np.broadcast_to(np.eye(keys, dtype=np.float32)[:, None], (batch, keys, kv_heads, keys))
    return [query, key, np.ascontiguousarray(value)]


SMALL = arrays(3, 6, 33, 4, 2)  # grouped heads; no axis packs, each element has its own word
PACKS = arrays(2, 64, 33, 2, 2)  # the queries pack
ROWS = np.array([5, 2**33 + 1, 0])
WINDOW = abs(np.arange(6)[:, None] * 5 - np.arange(33)) < 9
PADDING = np.arange(33) < np.array([33, 20, 1])[:, None, None, None]
QUERIES, KEYS = np.array([6, 0, 4], np.int32), np.array([33, 20, 2], np.int32)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "padding": {"mask": PADDING},
    "window": {"mask": WINDOW},
    "shared": {"broadcast_dropout": True},
    "causal, padding and window": {"is_causal": True, "mask": PADDING & WINDOW},
    "local window": {"local_window_size": (4, 9)},
    "lengths": {"query_seq_lengths": QUERIES, "key_value_seq_lengths": KEYS},
    "all": {
        "is_causal": True,
        "mask": PADDING & WINDOW,
        "local_window_size": (4, 9),
        "query_seq_lengths": QUERIES,
        "key_value_seq_lengths": KEYS,
    },
}


def seen(**options: Any) -> np.ndarray:
    """Return which weights of `SMALL` the arguments permit, (3, 1, 6, 33)."""
    row, column = np.arange(6)[:, None], np.arange(33)
    permitted = np.broadcast_to(options.get("mask", True), (3, 1, 6, 33))
    if options.get("is_causal"):
        permitted = permitted & (column <= row)
    if "local_window_size" in options:
        left, right = options["local_window_size"]
        permitted = permitted & (row - left <= column) & (column <= row + right)
    if "query_seq_lengths" in options:
        counts = options["query_seq_lengths"], options["key_value_seq_lengths"]
        queries, keys = (count[:, None, None, None] for count in counts)
        permitted = permitted & (row < queries) & (column < keys)
    return permitted


def samplers(framework: Framework, batch: int) -> dict[str, Any]:
    library = framework.library
    packed = functools.partial(library.packed_bernoulli, bits=3)
    return {
        "exact": library.bernoulli,
        "packed": packed,
        "16 bits": library.packed_bernoulli,
        "by example": library.by_example(ROWS[:batch]),
        "packed by example": library.by_example(ROWS[:batch], packed),
    }


def weights(framework: Framework, inputs: list[np.ndarray], sampler: Any, **options: Any) -> Any:
    """Return the dropped weights, with the key of seed 6."""
    given = {n: framework.array(v) if isinstance(v, np.ndarray) else v for n, v in options.items()}
    given = {"dropout_rng": framework.key(6), "dropout_rate": RATE} | given
    of = framework.library.dot_product_attention
    return framework.numpy(of(*map(framework.array, inputs), sampler=sampler, **given))


def check(name: str, inputs: list[np.ndarray], blocks: tuple[int, ...], **options: Any) -> None:
    """Assert that the zeros are the same in both forms, for block sizes, and in both packages."""
    zeros = []
    for framework in FRAMEWORKS:
        sampler = samplers(framework, len(inputs[0]))[name]
        draw = functools.partial(weights, framework, inputs, sampler, **options)
        whole = draw()
        zeros.append(whole == 0)
        for size in blocks:
            block = draw(block_size=size)
            np.testing.assert_array_equal(block == 0, whole == 0)
            np.testing.assert_allclose(block, whole, atol=1e-6)
    np.testing.assert_array_equal(zeros[0], zeros[1])


@both_frameworks
@pytest.mark.parametrize("option", ["local window", "lengths", "all"])
@pytest.mark.sample(4)
def test_what_a_query_may_attend_to_changes_no_mask(framework: Framework, option):
    """A weight is zero where it is dropped without the arguments, or where these exclude it."""
    sampler = framework.library.bernoulli
    kept = weights(framework, SMALL, sampler) != 0
    found = weights(framework, SMALL, sampler, block_size=7, **OPTIONS[option]) != 0
    permitted = np.swapaxes(seen(**OPTIONS[option]), 1, 2)
    np.testing.assert_array_equal(found, kept & permitted)


@pytest.mark.parametrize("name", ["packed", "by example"])
def test_blocks_have_the_mask_of_the_whole(name):
    check(name, SMALL, (7,), **OPTIONS["all"])


def test_blocks_of_packed_words_have_the_mask_of_the_whole():
    check("packed by example", PACKS, (7,))


@pytest.mark.slow  # 3 minutes
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", samplers(JAX, 1))
def test_every_sampler_with_every_option_and_block_size(name, option):
    if "example" in name and option == "shared":
        return
    check(name, SMALL, (1, 4, 7, 16, 32, 33, 50), **OPTIONS[option])
    if not any(isinstance(value, np.ndarray) for value in OPTIONS[option].values()):
        check(name, PACKS, (1, 7, 32, 33), **OPTIONS[option])


@both_frameworks
@pytest.mark.sample(1)
def test_the_mask_is_that_of_the_sampler(framework: Framework):
    """Of the whole weights, heads before queries; shared along batch and heads if asked."""
    for name, sampler in samplers(framework, 3).items():
        mask = framework.numpy(sampler(framework.key(6), 1 - RATE, (3, 4, 6, 33)))
        found = weights(framework, SMALL, sampler) != 0
        np.testing.assert_array_equal(np.swapaxes(found, 1, 2), mask)
        if "example" not in name:
            mask = framework.numpy(sampler(framework.key(6), 1 - RATE, (1, 1, 6, 33)))
            found = weights(framework, SMALL, sampler, broadcast_dropout=True) != 0
            np.testing.assert_array_equal(
                np.swapaxes(found, 1, 2), np.broadcast_to(mask, (3, 4, 6, 33))
            )


@both_frameworks
def test_the_scale_is_that_of_the_realized_probability(framework: Framework):
    """With 3 bits, rate 0.3 keeps 6 of 8 elements, in both forms."""
    packed = functools.partial(framework.library.packed_bernoulli, bits=3)
    draw = functools.partial(weights, framework, SMALL)
    plain = draw(framework.library.bernoulli, dropout_rate=0.0)
    for block_size in (None, 16):
        dropped = draw(packed, dropout_rate=0.3, block_size=block_size)
        kept = dropped != 0
        np.testing.assert_allclose(dropped[kept], plain[kept] / 0.75, rtol=1e-5)


@pytest.mark.slow
@both_frameworks
def test_micro_batches_have_the_masks_of_the_batch(framework: Framework):
    library = framework.library
    whole = weights(framework, SMALL, library.bernoulli)
    for rows in ([2], [1, 0]):
        part = [x[rows] for x in SMALL]
        for block_size in (None, 16):
            y = weights(framework, part, library.by_example(rows), block_size=block_size)
            np.testing.assert_array_equal(y == 0, whole[rows] == 0)


@both_frameworks
def test_a_user_s_function(framework: Framework):
    """It draws whole masks, so that blocks refuse it, also by example."""
    library = framework.library
    own = lambda key, keep_prob, shape, **_: library.bernoulli(key, keep_prob, shape)
    whole = weights(framework, SMALL, library.bernoulli)
    np.testing.assert_array_equal(weights(framework, SMALL, own), whole)
    for sampler in (own, library.by_example(ROWS, own)):
        with pytest.raises(ValueError, match=r"with block_size=8; got .*draws whole masks only"):
            weights(framework, SMALL, sampler, block_size=8)


@both_frameworks
def test_wrong_samplers(framework: Framework):
    library, draw = framework.library, functools.partial(weights, framework, SMALL)
    for block_size in (None, 8):
        with pytest.raises(TypeError, match="sampler must be a function"):
            draw("bernoulli", block_size=block_size)
        with pytest.raises(ValueError, match="examples must have one number for each of the 3"):
            draw(library.by_example([1, 2]), block_size=block_size)
        with pytest.raises(ValueError, match="where the examples share one mask"):
            draw(library.by_example(ROWS), broadcast_dropout=True, block_size=block_size)
        for axis in (1, -1, -4):
            with pytest.raises(ValueError, match="axis must be one of the 1 batch dimensions"):
                draw(library.by_example(np.arange(4), axis=axis), block_size=block_size)
