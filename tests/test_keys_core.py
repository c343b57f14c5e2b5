"""Unit tests of keys, in both packages; `make mutants` runs them first."""

from __future__ import annotations

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from parity_tests import reference
from parity_tests.frameworks import FRAMEWORKS, JAX, TORCH, Framework
from parity_tests.tables import both_frameworks
from regjax._random import keys as jax_keys
from regtorch._random import keys as torch_keys


@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg", "threefry2x32"])
@pytest.mark.parametrize("raw", [False, True])
def test_the_words_of_every_kind_of_key(impl, raw):
    """The first two words encrypt the last two; the words of a threefry key are unchanged."""
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
    """The words are padded to at least two blocks, and each result encrypts the next block."""
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


@both_frameworks
def test_arrays_that_are_keys(framework: Framework):
    check = jax_keys.check_key if framework is JAX else torch_keys.check_key
    for (dtype, shape), error in (JAX_KEYS if framework is JAX else TORCH_KEYS).items():
        key = framework.array(np.ones(shape, dtype))
        if error is None:
            assert check(key) is key
        else:
            with pytest.raises(error, match="secret must "):
                check(key, "secret")
    for nothing in (None, 0, [1, 2]):
        with pytest.raises(TypeError, match="key must be a"):
            check(nothing)


def test_a_typed_key_is_a_key_and_a_batch_is_not():
    key = jax.random.key(0)
    assert jax_keys.check_key(key) is key
    raw = np.ones(2, np.uint32)
    assert jax_keys.check_key(raw) is raw
    for keys in (key[None], key[None, None]):
        with pytest.raises(ValueError, match="batch of keys"):
            jax_keys.check_key(keys)


def test_eager_calls_compile_once():
    """A call is one dispatch, since key, step and site are not static."""
    before = jax_keys._site_words._cache_size()
    for seed in range(3):
        JAX.library.site_key(JAX.key(seed), seed, str(seed))
    assert jax_keys._site_words._cache_size() == before + 1


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


def test_words_are_read_only_without_synchronization(monkeypatch):
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
    for framework in FRAMEWORKS:
        step = np.uint64(2**64 - 1)
        assert (
            framework.words(framework.library.site_key(framework.key(1), step, "site")) == expected
        )


@pytest.mark.parametrize(("device", "error"), [("nonsense", ValueError), (0.5, TypeError)])
def test_a_device_that_is_none_is_refused(device, error):
    with pytest.raises(error, match=r"^device must be a torch device, such as 'cpu'; got"):
        torch_keys.key(0, device=device)
