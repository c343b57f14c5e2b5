"""Philox in regjax.torch_random: CUDA's masks by formula, and the stream of `torch.compile`.

No GPU takes part. The masks are held to a loop over the threads of PyTorch's kernel, written here
in NumPy, and to the emulation of CUDA's stream in `torch._inductor`.
"""

from __future__ import annotations

import shutil
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax import lax
from torch._inductor.fx_passes import replace_random
from torch._inductor.runtime import halide_helpers
from torch._prims import rng_prims
from torch.nn import functional as F

from parity_tests.torch_stream import as_numpy
from regjax import torch_random
from regjax.torch_random import cuda
from regjax.torch_random.philox import philox4x32

# The properties of an H100, and of a GPU so small that a thread fills many vectors.
H100 = {"multiprocessors": 132, "threads_per_multiprocessor": 2048}
SMALL = {"multiprocessors": 2, "threads_per_multiprocessor": 300}
generator: Any = torch_random.generator
SEED = 2**40 + 12


def cuda_state(offset=0, gpu=SMALL, seed=SEED) -> Any:
    return torch_random.from_torch(np.array([seed, offset], "<u8").tobytes(), **gpu)


def offset_of(g):
    return int(torch_random.to_torch(g).view("<u8")[1])


def numpy_philox(seed, counter):
    """Return the four words of counters of 64 bits and subsequences, in 64-bit arithmetic."""
    first, subsequence = (np.asarray(n, np.uint64) for n in counter)
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    a, b, c, d = first & low, first >> shift, subsequence & low, subsequence >> shift
    key = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        one, two = a * np.uint64(0xD2511F53), c * np.uint64(0xCD9E8D57)
        a, b = (two >> shift) ^ b ^ np.uint64(key[0]), two & low
        c, d = (one >> shift) ^ d ^ np.uint64(key[1]), one & low
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return np.stack([a, b, c, d], -1).astype(np.uint32)


