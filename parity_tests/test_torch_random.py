"""PyTorch's random stream in JAX: bits and state after every call, compared with live PyTorch."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax import lax
from torch.nn import functional as F

from parity_tests import torch_stream
from parity_tests.promises import Promise
from parity_tests.torch_stream import as_numpy, skip_words
from regjax import torch_random

CALLS = list(torch_stream.calls())
FAST = torch_stream.representatives(CALLS)
HAS_AVX2 = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
SEED = 12


@pytest.fixture(autouse=True)
def _seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        yield


def has_state_of_torch(g):
    return bool((torch_random.to_torch(g) == torch.get_rng_state().numpy()).all())


def differences(call, **options):
    """Return how a call differs from PyTorch's; in float64 by more than `call.ulps`."""

    def within():
        for label, one, other in call.pairs(**options):
            if call.ulps and one.dtype == np.float64:
                near = np.abs(one.view(np.int64) - other.view(np.int64)) <= call.ulps
                one = np.where(near, other, one)
            yield label, one, other

    return Promise("", "", within).broken()


@pytest.mark.parametrize(
    "call",
    [pytest.param(c, marks=[] if c in FAST else [pytest.mark.slow]) for c in CALLS],
    ids=str,
)
@pytest.mark.sample(9)
def test_value_and_state_equal_torchs(call):
    if call.needs_avx2 and not HAS_AVX2:
        pytest.skip("PyTorch rounds otherwise on a CPU without AVX2")
    # 623 is one word before the end of a block: a pair of words lies in two blocks.
    for skipped in (623, 7):
        skip_words(skipped)
        assert differences(call) == []


@pytest.mark.parametrize("words", [1, 623, 624, 1248])
def test_draws_up_to_the_end_of_a_block(words):
    """PyTorch computes a block when its first word is drawn, not when the last one is used up."""
    g = torch_random.from_torch(torch.default_generator)
    for _ in range(2):
        value, g = torch_random.uniform(g, (words,))
        np.testing.assert_array_equal(value, torch.rand(words))
        assert has_state_of_torch(g)
    position = int(g.position)
    skip_words(1248 - position - 4)  # a pair of normals takes 4 words
    value, g = torch_random.normal(torch_random.from_torch(torch.default_generator), (1,))
    np.testing.assert_array_equal(value, torch.randn(1))
    assert g.position == 624
    np.testing.assert_array_equal(g.state, torch_random.from_torch(torch.default_generator).state)


def test_jitted_calls_and_their_cached_normals():
    normals = [c for c in CALLS if c.kind == "normal" and "(15,), (0.0" in c.name]
    normals = [call for call in normals if call.dtype in ("float32", "float64")]
    for call in normals * 2:
        assert differences(call, jitted=True) == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_random_sequences_of_all_calls(seed):
    torch.manual_seed(seed - 2)
    for call in torch_stream.sequence(seed, 200, CALLS):
        if HAS_AVX2 or not call.needs_avx2:
            assert differences(call, jitted=seed == 2) == []


@pytest.mark.slow
def test_ten_million_draws():
    """Masks of many shapes, rates and dtypes: 10,034,240 elements, none different."""
    rng = np.random.default_rng(0)
    g, count, different = torch_random.generator(SEED), 0, 0
    for shape in ((1, 7), (33, 65), (128, 1001), (8, 3, 50, 50), (1_000_000,), (64_000,)):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.tensor(rng.normal(size=shape)).to(dtype)
            for rate in rng.uniform(size=4).tolist():
                y, g = torch_random.dropout(jnp.asarray(as_numpy(x)), rate, g)
                theirs = as_numpy(F.dropout(x, rate))
                different += np.count_nonzero(np.asarray(y).view("u1") != theirs.view("u1"))
                count += y.size
                assert has_state_of_torch(g)
    assert (count, different) == (10_034_240, 0)


@pytest.mark.parametrize("seed", [0, 1, -1, 2**31, 2**63, 2**64 - 1, -(2**63)])
def test_seeds(seed):
    torch.manual_seed(seed)
    assert has_state_of_torch(torch_random.generator(seed))


def test_state_survives_both_ways():
    torch.randn(3)  # caches a normal
    state = torch.get_rng_state()
    for source in (torch.default_generator, state, state.numpy(), state.numpy().tobytes()):
        g = torch_random.from_torch(source)
        assert has_state_of_torch(g)
    assert g.next_double_normal_sample[0] == 1
    first, g = torch_random.normal(g, (2,))
    np.testing.assert_array_equal(first, torch.randn(2))
    other = torch.Generator()
    other.set_state(torch.from_numpy(torch_random.to_torch(g)))
    _, g = torch_random.uniform(g, (5,))
    torch.rand(5, generator=other)
    assert torch.equal(torch.from_numpy(torch_random.to_torch(g)), other.get_state())


