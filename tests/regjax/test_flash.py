"""Attention in Pallas kernels, run by Pallas's interpreter: results, gradients, masks, errors."""

import functools
import importlib.util
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import regjax
from regjax._dropout.pallas_attention import interpreted_tile

TILE = (32, 128)
KEY = jax.random.key(5)
PACKED = regjax.packed_bernoulli


def arrays(shape=(1, 64, 2, 64), keys=256, kv_heads=None, dtype="float32"):
    *batch, _, heads, depth = shape
    of_keys = (*batch, keys, kv_heads or heads, depth)
    shapes = (shape, of_keys, of_keys)
    normal = np.random.default_rng(0).normal  # JAX's would be compiled for each shape
    return [jnp.asarray(normal(size=s).astype(np.float32)).astype(dtype) for s in shapes]


def attention(*args, **options):
    return regjax.dot_product_attention(*args, dropout_rng=KEY, **options)


def kernels(*args, tile=TILE, **options):
    with interpreted_tile(tile):
        return attention(*args, implementation="pallas", **options)


def with_gradients(function, operands, **options):
    @jax.jit
    def both(*operands):
        out, pull_back = jax.vjp(functools.partial(function, **options), *operands)
        return out, pull_back(jnp.cos(operands[0]))  # of the shape of the result

    return both(*operands)


def assert_close(found, reference, tolerance):
    """Compare arrays relative to their largest element, or to 1 if that is larger."""
    for pair in zip(jax.tree.leaves(found), jax.tree.leaves(reference), strict=True):
        x, y = (np.asarray(z, np.float32) for z in pair)
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * max(1, np.abs(y).max()))


def check_both(operands, tolerance=1e-6, **options):
    """Compare with the blockwise form."""
    out, dots = with_gradients(kernels, operands, **options)
    blocks = functools.partial(regjax.dot_product_attention, dropout_rng=KEY)
    reference, expected = with_gradients(blocks, operands, block_size=TILE[1], **options)
    assert int((out != reference).sum()) == 0
    assert_close(dots, expected, tolerance)


def test_the_result_is_that_of_blocks_bit_for_bit():
    check_both(arrays(), dropout_rate=0.5, is_causal=True)


SLOW = {
    "no dropout": ({}, {}),
    "rate .1": ({}, {"dropout_rate": 0.1}),
    "packed": ({}, {"dropout_rate": 0.1, "sampler": PACKED, "is_causal": True}),
    "grouped queries": ({"kv_heads": 1}, {"dropout_rate": 0.5}),
    "two batch dimensions": ({"shape": (2, 2, 32, 1, 64)}, {"dropout_rate": 0.5}),
    "no batch": ({"shape": (32, 2, 64)}, {"dropout_rate": 0.5}),
    "depth 256": ({"shape": (1, 32, 1, 256)}, {"dropout_rate": 0.5}),
    # The scale is no power of two: its products must not be contracted with later sums.
    "depth 128": ({"shape": (1, 32, 2, 128)}, {"dropout_rate": 0.1, "is_causal": True}),
    "depth 80": ({"shape": (1, 32, 1, 80)}, {"dropout_rate": 0.5}),
    "one mask": ({"shape": (2, 32, 2, 64)}, {"dropout_rate": 0.5, "broadcast_dropout": True}),
    "another scale": ({}, {"dropout_rate": 0.5, "scale": 0.3}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_more_results_are_those_of_blocks(name):
    shapes, options = SLOW[name]
    check_both(arrays(**shapes), **options)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 1, 1, 256), (2, 1, 64, 1), (1, 2, 64, 256)])
def test_masks_of_arguments_are_applied(shape):
    operands = arrays((2, 64, 2, 64))
    mask = np.random.default_rng(1).random(shape) < 0.5
    check_both(operands, mask=mask, dropout_rate=0.5)


@pytest.mark.slow
@pytest.mark.parametrize("is_causal", [False, True])  # causal queries do not read the last keys
def test_lengths_need_not_be_whole_tiles(is_causal):
    operands = arrays((1, 50, 1, 64), keys=200)
    out, dots = with_gradients(kernels, operands, dropout_rate=0.5, is_causal=is_causal)
    blocks = functools.partial(regjax.dot_product_attention, dropout_rng=KEY)
    options = {"dropout_rate": 0.5, "is_causal": is_causal, "block_size": 128}
    assert_close((out, dots), with_gradients(blocks, operands, **options), 2e-6)


@pytest.mark.slow
def test_bfloat16_gradients_round_as_bfloat16():
    operands = arrays(dtype="bfloat16")
    out, dots = with_gradients(kernels, operands, dropout_rate=0.5)
    blocks = functools.partial(regjax.dot_product_attention, dropout_rng=KEY)
    options = {"dropout_rate": 0.5, "block_size": 128}
    reference, expected = with_gradients(blocks, operands, **options)
    assert int((out != reference).sum()) == 0
    assert_close(dots, expected, 0.05)


