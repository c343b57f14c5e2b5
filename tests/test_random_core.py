"""Unit tests of the random core: each step from key and index to bits, with the NumPy reference.

These are the cheapest tests that detect a changed operation; `make mutants` runs them first.
"""

# ruff: noqa: B023  # each function made in a loop is called in the same turn

from __future__ import annotations

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from parity_tests import reference
from parity_tests.frameworks import JAX, Framework
from regjax._random import threefry as jax_threefry
from regtorch._random import threefry as torch_threefry

only_jax = pytest.mark.parametrize("framework", [JAX], ids=str)
KEY = (0x13198A2E, 0x83707344)


def jax_words(*words: int) -> tuple[jax.Array, ...]:
    return tuple(jnp.uint32(word) for word in words)


def torch_words(*words: int) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor(np.uint32(word).view(np.int32).item()) for word in words)


def combined(high: jax.Array, low: jax.Array) -> np.ndarray:
    """Return 64-bit indices from their words."""
    return (np.asarray(high).astype(np.uint64) << 32) | np.asarray(low).astype(np.uint64)


def row_major(shape: tuple[int, ...], places: tuple[np.ndarray, ...]) -> np.ndarray:
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    return sum(np.uint64(s) * p.astype(np.uint64) for s, p in zip(strides, places, strict=True))


@pytest.mark.parametrize("shape", [(), (5,), (3, 5), (2, 1, 7), (2, 3, 4)], ids=str)
def test_every_element_has_the_bits_of_its_index(shape):
    expected = reference.bits(KEY, range(math.prod(shape))).reshape(shape)
    in_jax = jax.jit(lambda: jax_threefry.counter_bits(jax_words(*KEY), shape))()
    np.testing.assert_array_equal(np.asarray(in_jax), expected)
    in_torch = torch_threefry.counter_bits(torch_words(*KEY), shape)
    np.testing.assert_array_equal(in_torch.numpy().view(np.uint32), expected)
    for in_place in (False, True):
        index = jax.jit(lambda: jax_threefry.part_index(shape, in_place=in_place))()
        expected = np.arange(math.prod(shape), dtype=np.uint64).reshape(shape)
        np.testing.assert_array_equal(np.broadcast_to(combined(*index), shape), expected)


