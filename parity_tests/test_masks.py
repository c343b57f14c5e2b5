"""Mask stream v1: both frameworks, the NumPy reference and jax.random draw the same bits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parity_tests import reference
from parity_tests.frameworks import FRAMEWORKS, JAX, TORCH, Framework
from parity_tests.tables import KEEP_PROBS, both_frameworks
from regjax._random import bernoulli as jax_masks
from regjax._random import threefry as jax_threefry
from regtorch._random import bernoulli as torch_masks
from regtorch._random import threefry as torch_threefry

SHAPES = [(), (0,), (1,), (257,), (3, 5, 7), (2, 1, 9), (64, 33)]

# Known answers of threefry2x32 with 20 rounds, published with Random123: key, counter, output.
KNOWN_ANSWERS = [
    ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
    ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
    ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
]


@pytest.mark.parametrize(("key", "counter", "expected"), KNOWN_ANSWERS)
def test_known_answers_of_threefry(key, counter, expected):
    assert reference.threefry2x32(key, counter) == expected
    key, counter = np.array(key, np.uint32), np.array(counter, np.uint32)
    out = jax_threefry.threefry2x32(tuple(jnp.asarray(key)), tuple(jnp.asarray(counter)))
    assert tuple(int(word) for word in out) == expected
    signed = [TORCH.array(words.view(np.int32)).unbind() for words in (key, counter)]
    out = torch_threefry.threefry2x32(*signed)
    assert tuple(int(word) & 0xFFFFFFFF for word in out) == expected


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 - 1, -1, -(2**31)])
def test_seeds_make_the_keys_of_jax(seed):
    assert TORCH.words(TORCH.key(seed)) == JAX.words(JAX.key(seed))


def test_split_fold_in_and_bits_are_those_of_jax():
    in_torch, in_jax = TORCH.key(42), jax.random.key(42)
    for num in (1, 2, 5, (2, 3)):
        expected = np.asarray(jax.random.key_data(jax.random.split(in_jax, num)))
        np.testing.assert_array_equal(TORCH.numpy(TORCH.library.split(in_torch, num)), expected)
    for data in (0, 1, 12345, 2**32 - 1):
        folded = TORCH.library.fold_in(in_torch, data)
        assert TORCH.words(folded) == JAX.words(jax.random.fold_in(in_jax, np.uint32(data)))
    for shape in SHAPES:
        expected = np.asarray(jax.random.bits(in_jax, shape, "uint32"))
        np.testing.assert_array_equal(TORCH.numpy(TORCH.library.bits(in_torch, shape)), expected)


@both_frameworks
@pytest.mark.parametrize("keep_prob", KEEP_PROBS)
@pytest.mark.sample(9)
def test_masks_are_those_of_jax_and_of_the_reference(framework: Framework, keep_prob):
    for shape in SHAPES:
        mask = framework.bernoulli(9, keep_prob, shape)
        expected = np.asarray(jax.random.bernoulli(jax.random.key(9), keep_prob, shape))
        np.testing.assert_array_equal(mask, expected)
    np.testing.assert_array_equal(
        framework.bernoulli(9, keep_prob, (3, 5, 7)),
        reference.bernoulli((0, 9), keep_prob, (3, 5, 7)),
    )


@both_frameworks
@pytest.mark.parametrize("keep_prob", [*KEEP_PROBS, float("nan"), -1.0, 2.0])
def test_a_changing_keep_prob_draws_the_same_mask(framework: Framework, keep_prob):
    draw = framework.traced(
        lambda prob: framework.library.bernoulli(framework.key(9), prob, (64, 33))
    )
    expected = np.asarray(jax.random.bernoulli(jax.random.key(9), np.float32(keep_prob), (64, 33)))
    np.testing.assert_array_equal(framework.numpy(draw(np.float32(keep_prob))), expected)


def test_the_smallest_uniform_and_the_smallest_probabilities():
    """A uniform of exactly 0 is kept for every normal probability, but not for a subnormal one."""
    bits = np.asarray(jax.random.bits(JAX.key(7), (4096, 4096), "uint32"))
    zeros = int(np.count_nonzero(bits >> 9 == 0))
    assert zeros > 0
    for keep_prob, kept in ((1e-45, 0), (1e-38, 0), (2e-38, zeros), (1e-10, zeros)):
        of_jax = int(jax.random.bernoulli(JAX.key(7), keep_prob, bits.shape).sum())
        of_regjax = int(JAX.library.bernoulli(JAX.key(7), keep_prob, bits.shape).sum())
        assert (of_regjax, of_jax) == (kept, kept)


def test_counters_carry_into_the_high_word():
    """Read a mask of more than 2**32 elements where the low word wraps, without allocating it."""
    shape = (2**17, 2**16)  # 2**33 elements
    words = (jnp.uint32(1), jnp.uint32(2))
    whole = jax.jit(lambda: jax_threefry.counter_bits(words, shape)[2**16 - 1 : 2**16 + 1, ::21845])
    memory = whole.lower().compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 2**20
    rows = [range(row * 2**16, (row + 1) * 2**16, 21845) for row in (2**16 - 1, 2**16)]
    expected = np.stack([reference.bits((1, 2), row) for row in rows])
    np.testing.assert_array_equal(np.asarray(whole()), expected)
    for start in (2**32 - 3, 2**33 + 2**31):
        key = TORCH.array(np.array([1, 2], np.int32))
        bits = torch_threefry.range_bits((key[0], key[1]), start, start + 6)
        expected = reference.bits((1, 2), range(start, start + 6))
        np.testing.assert_array_equal(TORCH.numpy(bits).view(np.uint32), expected)


@pytest.mark.parametrize("shape", [(3, 2**31, 5), (5, 2**17, 2**16, 3)])
def test_counters_of_long_axes_and_strides(shape):
    """Read the last element of arrays with strides beyond 2**32, which need 64-bit products."""
    words = (jnp.uint32(3), jnp.uint32(4))
    corner = tuple(slice(size - 1, size) for size in shape)
    last = jax.jit(lambda: jax_threefry.counter_bits(words, shape)[corner])
    index = int(np.prod([int(size) for size in shape], dtype=object)) - 1
    assert int(last().item()) == int(reference.bits((3, 4), [index])[0])


@both_frameworks
@pytest.mark.parametrize("site", ["", "hidden", "encoder/3/attention", "Schicht ü"])
@pytest.mark.parametrize("step", [0, 1, 2**31, 2**40 + 5])
def test_site_keys_are_those_of_the_reference(framework: Framework, step, site):
    assert framework.words(
        framework.library.site_key(framework.key(6), step, site)
    ) == reference.site_key((0, 6), step, site)


@both_frameworks
@pytest.mark.parametrize(
    ("step", "site", "error", "message"),
    [
        (-1, "a", ValueError, r"step must lie in \[0, 2\*\*64\); got -1"),
        (2**64, "a", ValueError, r"step must lie in \[0, 2\*\*64\); got 18446744073709551616"),
        (0.5, "a", TypeError, r"step must be an integer; got 0\.5"),
        (True, "a", TypeError, "step must be an integer; got True"),
        (0, 3, TypeError, "site must be a string that names the place; got 3"),
    ],
)
def test_wrong_steps_and_sites_are_refused(framework: Framework, step, site, error, message):
    with pytest.raises(error, match=message):
        framework.library.site_key(framework.key(0), step, site)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_a_hundred_million_elements_are_the_same_in_both_frameworks(seed):
    shape = (2048, 8192)  # 2**24 elements, six times
    np.testing.assert_array_equal(
        FRAMEWORKS[0].bernoulli(seed, 0.9 - 0.1 * seed, shape),
        FRAMEWORKS[1].bernoulli(seed, 0.9 - 0.1 * seed, shape),
    )


def test_a_mask_can_be_read_at_any_index():
    """Compare single elements with the reference, including indices beyond 32 bits."""
    index = np.array(
        [0, 1, 77, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40 + 5, *range(2**33, 2**33 + 99)]
    )
    high, low = (jnp.asarray((index >> shift).astype(np.uint32)) for shift in (32, 0))
    for keep_prob in KEEP_PROBS:
        expected = reference.bernoulli_at((0, 5), keep_prob, index)
        in_jax = jax_masks.bernoulli_at(JAX.key(5), keep_prob, (high, low))
        in_torch = torch_masks.bernoulli_at(TORCH.key(5), keep_prob, TORCH.array(index))
        np.testing.assert_array_equal(JAX.numpy(in_jax), expected)
        np.testing.assert_array_equal(TORCH.numpy(in_torch), expected)


@both_frameworks
@pytest.mark.parametrize("shape", [(2**40, 2**40), (2**62, 2)])
def test_a_shape_that_no_array_has_is_refused(framework: Framework, shape):
    library, key = framework.library, framework.key(0)
    for draw in (
        lambda: library.bernoulli(key, 0.5, shape),
        lambda: library.packed_bernoulli(key, 0.5, shape),
        lambda: library.normal(key, shape),
    ):
        with pytest.raises(ValueError, match=r"shape must have fewer than 2\*\*63 elements; got"):
            draw()


@pytest.mark.parametrize("draw", [TORCH.library.bernoulli, TORCH.library.packed_bernoulli])
def test_pytorch_refuses_what_does_not_fit_before_it_draws(draw):
    with pytest.raises(RuntimeError, match="memory"):
        draw(TORCH.key(0), 0.5, (2**25, 2**25))  # more than addresses can name