def keep_mask(sampler, shape, tile=TILE, rate=0.5, **options):
    """Return the keep mask that the kernels apply: with equal weights, kept values add up.

    Values are one-hot at the key's number modulo 64, so that 64 keys are read at a time.
    """
    *batch, heads, queries, keys = shape
    query = jnp.zeros((*batch, queries, heads, 64))
    found = []
    for first in range(0, keys, 64):
        value = jnp.eye(keys, dtype=jnp.float32)[:, first : first + 64]
        value = jnp.broadcast_to(value[:, None, :], (*batch, keys, heads, 64))
        key = jnp.zeros_like(value)
        out = kernels(query, key, value, sampler=sampler, dropout_rate=rate, tile=tile, **options)
        found.append(jnp.swapaxes(out, -2, -3) != 0)
    return jnp.concatenate(found, -1)[..., :keys]


MASKS = {
    "queries": (PACKED, (1, 1, 64, 128), TILE),
    "no axis": (PACKED, (1, 2, 33, 128), TILE),
    "batch": (PACKED, (32, 1, 3, 128), TILE),
    "heads": (functools.partial(PACKED, bits=3), (1, 32, 3, 128), TILE),
    "bits": (functools.partial(PACKED, bits=32), (1, 2, 64, 128), (64, 128)),
    "other tiles": (regjax.bernoulli, (1, 2, 64, 256), (64, 256)),
}


@pytest.mark.parametrize(
    "name",
    [
        *["queries"],
        *[pytest.param(name, marks=pytest.mark.slow) for name in MASKS if name != "queries"],
    ],
)
def test_the_mask_is_that_of_the_sampler_at_any_tile(name):
    sampler, shape, tile = MASKS[name]
    rate = 0.5 if name == "queries" else 0.25
    found = keep_mask(sampler, shape, tile, rate=rate)
    assert (found == sampler(KEY, 1 - rate, shape)).all()


@pytest.mark.slow
@pytest.mark.parametrize("sampler", [regjax.bernoulli, PACKED])
def test_traced_rates_draw_the_same_mask(sampler):
    shape = (1, 1, 64, 128)
    traced = jax.jit(lambda rate: keep_mask(sampler, shape, rate=rate))
    assert (traced(jnp.float32(0.25)) == sampler(KEY, 0.75, shape)).all()
    out = jax.jit(lambda rate: kernels(*arrays(keys=128), dropout_rate=rate))
    assert jnp.isnan(out(jnp.float32(1.5))).all()
    assert (out(jnp.float32(1)) == 0).all()


@pytest.mark.slow
def test_examples_have_the_masks_of_the_whole_batch():
    rows = jnp.array([4, 1])
    for inner in (regjax.bernoulli, PACKED):
        found = keep_mask(regjax.by_example(rows, inner), (2, 2, 64, 128))
        assert (found == inner(KEY, 0.5, (6, 2, 64, 128))[rows]).all()


@pytest.mark.slow
def test_vmap_and_remat_give_what_a_loop_gives():
    operands = arrays((2, 1, 32, 1, 64), keys=128)

    def loss(*operands):
        return (kernels(*operands, dropout_rate=0.5) ** 2).sum()

    grad = jax.grad(loss, (0, 1, 2))
    mapped = jax.jit(jax.vmap(grad))(*operands)
    looped = [grad(*[x[i] for x in operands]) for i in range(2)]
    for i, one in enumerate(looped):
        assert_close([x[i] for x in mapped], one, 1e-6)
    one = [x[0] for x in operands]
    assert_close(jax.grad(jax.checkpoint(loss), (0, 1, 2))(*one), looped[0], 1e-6)


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, PartitionSpec as P
from tests.regjax import test_flash as t
import regjax

operands = t.arrays((2, 64, 2, 64), keys=128, kv_heads=KV)
options = dict(dropout_rate=0.5, is_causal=True)
sampler = SAMPLER
whole = t.with_gradients(t.kernels, operands, sampler=sampler, **options)
mesh = jax.make_mesh((2, 2, 2), ("b", "q", "h"), axis_types=(AxisType.Explicit,) * 3)
with jax.set_mesh(mesh):
    spec, of_keys = P("b", "q", "h", None), P("b", None, "h" if KV == 2 else None, None)
    parts = [jax.device_put(x, s) for x, s in zip(operands, (spec, of_keys, of_keys))]
    found = t.with_gradients(t.kernels, parts, sampler=sampler, **options)
assert found[0].sharding.spec == spec, found[0].sharding
assert int((np.asarray(found[0]) != np.asarray(whole[0])).sum()) == 0
t.assert_close(jax.tree.map(np.asarray, found), jax.tree.map(np.asarray, whole), 2e-6)

# In a shard_map, the numbers of the examples give the masks of the whole batch.
def local(query, key, value):
    rows = jax.lax.axis_index("b") + jnp.arange(1)
    return t.kernels(query, key, value, sampler=regjax.by_example(rows, sampler), **options)

