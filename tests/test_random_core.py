"""The random core in small: each step from key and index to mask, against the NumPy reference.

These are the cheapest tests that catch a changed operation in it; `make mutants` runs them first.
"""

from __future__ import annotations

import functools
import itertools
import math

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from parity_tests import reference
from parity_tests.wings import JAX, TORCH, WINGS, Wing
from regjax import _keys as jax_keys
from regjax import _masks as jax_masks
from regjax import _threefry as jax_threefry
from regtorch import _keys as torch_keys
from regtorch import _masks as torch_masks
from regtorch import _threefry as torch_threefry

both_wings = pytest.mark.parametrize("wing", WINGS, ids=str)
only_jax = pytest.mark.parametrize("wing", [JAX], ids=str)
KEY = (0x13198A2E, 0x83707344)
SMALLEST = 2.0**-126


def jax_words(*words: int) -> tuple[jax.Array, ...]:
    return tuple(jnp.uint32(word) for word in words)


def torch_words(*words: int) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor(np.uint32(word).view(np.int32).item()) for word in words)


def combined(high: jax.Array, low: jax.Array) -> np.ndarray:
    """64-bit indices from their words."""
    return (np.asarray(high).astype(np.uint64) << 32) | np.asarray(low).astype(np.uint64)


def row_major(shape: tuple[int, ...], places: tuple[np.ndarray, ...]) -> np.ndarray:
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    return sum(np.uint64(s) * p.astype(np.uint64) for s, p in zip(strides, places, strict=True))


@pytest.mark.parametrize("shape", [(), (5,), (3, 5), (2, 1, 7), (2, 3, 4)], ids=str)
def test_every_element_takes_the_bits_of_its_own_index(shape):
    expected = reference.bits(KEY, range(math.prod(shape))).reshape(shape)
    ours = jax.jit(lambda: jax_threefry.counter_bits(jax_words(*KEY), shape))()
    np.testing.assert_array_equal(np.asarray(ours), expected)
    theirs = torch_threefry.counter_bits(torch_words(*KEY), shape)
    np.testing.assert_array_equal(theirs.numpy().view(np.uint32), expected)
    for in_place in (False, True):
        index = jax.jit(lambda: jax_threefry.row_major_index(shape, None, in_place=in_place))()  # noqa: B023
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
def test_a_slice_knows_where_it_lies(wing: Wing, whole):
    """Also where the index passes 2**32: the high word takes the product and both carries."""
    shape = tuple(min(size, 3) for size in whole)
    for far in (0.0, 0.3, 0.999, 1.0):
        starts = {i: int((n - s) * far) for i, (n, s) in enumerate(zip(whole, shape, strict=True))}
        given = starts if far else {}
        index = jax.jit(lambda: jax_threefry.slice_index(whole, shape, given))()  # noqa: B023
        places = np.indices(shape)
        expected = row_major(whole, tuple(p + starts[i] for i, p in enumerate(places)))
        np.testing.assert_array_equal(np.broadcast_to(combined(*index), shape), expected)


def test_the_upper_half_of_a_product():
    rng = np.random.default_rng(0)
    x = np.append(rng.integers(0, 2**32, 200, np.uint32), np.uint32([0, 1, 2**16, 2**32 - 1]))
    for factor in (0, 1, 0xFFFF, 0x10000, 0x89ABCDEF, 2**32 - 1):
        high = jax.jit(jax_threefry._multiply_high, static_argnums=1)(x, factor)
        np.testing.assert_array_equal(np.asarray(high), (x.astype(np.uint64) * factor) >> 32)


def test_more_than_a_word_of_elements():
    """The first shape whose index takes two words, and the last whose index takes one."""
    for shape in ((2**16, 2**16), (2**16, 2**16 + 1)):
        rows = [0, 1, 2**15, 2**16 - 1]
        draw = lambda: jax_threefry.counter_bits(jax_words(*KEY), shape)[jnp.array(rows), -2:]  # noqa: B023
        index = [
            [row * shape[1] + column for column in (shape[1] - 2, shape[1] - 1)] for row in rows
        ]
        expected = reference.bits(KEY, np.ravel(np.array(index, object))).reshape(4, 2)
        np.testing.assert_array_equal(np.asarray(jax.jit(draw)()), expected)