def numpy_uniforms(seed, offset, size, itemsize, gpu):
    """Visit elements as the threads of PyTorch's kernel do, one step of all threads at a time."""
    grid = min(gpu["multiprocessors"] * (gpu["threads_per_multiprocessor"] // 256), -(-size // 256))
    threads = np.arange(256 * grid)
    width = 16 // itemsize
    while size % width:
        width //= 2
    calls = np.full(threads.size, offset // 4)
    bits = np.zeros(size, np.uint32)

    def draw(active):
        drawn = numpy_philox(seed, (calls[active], threads[active]))
        calls[active] += 1
        return drawn

    start = threads * width
    while (start < size).any():
        active = start < size
        if width > 1:
            for first in range(0, width, 4):
                drawn = draw(active)
                for lane in range(min(4, width)):
                    bits[start[active] + first + lane] = drawn[:, lane]
            start = start + threads.size * width
        else:
            drawn = draw(active)
            for lane in range(4):
                index = start[active] + lane * threads.size
                bits[index[index < size]] = drawn[index < size, lane]
            start = start + 4 * threads.size
    return bits.astype(np.float32) * np.float32(2.0**-32) + np.float32(2.0**-33)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_known_answers_of_random123(counter, key, expected):
    words: Any = [tuple(map(jnp.uint32, numbers)) for numbers in (key, counter)]
    words = philox4x32(*words)
    assert [int(word) for word in words] == expected


def test_philox_equals_64_bit_arithmetic():
    counters = np.random.default_rng(0).integers(2**63, size=(2, 1000)).astype(np.uint64)
    halves: Any = tuple(
        jnp.asarray((n >> np.uint64(s)).astype(np.uint32)) for n in counters for s in (0, 32)
    )
    words = philox4x32((jnp.uint32(SEED & 0xFFFFFFFF), jnp.uint32(SEED >> 32)), halves)
    np.testing.assert_array_equal(jnp.stack(words, -1), numpy_philox(SEED, counters))


DTYPES = (np.float32, jnp.bfloat16, np.float16, np.float64)


@pytest.mark.parametrize(
    ("dtype", "size", "gpu", "step"),
    [
        *((dtype, 4001, SMALL, 8) for dtype in DTYPES),
        *((dtype, 8192, SMALL, 16) for dtype in DTYPES),
        (jnp.bfloat16, 3004, SMALL, 8),  # vectors of 4
        (np.float32, 1538, SMALL, 4),  # of 2
        (np.float32, 8, H100, 4),
    ],
)
@pytest.mark.sample(3)
def test_masks_equal_those_of_a_loop_over_threads(dtype, size, gpu, step):
    # At the second offset, the low word of the counter overflows.
    for offset, rate in ((8, 0.3), (2**34 - 4, 0.9)):
        with jax.enable_x64(dtype == np.float64):
            y, g = torch_random.dropout(jnp.ones(size, dtype), rate, cuda_state(offset, gpu))
        itemsize = np.dtype(dtype).itemsize
        uniforms = numpy_uniforms(SEED, offset, size, itemsize, gpu)
        bound = 1 - rate if dtype == np.float64 else np.float32(1 - rate)
        np.testing.assert_array_equal(np.asarray(y) != 0, uniforms < bound)
        assert offset_of(g) == offset + step


def numpy_halide():
    """Return functions of Halide on arrays, so that PyTorch's emulation runs without Halide."""

    class Array(np.ndarray):
        def type(self):
            return types.SimpleNamespace(bits=lambda: 8 * self.itemsize)

    unsigned = {32: np.uint32, 64: np.uint64}
    return types.SimpleNamespace(
        UInt=unsigned.__getitem__,
        Float={32: np.float32}.__getitem__,
        u32=np.uint32,
        u64=np.uint64,
        cast=lambda dtype, x: np.asarray(x).astype(dtype).view(Array),
        select=np.where,
    )


@pytest.mark.parametrize(("dtype", "width"), [(np.float32, 4), (jnp.bfloat16, 8)])
def test_uniforms_equal_the_emulation_in_inductor(dtype, width, monkeypatch):
    monkeypatch.setattr(halide_helpers, "hl", numpy_halide())
    for name, value in {
        "KEY_A": 0x9E3779B9,
        "KEY_B": 0xBB67AE85,
        "ROUND_A": 0xD2511F53,
        "ROUND_B": 0xCD9E8D57,
    }.items():
        monkeypatch.setattr(halide_helpers, f"PHILOX_{name}_U32", np.uint32(value))
    size, offset = 4096, 2**34 - 4
    assert cuda.vector_width(size, np.dtype(dtype)) == width
    with np.errstate(over="ignore"):
        theirs = halide_helpers.rand_eager_kernel(
            np.uint64(SEED), np.uint64(offset // 4), np.arange(size, dtype=np.uint64), width
        )
    ours = cuda._uniforms(cuda.words(cuda_state(offset, H100), size, width))
    np.testing.assert_array_equal(np.float32(1) - np.asarray(ours), np.asarray(theirs))


@pytest.mark.parametrize("size", [1, 256, 257, 2048, 2049, 10_000_000])
@pytest.mark.parametrize("gpu", [SMALL, H100])
def test_offsets_advance_as_in_torch(size, gpu, monkeypatch):
    properties = types.SimpleNamespace(
        multi_processor_count=gpu["multiprocessors"],
        max_threads_per_multi_processor=gpu["threads_per_multiprocessor"],
    )
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    step = offset_of(cuda._advanced(cuda_state(0, gpu), size))
    assert step == rng_prims.philox_rand_offset(torch.Size((size,)))
    assert step == replace_random._shape_to_offset((size,), torch.device("cuda"))
    assert offset_of(cuda._advanced(cuda_state(2**32 - 4, gpu), size)) == 2**32 - 4 + step


@pytest.mark.slow
def test_values_layouts_and_corners():
    g = torch_random.generator(0, "cuda", **SMALL)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 10, 8)), jnp.bfloat16)
    x = x.at[0].set(-jnp.inf)
    y, after = torch_random.dropout(x, 0.3, g)
    keep = np.asarray(torch_random.dropout(jnp.ones_like(x), 0.3, g)[0]) != 0
    assert 0.6 < keep.mean() < 0.8
    # bfloat16 is multiplied in float32 and rounded once; a dropped infinity is NaN.
    noise = keep * (np.float32(1) / np.float32(0.7))
    with np.errstate(invalid="ignore"):
        expected = (np.asarray(x, np.float32) * noise).astype(jnp.bfloat16)
    np.testing.assert_array_equal(y.astype(np.float32), expected.astype(np.float32))
    # The kernel for vectors fills in the order of memory, the one for single elements row-major.
    ones = jnp.ones((6, 10, 8))
    flat = torch_random.dropout(ones, 0.3, g)[0].reshape(-1)
    moved, _ = torch_random.dropout(ones, 0.3, g, memory_order=(2, 0, 1))
    np.testing.assert_array_equal(moved.transpose(2, 0, 1).reshape(-1), flat)
    odd = jnp.ones((3, 5))
    for order in (None, (1, 0)):
        y, _ = torch_random.dropout(odd, 0.3, g, memory_order=order)
        np.testing.assert_array_equal(
            y, torch_random.dropout(odd.reshape(-1), 0.3, g)[0].reshape(3, 5)
        )
    for rate, result in ((0, ones), (1, 0 * ones)):
        y, same = torch_random.dropout(ones, rate, g)
        np.testing.assert_array_equal(y, result)
        assert same is g
    assert torch_random.dropout(ones, 0.3, g, deterministic=True)[1] is g
    assert offset_of(after) == 4


def test_scan_and_gradient_advance_the_offset():
    g, x = torch_random.generator(3, "cuda", **SMALL), jnp.linspace(1, 2, 5000)

    def step(g, _):
        gradient, g = (
            jax.grad(lambda x: torch_random.dropout(x, 0.4, g)[0].sum())(x),
            torch_random.dropout(x, 0.4, g)[1],
        )
        return g, gradient

    last, gradients = jax.jit(lambda g: lax.scan(step, g, length=3))(g)
    for gradient in gradients:
        y, g = torch_random.dropout(x, 0.4, g)
        np.testing.assert_array_equal(gradient != 0, y != 0)
    assert offset_of(last) == offset_of(g) == 3 * 12
    assert (gradients[0] != gradients[1]).any()
    with pytest.raises(ValueError, match=r"^x must not be mapped by jax\.vmap"):
        jax.vmap(lambda x: torch_random.dropout(x, 0.4, g)[0])(x[None])


@pytest.mark.parametrize("shape", [(64, 1024), pytest.param((8, 128, 768), marks=pytest.mark.slow)])
def test_by_the_formula_half_types_draw_more_than_is_reserved(shape):
    """A thread draws 8 numbers, and the offset moves by 4: a statement about the formula alone."""
    for dtype, is_shared in ((jnp.bfloat16, True), (np.float32, False)):
        ones, g = jnp.ones(shape, dtype), torch_random.generator(0, "cuda", **H100)
        first, g = torch_random.dropout(ones, 0.5, g)
        second, _ = torch_random.dropout(ones, 0.5, g)
        first, second = (y.reshape(-1, 8) for y in (first, second))
        assert bool((first[:, 4:] == second[:, :4]).all()) == is_shared


def test_state_on_cuda_survives_both_ways():
    state = np.array([2**64 - 3, 2**62], "<u8").view(np.uint8)
    for source in (state, state.tobytes(), torch.from_numpy(state)):
        g = torch_random.from_torch(source, **H100)
        np.testing.assert_array_equal(torch_random.to_torch(g), state)
    assert repr(g).startswith(f"CudaGenerator(seed={2**64 - 3}, offset={2**62}, multiproc")
    negative = torch_random.generator(-3, "cuda", **H100)
    assert torch_random.to_torch(negative).view("<u8").tolist() == [2**64 - 3, 0]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: generator(0, "cuda"), TypeError, "^multiprocessors must be an int"),
        (lambda: generator(0, "cuda", 132), TypeError, "^threads_per_multiprocessor"),
        (lambda: generator(0, "mps"), ValueError, "^device must be"),
        (
            lambda: generator(0, "cpu", 132),
            ValueError,
            "^multiprocessors must be None",
        ),
        (
            lambda: torch_random.generator(0, "cuda", 0, 2048),
            ValueError,
            "multiprocessors must be at",
        ),
        (lambda: torch_random.generator(0, "cuda", 1, 255), ValueError, "must be at least 256"),
        (
            lambda: torch_random.from_torch(bytes(16)),
            ValueError,
            "For CUDA, and only for CUDA, pass",
        ),
        (lambda: cuda_state(6), ValueError, "multiple of 4 below"),
        (lambda: cuda_state(2**63), ValueError, "multiple of 4 below"),
        (
            lambda: torch_random.from_torch(torch.default_generator, **H100),
            ValueError,
            "must have 16 bytes.*got 5056, as of a generator on a CPU",
        ),
        *(
            (call, TypeError, "^g must be a TorchGenerator for this function; got a CudaGenerator")
            for call in (
                lambda: torch_random.bernoulli(cuda_state(), 0.5, (2,)),
                lambda: torch_random.uniform(cuda_state(), (2,)),
                lambda: torch_random.permutation(cuda_state(), 2),
                lambda: torch_random.alpha_dropout(jnp.ones(2), 0.5, cuda_state()),
                lambda: torch_random.feature_dropout(jnp.ones((2, 2)), 0.5, cuda_state()),
                lambda: torch_random.compiled_dropout(jnp.ones(2), 0.5, cuda_state()),
            )
        ),
        (lambda: cuda.check_size(2**31), ValueError, "fewer than 2\\*\\*31 elements"),
    ],
)
def test_wrong_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


