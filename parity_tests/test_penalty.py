"""Penalties: values and gradients of regjax and regtorch agree with NumPy."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch

from parity_tests import reference_penalty
from regjax._decay import penalty as jax_penalty
from regjax._decay.penalty import l2_penalty as jax_l2_penalty
from regtorch._decay import penalty as torch_penalty
from regtorch._decay.penalty import l2_penalty as torch_l2_penalty

SHAPES = {"bias": (7,), "empty": (0, 3), "kernel": (5, 7), "scale": ()}
MASKS = {"no mask": None, "mask": {"bias": False, "empty": True, "kernel": True, "scale": True}}
# Half types are squared and summed in float32, so values agree as in float32; the gradient is
# rounded to the half type at the end in both frameworks.
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


# Value and gradient of each penalty in NumPy, for parameters and reference, and its arguments in
# the packages.
PENALTIES = {
    "l1_penalty": (
        lambda p, p0, mask: reference_penalty.l1_penalty(p, 0.3, mask),
        lambda p, p0, mask: reference_penalty.l1_gradient(p, 0.3, mask),
        lambda p0: (0.3,),
    ),
    "l2_penalty": (
        lambda p, p0, mask: reference_penalty.l2_penalty(p, 0.3, mask),
        lambda p, p0, mask: reference_penalty.l2_gradient(p, 0.3, mask),
        lambda p0: (0.3,),
    ),
    "elastic_net_penalty": (
        lambda p, p0, mask: (
            reference_penalty.l1_penalty(p, 0.3, mask) + reference_penalty.l2_penalty(p, 0.2, mask)
        ),
        lambda p, p0, mask: _added(
            reference_penalty.l1_gradient(p, 0.3, mask), reference_penalty.l2_gradient(p, 0.2, mask)
        ),
        lambda p0: (0.3, 0.2),
    ),
    "l2_sp_penalty": (
        lambda p, p0, mask: reference_penalty.l2_penalty(
            reference_penalty.distance(p, p0), 0.3, mask
        ),
        lambda p, p0, mask: reference_penalty.l2_gradient(
            reference_penalty.distance(p, p0), 0.3, mask
        ),
        lambda p0: (p0, 0.3),
    ),
}


def _added(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: leaf + right[name] for name, leaf in left.items()}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", PENALTIES)
@pytest.mark.sample(13)
def test_three_parties_agree(name, dtype, mask):
    arrays = _arrays(dtype)
    # A zero, at which signs and moduli have no derivative.
    arrays["kernel"][0, 0] = 0
    origins = {n: np.asarray(a + np.asarray(1, a.dtype)) for n, a in arrays.items()}
    value_of, gradient_of, arguments = PENALTIES[name]
    wide, wide_origins = _widened(arrays), _widened(origins)
    value = value_of(wide, wide_origins, mask)
    gradient = gradient_of(wide, wide_origins, mask)

    with jax.enable_x64(True):
        params = {n: jnp.asarray(a) for n, a in arrays.items()}
        reference = {n: jnp.asarray(a) for n, a in origins.items()}
        penalty = functools.partial(getattr(jax_penalty, name), mask=mask)
        in_jax, slope = jax.jit(jax.value_and_grad(penalty))(params, *arguments(reference))
        # The gradient in JAX is the conjugate of the gradient in PyTorch.
        slope = {n: np.asarray(g.conj()) for n, g in slope.items()}
        in_jax = np.asarray(in_jax)
    tensors, torch_reference = _torch(arrays), _torch(origins)
    in_torch = getattr(torch_penalty, name)(tensors, *arguments(torch_reference), mask=mask)
    in_torch.backward()
    assert all(tensor.grad is None for tensor in torch_reference.values())

    limit = TOLERANCES[dtype]
    assert in_jax.dtype == in_torch.detach().numpy().dtype
    assert in_jax.dtype == ("float64" if dtype in ("float64", "complex128") else "float32")
    np.testing.assert_allclose(in_jax, value, rtol=limit)
    np.testing.assert_allclose(in_torch.item(), value, rtol=limit)
    # The gradient of a half type is accurate to half a unit in its last place.
    limit = {"float16": 2.0**-11, "bfloat16": 2.0**-8}.get(dtype, limit)
    for leaf, expected in gradient.items():
        grad = tensors[leaf].grad
        found = np.zeros(expected.shape) if grad is None else grad.to(_wide(grad)).numpy()
        np.testing.assert_allclose(slope[leaf].astype(expected.dtype), expected, rtol=limit)
        np.testing.assert_allclose(found, expected, rtol=limit)


def _widened(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    kinds = {n: "complex128" if a.dtype.kind == "c" else "float64" for n, a in arrays.items()}
    return {n: a.astype(kinds[n]) for n, a in arrays.items()}


def _wide(tensor: torch.Tensor) -> torch.dtype:
    return torch.complex128 if tensor.is_complex() else torch.float64


def test_mixed_dtypes_agree():
    arrays = {"a": _arrays("bfloat16")["kernel"], "b": _arrays("complex64")["kernel"]}
    arrays["c"] = _arrays("float64")["bias"]
    value = reference_penalty.l2_penalty(
        {n: a.astype("complex128") for n, a in arrays.items()}, 0.3
    )
    with jax.enable_x64(True):
        in_jax = jax_l2_penalty({n: jnp.asarray(a) for n, a in arrays.items()}, 0.3)
        assert in_jax.dtype == "float64"
        np.testing.assert_allclose(in_jax, value, rtol=1e-6)
    in_torch = torch_l2_penalty(_torch(arrays), 0.3)
    assert in_torch.dtype == torch.float64
    np.testing.assert_allclose(in_torch.item(), value, rtol=1e-6)


def test_gradient_with_respect_to_the_coefficient_agrees():
    arrays = _arrays("float32")
    expected = reference_penalty.l2_penalty(arrays, 1.0)
    in_jax = jax.grad(jax_l2_penalty, argnums=1)(arrays, jnp.float32(0.3))
    weight_decay = torch.tensor(0.3, requires_grad=True)
    torch_l2_penalty(_torch(arrays), weight_decay).backward()
    assert weight_decay.grad is not None
    np.testing.assert_allclose(in_jax, expected, rtol=1e-6)
    np.testing.assert_allclose(weight_decay.grad.item(), expected, rtol=1e-6)


@pytest.mark.parametrize("weight_decay", [-0.1, float("nan"), float("inf"), True, "0.1"])
def test_both_frameworks_have_the_same_errors_for_coefficients(weight_decay):
    arrays = _arrays("float32")
    with pytest.raises((ValueError, TypeError)) as in_jax:
        jax_l2_penalty(arrays, weight_decay)
    with pytest.raises((ValueError, TypeError)) as in_torch:
        torch_l2_penalty(_torch(arrays), weight_decay)
    assert in_jax.type is in_torch.type
    assert str(in_jax.value) == str(in_torch.value)


@pytest.mark.parametrize("name", PENALTIES)
def test_both_frameworks_have_the_same_errors_for_parameters(name):
    arguments = PENALTIES[name][2]
    with pytest.raises(TypeError) as in_jax:
        getattr(jax_penalty, name)({"a": 0.5}, *arguments({"a": 0.5}))
    with pytest.raises(TypeError) as in_torch:
        getattr(torch_penalty, name)({"a": 0.5}, *arguments({"a": 0.5}))
    for message in (in_jax, in_torch):
        assert str(message.value).startswith("params at 'a' must be a float or complex")
        assert f"for {name}; got 0.5. Set it to False in `mask`" in str(message.value)


@pytest.mark.parametrize(
    ("reference", "error"),
    [(np.ones((3, 2)), ValueError), (np.ones((2, 3)) * 1j, TypeError)],
)
def test_both_frameworks_have_the_same_errors_for_references(reference, error):
    params = np.ones((2, 3))
    with jax.enable_x64(True), pytest.raises(error) as in_jax:
        jax_penalty.l2_sp_penalty({"a": params}, {"a": reference}, 0.1)
    with pytest.raises(error) as in_torch:
        torch_penalty.l2_sp_penalty(
            {"a": torch.tensor(params)}, {"a": torch.tensor(reference)}, 0.1
        )
    assert str(in_jax.value) == str(in_torch.value)
    assert "reference at 'a'" in str(in_jax.value)


def test_elastic_net_is_that_of_scikit_learn():
    linear_model = pytest.importorskip("sklearn.linear_model")
    rng = np.random.default_rng(0)
    x, noise = rng.standard_normal((60, 5)), rng.standard_normal(60)
    y = x @ np.array([2.0, -1.0, 0.0, 0.5, 0.0]) + 0.1 * noise
    alpha, l1_ratio = 0.2, 0.6
    model = linear_model.ElasticNet(alpha=alpha, l1_ratio=l1_ratio, fit_intercept=False, tol=1e-12)
    best = model.fit(x, y).coef_
    assert 0 < np.count_nonzero(best) < 5

    def objective(w):
        penalty = jax_penalty.elastic_net_penalty(w, alpha * l1_ratio, alpha * (1 - l1_ratio) / 2)
        return jnp.mean((y - x @ w) ** 2) / 2 + penalty

    with jax.enable_x64(True):
        slope = np.asarray(jax.grad(objective)(jnp.asarray(best)))
    # At the optimum the gradient vanishes, but where the L1 term holds a weight at 0.
    np.testing.assert_allclose(slope[best != 0], 0, atol=1e-8)
    assert (np.abs(slope[best == 0]) <= alpha * l1_ratio).all()
