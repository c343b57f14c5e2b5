from __future__ import annotations

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from regjax._decay.paths import named_leaves
from regjax._decay.validation import (
    check_reference,
    resolve_mask,
    resolve_reference,
    resolve_scale,
)
from regshared.checks import check_coefficient


class Layer(NamedTuple):
    kernel: object
    bias: object


PARAMS = {
    "dense": [Layer(jnp.ones((2, 3)), jnp.ones(3)), Layer(jnp.ones((3, 3)), None)],
    "scale": jnp.ones(()),
}


def _matrices(tree):
    return jax.tree.map(lambda leaf: leaf.ndim > 1, tree)


def test_names_of_every_kind_of_node():
    assert [name for name, _ in named_leaves(PARAMS)] == [
        "dense/0/kernel",
        "dense/0/bias",
        "dense/1/kernel",
        "scale",
    ]
    module = eqx.nn.Linear(2, 3, key=jax.random.key(0))
    assert [name for name, _ in named_leaves(module)] == ["weight", "bias"]
    assert named_leaves(1.0) == [("", 1.0)]


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (None, [True, True, True, True]),
        (False, [False, False, False, False]),
        ({"dense": True, "scale": False}, [True, True, True, False]),
        ({"dense": [Layer(True, False), True], "scale": False}, [True, False, True, False]),
        # A None of the mask matches a None of the parameters, as does a bool above it.
        ({"dense": [False, Layer(True, None)], "scale": True}, [False, False, True, True]),
        ({"dense": [False, Layer(True, True)], "scale": True}, [False, False, True, True]),
        (_matrices, [True, False, True, False]),
        (lambda params: {"dense": False, "scale": True}, [False, False, False, True]),
        ({"dense": np.bool_(True), "scale": jnp.array(False)}, [True, True, True, False]),
    ],
)
def test_mask_is_resolved(mask, expected):
    resolved = resolve_mask(mask, PARAMS)
    assert jax.tree.structure(resolved) == jax.tree.structure(PARAMS)
    assert jax.tree.leaves(resolved) == expected
    assert all(type(leaf) is bool for leaf in jax.tree.leaves(resolved))


def test_a_callable_module_of_bools_is_a_tree():
    module = eqx.filter(eqx.nn.MLP(2, 3, 4, 1, key=jax.random.key(0)), eqx.is_inexact_array)
    mask = _matrices(module)
    assert callable(mask)
    assert jax.tree.leaves(resolve_mask(mask, module)) == [True, False, True, False]


def test_flax_state_is_a_tree():
    state = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Param)
    assert jax.tree.leaves(resolve_mask(_matrices, state)) == [False, True]


def test_mask_is_resolved_under_jit():
    shapes = []
    jax.jit(lambda params: shapes.append(resolve_mask(_matrices, params)))(PARAMS)
    assert jax.tree.leaves(shapes) == [True, False, True, False]


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ({}, r"got nothing at 'dense', where the parameters have a list of \(0, 1\)"),
        ({"dense": True}, r"got nothing at 'scale', .* have an array float32\[\]"),
        ({"dense": True, "scale": True, "x": True}, "got True at 'x', .* have nothing"),
        ({"dense": [True], "scale": True}, r"got nothing at 'dense/1', .* Layer of \(ker"),
        (
            {"dense": (True, True), "scale": True},
            r"got a tuple of \(0, 1\) at 'dense', .* have a list of \(0, 1\)",
        ),
        (
            {"dense": [True, Layer(None, True)], "scale": True},
            r"got None at 'dense/1/kernel', .* have an array float32\[3, 3\]",
        ),
        ({"dense": True, "scale": {"x": True}}, r"got a dict of \(x\) at 'scale'"),
        ([True], r"got a list of \(0\) at the root, .* have a dict of \(dense, sc"),
        (lambda params: {"dense": True}, "at 'scale'"),
        (lambda params: None, "got None at the root"),
    ],
)
def test_another_structure_is_refused(mask, message):
    with pytest.raises(ValueError, match=message):
        resolve_mask(mask, PARAMS)


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (0.5, "must be a bool; got 0.5"),
        (1, r"must be a bool; got 1\."),
        ("kernel", "must be a bool; got 'kernel'"),
        (np.ones(3), r"must be a bool; got array\(\[1., 1., 1.\]\)"),
        (np.array([True, False]), "must be a bool; got array"),
        (_matrices, "must be a bool; got <function"),
    ],
)
def test_a_leaf_that_is_no_bool_is_refused(leaf, message):
    with pytest.raises(TypeError, match="mask at 'scale' " + message):
        resolve_mask({"dense": True, "scale": leaf}, PARAMS)
    with pytest.raises(TypeError, match=r"mask at the root must be a bool; got 0\.5"):
        resolve_mask(lambda params: 0.5, PARAMS)


