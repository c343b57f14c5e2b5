"""Conversion of words to masks, by bytes on GPUs and by words elsewhere, with the same bits."""

from __future__ import annotations

import jax
import jax.export
import numpy as np
import pytest

from regjax._random import packed as _packed
from regjax._random.xla import word_bytes


def bits_of(words, group, parts):
    return np.asarray(jax.jit(lambda words: group._bits(parts(words), None))(words))


@pytest.mark.parametrize(("shape", "axis"), [((64, 8), 0), ((3, 96, 5), 1), ((2, 3, 32, 4), 2)])
def test_bytes_and_words_spread_to_the_same_mask(shape, axis):
    group = _packed.Group(shape, axis, None)
    words = jax.random.bits(jax.random.key(0), group.words_shape)
    by_byte = bits_of(words, group, word_bytes)
    np.testing.assert_array_equal(by_byte, bits_of(words, group, lambda words: (words,)))
    lane = np.arange(32).reshape(32, *[1] * (len(shape) - axis - 1))
    expected = np.expand_dims(np.asarray(words), axis + 1) >> lane & 1 != 0
    np.testing.assert_array_equal(by_byte, expected)


def test_on_cuda_each_element_reads_a_byte():
    """The CPU cannot run the branch for GPUs, but can export it; words are split into bytes."""
    draw = jax.jit(lambda key: _packed.packed_bernoulli(key, 0.5, (64, 64)))
    key = jax.eval_shape(lambda: jax.random.key(0))
    texts = {
        platform: jax.export.export(draw, platforms=[platform])(key).mlir_module()
        for platform in ("cpu", "cuda", "tpu")
    }
    assert {platform: "xui8>" in text for platform, text in texts.items()} == {
        "cpu": False,
        "cuda": True,
        "tpu": False,
    }