@only_jax
def test_symbolic_sizes_make_the_words_that_numbers_make(wing: Wing):
    """Of an exported program whose sizes are symbols: products, indices, slices and bits."""

    def words(x, y, z):
        shape = (x.size, y.size, z.size)
        starts = {axis: size - 1 for axis, size in enumerate(shape)}
        corner = jax_threefry.slice_index((*shape, 3), (1, 1, 1, 3), starts)
        return jax_threefry.product_words((*shape[:2], 7, shape[2])), corner

    def drawn(x):
        index = jax_threefry.row_major_index(x.shape, None)
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
def test_a_layout_is_a_sharding_or_a_spec(wing: Wing):
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
    key, expected = wing.key(9), wing.bernoulli(9, 0.3, (4, 8, 3))
    for spec in (P("a", "b"), P(None, ("a", "b")), P("b")):
        sharding = NamedSharding(mesh, spec)
        for layout in (spec, sharding):
            with jax.set_mesh(mesh):
                mask = wing.library.bernoulli(key, 0.3, expected.shape, out_sharding=layout)
                index = jax.make_jaxpr(lambda: jax_threefry.row_major_index(mask.shape, layout))()  # noqa: B023
            axes = [e.outvars[0].aval for e in index.eqns if e.primitive.name == "iota"]
            assert [aval.sharding.spec for aval in axes] == [
                P(*(spec[axis] if axis == i < len(spec) else None for axis in range(3)))
                for i in range(3)
            ]
            np.testing.assert_array_equal(np.asarray(mask), expected)
            assert mask.sharding.is_equivalent_to(sharding, 3)


def test_the_most_elements_that_a_shape_may_have():
    """2**63 - 1; PyTorch asks for the memory of more than 2**30."""
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
def test_pieces_join(monkeypatch, size, compiling):
    """Pieces neither overlap nor leave a gap, and none is longer than promised."""
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


def test_the_block_on_integers_is_the_block_on_tensors():
    for key, counter in itertools.product([(0, 0), KEY, (2**32 - 1,) * 2], repeat=2):
        expected = reference.threefry2x32(key, counter)
        assert torch_threefry.encrypt(key, counter) == expected
        out = torch_threefry.threefry2x32(torch_words(*key), torch_words(*counter))
        assert tuple(int(word) & 0xFFFFFFFF for word in out) == expected
        out = jax_threefry.threefry2x32(jax_words(*key), jax_words(*counter))
        assert tuple(int(word) for word in out) == expected


@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg", "threefry2x32"])
@pytest.mark.parametrize("raw", [False, True])
def test_the_words_of_every_kind_of_key(impl, raw):
    """The first two words encrypt the last two; a threefry key is its own words."""
    key = jax.random.key(5, impl=impl)
    data = [0x13198A2E, 0x83707344, 0xA4093822, 0x299F31D0][: 2 if impl == "threefry2x32" else 4]
    key = jnp.array(data, jnp.uint32)
    key = key if raw else jax.random.wrap_key_data(key, impl=impl)
    expected = tuple(data[:2])
    if len(data) == 4:
        expected = reference.threefry2x32(expected, tuple(data[2:]))
    assert tuple(int(word) for word in jax_keys.key_words(key)) == expected
    assert jax_keys.is_threefry(key) == (impl == "threefry2x32")


@pytest.mark.parametrize("size", [1, 3, 4, 5, 6])
def test_the_words_of_a_key_of_another_kind(size):
    """Padded with zeros to whole blocks, two at least; what is there encrypts the next block."""
    words = [0x13198A2E, 0x83707344, 0xA4093822, 0x299F31D0, 0x082EFA98, 0xEC4E6C89][:size]
    methods = dict.fromkeys(("seed", "split", "random_bits", "fold_in"), lambda *_: None)
    impl = jax.extend.random.define_prng_impl(key_shape=(size,), **methods)
    padded = (*words, 0, 0, 0)
    expected = reference.threefry2x32(padded[:2], padded[2:4])
    if size > 4:
        expected = reference.threefry2x32(expected, padded[4:6])
    key = jax.random.wrap_key_data(jnp.array(words, jnp.uint32), impl=impl)
    assert tuple(int(word) for word in jax_keys.key_words(key)) == expected


JAX_KEYS = {
    ("uint32", (2,)): None,
    ("uint32", (4,)): None,
    ("uint32", (1,)): ValueError,
    ("uint32", (3,)): ValueError,
    ("uint32", (5,)): ValueError,
    ("uint32", ()): ValueError,
    ("uint32", (1, 2)): ValueError,
    ("int32", (2,)): TypeError,
    ("float32", (2,)): TypeError,
}
TORCH_KEYS = {
    ("uint32", (2,)): None,
    ("uint32", (1,)): TypeError,
    ("uint32", (3,)): TypeError,
    ("uint32", (2, 3)): TypeError,
    ("uint32", ()): TypeError,
    ("uint32", (1, 2)): ValueError,
    ("uint32", (1, 1, 2)): ValueError,
    ("int32", (2,)): TypeError,
    ("int64", (2,)): TypeError,
}


