"""Unit tests of the parts of dropout, in both packages; `make mutants` runs them first."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from torch.utils._python_dispatch import TorchDispatchMode

from parity_tests.frameworks import JAX, TORCH, Framework
from parity_tests.tables import both_frameworks
from regjax._dropout import core as jax_dropout
from regjax._random.packed import mask_sampler
from regtorch._dropout import core as torch_dropout
from regtorch._random.packed import mask_sampler as torch_mask_sampler

X = np.linspace(-2, 3, 60, dtype=np.float32).reshape(3, 4, 5)


def module(framework: Framework):
    return jax_dropout if framework is JAX else torch_dropout


def dtype_of(framework: Framework, dtype):
    return framework.array(np.zeros((), dtype)).dtype


@both_frameworks
def test_flags(framework: Framework):
    check = module(framework).check_flag
    for flag in (True, False):
        assert check(flag) is flag
        checked = check(framework.array(np.bool_(flag)))
        assert checked is flag if framework is JAX else checked.item() is flag
    for value in (
        0,
        1,
        None,
        "no",
        framework.array(np.ones(1, bool)),
        framework.array(np.int32(1)),
    ):
        with pytest.raises(TypeError, match="deterministic must be a boolean"):
            check(value)


@both_frameworks
def test_dimensions_that_share_a_mask(framework: Framework):
    check = module(framework).check_dims
    for dims, ndim, expected in [((), 0, ()), ((2, 0), 3, (0, 2)), ((1,), 2, (1,))]:
        assert check(dims, ndim) == expected
    for dims, ndim in [((0,), 0), ((3,), 3), ((-1,), 3), ((1, 0, 1), 3)]:
        with pytest.raises(ValueError, match=rf"counted from 0 and below {ndim}; got"):
            check(dims, ndim)


@both_frameworks
def test_an_axis_counts_from_either_end(framework: Framework):
    check = module(framework).check_axis
    for axis, expected in {0: 0, 2: 2, -1: 2, -3: 0}.items():
        assert check("axis", axis, 3) == expected
    for axis in (3, -4):
        with pytest.raises(ValueError, match=rf"of x, which has 3; got {axis}\. Turn it\."):
            check("axis", axis, 3, " Turn it.")


@both_frameworks
def test_arrays_that_dropout_accepts(framework: Framework):
    inexact, real = module(framework).check_inexact, module(framework).check_real
    for dtype in (np.float16, np.float32, ml_dtypes.bfloat16):
        x = framework.array(np.ones(2, dtype))
        assert inexact(x) is x
        assert real(x, "noise", "Advice.") is x
    x = framework.array(np.ones(2, np.complex64))
    assert inexact(x) is x
    with pytest.raises(TypeError, match=r"x must be real for noise; got dtype .*64\. Advice\."):
        real(x, "noise", "Advice.")
    with pytest.raises(TypeError, match=r"x must be floating or complex; got dtype .*int32\. Cast"):
        real(framework.array(np.ones(2, np.int32)), "noise", "Advice.")


@both_frameworks
@pytest.mark.parametrize("rate", [0.0, 0.1, 0.123, 0.5, 0.9, 1 - 2.0**-23])
def test_the_scale_is_rounded_once(framework: Framework, rate):
    keep_prob_of, inverse = module(framework).keep_prob_of, module(framework).inverse_keep_prob
    for real in (np.float32, np.float64):
        # JAX's own arrays are of float32 unless x64 is enabled.
        dtype = dtype_of(framework, real) if framework is TORCH else np.dtype(real)
        keep_prob = keep_prob_of(rate, dtype)
        assert (keep_prob, type(keep_prob)) == (float(real(1 - rate)), float)
        scale = inverse(keep_prob, dtype)
        assert scale == real(1) / real(keep_prob)
    changing = lambda rate: keep_prob_of(rate, dtype_of(framework, np.float16))
    assert framework.traced(changing)(np.float32(rate)) == 1 - np.float32(rate)


@both_frameworks
def test_the_scale_is_0_if_nothing_is_kept(framework: Framework):
    scale = lambda keep_prob: module(framework).inverse_keep_prob(
        keep_prob, dtype_of(framework, np.float32)
    )
    for keep_prob, expected in [(0.0, 0.0), (-1.0, 0.0), (0.25, 4.0), (2.0**-20, 2.0**20)]:
        assert framework.traced(scale)(np.float32(keep_prob)) == expected


@both_frameworks
def test_known_rates(framework: Framework):
    is_number = module(framework).is_number
    assert [is_number(rate, 1) for rate in (0, 0.5, 1, 1.0)] == [False, False, True, True]
    assert not is_number(framework.array(np.float32(1)), 1)


@both_frameworks
def test_the_dtype_in_which_elements_are_scaled(framework: Framework):
    for dtype in ["float16", "float32", "complex64", "float64", "complex128"]:
        with jax.enable_x64(True):
            real = module(framework).real_dtype(dtype_of(framework, dtype))
        assert (
            real
            == (torch if framework is TORCH else np).__dict__[
                "float64" if dtype in ("float64", "complex128") else "float32"
            ]
        )


@both_frameworks
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_an_element_is_shifted_before_it_is_scaled(framework: Framework, dtype):
    """Arithmetic is in float32, rounded once; the gradient has no offsets."""
    offsets = lambda keep_prob, dtype: (3.0, -7.0)
    sampler = (mask_sampler if framework is JAX else torch_mask_sampler)(
        framework.library.bernoulli
    )
    spec = module(framework).SampledMask("name", sampler, offsets=offsets)
    x, ones = framework.array(X.astype(dtype)), framework.array(np.ones(X.shape, dtype))
    drop = lambda x: module(framework).apply_dropout(spec, x, 0.3, framework.key(5), False)
    y, gradient = framework.vjp(drop, x, ones)
    keep, scale = framework.bernoulli(5, 1 - 0.3, X.shape), np.float32(1) / np.float32(0.7)
    kept = (X.astype(dtype).astype(np.float32) + 3) * scale
    np.testing.assert_array_equal(framework.numpy(y), np.where(keep, kept, -7).astype(dtype))
    np.testing.assert_array_equal(framework.numpy(gradient), np.where(keep, scale, 0).astype(dtype))


# The shape of x, the dimensions that share its mask, and whether a CPU stores the mask.
STORED = [
    ((4, 5, 6), (0,), True),
    ((4, 5, 6), (0, 2), True),
    ((2, 5), (0,), True),
    ((4, 2), (0,), True),
    ((4, 5, 6), (2,), False),
    ((4, 5, 6), (1, 2), False),
    ((4, 5, 6), (), False),
    ((1, 5), (0,), False),
    ((4, 1, 6), (1,), False),
    ((4, 1), (0,), False),
]


@pytest.mark.parametrize(("shape", "dims", "stored"), STORED)
def test_a_mask_is_stored_if_elements_would_draw_it_again(monkeypatch, shape, dims, stored):
    calls, store = [], jax_dropout.materialize
    monkeypatch.setattr(jax_dropout, "materialize", lambda mask: calls.append(1) or store(mask))
    sampler = mask_sampler(JAX.library.bernoulli)
    mask = jax_dropout.keep_mask(jnp.ones(shape), JAX.key(5), 0.5, dims, sampler)
    alone = tuple(1 if dim in dims else size for dim, size in enumerate(shape))
    np.testing.assert_array_equal(np.asarray(mask), JAX.bernoulli(5, 0.5, alone))
    assert bool(calls) == stored


def test_a_spec_is_static_under_jit():
    spec = jax_dropout.SampledMask("dropout", mask_sampler(JAX.library.bernoulli))
    assert jax.tree.leaves(spec) == []
    assert hash(spec) == hash(dataclasses.replace(spec))
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.name = "other"


# `1 - rate` rounds differently for 0.9 as a number and as an array.
@pytest.mark.parametrize("rate", [0.9, jnp.float32(0.9)], ids=["number", "array"])
def test_the_observed_mask_is_the_applied_mask(rate):
    drop = jax.jit(lambda x: JAX.library.dropout(x, rate, key=JAX.key(5), broadcast_dims=(0,)))
    events: list[Any] = []
    with JAX.library.observing(events.append):
        dropped = jax.block_until_ready(drop(jnp.asarray(X)))
        jax.effects_barrier()
    np.testing.assert_array_equal(dropped, drop(jnp.asarray(X)))
    (event,) = events
    np.testing.assert_array_equal(event.mask, JAX.bernoulli(5, 1 - 0.9, (1, 4, 5)))


def test_a_mask_has_the_layout_of_its_input():
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
    x = jax.device_put(jnp.ones((8, 16)), NamedSharding(mesh, P("a", "b")))
    for dims, spec in [((), P("a", "b")), ((0,), P(None, "b")), ((0, 1), P(None, None))]:
        assert jax_dropout.mask_sharding(x, dims).spec == spec
    with jax.set_mesh(mesh):
        assert jax_dropout.mask_sharding(jnp.ones((8, 16)), ()) is None


def test_no_barrier_keeps_xla_from_fusing_a_mask():
    drop = lambda x: JAX.library.dropout(x, 0.3, key=JAX.key(5)).sum()
    assert "barrier" not in jax.jit(jax.grad(drop)).lower(jnp.asarray(X)).as_text()


def test_specifications_and_sampled_masks_are_values():
    make = lambda: torch_dropout.SampledMask(
        "dropout", torch_mask_sampler(TORCH.library.bernoulli), (0,)
    )
    assert (
        len({make(), make(), torch_dropout._DrawnMask(make()), torch_dropout._DrawnMask(make())})
        == 2
    )
    assert torch_dropout._DrawnMask(make()).name == "dropout"


def test_compilers_trace_plain_operations(monkeypatch):
    x = torch.ones(3, requires_grad=True)
    drop = lambda: TORCH.library.dropout(x, 0.3, key=TORCH.key(5))
    assert "Drop" in drop().grad_fn.name()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert "Drop" not in drop().grad_fn.name()


class Copies(TorchDispatchMode):
    """A counter of conversions between dtypes."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._to_copy.default
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize("dtype", ["float8_e5m2", "float16", "bfloat16", "float32"])
def test_half_types_are_scaled_without_a_copy_in_float32(monkeypatch, dtype, compiling):
    """Eager PyTorch converts inside the operation; compiled code fuses the conversion."""
    x, scale = torch.linspace(-2, 3, 60).to(getattr(torch, dtype)), (1 / torch.tensor(0.7)).item()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    with Copies() as copies:
        scaled = torch_dropout._scaled(x, scale)
    assert torch.equal(scaled.float(), (x.float() * scale).to(x.dtype).float())
    eight_bit = dtype.startswith("float8")
    assert bool(copies.count) == (eight_bit or (compiling and dtype != "float32"))


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 0, 2), (2, 1, 0)], ids=str)
@pytest.mark.parametrize("dims", [(), (1,), (0, 2)], ids=str)
def test_the_result_has_the_layout_of_the_input(order, dims):
    x = torch.from_numpy(X).permute(order)
    options = {"key": TORCH.key(5), "broadcast_dims": dims}
    y = TORCH.library.dropout(x, 0.3, **options)
    assert y.stride() == x.stride()
    assert torch.equal(y, TORCH.library.dropout(x.contiguous(), 0.3, **options))
    wide = x[:, :1].expand(x.shape)
    expected = TORCH.library.dropout(wide.contiguous(), 0.3, **options)
    keep = torch.ones(5, 4, 3, dtype=torch.bool)
    assert torch_dropout.laid_out(keep, x.contiguous()) is keep
    y = TORCH.library.dropout(wide, 0.3, **options)
    assert torch.equal(y, expected)
    assert dims or y.is_contiguous()  # an expanded dimension has no position in the order
