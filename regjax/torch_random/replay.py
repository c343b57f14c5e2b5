"""Draws of many tensors, one after the other, with few compilations.

Small tensors share blocks of one size, so that the shapes of a model need no compilation each.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from regjax.torch_random.generator import TorchGenerator
from regjax.torch_random.mt19937 import advance
from regjax.torch_random.normal import normal
from regjax.torch_random.uniforms import FLOAT_DIGITS, between, scaled_bounds, uniform

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int32

    from regjax.torch_random.layers import Draw

_BLOCK = 8192  # words


def replay(
    g: TorchGenerator, draws: Iterable[Draw]
) -> tuple[dict[str, Array], TorchGenerator]:
    """Return the tensors of `draws` by name, and the next state of the generator."""
    values: dict[str, Array] = {}
    pending: list[Draw] = []
    for draw in draws:
        fits = draw.kind == "uniform" and draw.dtype == np.float32
        used = sum(math.prod(each.shape) for each in pending) + math.prod(draw.shape)
        if not fits or used > _BLOCK:
            g = _draw_together(g, pending, values)
            pending = []
        if fits and math.prod(draw.shape) <= _BLOCK:
            pending.append(draw)
        else:
            values[draw.name], g = _draw_alone(g, draw)
    return values, _draw_together(g, pending, values)


def _draw_alone(g: TorchGenerator, draw: Draw) -> tuple[Array, TorchGenerator]:
    if draw.kind == "constant":
        return jnp.asarray(np.full(draw.shape, draw.numbers[0], draw.dtype)), g
    function = uniform if draw.kind == "uniform" else normal
    value, g = function(g, draw.shape, *draw.numbers, draw.dtype)
    return (value if draw.zero_row is None else value.at[draw.zero_row].set(0)), g


def _draw_together(
    g: TorchGenerator, draws: list[Draw], values: dict[str, Array]
) -> TorchGenerator:
    """Add the tensors of one block to `values`."""
    if not draws:
        return g
    sizes = [math.prod(draw.shape) for draw in draws]
    table = np.stack([scaled_bounds(*draw.numbers, np.dtype(np.float32)) for draw in draws], 1)
    bounds = np.repeat(table, sizes, 1)
    bounds = np.pad(bounds, [(0, 0), (0, _BLOCK - bounds.shape[1])])
    numbers, g = _block(g, bounds, np.int32(sum(sizes)))
    if not isinstance(numbers, Tracer):
        numbers = np.asarray(numbers)  # whose slices need no compilation
    ends = np.cumsum(sizes).tolist()
    for draw, end, size in zip(draws, ends, sizes, strict=True):
        values[draw.name] = jnp.asarray(numbers[end - size : end].reshape(draw.shape))
    return g


@jax.jit
def _block(
    g: TorchGenerator, bounds: Float[Any, "bounds n"], used: Int32[Any, ""]
) -> tuple[Float[Array, " n"], TorchGenerator]:
    words, state, position = advance(g.state, g.position, _BLOCK, used)
    low_bits = words & np.uint32((1 << FLOAT_DIGITS) - 1)
    numbers = low_bits.astype(np.float32) * np.float32(2.0**-FLOAT_DIGITS)
    g = dataclasses.replace(g, state=state, position=position)
    return between(numbers, bounds, np.dtype(np.float32)), g
