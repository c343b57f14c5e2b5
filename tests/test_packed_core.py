"""Unit tests of the packed sampler, with the NumPy reference; `make mutants` runs them first."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from parity_tests import reference
from parity_tests.frameworks import JAX, Framework
from parity_tests.tables import KEEP_PROBS, SMALLEST, both_frameworks
from regjax._random import packed as jax_packed
from regjax._random.xla import word_bytes
from regtorch._random import packed as torch_packed
from regtorch._random import threefry as torch_threefry
from tests.test_random_core import KEY, only_jax, torch_words


@pytest.mark.parametrize("bits", [1, 5, 16, 23, 24, 25, 32])
@pytest.mark.parametrize("keep_prob", [*KEEP_PROBS, 1e-3, 0.75, -1.0, 2.0, math.nan])
def test_packed_thresholds(bits, keep_prob):
    """The threshold is `round(p * 2**bits)`, and 0 or 2**bits only if the probability is 0 or 1."""
    exact = float(np.float32(keep_prob))
    rounded = round(exact * 2**bits) if math.isfinite(exact) else 0
    expected = min(max(rounded, 1), 2**bits - 1) if 0 < exact < 1 else 2**bits * (exact >= 1)
    if 0 <= keep_prob <= 1 and (rounded == expected or not 0 < keep_prob < 1):
        assert jax_packed._threshold(keep_prob, bits) == expected
        assert torch_packed._threshold(keep_prob, bits) == expected
    elif 0 <= keep_prob <= 1:
        for packed in (jax_packed, torch_packed):
            with pytest.raises(
                ValueError, match=f"must not round to {rounded >> bits} in {bits} bits"
            ):
                packed._threshold(keep_prob, bits)
    if keep_prob == 0 or not keep_prob < SMALLEST:  # a device may flush smaller numbers to zero
        changing = jax.jit(jax_packed._threshold, static_argnums=1)
        assert float(changing(jnp.float32(keep_prob), bits)) == expected
        assert float(torch_packed._threshold(torch.tensor(keep_prob), bits)) == expected


@both_frameworks
def test_the_default_is_16_bits(framework: Framework):
    draw = lambda keep_prob: framework.library.packed_bernoulli(framework.key(9), keep_prob, (3,))
    assert not framework.numpy(draw(2.0**-16)).any()
    for too_small in (2.0**-17, 1e-9):
        with pytest.raises(ValueError, match="in 16 bits"):
            draw(too_small)
    packed = framework.library.packed_bernoulli
    with pytest.raises(ValueError, match="Use more bits"):
        framework.dropout(np.ones((64, 64), np.float32), 1e-6, sampler=packed)


AXES = {(64, 64): 0, (64, 63): None, (4, 32, 32): 1, (128, 32, 4): 0, (64, 64, 2): 1}
AXES |= {(32, 64, 2): 1, (4096,): None, (33, 128): None, (2, 64, 64): 1, (0, 64): None}
AXES |= {(33, 64, 64): 1, (32, 2**16, 2**11): 1}


def test_the_packed_axis():
    for shape, axis in AXES.items():
        assert (jax_packed.packed_axis(shape), torch_packed.packed_axis(shape)) == (axis, axis)


SMALL = [(64, 64, 1), (64, 63, 1), (32, 64, 1), (63, 65, 1)]


@only_jax
def test_the_packed_axis_of_symbolic_sizes(framework: Framework):
    """The sizes are those of vectors, since one array would be too large."""

    def axes(x, y, z):
        draw = lambda axis: jnp.int32(-1 if axis is None else axis)
        sizes = (x.size, y.size, z.size)
        shapes = (sizes, sizes[:2], sizes[:1], (x.size, 64, z.size), (33, y.size, 64))
        return [jax_packed._at_packed_axis(draw, shape) for shape in shapes]

    symbols = jax.export.symbolic_shape("a, b, c")
    vectors = [jax.ShapeDtypeStruct((symbol,), jnp.int8) for symbol in symbols]
    call = jax.export.export(jax.jit(axes))(*vectors).call
    for sizes in [*(shape for shape in AXES if len(shape) == 3), *SMALL]:
        shapes = (sizes, sizes[:2], sizes[:1], (sizes[0], 64, sizes[2]), (33, sizes[1], 64))
        expected = [jax_packed.packed_axis(shape) for shape in shapes]
        found = call(*(np.zeros(size, np.int8) for size in sizes))
        assert [None if axis < 0 else axis for axis in found] == expected


BLOCKS = {(0, 16): 0, (2**16, 16): 0, (2**15, 16): 1, (3 << 14, 16): 1, (5 << 13, 16): 2}
BLOCKS |= {(1, 16): 8, (1, 1): 1, (1, 32): 16, (2, 32): 16, (4, 32): 15}


@both_frameworks
@pytest.mark.parametrize(("threshold", "bits"), BLOCKS)
def test_words_after_the_last_bit_of_the_threshold_are_not_drawn(
    framework: Framework, monkeypatch, threshold, bits
):
    """A block gives two words; the counter is the index of the block."""
    packed, drawn = jax_packed if framework is JAX else torch_packed, []
    block = packed.threefry2x32
    monkeypatch.setattr(packed, "threefry2x32", lambda *a: drawn.append(a[1]) or block(*a))
    key = tuple(
        framework.array(np.zeros((), "uint32" if framework is JAX else "int32")) for _ in range(2)
    )
    place: Any = (
        [jax_packed.Group((64, 3), 0, None)] if framework is JAX else [(2, 3), (None, None)]
    )
    words = framework.numpy(packed._compared(key, threshold, bits, *place))
    assert (words.shape, len(drawn)) == ((2, 3), BLOCKS[threshold, bits])
    for pair, (high, low) in enumerate(reversed(drawn)):
        assert set((framework.numpy(high).ravel().view(np.uint32)).tolist()) == {pair << 28}
        np.testing.assert_array_equal(framework.numpy(low), np.arange(6).reshape(2, 3))
    if threshold % 2**bits == 0:
        np.testing.assert_array_equal(words.view(np.int32), -1 if threshold else 0)


def test_the_number_of_a_word_may_take_more_than_32_bits():
    """The first word of blocks with large indices, as in an array too large for a test."""
    start = 2**36 + 2**31 + 5
    part = [torch_threefry.Span(start, 3)]
    words = torch_packed._compared(torch_words(*KEY), 2**15, 16, (2**40,), part).numpy()
    words = words.view(np.uint32)
    expected = [reference.threefry2x32(KEY, divmod(start + i, 2**32))[0] for i in range(3)]
    assert words.tolist() == expected


@pytest.mark.parametrize(("shape", "axis"), [((64, 3), 0), ((2, 96, 5), 1)], ids=str)
def test_each_element_takes_its_bit_of_its_word(shape, axis):
    """As words, as bytes (which GPUs read), and for an axis of symbolic length."""
    group = jax_packed.Group(shape, axis, None)
    rng = np.random.default_rng(0)
    words = rng.integers(0, 2**32, group.words_shape, np.uint32)
    lanes = np.arange(32, dtype=np.uint32).reshape(32, *[1] * (len(shape) - axis - 1))
    expected = (np.expand_dims(words, axis + 1) >> lanes & 1 != 0).reshape(shape)
    spread = torch_packed._spread(torch.from_numpy(words.view(np.int32)), axis)
    np.testing.assert_array_equal(spread.numpy().reshape(shape), expected)
    words = jnp.asarray(words)
    for parts in ((words,), word_bytes(words)):
        bits = np.asarray(group._bits(parts, None))
        np.testing.assert_array_equal(bits.reshape(shape), expected)
    for found in (group.spread(words), group._gathered(words)):
        np.testing.assert_array_equal(np.asarray(found), expected)


LAYOUTS = [
    ((256, 8), P("a"), P("a", None)),
    ((96, 8), P("a"), P(None, None)),
    ((256, 8), P(("a", "b")), P(("a", "b"), None)),
    ((128, 8), P(("a", "b"), None), P(None, None)),
    ((32, 64, 8), P("b", "a"), P("b", "a", None)),
    ((32, 96, 8), P("b", "a"), P("b", None, None)),
    ((32, 96, 8), P(None, None, "b"), P(None, None, "b")),
]


@only_jax
@pytest.mark.parametrize(("shape", "spec", "expected"), LAYOUTS)
@pytest.mark.sample(5)
def test_words_have_the_sharding_of_their_elements_if_shards_hold_whole_words(
    framework: Framework, shape, spec, expected
):
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
    axis, key, sampler = len(shape) - 2, framework.key(0), framework.library.packed_bernoulli
    mask = sampler(key, 0.5, (64, *shape[1:]) if axis else shape)
    with jax.set_mesh(mesh):
        for layout in (spec, NamedSharding(mesh, spec)):
            words = jax_packed.Group(shape, axis, layout).words_sharding
            assert isinstance(words, NamedSharding)
            assert words.spec == expected
        draw = lambda: sampler(key, 0.5, mask.shape, out_sharding=layout)
        sharded = jax.jit(draw)()
        np.testing.assert_array_equal(np.asarray(sharded), np.asarray(mask))
        assert sharded.sharding.is_equivalent_to(NamedSharding(mesh, spec), mask.ndim)
    assert jax_packed.Group(shape, axis, None).words_sharding is None


WORDS = [((64, 64), *each) for each in [(0, 4), (32, 5), (1, 1), (0x2A95, 16), (7, 18)]]
WORDS += [((4, 32, 40), *each) for each in [(5, 3), (200, 8)]]
# Rows and channels; four axes; and two axes of one length, of which the later packs.
WORDS += [(shape, 0xE666, 16) for shape in ((2, 96, 24), (3, 32, 64, 2), (64, 64, 2))]


@both_frameworks
@pytest.mark.parametrize(("shape", "threshold", "bits"), WORDS)
@pytest.mark.sample(5)
def test_packed_words(framework: Framework, shape, threshold, bits):
    keep_prob = threshold / 2**bits
    expected = reference.packed_bernoulli((0, 9), threshold, shape, bits)
    draw = lambda prob: framework.library.packed_bernoulli(framework.key(9), prob, shape, bits=bits)
    np.testing.assert_array_equal(framework.numpy(draw(keep_prob)), expected)
    changing = framework.traced(draw)(np.float32(keep_prob))
    np.testing.assert_array_equal(framework.numpy(changing), expected)


@both_frameworks
@pytest.mark.parametrize("bits", [1, 8, 32])
def test_shapes_without_a_packed_axis(framework: Framework, bits):
    drawn = reference.bits((0, 9), range(99)) >> np.uint32(32 - bits)
    for threshold in {0, 1, 2 ** (bits - 1), 2**bits}:
        draw = lambda p: framework.library.packed_bernoulli(framework.key(9), p, (99,), bits=bits)
        changing = framework.traced(draw)(np.float32(threshold / 2**bits))
        for mask in (draw(threshold / 2**bits), changing):
            np.testing.assert_array_equal(framework.numpy(mask), drawn < threshold)


def test_a_threshold_of_2_to_the_32_keeps_every_integer():
    drawn = jnp.uint32([0, 2**31, 2**32 - 1])
    for threshold, kept in ((2**32, [True] * 3), (0, [False] * 3)):
        for each in (threshold, jnp.float32(threshold)):
            assert jax_packed._below(drawn, each, 32).tolist() == kept
        signed = torch.from_numpy(np.array(drawn).view(np.int32))
        assert torch_packed._below(signed, threshold, 32).tolist() == kept


@only_jax
def test_a_cpu_draws_no_word_in_the_loop_that_reads_it(framework: Framework):
    """XLA would fuse the two, and draw each word for each of its 32 elements."""
    draw = jax.jit(lambda key: framework.library.packed_bernoulli(key, 0.3, (64, 128)))
    loops = draw.lower(framework.key(9)).compile().as_text().split("\n\n")
    assert any("xor(" in loop for loop in loops)
    assert not any("xor(" in loop and "pred[2,32,128]" in loop for loop in loops)


def test_a_traced_probability_takes_a_layout():
    mesh = jax.make_mesh((2,), ("a",), axis_types=(AxisType.Explicit,))
    layout, key = NamedSharding(mesh, P("a")), jax.random.key(9)
    draw = jax.jit(lambda q: JAX.library.packed_bernoulli(key, q, (64, 32), out_sharding=layout))
    with jax.set_mesh(mesh):
        mask = draw(jnp.float32(0.3))
    assert mask.sharding.is_equivalent_to(layout, 2)
    np.testing.assert_array_equal(mask, JAX.library.packed_bernoulli(key, 0.3, (64, 32)))
