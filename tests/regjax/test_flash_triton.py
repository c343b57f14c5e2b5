"""Attention in kernels for NVIDIA GPUs: in Pallas's interpreter, and lowered for CUDA."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import regjax
from regjax._dropout.pallas_attention import interpreted_tile
from regjax._random.tiles import Starts, TileKey, TileMask

TILE = (32, 64)
KEY = jax.random.key(5)
PACKED = regjax.packed_bernoulli


def arrays(shape=(1, 32, 2, 64), keys=64, kv_heads=None, dtype="float32"):
    *batch, _, heads, depth = shape
    of_keys = (*batch, keys, kv_heads or heads, depth)
    normal = np.random.default_rng(0).normal  # JAX's would be compiled for each shape
    shapes = (shape, of_keys, of_keys)
    return [jnp.asarray(normal(size=s).astype(np.float32)).astype(dtype) for s in shapes]


def kernels(*operands, **options):
    with interpreted_tile(TILE):
        return regjax.dot_product_attention(
            *operands, dropout_rng=KEY, implementation="triton", **options
        )


def blocks(*operands, **options):
    return regjax.dot_product_attention(*operands, dropout_rng=KEY, block_size=TILE[1], **options)


def with_gradients(function, operands, **options):
    @jax.jit
    def both(*operands):
        out, pull_back = jax.vjp(functools.partial(function, **options), *operands)
        return out, pull_back(jnp.cos(operands[0]))  # of the shape of the result

    return both(*operands)


def check_both(operands, tolerance=2e-6, **options):
    """Compare results and gradients with the blockwise form, whose mask is the sampler's."""
    found = with_gradients(kernels, operands, **options)
    expected = with_gradients(blocks, operands, **options)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(*(np.asarray(z, np.float32) for z in (x, y)), atol=tolerance)


def test_results_and_gradients_are_those_of_blocks():
    check_both(arrays(keys=128), dropout_rate=0.5, is_causal=True)


SLOW = {
    "no dropout": ({}, {}),
    "two tiles of queries": ({"shape": (1, 64, 1, 64), "keys": 128}, {"is_causal": True}),
    "grouped queries": ({"shape": (2, 32, 4, 64), "kv_heads": 2}, {}),
    "two batch dimensions": ({"shape": (2, 2, 32, 1, 64)}, {}),
    "one mask": ({"shape": (2, 32, 2, 64)}, {"broadcast_dropout": True}),
    "lengths that are no tiles": ({"shape": (1, 50, 2, 72), "keys": 100}, {"is_causal": True}),
    "packed along queries": ({"shape": (1, 64, 2, 64), "keys": 128}, {"sampler": PACKED}),
    "packed along heads": ({"shape": (1, 30, 32, 64), "keys": 65}, {"sampler": PACKED}),
    "by example": ({"shape": (2, 32, 1, 64)}, {"sampler": regjax.by_example([5, 2**31])}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_more_results_are_those_of_blocks(name):
    shapes, options = SLOW[name]
    rate = 0.0 if name == "no dropout" else 0.1
    check_both(arrays(**shapes), dropout_rate=rate, **options)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 1, 1, 64), (2, 1, 32, 1), (1, 2, 32, 64)])
def test_masks_of_arguments_are_applied(shape):
    mask = np.random.default_rng(1).random(shape) < 0.5
    check_both(arrays((2, 32, 2, 64)), mask=mask, dropout_rate=0.5)


@pytest.mark.slow
def test_bfloat16_rounds_as_bfloat16():
    check_both(arrays(dtype="bfloat16"), 0.05, dropout_rate=0.5)


@pytest.mark.slow
@pytest.mark.parametrize("rate", [0.1, 0.5])
@pytest.mark.parametrize("sampler", [regjax.bernoulli, PACKED])
def test_the_mask_is_that_of_the_sampler(sampler, rate):
    """Equal weights of one-hot values show which weights were dropped."""
    zeros, many = jnp.zeros((2, 64, 2, 64)), jnp.zeros((2, 128, 2, 64))
    one_hot = jnp.broadcast_to(jnp.eye(128)[:, None], (2, 128, 2, 128))
    out = kernels(zeros, many, one_hot, sampler=sampler, dropout_rate=rate)
    expected = sampler(KEY, 1 - rate, (2, 2, 64, 128))
    np.testing.assert_array_equal(jnp.swapaxes(out, 1, 2) != 0, expected)