auto = jax.make_mesh((2,), ("b",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
inside = jax.shard_map(local, mesh=auto, in_specs=P("b"), out_specs=P("b"), check_vma=False)
assert int((np.asarray(jax.jit(inside)(*operands)) != np.asarray(whole[0])).sum()) == 0

# With the check, which Pallas's interpreter does not pass.
def compiled(query, key, value):
    return t.attention(query, key, value, implementation="pallas", **options)

checked = jax.shard_map(compiled, mesh=auto, in_specs=(P("b"), P(), P()), out_specs=P("b"))
loss = jax.grad(lambda *x: checked(*x).sum(), (0, 1, 2))
wide = [operands[0], *[x[:1] for x in operands[1:]]]
jax.jit(loss).trace(*wide).lower(lowering_platforms=("tpu",))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("sampler", ["regjax.bernoulli", "regjax.packed_bernoulli"])
def test_a_shard_draws_its_part_of_the_whole_mask(sampler, kv_heads, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    program = SHARDED.replace("SAMPLER", sampler).replace("KV", str(kv_heads))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


ERRORS = {
    "dtype": ({"dtype": "float16"}, TypeError, "query must be float32 or bfloat16"),
    "depth": ({"shape": (1, 8, 1, 32)}, ValueError, "depth from 64 to 256, a multiple of 8"),
    "odd depth": ({"shape": (1, 8, 1, 67)}, ValueError, "depth from 64 to 256, a multiple of 8"),
    "bias": ({"bias": np.zeros((1, 1, 1, 1), "float32")}, ValueError, "bias must be None"),
    "block_size": ({"block_size": 8}, ValueError, "block_size must be None"),
    "module": ({"module": object()}, ValueError, "module must be None"),
    "precision": ({"precision": lax.Precision.HIGH}, ValueError, "precision must be None"),
    "sampler": ({"sampler": lambda *a, **k: None}, ValueError, "sampler must be bernoulli"),
    "name": (
        {"implementation": "cudnn"},
        ValueError,
        'implementation must be "xla", "pallas" or "triton"',
    ),
    "empty": ({"shape": (1, 0, 1, 64)}, ValueError, "must not be empty"),
    "packed batch": (
        {"shape": (64, 2, 16, 1, 64), "sampler": PACKED},
        ValueError,
        "first of several batch dimensions",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_what_is_supported(name):
    options, kind, message = ERRORS[name]
    shapes = {x: options[x] for x in ("shape", "dtype") if x in options}
    rest = {x: y for x, y in options.items() if x not in shapes}
    operands = arrays(**shapes, keys=8)
    with pytest.raises(kind, match=message):
        attention(*operands, **{"implementation": "pallas", "dropout_rate": 0.5} | rest)


def test_other_platforms_are_rejected_when_a_program_is_compiled():
    call = functools.partial(attention, implementation="pallas")
    with pytest.raises(NotImplementedError, match="run on TPUs only"):
        call(*arrays(keys=64))
    with pytest.raises(NotImplementedError, match="run on TPUs only"):
        jax.jit(call).lower(*arrays(keys=64))


def test_a_program_for_tpus_can_be_exported_from_a_machine_without_any():
    call = functools.partial(attention, implementation="pallas", dropout_rate=0.5)
    export = jax.export.export(jax.jit(call), platforms=["tpu"])(*arrays(keys=64))
    assert "tpu_custom_call" in export.mlir_module()


def test_forward_mode_is_rejected():
    query, key, value = arrays((1, 32, 1, 64), keys=128)
    with pytest.raises(TypeError, match="implementation must be 'xla' for forward-mode"):
        jax.jvp(lambda query: kernels(query, key, value), (query,), (query,))


def test_observers_and_automatic_axes_are_rejected():
    call = functools.partial(attention, *arrays(keys=64), implementation="pallas")
    from regjax._random.events import observing

    with observing(lambda event: None), pytest.raises(ValueError, match="while masks are observed"):
        call()


AOT = """
import json, pathlib, tempfile
from benchmarks import attention_kernel as kernel
kernel.prepare(pathlib.Path(tempfile.mkdtemp()))
cases = json.loads(CASES)
print(json.dumps([
    kernel.compiled(chip, rate, bits, backward=backward, shape=tuple(shape), dtype=dtype)
    .memory_analysis().temp_size_in_bytes
    for chip, rate, bits, shape, dtype in cases
    for backward in (False, True)
]))
"""


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu, the compiler for TPUs, is not installed: pip install libtpu",
)
def test_kernels_compile_for_tpus():
    chips = ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
    cases = [(chip, 0.5, 16, (1, 1024, 2, 128), "bfloat16") for chip in chips]
    cases += [
        ("v5e:2x2", 0.1, None, (2, 512, 2, depth), dtype)
        for depth in (64, 80, 256)
        for dtype in ("bfloat16", "float32")
    ]
    lengths = 50, 96, 200, 300
    cases += [("v5e:2x2", 0.1, 16, (1, length, 2, 64), "float32") for length in lengths]
    program = AOT.replace("CASES", repr(json.dumps(cases)))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    temporary = json.loads(done.stdout.splitlines()[-1])
    assert temporary == [0] * (2 * len(cases))
