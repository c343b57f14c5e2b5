"""Parameters of PyTorch that do not fit: the error names each of them, and nothing is done."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import numpy as np
import pytest
import torch
from flax import nnx

from regjax.interop._leaves import Leaf
from regjax.interop._params import params_from_torch

KEY = jax.random.key(0)


def _array(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.zeros(shape, dtype)


def _shapes(make: Callable[[], nnx.Module]) -> nnx.Module:
    """Return the module without its arrays, whose initialization would slow down collection."""
    return nnx.eval_shape(make)


FC = {"fc.weight": _array(3, 2), "fc.bias": _array(3)}
DENSE_3 = {"fc": {"kernel": _array(2, 3), "bias": _array(3)}}
UP = torch.nn.ConvTranspose2d(4, 4, 2, bias=False)
NORMALIZED = torch.nn.utils.parametrizations.weight_norm(
    torch.nn.ConvTranspose2d(4, 4, 2, bias=False)
)
# Entries, params, names, and the error.
ERRORS = {
    "no entry": (
        {"fc.weight": FC["fc.weight"]},
        DENSE_3,
        {},
        ["'fc/bias' has no entry: 'fc.bias' is not in state_dict"],
    ),
    "no leaf": (
        FC | {"other.weight": _array(1), "last": _array(1), "bn.num_batches_tracked": _array()},
        DENSE_3,
        {},
        ["no leaf of params takes 'other.weight', 'last'. Map them"],
    ),
    "no leaf for a part": (
        {"a.in_proj_weight": _array(12, 4)},
        {"a": {"query": {"kernel": _array(4, 2, 2)}}},
        {},
        [
            "no leaf of params takes 'a.in_proj_weight'[4:12]. Map",
        ],
    ),
    "no leaf for a statistic": (
        {"bn.weight": _array(2), "bn.running_mean": _array(2), "bn.running_var": _array(2)},
        {"bn": {"scale": _array(2)}},
        {},
        ["no leaf of params takes 'bn.running_mean', 'bn.running_var'"],
    ),
    "shape": (
        FC,
        {"fc": {"kernel": _array(2, 4), "bias": _array(4)}},
        {},
        [
            "'fc/kernel' must have shape (2, 3), like 'fc.weight' of shape (3, 2) in JAX's layout; "
            "got (2, 4) in params.",
            "'fc/bias' must have shape (3,), like 'fc.bias' of shape (3,) in",
        ],
    ),
    "exchanged axes": (
        FC,
        {"fc": {"kernel": _array(3, 2), "bias": _array(3)}},
        {},
        [
            "got (3, 2) in params. If its axes are exchanged, pass Leaf(name='fc.weight') for it "
            "and for square ones like it."
        ],
    ),
    "shape to unfold to": (
        {"a.weight": _array(6, 4), "b.weight": _array(6, 1), "c.bias": _array(6)},
        {
            "a": {"kernel": _array(2, 4, 3)},
            "b": {"kernel": _array(2, 3)},
            "c": {"bias": _array(2, 4)},
        },
        {},
        [
            "'a.weight' of shape (6, 4) in JAX's layout; got (2, 4, 3) in params",
            "'b.weight' of shape (6, 1) in JAX's layout; got (2, 3) in params",
            "'c.bias' of shape (6,) in JAX's layout; got (2, 4) in params",
        ],
    ),
    "dtype": (
        FC,
        {"fc": {"kernel": _array(2, 3), "bias": _array(3, dtype=np.float16)}},
        {},
        ["'fc/bias' must be float32, like 'fc.bias'; got float16 in params. Cast one of them."],
    ),
    "float64 without x64": (
        {"w": _array(2, dtype=np.float64)},
        {"w": _array(2, dtype=np.float64)},
        {},
        ["'w' must not be float64 in 32-bit mode. Call jax.config.update('jax_enable_x64', True)."],
    ),
    "unknown layout": (
        FC,
        {"projection": _array(2, 2), "bias": _array(3)},
        {"projection": "fc.weight", "bias": "fc.bias"},
        ["'projection' of shape (2, 2) has no known layout for 'fc.weight' of shape (3, 2)"],
    ),
    "kernel of other rank": (
        {"fc.weight": _array(3, 2, 1)},
        {"fc": {"kernel": _array(2, 3)}},
        {},
        ["'fc/kernel' of shape (2, 3) has no known layout for 'fc.weight' of shape (3, 2, 1)"],
    ),
    "kernel from a vector": (
        {"fc.weight": _array(6)},
        {"fc": {"kernel": _array(2, 3)}},
        {},
        ["has no known layout for 'fc.weight' of shape (6,)"],
    ),
    "order of axes": (
        FC,
        DENSE_3,
        {"fc/kernel": Leaf("fc.weight", (2, 0, 1))},
        ["'fc/kernel': Leaf(name='fc.weight', transpose=(2, 0, 1)) must order the axes of"],
    ),
    "misspelt module of params": (
        FC,
        DENSE_3,
        {"fd": "fc"},
        ["names must have leaves or modules of params; got 'fd'"],
    ),
    "misspelt module of PyTorch": (
        FC,
        DENSE_3,
        {"fc": "fd"},
        ["'fc/kernel' has no entry: 'fd.weight' is not in", "takes 'fc.weight', 'fc.bias'"],
    ),
    "misspelt entry": (
        FC,
        DENSE_3,
        {"fc/kernel": "fd.weight"},
        ["'fc/kernel' has no entry: 'fd.weight' is not in"],
    ),
    "Leaf for a module": (
        FC,
        DENSE_3,
        {"fc": Leaf("fc.weight")},
        ["names must have a Leaf for single leaves; got one for 'fc', a module of params"],
    ),
    "transposed convolution of a module": (
        torch.nn.ModuleDict({"up": UP}),
        {"up": {"kernel": _array(2, 2, 4, 4)}},
        {},
        [
            "'up/kernel' belongs to a transposed convolution",
            "Leaf(name='up.weight', transpose=(2, 3, 1, 0))",
        ],
    ),
    "transposed convolution with weight normalization": (
        torch.nn.ModuleDict({"up": NORMALIZED}),
        {"up": {"weight": _array(4, 4, 2, 2), "g": _array(4, 1, 1, 1)}},
        {},
        ["'up/weight' belongs to a transposed convolution"],
    ),
    "transposed convolution of Linen": (
        {"up.weight": _array(4, 4, 2, 2)},
        {"params": {"ConvTranspose_0": {"kernel": _array(2, 2, 4, 4)}}},
        {"ConvTranspose_0": "up"},
        ["'params/ConvTranspose_0/kernel' belongs to a transposed convolution"],
    ),
    "transposed convolution of NNX": (
        {"up.weight": _array(4, 4, 2, 2)},
        {"up": _shapes(lambda: nnx.ConvTranspose(4, 4, (2, 2), use_bias=False, rngs=nnx.Rngs(0)))},
        {},
        ["'up/kernel/value' belongs to a transposed convolution"],
    ),
    "transposed convolution of Equinox": (
        {"up.weight": _array(4, 4, 2, 2)},
        {"up": eqx.filter_eval_shape(eqx.nn.ConvTranspose2d, 4, 4, 2, use_bias=False, key=KEY)},
        {},
        ["'up/weight' belongs to a transposed convolution"],
    ),
    "recurrent": (
        torch.nn.LSTM(4, 4),
        _shapes(lambda: nnx.OptimizedLSTMCell(4, 4, rngs=nnx.Rngs(0))),
        {},
        ["'dense_i/kernel/value' belongs to a recurrent layer, which cannot be converted"],
    ),
}


@pytest.mark.parametrize(("entries", "params", "names", "messages"), ERRORS.values(), ids=ERRORS)
def test_errors(entries, params, names, messages):
    with pytest.raises(
        ValueError,
        match=r"^state_dict and params must match; got these differences",
    ) as raised:
        params_from_torch(entries, params, names)
    assert all(message in str(raised.value) for message in messages), raised.value