RATES = (0.1, 0.3, 1 / 3, 0.999, 1e-9, 1.0, 0.0)
compiles = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile requires g++")


def in_torch(xs):
    return [F.dropout(x, rate) for x in xs for rate in RATES]


def in_jax(xs, orders, g):
    values = []
    for x, order in zip(xs, orders, strict=True):
        for rate in RATES:
            y, g = torch_random.compiled_dropout(x, rate, g, memory_order=order)
            values.append(y)
    return values, g


@compiles
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_compiled_graph_of_dropouts_and_its_backward_pass(dtype):
    """Sizes, layouts and rates in one graph; the seeds are drawn in the order of the calls."""
    make = torch.Generator().manual_seed(5)
    shapes = ((3,), (40, 101), (4, 5, 6, 7), (30, 17))
    xs = [torch.randn(shape, generator=make).to(dtype) for shape in shapes]
    xs[2], xs[3] = xs[2].to(memory_format=torch.channels_last), xs[3].t()
    orders = (None, None, "channels_last", (1, 0))
    xs[0][0] = float("inf")
    torch._dynamo.reset()
    with torch.random.fork_rng(devices=[]), jax.enable_x64(dtype == torch.float64):
        torch.manual_seed(SEED)
        program = torch.compile(in_torch)
        arrays = [jnp.asarray(as_numpy(x)) for x in xs]
        for gradients in (False, True):
            xs = [x.detach().requires_grad_(gradients) for x in xs]
            before = torch_random.from_torch(torch.default_generator)
            theirs = program(xs)
            ours, g = in_jax(arrays, orders, before)
            for one, two in zip(ours, theirs, strict=True):
                assert_same(one, two)
            np.testing.assert_array_equal(torch_random.to_torch(g), torch.get_rng_state())
            if gradients:
                # Alone, each of the outputs has a gradient that is not a sum over rates.
                which = range(RATES.index(0.3), len(theirs), len(RATES))
                chosen = [theirs[i] for i in which]
                cotangents = [torch.rand_like(y) for y in chosen]
                slopes = torch.autograd.grad(chosen, xs, cotangents)
                _, pullback = jax.vjp(
                    lambda *xs, g=before, n=which: [in_jax(xs, orders, g)[0][i] for i in n],
                    *arrays,
                )
                for one, two in zip(
                    pullback([jnp.asarray(as_numpy(c)) for c in cotangents]), slopes, strict=True
                ):
                    assert_same(one, two)


def assert_same(one, two):
    # In float64 every dtype is exact, and NaN are equal.
    one, two = np.float64(one), np.float64(as_numpy(two.detach()))
    np.testing.assert_array_equal(one, two)
    kept = ~np.isnan(one)
    np.testing.assert_array_equal(np.signbit(one)[kept], np.signbit(two)[kept])