@both_wings
def test_which_arrays_are_keys(wing: Wing):
    check = jax_keys.check_key if wing is JAX else torch_keys.check_key
    for (dtype, shape), error in (JAX_KEYS if wing is JAX else TORCH_KEYS).items():
        key = wing.array(np.ones(shape, dtype))
        if error is None:
            assert check(key) is key
        else:
            with pytest.raises(error, match="secret must "):
                check(key, "secret")
    for nothing in (None, 0, [1, 2]):
        with pytest.raises(TypeError, match="key must be a"):
            check(nothing)


def test_one_typed_key_is_a_key_and_a_batch_is_none():
    key = jax.random.key(0)
    assert jax_keys.check_key(key) is key
    raw = np.ones(2, np.uint32)
    assert jax_keys.check_key(raw) is raw
    for keys in (key[None], key[None, None]):
        with pytest.raises(ValueError, match="batch of keys"):
            jax_keys.check_key(keys)


def test_eager_calls_compile_once():
    """A call is one dispatch: neither the key, nor a step, a site or a probability is static."""
    programs = (jax_keys._site_words, jax_masks._threshold_mask)
    before = [program._cache_size() for program in programs]
    for seed in range(3):
        key = JAX.library.site_key(JAX.key(seed), seed, str(seed))
        JAX.library.bernoulli(key, seed / 3, (3, 5, 11))
    assert [program._cache_size() for program in programs] == [size + 1 for size in before]


def test_seeds_and_data_of_32_bits():
    library, key = TORCH.library, TORCH.key(0)
    keys = [list(reference.threefry2x32((0, 0), (0, i))) for i in range(6)]
    assert library.split(key).tolist() == keys[:2]
    assert library.split(key, (2, 3)).reshape(6, 2).tolist() == keys
    assert library.split(key, np.int64(3)).tolist() == keys[:3]
    for value, word in ((-(2**31), 2**31), (-1, 2**32 - 1), (2**32 - 1, 2**32 - 1), (5, 5)):
        assert library.key(value).tolist() == [0, word]
        expected = reference.threefry2x32((0, 0), (0, word))
        assert tuple(library.fold_in(key, value).tolist()) == expected
    for value in (-(2**31) - 1, 2**32):
        for call in (library.key, lambda data: library.fold_in(key, data)):
            with pytest.raises(
                ValueError, match=rf"must lie in \[-2\*\*31, 2\*\*32\); got {value}"
            ):
                call(value)
    for num in ("22", 2.0, [2.0]):
        with pytest.raises(TypeError, match="num"):
            library.split(key, num)


def test_words_are_read_where_reading_waits_for_nothing(monkeypatch):
    assert torch_keys._host_words(TORCH.key(5)) == (0, 5)
    assert torch_keys._host_words(TORCH.key(5).to("meta")) is None
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert torch_keys._host_words(TORCH.key(5)) is None


def test_a_generator_draws_two_words_of_32_bits():
    source = torch.Generator().manual_seed(3)
    keys = torch.stack([torch_keys.generator_key(source) for _ in range(200)]).to(torch.int64)
    again = torch.Generator().manual_seed(3)
    assert keys.ravel().tolist() == torch.randint(2**32, (400,), generator=again).tolist()


def test_halves_of_a_step():
    for step in (0, 2**31 - 1):
        words = jax.jit(jax_keys._step_words)(jnp.int32(step))
        assert tuple(int(word) for word in words) == (0, step)
    with jax.enable_x64(True):
        words = jax.jit(jax_keys._step_words)(jnp.uint64(2**40 + 2**31 + 5))
    assert tuple(int(word) for word in words) == (2**8, 2**31 + 5)
    assert torch_keys._words(2**40 + 2**31 + 5, torch.device("cpu"))[0] == 2**8
    assert torch_keys.check_step(2**64 - 1) == 2**64 - 1
    expected = reference.site_key((0, 1), 2**64 - 1, "site")
    for wing in WINGS:
        step = np.uint64(2**64 - 1)
        assert wing.words(wing.library.site_key(wing.key(1), step, "site")) == expected


PROBABILITIES = [0.0, 1e-45, float(np.nextafter(np.float32(SMALLEST), np.float32(0))), SMALLEST]
PROBABILITIES += [1e-9, 2.0**-24, 2.0**-23, 0.123, 0.5, 0.9, 1 - 2.0**-24, 1.0]


