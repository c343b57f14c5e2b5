"""L2 as a loss term: regjax and regtorch against NumPy, values and gradients."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch

from parity_tests import reference_penalty
from regjax._penalty import l2_penalty as jax_l2_penalty
from regtorch._penalty import l2_penalty as torch_l2_penalty

SHAPES = {"bias": (7,), "empty": (0, 3), "kernel": (5, 7), "scale": ()}
MASKS = {"no mask": None, "mask": {"bias": False, "empty": True, "kernel": True, "scale": True}}
# Half types are squared and summed in float32: values agree as closely as float32 does, while a
# gradient is rounded to the half type at the end in both wings.
TOLERANCES = {
    "float16": 1e-6,
    "bfloat16": 1e-6,
    "float32": 1e-6,
    "float64": 1e-14,
    "complex64": 1e-6,
    "complex128": 1e-14,
}


def _arrays(dtype: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    draws = {n: rng.standard_normal((2, *shape)) for n, shape in SHAPES.items()}
    if dtype.startswith("complex"):
        return {n: np.asarray(re + 1j * im).astype(dtype) for n, (re, im) in draws.items()}
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    return {n: np.asarray(re).astype(kind) for n, (re, _) in draws.items()}


def _torch(arrays: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    halves = (n for n, a in arrays.items() if a.dtype == ml_dtypes.bfloat16)
    tensors = {n: torch.tensor(arrays[n].astype("float32")).bfloat16() for n in halves}
    tensors |= {n: torch.tensor(a) for n, a in arrays.items() if n not in tensors}
    return {n: tensors[n].requires_grad_() for n in arrays}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_three_parties_agree(dtype, mask):
    arrays, weight_decay = _arrays(dtype), 0.3
    wide = {
        n: a.astype("complex128" if a.dtype.kind == "c" else "float64") for n, a in arrays.items()
    }
    value = reference_penalty.l2_penalty(wide, weight_decay, mask)
    gradient = reference_penalty.l2_gradient(wide, weight_decay, mask)

    with jax.enable_x64(True):
        params = {n: jnp.asarray(a) for n, a in arrays.items()}
        penalty = functools.partial(jax_l2_penalty, weight_decay=weight_decay, mask=mask)
        ours, slope = jax.jit(jax.value_and_grad(penalty))(params)
        # JAX gives the conjugate of what PyTorch calls the gradient.
        slope = {n: np.asarray(g.conj()) for n, g in slope.items()}
        ours = np.asarray(ours)
    tensors = _torch(arrays)
    theirs = torch_l2_penalty(tensors, weight_decay, mask=mask)
    theirs.backward()

    limit = TOLERANCES[dtype]
    assert ours.dtype == theirs.detach().numpy().dtype
    assert ours.dtype == ("float64" if dtype in ("float64", "complex128") else "float32")
    np.testing.assert_allclose(ours, value, rtol=limit)
    np.testing.assert_allclose(theirs.item(), value, rtol=limit)
    # The gradient of a half type is right to half of its last place, which has 8 or 11 digits.
    limit = {"float16": 2.0**-11, "bfloat16": 2.0**-8}.get(dtype, limit)
    for name, expected in gradient.items():
        grad = tensors[name].grad
        found = np.zeros(expected.shape) if grad is None else grad.to(_wide(grad)).numpy()
        np.testing.assert_allclose(slope[name].astype(expected.dtype), expected, rtol=limit)
        np.testing.assert_allclose(found, expected, rtol=limit)


def _wide(tensor: torch.Tensor) -> torch.dtype:
    return torch.complex128 if tensor.is_complex() else torch.float64


def test_mixed_dtypes_agree():
    arrays = {"a": _arrays("bfloat16")["kernel"], "b": _arrays("complex64")["kernel"]}
    arrays["c"] = _arrays("float64")["bias"]
    value = reference_penalty.l2_penalty(
        {n: a.astype("complex128") for n, a in arrays.items()}, 0.3
    )
    with jax.enable_x64(True):
        ours = jax_l2_penalty({n: jnp.asarray(a) for n, a in arrays.items()}, 0.3)
        assert ours.dtype == "float64"
        np.testing.assert_allclose(ours, value, rtol=1e-6)
    theirs = torch_l2_penalty(_torch(arrays), 0.3)
    assert theirs.dtype == torch.float64
    np.testing.assert_allclose(theirs.item(), value, rtol=1e-6)


def test_gradient_with_respect_to_the_coefficient_agrees():
    arrays = _arrays("float32")
    expected = reference_penalty.l2_penalty(arrays, 1.0)
    ours = jax.grad(jax_l2_penalty, argnums=1)(arrays, jnp.float32(0.3))
    weight_decay = torch.tensor(0.3, requires_grad=True)
    torch_l2_penalty(_torch(arrays), weight_decay).backward()
    assert weight_decay.grad is not None
    np.testing.assert_allclose(ours, expected, rtol=1e-6)
    np.testing.assert_allclose(weight_decay.grad.item(), expected, rtol=1e-6)


@pytest.mark.parametrize("weight_decay", [-0.1, float("nan"), float("inf"), True, "0.1"])
def test_both_wings_refuse_a_coefficient_with_the_same_words(weight_decay):
    arrays = _arrays("float32")
    with pytest.raises((ValueError, TypeError)) as ours:
        jax_l2_penalty(arrays, weight_decay)
    with pytest.raises((ValueError, TypeError)) as theirs:
        torch_l2_penalty(_torch(arrays), weight_decay)
    assert ours.type is theirs.type
    assert str(ours.value) == str(theirs.value)