MASKS = {
    "exact": TileMask((2, 3, 64, 128), 23, 4_000_000, is_exact=True),
    "more than 2**32 elements": TileMask((None, 3, 64, 128), 23, 4_000_000, is_exact=True),
    "packed along queries": TileMask((2, 3, 64, 128), 16, 58982, is_exact=False, packed=2),
    "packed along heads": TileMask((2, 32, 64, 128), 16, 58982, is_exact=False, packed=1),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.sample(3)
def test_a_transposed_tile_has_the_same_mask(name):
    key = TileKey((jnp.uint32(3), jnp.uint32(4)), jnp.uint32(0), jnp.bool_(False))
    starts = Starts((jnp.uint32(0), jnp.uint32(1)), *(jnp.uint32(n) for n in (2, 32, 64)))

    @functools.partial(jax.jit, static_argnums=0)
    def draw(is_transposed):
        options = {"is_reshaped": is_transposed, "is_transposed": is_transposed}
        mask = dataclasses.replace(MASKS[name], **options)
        return mask.draw(key, starts, (32, 64))

    found = draw(True)
    assert found.shape == (64, 32)
    np.testing.assert_array_equal(found, draw(False).T)


def lowered(platform, *operands, **options):
    attend = functools.partial(
        regjax.dot_product_attention, dropout_rng=KEY, implementation="triton", **options
    )

    def both(*operands):
        out, pull_back = jax.vjp(attend, *operands)
        return pull_back(out)

    traced = jax.jit(both).trace(*operands)
    return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sampler", [regjax.bernoulli, PACKED])
def test_three_kernels_are_lowered_for_cuda(sampler, dtype):
    text = lowered("cuda", *arrays(dtype=dtype), dropout_rate=0.1, sampler=sampler)
    assert text.count("__gpu$xla.gpu.triton") == 3


@pytest.mark.parametrize("platform", ["cpu", "tpu", "rocm"])
def test_other_platforms_are_rejected_by_name(platform):
    with pytest.raises(NotImplementedError, match="got 'triton', whose kernels run on NVIDIA GPUs"):
        lowered(platform, *arrays(), dropout_rate=0.1)


REJECTED = {
    "dtype": ({"dtype": "float16"}, {}, TypeError, "float32 or bfloat16 with implementation='tri"),
    "depth": ({"shape": (1, 32, 1, 32)}, {}, ValueError, "64 to 256, a multiple of 8, with impl"),
    "bias": ({}, {"bias": jnp.zeros((1, 1))}, ValueError, "bias must be None with implementation"),
    "blocks": (
        {},
        {"block_size": 32},
        ValueError,
        "block_size must be None with implementation='t",
    ),
}


@pytest.mark.parametrize("name", REJECTED)
def test_unsupported_arguments_are_rejected_by_name(name):
    shapes, options, error, words = REJECTED[name]
    with pytest.raises(error, match=words):
        kernels(*arrays(**shapes), dropout_rate=0.5, **options)


def test_an_array_that_triton_cannot_index_is_rejected():
    x = jax.ShapeDtypeStruct((2**17, 256, 1, 64), "bfloat16")
    with pytest.raises(ValueError, match="fewer than 2\\*\\*31 elements with implementation='trit"):
        jax.eval_shape(kernels, x, x, x)


def test_a_forward_derivative_is_rejected_by_name():
    operands = arrays()
    with pytest.raises(TypeError, match=r"must be 'xla' for forward-mode .* got 'triton'"):
        jax.jvp(kernels, operands, operands)


def test_explicitly_sharded_heads_have_the_same_mask():
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])
    operands = arrays((1, 32, 2, 64))
    expected = jax.jit(functools.partial(kernels, dropout_rate=0.5))(*operands)
    with jax.set_mesh(mesh):
        spec = jax.P(None, None, "x", None)
        placed = [jax.device_put(x, jax.NamedSharding(mesh, spec)) for x in operands]
        found = jax.jit(functools.partial(kernels, dropout_rate=0.5))(*placed)
    np.testing.assert_allclose(found, expected, atol=1e-6)