@pytest.mark.parametrize("keep_prob", [*PROBABILITIES, -1.0, 2.0, math.nan])
def test_thresholds(keep_prob):
    """`ceil(p * 2**23)`, and nothing below the smallest normal number, as a number and changing."""
    inside = min(keep_prob, 1.0) if keep_prob >= SMALLEST else 0.0
    expected = math.ceil(float(np.float32(inside)) * 2**23)
    assert int(jax.jit(jax_masks._threshold)(jnp.float32(keep_prob))) == expected
    assert int(torch_masks._threshold(torch.tensor(keep_prob))) == expected
    if 0 <= keep_prob <= 1:
        assert jax_masks._threshold(keep_prob) == expected
        assert torch_masks._threshold(keep_prob) == expected


TINY = 2.0**-12
SHARES = [-0.5, 3e-7, float(np.nextafter(np.float32(TINY), np.float32(0))), TINY, 1.001 * TINY]


@pytest.mark.parametrize("keep_prob", [*PROBABILITIES, *SHARES])
def test_what_share_of_the_elements_is_kept(keep_prob):
    """The threshold's share below 2**-12, and otherwise what is asked for."""
    changing = np.float32(keep_prob)
    kept = math.ceil(float(changing) * 2**23) / 2**23 * (changing >= SMALLEST)
    if keep_prob >= 0:
        expected = kept if keep_prob < TINY else keep_prob
        assert jax_masks.realised_keep_prob(jax_masks.bernoulli, keep_prob) == expected
        assert torch_masks.realised_keep_prob(torch_masks.bernoulli, keep_prob) == expected
    if keep_prob <= 0 or keep_prob >= SMALLEST:  # a device may flush what is smaller
        expected = np.float32(kept) if 0 < keep_prob < TINY else changing
        assert jax_masks.exact_keep_prob(jnp.asarray(changing)) == expected
        assert torch_masks.exact_keep_prob(torch.tensor(changing)) == expected


@both_wings
def test_a_sampler_may_say_what_it_keeps(wing: Wing):
    """Also where a partial gave it options; one that says nothing keeps what is asked for."""
    realised = (jax_masks if wing is JAX else torch_masks).realised_keep_prob
    packed = wing.library.packed_bernoulli
    assert realised(packed, 0.3) == round(0.3 * 2**16) / 2**16
    assert realised(functools.partial(packed, bits=3), 0.3) == 2 / 8
    for silent in (lambda *_: None, functools.partial(lambda *_, **options: None, bits=3)):
        assert realised(silent, 0.3) == 0.3


@both_wings
def test_which_numbers_are_probabilities(wing: Wing):
    check = (jax_masks if wing is JAX else torch_masks).check_probability
    for value in (0, 1, 0.5, np.float32(0.25), np.float64(1)):
        checked = check("share", value)
        assert (checked, type(checked)) == (value, float)
    for value in (-1e-9, 1 + 1e-7, math.nan, math.inf, 2):
        with pytest.raises(ValueError, match=r"share must lie in \[0, 1\]; got"):
            check("share", value)
    for value in (True, "0.5", None, 0.5j, wing.array(np.bool_(1)), wing.array(np.complex64(1))):
        with pytest.raises(TypeError, match="share must be a real number"):
            check("share", value)
    with pytest.raises(ValueError, match=r"share must be a scalar in \[0, 1\]; got shape \(1,\)"):
        check("share", wing.array(np.ones(1, np.float32)))
    for dtype in (np.float32, np.int32):
        assert wing.traced(lambda value: check("share", value) + 0)(np.array(3, dtype)) == 3


def test_a_uniform_equal_to_the_threshold_is_dropped():
    """The threshold of one element, exactly: it falls on the side of the dropped ones."""
    (drawn,) = reference.bits((0, 9), [4])
    for kept, uniform in enumerate((drawn >> 9, (drawn >> 9) + 1)):
        keep_prob = float(uniform) / 2**23
        for wing in WINGS:
            assert wing.bernoulli(9, keep_prob, (5,))[4] == kept
        assert bool(jax_masks.bernoulli_at(JAX.key(9), keep_prob, jax_words(0, 4))) == kept
        assert torch_masks.bernoulli_at(TORCH.key(9), keep_prob, torch.tensor(4)) == kept


def test_words_as_signed_integers():
    for word in (0, 1, 2**31 - 1, 2**31, 2**32 - 1):
        assert torch_threefry._signed(word) == np.uint32(word).view(np.int32)
