"""Packed dropout in a kernel for NVIDIA GPUs: in Pallas's interpreter, and lowered for CUDA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import regjax
from regjax._dropout import triton_dropout
from regjax._dropout.triton_dropout import interpreted

KEY = jax.random.key(3)
PACKED = regjax.packed_bernoulli
EIGHT_BITS = functools.partial(PACKED, bits=8)


def array(*shape, dtype="float32"):
    x = np.random.default_rng(0).standard_normal(shape, np.float32)
    x[..., :1] = np.nan  # a dropped NaN is 0
    return jnp.asarray(x).astype(dtype)


def drop(x, rate=0.1, sampler=PACKED, key=KEY, **options):
    return regjax.dropout(x, rate, key=key, sampler=sampler, **options)


def in_kernel(*arguments, **options):
    with interpreted(True):
        return drop(*arguments, implementation="triton", **options)


def with_gradient(function, x):
    y, pull_back = jax.vjp(function, x)
    return y, pull_back(jnp.sin(x))[0]


def bits(x):
    return np.asarray(x).view(f"uint{8 * x.dtype.itemsize}")


CASES = {
    "rate .5": ((64, 130), {"rate": 0.5}),
    "rate .1": ((64, 128), {}),
    "8 bits": ((64, 256), {"sampler": EIGHT_BITS}),
    "bfloat16": ((64, 128), {"dtype": "bfloat16"}),
    "columns that are no tile": ((128, 33), {}),
    "packed along the first axis": ((64, 3, 50), {}),
    "packed along the middle": ((3, 64, 32), {"rate": 0.877}),
}


@pytest.mark.parametrize(
    "name", [n if n == "rate .5" else pytest.param(n, marks=pytest.mark.slow) for n in CASES]
)
def test_results_and_gradients_are_those_of_xla_bit_for_bit(name):
    shape, options = CASES[name]
    options = dict(options)
    x = array(*shape, dtype=options.pop("dtype", "float32"))
    found = with_gradient(functools.partial(in_kernel, **options), x)
    expected = with_gradient(functools.partial(drop, **options), x)
    for own, reference in zip(found, expected, strict=True):
        np.testing.assert_array_equal(bits(own), bits(reference))


@pytest.mark.slow
def test_vmap_repeats_the_mask_for_one_key_and_draws_another_for_each():
    x, keys = array(2, 64, 64), jax.random.split(KEY, 2)
    for axis, key in ((None, KEY), (0, keys)):
        found, expected = (
            jax.vmap(lambda x, key, f=f: f(x, 0.5, key=key), in_axes=(0, axis))(x, key)
            for f in (in_kernel, drop)
        )
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("columns", "is_masked"), [(128, False), (130, True)])
def test_columns_beyond_the_last_are_not_written(monkeypatch, columns, is_masked):
    """The interpreter ignores them; on a GPU they would be the first of the next row."""
    masks = []

    def store(*arguments, mask):
        masks.append(mask is not None)
        original(*arguments, mask=mask)

    original = triton_dropout.plgpu.store
    monkeypatch.setattr(triton_dropout.plgpu, "store", store)
    jax.eval_shape(functools.partial(in_kernel, rate=0.25), array(64, columns))
    assert set(masks) == {is_masked}


def test_evaluation_and_rate_0_return_the_array_itself():
    x = array(64, 64)
    assert in_kernel(x, rate=0.0) is x
    assert in_kernel(x, deterministic=True) is x
    assert not in_kernel(x, rate=1.0).any()


def lowered(platform):
    run = jax.jit(
        functools.partial(with_gradient, functools.partial(drop, implementation="triton"))
    )
    return run.trace(array(64, 128)).lower(lowering_platforms=(platform,)).as_text()


def test_two_kernels_are_lowered_for_cuda():
    assert lowered("cuda").count("__gpu$xla.gpu.triton") == 2  # the result, and the gradient


@pytest.mark.parametrize("platform", ["cpu", "tpu", "rocm"])
def test_other_platforms_are_rejected_by_name(platform):
    with pytest.raises(NotImplementedError, match="got 'triton', whose kernels run on NVIDIA GPUs"):
        lowered(platform)


@jax.jit
def traced(rate):
    return in_kernel(array(64, 64), rate=rate)


REJECTED = {
    "name": (lambda: drop(array(64, 64), implementation="cuda"), ValueError, '"xla" or "triton"'),
    "exact": (lambda: in_kernel(array(64, 64), sampler=regjax.bernoulli), ValueError, "packed_b"),
    "dtype": (lambda: in_kernel(array(64, 64, dtype="complex64")), TypeError, "float16 with impl"),
    "small": (lambda: in_kernel(array(32, 64)), ValueError, "from 4,096 to"),
    "no axis": (lambda: in_kernel(array(65, 128)), ValueError, "a multiple of 32"),
    "shared": (lambda: in_kernel(array(64, 64), broadcast_dims=(1,)), ValueError, "must be empty"),
    "traced rate": (lambda: traced(0.5), TypeError, "rate must be a number"),
    "forward mode": (
        lambda: jax.jvp(in_kernel, (array(64, 64),), (array(64, 64),)),
        TypeError,
        "forward-mode derivatives; got 'triton'",
    ),
}


@pytest.mark.parametrize("name", REJECTED)
def test_unsupported_arguments_are_rejected_by_name(name):
    call, error, words = REJECTED[name]
    with pytest.raises(error, match=words):
        call()


def test_an_array_that_triton_cannot_index_is_rejected():
    x = jax.ShapeDtypeStruct((2**16, 2**15), "bfloat16")
    with pytest.raises(ValueError, match="2\\*\\*31 - 1 elements"):
        jax.eval_shape(in_kernel, x)


def test_a_sharded_array_is_rejected():
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])
    x = jax.device_put(array(64, 64), jax.NamedSharding(mesh, jax.P("x")))
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="x must not be sharded"):
        in_kernel(x)


def test_an_observer_is_rejected():
    with regjax.observing(print), pytest.raises(ValueError, match="while masks are observed"):
        in_kernel(array(64, 64))