WHOLES = [
    (3, 5, 2),
    (7, 2**31, 5),
    (5, 2**17, 2**16, 3),
    (2**33 // 2**2, 4),
    (2**20 + 7, 3 * 2**20),
]


@only_jax
@pytest.mark.parametrize("whole", WHOLES, ids=str)
def test_a_slice_has_the_bits_of_its_position(framework: Framework, whole):
    """Also for indices beyond 2**32, whose high word has the product and both carries."""
    shape = tuple(min(size, 3) for size in whole)
    for far in (0.0, 0.3, 0.999, 1.0):
        starts = {i: int((n - s) * far) for i, (n, s) in enumerate(zip(whole, shape, strict=True))}
        spans = [jax_threefry.Span(starts[i], size) for i, size in enumerate(shape)]
        index = jax.jit(lambda: jax_threefry.part_index(whole, spans))()
        places = np.indices(shape)
        expected = row_major(whole, tuple(p + starts[i] for i, p in enumerate(places)))
        np.testing.assert_array_equal(np.broadcast_to(combined(*index), shape), expected)


def test_the_upper_half_of_a_product():
    rng = np.random.default_rng(0)
    x = np.append(rng.integers(0, 2**32, 200, np.uint32), np.uint32([0, 1, 2**16, 2**32 - 1]))
    for factor in (0, 1, 0xFFFF, 0x10000, 0x89ABCDEF, 2**32 - 1):
        high = jax.jit(jax_threefry._multiply_high, static_argnums=1)(x, factor)
        np.testing.assert_array_equal(np.asarray(high), (x.astype(np.uint64) * factor) >> 32)


def test_indices_of_more_than_32_bits():
    """The smallest shape whose index needs two words, and the largest whose index needs one."""
    for shape in ((2**16, 2**16), (2**16, 2**16 + 1)):
        rows = [0, 1, 2**15, 2**16 - 1]
        draw = lambda: jax_threefry.counter_bits(jax_words(*KEY), shape)[jnp.array(rows), -2:]
        index = [
            [row * shape[1] + column for column in (shape[1] - 2, shape[1] - 1)] for row in rows
        ]
        expected = reference.bits(KEY, np.ravel(np.array(index, object))).reshape(4, 2)
        np.testing.assert_array_equal(np.asarray(jax.jit(draw)()), expected)


@only_jax
def test_symbolic_sizes_give_the_words_of_numbers(framework: Framework):
    """Products, indices, slices and bits in an exported program with symbolic sizes."""

    def words(x, y, z):
        shape = (x.size, y.size, z.size)
        ends = [jax_threefry.Span(size - 1, 1) for size in shape]
        corner = jax_threefry.part_index((*shape, 3), [*ends, None])
        return jax_threefry.product_words((*shape[:2], 7, shape[2])), corner

    def drawn(x):
        index = jax_threefry.part_index(x.shape)
        return jax_threefry.counter_bits(jax_words(*KEY), x.shape), index

    symbols = jax.export.symbolic_shape("a, b, c")
    whole = jax.ShapeDtypeStruct(symbols, jnp.int8)
    vectors = [jax.ShapeDtypeStruct((symbol,), jnp.int8) for symbol in symbols]
    words = jax.export.export(jax.jit(words))(*vectors).call
    drawn = jax.export.export(jax.jit(drawn))(whole).call
    for sizes in ((3, 1, 2), (60_000, 70_000, 3)):
        product, corner = words(*(np.zeros(size, np.int8) for size in sizes))
        assert combined(*product) == 7 * math.prod(sizes)
        last = 3 * math.prod(sizes)
        assert combined(*np.broadcast_arrays(*corner)).ravel().tolist() == [*range(last - 3, last)]
    for shape in ((2, 1, 3), (1, 4, 1)):
        bits, index = drawn(np.zeros(shape, np.int8))
        expected = np.arange(math.prod(shape), dtype=np.uint64).reshape(shape)
        np.testing.assert_array_equal(np.broadcast_to(combined(*index), shape), expected)
        np.testing.assert_array_equal(bits, reference.bits(KEY, expected.ravel()).reshape(shape))


@only_jax
def test_a_layout_is_a_sharding_or_a_spec(framework: Framework):
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
    key, expected = framework.key(9), framework.bernoulli(9, 0.3, (4, 8, 3))
    for spec in (P("a", "b"), P(None, ("a", "b")), P("b")):
        sharding = NamedSharding(mesh, spec)
        for layout in (spec, sharding):
            with jax.set_mesh(mesh):
                mask = framework.library.bernoulli(key, 0.3, expected.shape, out_sharding=layout)
                index = jax.make_jaxpr(lambda: jax_threefry.part_index(mask.shape, (), layout))()
            axes = [e.outvars[0].aval for e in index.eqns if e.primitive.name == "iota"]
            assert [aval.sharding.spec for aval in axes] == [
                P(*(spec[axis] if axis == i < len(spec) else None for axis in range(3)))
                for i in range(3)
            ]
            np.testing.assert_array_equal(np.asarray(mask), expected)
            assert mask.sharding.is_equivalent_to(sharding, 3)


def test_the_largest_number_of_elements():
    """It is 2**63 - 1; above 2**30, PyTorch first checks the memory."""
    device = torch.device("cpu")
    jax_threefry.check_size((2**63 - 1,))
    with pytest.raises(RuntimeError, match="memory"):
        torch_threefry.check_size((2**62,), device)
    for check in (jax_threefry.check_size, lambda shape: torch_threefry.check_size(shape, device)):
        with pytest.raises(ValueError, match=r"fewer than 2\*\*63 elements; got \(2, 46"):
            check((2, 2**62))


@pytest.mark.parametrize("start", [0, 2**30 - 2, 2**31 - 2, 2**32 - 2, 3 * 2**32 + 2**31 - 2])
def test_a_range_of_bits(start):
    drawn = torch_threefry.range_bits(torch_words(*KEY), start, start + 4).numpy()
    np.testing.assert_array_equal(
        drawn.view(np.uint32), reference.bits(KEY, range(start, start + 4))
    )


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize("size", [0, 5, 2**17, 2**18 - 1, 2**18, 2**18 + 1])
def test_pieces_are_complete(monkeypatch, size, compiling):
    """Pieces have no overlaps and no gaps, and none is longer than the limit."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    made = []

    def make(start: int, stop: int) -> torch.Tensor:
        made.append(stop - start)
        return torch.arange(start, stop)

    whole = torch_threefry.in_pieces(make, (size, 1), torch.device("cpu"))
    np.testing.assert_array_equal(whole.numpy(), np.arange(size)[:, None])
    if compiling or not size:
        assert made == [size]
    else:
        assert max(made) <= 2**17
        assert len(made) == -(-size // 2**17)


def test_shifts_fill_with_zeros():
    x = np.uint32([0, 1, 2**31, 2**32 - 1, 0x89ABCDEF])
    for distance in (1, 9, 31):
        shifted = torch_threefry.shift_right(torch.from_numpy(x.view(np.int32)), distance)
        np.testing.assert_array_equal(shifted.numpy().view(np.uint32), x >> np.uint32(distance))


def test_blocks_of_integers_and_tensors_agree():
    for key, counter in itertools.product([(0, 0), KEY, (2**32 - 1,) * 2], repeat=2):
        expected = reference.threefry2x32(key, counter)
        assert torch_threefry.encrypt(key, counter) == expected
        out = torch_threefry.threefry2x32(torch_words(*key), torch_words(*counter))
        assert tuple(int(word) & 0xFFFFFFFF for word in out) == expected
        out = jax_threefry.threefry2x32(jax_words(*key), jax_words(*counter))
        assert tuple(int(word) for word in out) == expected


def test_words_as_signed_integers():
    for word in (0, 1, 2**31 - 1, 2**31, 2**32 - 1):
        assert torch_threefry.as_signed(word) == np.uint32(word).view(np.int32)
