"""Values that the checks of arguments accept, and the results; for errors see `wrong_calls.txt`."""

from __future__ import annotations

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax import export

import regjax
import regtorch
from regjax import _checks as in_jax
from regjax import linen
from regshared import checks as shared
from regtorch import _checks as in_torch


@pytest.mark.parametrize("flag", [True, False, np.True_, np.False_])
def test_a_flag_may_be_numpys(flag):
    assert shared.check_bool("flag", flag) is bool(flag)


@pytest.mark.parametrize("number", [3, np.int64(3), np.uint8(3), np.array(3)])
def test_an_integer_may_be_numpys(number):
    assert type(shared.check_integer("axis", number)) is int


@pytest.mark.parametrize("checks", [in_jax, in_torch], ids=["jax", "torch"])
@pytest.mark.parametrize(
    "shape", [(2, 3), [2, 3], range(2, 4), np.array([2, 3]), (np.int32(2), 3), torch.Size([2, 3])]
)
def test_a_shape_is_any_sequence_of_integers(checks, shape):
    found = checks.check_shape("shape", shape)
    assert found == (2, 3)
    assert {type(size) for size in found} == {int}
    assert shared.check_integers("dims", shape) == (2, 3)


def test_arrays_of_each_framework_are_integers_and_flags_too():
    assert shared.check_integer("axis", jnp.array(3)) == 3
    assert in_jax.check_shape("shape", jnp.array([2, 3])) == (2, 3)
    assert shared.check_bool("flag", jnp.array(True)) is True
    assert shared.check_integer("axis", torch.tensor(3)) == 3
    assert in_torch.check_shape("shape", torch.tensor([2, 3])) == (2, 3)
    assert shared.check_bool("flag", torch.tensor(True)) is True


def test_a_symbolic_size_stays_symbolic():
    (batch,) = export.symbolic_shape("batch")
    assert in_jax.check_shape("shape", (batch, 3)) == (batch, 3)


@pytest.mark.parametrize("check", [shared.check_bool, shared.check_integer, in_jax.check_number])
def test_a_traced_value_is_rejected_with_an_error_of_regjax(check):
    with pytest.raises(TypeError, match="flag must be") as raised:
        jax.eval_shape(lambda value: check("flag", value), jnp.array(True))
    assert type(raised.value) is TypeError


def test_a_long_value_is_cut_and_an_array_described():
    with pytest.raises(TypeError, match=r"got \[0, 1, .{60,80}\.\.\.\.$"):
        shared.check_integer("axis", list(range(1000)))
    with pytest.raises(TypeError, match=r"got a tensor of dtype torch.float32 and shape \(9,\)"):
        shared.check_integer("axis", torch.ones(9))


@pytest.mark.wrong_types
def test_layers_accept_what_those_of_the_framework_accept():
    """Flax checks neither the key nor the input if it drops nothing."""
    x, dims, off = jnp.ones((2, 3)), [np.int64(-1)], np.False_
    layer: Any = linen.Dropout(0.5, deterministic=None, broadcast_dims=cast("Any", dims))
    assert layer.apply({}, x, deterministic=np.True_) is x
    assert layer.apply({}, x, False, rng=jax.random.key(0)).shape == (2, 3)
    assert linen.Dropout(0.0, deterministic=False).apply({}, x, rng=7) is x
    rows, key = jnp.ones((4, 2)), jax.random.key(0)
    assert regjax.drop_path(rows, 0.5, key=key, scale_by_keep=cast("Any", off)).max() == 1
    shape = cast("Any", np.array([2, 3]))
    assert regtorch.bernoulli(regtorch.key(0), 0.5, shape).shape == (2, 3)
