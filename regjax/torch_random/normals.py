"""Normal numbers in PyTorch's order, arithmetic and rounding, by the Box-Muller transform.

PyTorch has three ways. A tensor of at least 16 elements in row-major order is filled in blocks of
16, each from 8 radii and 8 angles: float32 and half types with polynomials in float32, which this
module evaluates with the same roundings, and float64 with the functions of the C library. All other
tensors are filled one element at a time, in float64, and the second of two numbers is cached in the
generator for the next such tensor.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from regjax._checks import check_number, check_shape
from regjax.torch_random.box_muller import float32_pairs, float64_pairs
from regjax.torch_random.fma import fused_multiply_add
from regjax.torch_random.layouts import arranged, check_memory_order, is_row_major
from regjax.torch_random.mt19937 import advance
from regjax.torch_random.state import TorchGenerator, as_longs, check_generator
from regjax.torch_random.uniforms import (
    HALF_TYPES,
    check_dtype,
    compute_dtype,
    double_uniforms,
    unit_uniforms,
)

if TYPE_CHECKING:
    from jax.typing import DTypeLike
    from jaxtyping import Array, Float, UInt32

    from regjax.torch_random.layouts import MemoryOrder

_BLOCK = 16


def normal(
    g: TorchGenerator,
    shape: Sequence[int],
    mean: float = 0.0,
    stddev: float = 1.0,
    dtype: DTypeLike = jnp.float32,
    *,
    memory_order: MemoryOrder = None,
) -> tuple[Float[Array, "*shape"], TorchGenerator]:
    """Draw normal numbers: PyTorch's `torch.randn(shape)` and `tensor.normal_(mean, stddev)`.

    Args:
        g: The generator.
        shape: The shape of the result.
        mean: The mean, a concrete number.
        stddev: The standard deviation, at least 0.
        dtype: float16, bfloat16, float32, or float64, which requires `jax_enable_x64`.
        memory_order: As for `dropout`. PyTorch fills a tensor that is not row-major otherwise.

    Returns:
        The numbers, and the next state of the generator.

    Raises:
        TypeError: An argument has a wrong type.
        ValueError: `stddev` is negative, or `dtype` is float64 without `jax_enable_x64`.

    Note (PyTorch):
        See the table of promises: at least 16 row-major numbers of at most 32 bits are bitwise
        identical on CPUs with AVX2; other numbers are within a few units in the last place.

    Example:
        >>> import torch
        >>> from regjax import torch_random
        >>> torch_random.normal(torch_random.generator(0), (3,))[0]
        Array([ 1.5409961, -0.2934289, -2.1787894], dtype=float32)
        >>> torch.randn(3, generator=torch.Generator().manual_seed(0))
        tensor([ 1.5410, -0.2934, -2.1788])
    """
    g, shape = check_generator(g), check_shape("shape", shape)
    mean, stddev = check_number("mean", mean), check_number("stddev", stddev, minimum=0)
    dtype, order = check_dtype(dtype), check_memory_order(memory_order, len(shape))
    draw = _in_blocks if math.prod(shape) >= _BLOCK and is_row_major(order, shape) else _one_by_one
    moments = None if (mean, stddev) == (0, 1) else np.array([mean, stddev])
    return draw(g, moments if moments is None else moments.view(np.uint32), shape, dtype, order)


# Mean and deviation are traced, so that one trace serves all of them: as the words of two float64,
# which can be passed without `jax_enable_x64`.
@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _in_blocks(
    g: TorchGenerator,
    moments: UInt32[Any, " words"] | None,
    shape: tuple[int, ...],
    dtype: np.dtype,
    order: tuple[int, ...],
) -> tuple[Float[Array, "*shape"], TorchGenerator]:
    count, is_half = math.prod(shape), dtype in HALF_TYPES
    # PyTorch fills the last 16 elements once more if the rest is not a block. In float32 and
    # float64 it has drawn a uniform for each element of the rest, too.
    rest = count % _BLOCK
    whole, unused = count - rest, 0 if is_half else rest
    unit, g = unit_uniforms(g, whole + (unused + _BLOCK if rest else 0), compute_dtype(dtype))
    unit = jnp.append(unit[:whole], unit[whole + unused :])
    unit = unit.reshape(-1, 2, _BLOCK // 2)
    transform = float64_pairs if dtype == np.float64 else float32_pairs
    halves = [_shifted(half, moments).astype(dtype) for half in transform(unit[:, 0], unit[:, 1])]
    # A fifth of the time of a stack, and of an operation on the result: XLA would compute both
    # halves for each of its elements.
    numbers = jnp.zeros(unit.shape, dtype).at[:, 0].set(halves[0]).at[:, 1].set(halves[1])
    numbers = numbers.reshape(-1)
    if rest:
        numbers = jnp.append(numbers[: count - _BLOCK], numbers[-_BLOCK:])
    return arranged(numbers, shape, order), g


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _one_by_one(
    g: TorchGenerator,
    moments: UInt32[Any, " words"] | None,
    shape: tuple[int, ...],
    dtype: np.dtype,
    order: tuple[int, ...],
) -> tuple[Float[Array, "*shape"], TorchGenerator]:
    if not (count := math.prod(shape)):
        return jnp.zeros(shape, dtype), g
    # PyTorch computes in float64 for every dtype, hence also without `jax_enable_x64`.
    with jax.enable_x64(True):
        is_cached, *cached = g.next_double_normal_sample
        missing = count - is_cached.astype(np.int32)
        used = (missing + 1) // 2  # pairs
        words, state, position = advance(g.state, g.position, 4 * ((count + 1) // 2), 4 * used)
        angular, radial = double_uniforms(as_longs(words)).reshape(-1, 2).T
        fresh = jnp.stack(float64_pairs(radial, angular), 1)
        both = jnp.append(_from_words(*cached), fresh)
        numbers = lax.dynamic_slice(both, (1 - (count - missing),), (count,))
        numbers = _shifted(numbers, moments)
        if dtype != np.float64:
            numbers = numbers.astype(np.float32)  # half types are rounded twice, as in PyTorch
        low, high = lax.bitcast_convert_type(both[2 * used], np.uint32)
        cache = jnp.stack([jnp.ones((), np.uint32), high, low]) * (missing % 2).astype(np.uint32)
        g = dataclasses.replace(g, state=state, position=position, next_double_normal_sample=cache)
        return arranged(numbers.astype(dtype), shape, order), g


def _shifted(
    x: Float[Array, "*shape"], moments: UInt32[Array, " words"] | None
) -> Float[Array, "*shape"]:
    if moments is None:
        return jnp.where(x == 0, jnp.zeros_like(x), x)  # -0 + 0 is 0
    with jax.enable_x64(True):
        # The words of a float64 in memory are low and high.
        mean, stddev = (_from_words(*pair[::-1]).astype(x.dtype) for pair in moments.reshape(2, 2))
        return fused_multiply_add(x, stddev, mean)


def _from_words(high: UInt32[Array, ""], low: UInt32[Array, ""]) -> Float[Array, ""]:
    return lax.bitcast_convert_type(jnp.stack([low, high]), np.float64)