def test_a_radius_of_zero_has_no_sign():
    state = torch_random.to_torch(torch_random.from_torch(torch.default_generator))
    torch.rand(624)
    words = torch.get_rng_state().numpy()[24:5016].view(np.uint64).copy()
    words[8:16] = 0  # a word of 0 becomes a uniform number of 0, and 1 - 0 a radius of 0
    state[24:5016], state[8:10], state[16] = words.view(np.uint8), (617 & 255, 617 >> 8), 8
    torch.set_rng_state(torch.from_numpy(state))
    value, _ = torch_random.normal(torch_random.from_torch(state), (16,))
    value = np.asarray(value)
    assert not value.any()
    np.testing.assert_array_equal(value.view(np.uint32), torch.randn(16).numpy().view(np.uint32))


def test_every_field_of_the_state_is_preserved():
    state = torch_random.to_torch(torch_random.generator(2**40 + 3))
    state[24:5016:8] = np.arange(624) % 256  # words, each of 8 bytes
    state[5024:5032], state[5040] = range(1, 9), 1  # the cached float64
    state[5048:5052], state[5052] = range(4), 1  # the cached float32
    state[8:10], state[16] = ((625 - 12) & 255, (625 - 12) >> 8), 12  # left and next
    np.testing.assert_array_equal(torch_random.to_torch(torch_random.from_torch(state)), state)
    generator = torch.Generator()
    generator.set_state(torch.from_numpy(state))
    np.testing.assert_array_equal(generator.get_state().numpy(), state)


def mlp(x, weights, rate, g):
    for weight in weights:
        x, g = torch_random.dropout(jnp.tanh(x @ weight), rate, g)
    return (x**2).sum(), g


def test_gradients_and_scan_replay_a_run_of_torch():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(5, 8)).astype(np.float32)
    weights = [rng.normal(size=(8, 8)).astype(np.float32) for _ in range(2)]

    def step(g, _):
        gradient, g = jax.grad(lambda w: mlp(x, w, 0.3, g), has_aux=True)(weights)
        return g, gradient

    g, gradients = jax.jit(lambda g: lax.scan(step, g, length=3))(torch_random.generator(SEED))
    tensors = [torch.tensor(weight, requires_grad=True) for weight in weights]
    for i in range(3):
        h = torch.tensor(x)
        for weight in tensors:
            h = F.dropout(torch.tanh(h @ weight), 0.3)
        for one, two in zip(gradients, torch.autograd.grad((h**2).sum(), tensors), strict=True):
            np.testing.assert_allclose(one[i], two, rtol=1e-4, atol=1e-5)
    assert has_state_of_torch(g)


def test_transformations_keep_the_mask():
    g, x = torch_random.generator(1), jnp.arange(1.0, 13.0)

    def drop(x):
        return torch_random.dropout(x, 0.5, g)[0]

    y = drop(x)
    noise = y / x
    np.testing.assert_array_equal(jax.grad(lambda x: drop(x).sum())(x), noise)
    np.testing.assert_array_equal(jax.jvp(drop, [x], [x])[1], y)
    np.testing.assert_array_equal(jax.vjp(jax.checkpoint(drop), x)[1](x)[0], y)
    _, pullback = jax.vjp(drop, x)
    dtypes = sorted(str(leaf.dtype) for leaf in jax.tree.leaves(pullback) if leaf.size == x.size)
    assert dtypes == ["bool"]  # the mask alone is stored


def test_vmap():
    generators = map(torch_random.generator, range(3))
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *generators)
    x = jnp.ones((3, 40))
    y, _ = jax.vmap(lambda x, g: torch_random.dropout(x, 0.5, g))(x, stack)
    for seed in range(3):
        torch.manual_seed(seed)
        np.testing.assert_array_equal(y[seed], F.dropout(torch.ones(40), 0.5))
    one = torch_random.generator(0)
    mapped = jax.vmap(lambda x: torch_random.dropout(x, 0.5, one)[0])
    twice = lambda x: jax.vmap(mapped)(x[None])
    gradient = jax.grad(lambda x: mapped(x).sum())
    for function in (mapped, jax.jit(mapped), twice, gradient):
        with pytest.raises(
            ValueError, match=r"^x must not be mapped by jax\.vmap with a generator"
        ):
            function(x)
    with pytest.raises(ValueError, match=r"^g must be a single generator; got a stack"):
        torch_random.uniform(stack, (3,))