def test_a_mask_of_values_is_refused_under_jit():
    def rule(params):
        return jax.tree.map(lambda leaf: jnp.all(leaf > 0), params)

    assert all(jax.tree.leaves(resolve_mask(rule, PARAMS)))
    with pytest.raises(TypeError, match="mask at 'dense/0/kernel' must be known before tracing"):
        jax.jit(lambda params: resolve_mask(rule, params))(PARAMS)


BOXES = {"variable": nnx.Param, "partitioned": lambda leaf: linen.Partitioned(leaf, (None,))}


@pytest.mark.parametrize("box", BOXES.values(), ids=BOXES)
def test_a_box_of_flax_and_its_content_fit_each_other(box):
    bare, boxed = {"kernel": jnp.ones(2)}, {"kernel": box(jnp.ones(2))}
    for params in (bare, boxed):
        for mask in (True, box(True)):
            resolved = resolve_mask({"kernel": mask}, params)
            assert jax.tree.structure(resolved) == jax.tree.structure(params)
            assert jax.tree.leaves(resolved) == [True]
        for reference in (bare, boxed):
            resolved = resolve_reference(reference, params)
            assert jax.tree.structure(resolved) == jax.tree.structure(params)
            assert jax.tree.leaves(resolved)[0] is jax.tree.leaves(reference)[0]
    # A box is not a prefix of another tree.
    with pytest.raises(ValueError, match=r"got an array .* at 'kernel'"):
        resolve_reference(boxed, {"kernel": {"a": jnp.ones(2)}})


def test_a_scale_is_resolved():
    assert resolve_scale({"a": 0.5, "b": 2}, {"a": [1.0, 1.0], "b": 1.0}) == {
        "a": [0.5] * 2,
        "b": 2,
    }
    with pytest.raises(ValueError, match="scale at the root must be finite and not negative"):
        resolve_scale(-1.0, PARAMS)


def test_a_reference_is_no_prefix():
    assert resolve_reference(PARAMS, PARAMS) == PARAMS
    assert resolve_reference({"a": 1.0, "b": 2.0}, {"a": None, "b": 3.0}) == {"a": None, "b": 2.0}
    with pytest.raises(ValueError, match=r"got 1\.0 at 'dense', .* have a list of \(0, 1\)"):
        resolve_reference({"dense": 1.0, "scale": 1.0}, PARAMS)


@pytest.mark.parametrize(
    ("reference", "error", "message"),
    [
        (0.0, TypeError, r"'w' must be a float or complex array; got 0\.0\. Pass the"),
        (jnp.ones(2, int), TypeError, "'w' must be .* got an array of int32. Pass"),
        (np.int64(1), TypeError, "'w' must be .* got an array of int64. Pass"),
        (jnp.ones(2, complex), TypeError, "'w' must be real, as the parameter is; got a complex"),
        (jnp.ones(3), ValueError, r"'w' must have the parameter's shape \(2,\); got \(3,\)"),
    ],
)
def test_a_reference_of_another_kind_is_refused(reference, error, message):
    with pytest.raises(error, match=f"^reference at {message}"):
        check_reference("w", jnp.ones(2), reference)


def test_a_reference_of_the_same_kind_passes():
    check_reference("w", jnp.ones(2), np.ones(2))
    check_reference("w", jnp.ones((), complex), np.float32(1))
    check_reference("w", jnp.ones(2, complex), jnp.ones(2, complex))


@pytest.mark.parametrize("value", [0, 0.0, 1, 2.5, np.float32(0.5), np.array(0.5), jnp.array(0.5)])
def test_coefficient_passes(value):
    check_coefficient("eps", value, fix="")


@pytest.mark.parametrize("value", [-1, -1e-30, float("nan"), float("inf"), jnp.array(-0.5)])
def test_coefficient_out_of_range_is_refused(value):
    with pytest.raises(ValueError, match=r"eps must be finite and not negative; got .*\. Fix"):
        check_coefficient("eps", value, fix="Fix it so.")


@pytest.mark.parametrize("value", [1.0, 2, -0.5, float("nan")])
def test_coefficient_has_an_upper_end(value):
    with pytest.raises(ValueError, match=r"beta must lie in \[0, 1\); got .*\. Fix"):
        check_coefficient("beta", value, fix="Fix it so.", below=1.0)


@pytest.mark.parametrize(
    "value", [True, np.True_, None, "1", 1j, jnp.ones(1), jnp.array(1j), lambda step: 0.1]
)
def test_coefficient_that_is_no_number_is_refused(value):
    with pytest.raises(TypeError, match=r"eps must be a real number; got .*\. Fix it so"):
        check_coefficient("eps", value, fix="Fix it so.")


def test_traced_coefficient_passes():
    def checked(value):
        check_coefficient("eps", value, fix="")
        return value

    assert jax.jit(checked)(-1.0) == -1.0
    with pytest.raises(TypeError, match="must be a real number"):
        jax.jit(checked)(jnp.ones(2))
