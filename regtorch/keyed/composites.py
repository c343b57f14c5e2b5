"""Functions of PyTorch in Python, whose own calls draw, and those that have no keys."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regtorch.keyed.examples import Layout
from regtorch.keyed.replacements import Draws, replaces


def _never(*args: Any) -> bool:
    return False


@functools.cache
def composite(function: FunctionType) -> FunctionType:
    """Return a copy of a function in PyTorch's Python that does not look for a mode itself.

    PyTorch gives a mode the whole call first, and runs it outside of the mode. A second call within
    the mode would be given to the mode again, without end.
    """
    names = (n for n in function.__globals__ if n.startswith("has_torch_function"))
    own = function.__globals__ | dict.fromkeys(names, _never)
    closure = function.__closure__
    twin = FunctionType(function.__code__, own, function.__name__, function.__defaults__, closure)
    twin.__kwdefaults__ = function.__kwdefaults__
    return twin


def _run_composite(function: Callable[..., Any], draws: Draws, *args: Any, **options: Any) -> Any:
    return draws.run(function, args, options)


for _function in (
    F.gumbel_softmax,
    F.rrelu,
    F.fractional_max_pool2d_with_indices,
    F.fractional_max_pool3d_with_indices,
):
    replaces(_function, in_evaluation=True)(functools.partial(_run_composite, _function))


@replaces(F.multi_head_attention_forward, in_evaluation=True)
def _multi_head_attention(draws: Draws, *args: Any, **options: Any) -> Any:
    """Drop in weights of shape (batch * heads, queries, keys), whatever the layout of the input."""
    heads = args[4] if len(args) > 4 else options["num_heads"]
    return draws.run(F.multi_head_attention_forward, args, options, Layout(0, heads))


# These two choose between the functions above and a private one by an argument.
for _function in (F.fractional_max_pool2d, F.fractional_max_pool3d):
    _without_indices = getattr(F, "_" + _function.__name__)
    replaces(_function, in_evaluation=True)(functools.partial(_run_composite, _without_indices))

# The rest of PyTorch's functions that draw: an error in training, if they do.
_NAMES = ("native_dropout", "poisson", "binomial", "_standard_gamma", "_sample_dirichlet")
_UNKNOWN = [getattr(torch, name) for name in _NAMES]
for _function in (*_UNKNOWN, Tensor.cauchy_, Tensor.geometric_, Tensor.log_normal_):
    replaces(_function)(lambda draws, *args, **options: NotImplemented)