def test_values_are_rounded_inside_a_jitted_function():
    x = np.random.default_rng(0).normal(size=5000).astype(np.float32)
    for dtype in (np.float32, jnp.bfloat16):
        for name, theirs in (("dropout", F.dropout), ("alpha_dropout", F.alpha_dropout)):

            def ours(x, y, g, name=name):
                return getattr(torch_random, name)(x * y, 0.3, g)[0].astype(np.float32) + 1

            value = jax.jit(ours)(x.astype(dtype), x.astype(dtype), torch_random.generator(SEED))
            torch.manual_seed(SEED)
            t = torch.tensor(x).to(torch.float32 if dtype == np.float32 else torch.bfloat16)
            np.testing.assert_array_equal(value, theirs(t * t, 0.3, training=True).float() + 1)


G = torch_random.generator(0)
STATE = torch_random.to_torch(G)


def changed(position, value):
    state = STATE.copy()
    state[position] = value
    return state


def wrong(argument: Any) -> Any:
    """Hide the type of an argument that the annotation excludes."""
    return argument


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: torch_random.generator(2**64),
            ValueError,
            r"seed must lie in \[-2\*\*63, 2\*\*64\)",
        ),
        (lambda: torch_random.generator(wrong(1.5)), TypeError, "seed must be an integer"),
        (lambda: torch_random.from_torch(STATE[:-1]), ValueError, "must have 5056 bytes.*got 5055"),
        (
            lambda: torch_random.from_torch(bytes(16)),
            ValueError,
            "got 16, as of a generator on CUDA",
        ),
        (lambda: torch_random.from_torch(0), TypeError, "must be a torch.Generator"),
        (lambda: torch_random.from_torch(STATE.astype(float)), TypeError, "must be a torch.Gen"),
        (lambda: torch_random.from_torch(changed(8, 7)), ValueError, "left=7, next=0"),
        (lambda: torch_random.from_torch(changed(12, 0)), ValueError, "seeded=0"),
        (lambda: torch_random.from_torch(changed(28, 1)), ValueError, "largest word 4294967"),
        (lambda: torch_random.to_torch(wrong(STATE)), TypeError, "g must be a TorchGenerator"),
        (lambda: jax.jit(torch_random.to_torch)(G), TypeError, "g must be known before tracing"),
        (
            lambda: torch_random.uniform(wrong(jax.random.key(0)), (2,)),
            TypeError,
            "g must be a TorchGen",
        ),
        (lambda: torch_random.uniform(G, (2,), 2, 1), ValueError, "low must be at most high"),
        (
            lambda: torch_random.uniform(G, (2,), 0, 1e39),
            ValueError,
            "high must be finite in float32",
        ),
        (
            lambda: torch_random.uniform(G, (2,), -3e38, 3e38),
            ValueError,
            "high must exceed low by at",
        ),
        (lambda: torch_random.uniform(G, (2,), dtype="int32"), TypeError, "dtype must be float16"),
        (
            lambda: torch_random.uniform(G, (2,), dtype="float64"),
            ValueError,
            "dtype must have at mos",
        ),
        (lambda: torch_random.normal(G, (2,), 0, -1), ValueError, "stddev must be at least 0"),
        (lambda: torch_random.randint(G, (2,), 3, 3), ValueError, "low and high must satisfy"),
        (
            lambda: torch_random.randint(G, (2,), 0, 257, "uint8"),
            ValueError,
            "low and high must sat",
        ),
        (
            lambda: torch_random.randint(G, (2,), 0, 2, "float32"),
            TypeError,
            "dtype must be an integ",
        ),
        (lambda: torch_random.permutation(G, -1), ValueError, "n must be at least 0"),
        (lambda: torch_random.permutation(G, 2**28), ValueError, "n must be at most 214748363"),
        (lambda: torch_random.bernoulli(G, 1.5, (2,)), ValueError, "keep_prob must lie in"),
        (
            lambda: jax.jit(lambda r: torch_random.dropout(jnp.ones(2), r, G))(0.5),
            TypeError,
            "rate must be a number known before tracing",
        ),
        (lambda: torch_random.dropout(jnp.ones(2, int), 0.5, G), TypeError, "x must be floating"),
        (lambda: torch_random.dropout(jnp.ones(2, complex), 0.5, G), TypeError, "x must be real"),
        (
            lambda: torch_random.feature_dropout(jnp.ones(2), 0.5, G),
            ValueError,
            "x must have at least",
        ),
        (
            lambda: torch_random.dropout(jnp.ones((2, 2)), 0.5, G, memory_order=(0, 2)),
            ValueError,
            "memory_order must be a permutation of the axes",
        ),
        (
            lambda: torch_random.dropout(jnp.ones((2, 2)), 0.5, G, memory_order="channels_last"),
            ValueError,
            "memory_order must be a permutation of axes if",
        ),
        (
            lambda: torch_random.dropout(jnp.ones((2, 2)), 0.5, G, memory_order="rows"),
            ValueError,
            'memory_order must be "channels_last" or a permutation',
        ),
    ],
)
def test_wrong_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()
