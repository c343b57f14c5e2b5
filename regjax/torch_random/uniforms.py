"""Uniform numbers and masks in PyTorch's order, arithmetic and rounding."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from regjax._checks import check_floating_dtype, check_number, check_shape
from regjax._random.bernoulli import check_probability
from regjax._random.events import observer
from regjax.torch_random.fma import fused_multiply_add
from regjax.torch_random.layouts import arranged, check_memory_order
from regjax.torch_random.state import (
    TorchGenerator,
    as_longs,
    check_generator,
    draw_longs,
    draw_words,
    next_words,
)

if TYPE_CHECKING:
    from jax.typing import DTypeLike
    from jaxtyping import Array, Bool, Float, UInt32, UInt64

    from regjax.torch_random.layouts import MemoryOrder

FLOAT_DIGITS, DOUBLE_DIGITS = 24, 53
_LOWEST_53 = np.uint64(2**DOUBLE_DIGITS - 1)
HALF_TYPES = (np.dtype(np.float16), np.dtype(jnp.bfloat16))


def bernoulli(
    g: TorchGenerator,
    keep_prob: float,
    shape: Sequence[int],
    *,
    memory_order: MemoryOrder = None,
) -> tuple[Bool[Array, "*shape"], TorchGenerator]:
    """Draw a mask: PyTorch's `torch.empty(shape).bernoulli_(keep_prob)`.

    Each element consumes 64 bits, for every dtype and probability: it is True where their lowest 53
    bits, as an integer, are less than `keep_prob * 2**53`.

    Args:
        g: The generator.
        keep_prob: The probability of True, a concrete number in [0, 1], in double precision.
        shape: The shape of the mask.
        memory_order: As for `dropout`.

    Returns:
        The mask, and the next state of the generator.

    Raises:
        TypeError: `keep_prob` is traced or not a number, or `g` is not a generator.
        ValueError: `keep_prob` is not in [0, 1], or `memory_order` does not fit the shape.

    Note (PyTorch):
        `torch.bernoulli(probabilities)` of a float32 tensor consumes 32 bits for each element
        instead, and gives another mask.

    Example:
        >>> import torch
        >>> from regjax import torch_random
        >>> mask, g = torch_random.bernoulli(torch_random.generator(0), 0.7, (8,))
        >>> mask.astype(int).tolist()
        [0, 0, 1, 0, 1, 0, 1, 1]
        >>> _ = torch.manual_seed(0)
        >>> torch.empty(8).bernoulli_(0.7).int().tolist()
        [0, 0, 1, 0, 1, 0, 1, 1]
    """
    g, shape = check_generator(g), check_shape("shape", shape)
    order = check_memory_order(memory_order, len(shape))
    keep_prob = concrete_probability("keep_prob", keep_prob)
    keep, following = draw_mask(g, keep_threshold(keep_prob), shape, order)
    if observers := observer():
        values = keep.astype(np.float32)
        observers.draw("torch_random.bernoulli", next_words(g), 1 - keep_prob, keep, values)
    return keep, following


def keep_threshold(keep_prob: float) -> UInt32[np.ndarray, " pair"]:
    """Return, as a high and a low word, how many of the 2**53 uniforms lie below a probability."""
    # Exact: the product only changes the exponent.
    threshold = math.ceil(keep_prob * 2.0**DOUBLE_DIGITS)
    return np.array([threshold >> 32, threshold & 0xFFFFFFFF], np.uint32)


# The inner jit makes an eager call one dispatch. The threshold is a traced argument, so that one
# trace serves every probability.
@functools.partial(jax.jit, static_argnums=(2, 3))
def draw_mask(
    g: TorchGenerator,
    threshold: UInt32[Any, " pair"],
    shape: tuple[int, ...],
    order: tuple[int, ...],
) -> tuple[Bool[Array, "*shape"], TorchGenerator]:
    """Draw the mask of `bernoulli`."""
    with jax.enable_x64(True):
        longs, g = draw_longs(g, math.prod(shape))
        keep = longs & _LOWEST_53 < as_longs(threshold)[0]
        return arranged(keep, shape, order), g


def uniform(
    g: TorchGenerator,
    shape: Sequence[int],
    low: float = 0.0,
    high: float = 1.0,
    dtype: DTypeLike = jnp.float32,
    *,
    memory_order: MemoryOrder = None,
) -> tuple[Float[Array, "*shape"], TorchGenerator]:
    """Draw uniform numbers: PyTorch's `torch.rand(shape)` and `tensor.uniform_(low, high)`.

    A number is `u * (high - low) + low` with one rounding; `u` has the lowest 24 of 32 bits, or for
    float64 the lowest 53 of 64. Half types are computed in float32. A number that rounds to `high`
    becomes `low`.

    Args:
        g: The generator.
        shape: The shape of the result.
        low: The lower bound, a concrete number.
        high: The upper bound.
        dtype: float16, bfloat16, float32, or float64, which requires `jax_enable_x64`.
        memory_order: As for `dropout`.

    Returns:
        The numbers, and the next state of the generator.

    Raises:
        TypeError: An argument has a wrong type.
        ValueError: A bound is not finite in this dtype, `low` exceeds `high`, or `dtype` is float64
            without `jax_enable_x64`.

    Note (PyTorch):
        Bitwise identical with the bounds 0 and 1 everywhere, and with others on CPUs with AVX2.
        Without AVX2, PyTorch rounds the product, too.

    Example:
        >>> import torch
        >>> from regjax import torch_random
        >>> torch_random.uniform(torch_random.generator(0), (3,), -0.1, 0.1)[0]
        Array([-0.00074868,  0.05364436, -0.08230451], dtype=float32)
        >>> torch.empty(3).uniform_(-0.1, 0.1, generator=torch.Generator().manual_seed(0))
        tensor([-0.0007,  0.0536, -0.0823])
    """
    g, shape = check_generator(g), check_shape("shape", shape)
    dtype = check_dtype(dtype)
    low, high = check_number("low", low), check_number("high", high)
    _check_bounds(low, high, dtype)
    order = check_memory_order(memory_order, len(shape))
    bounds = None if (low, high) == (0, 1) else scaled_bounds(low, high, compute_dtype(dtype))
    return _uniform(g, bounds, shape, dtype, order)


def scaled_bounds(low: float, high: float, dtype: np.dtype) -> Float[np.ndarray, " bounds"]:
    """Return a power of two, then the span and `low` divided by it, and the two bounds.

    A span in [1, 2) makes that no intermediate result overflows or is subnormal.
    """
    start, end = dtype.type(low), dtype.type(high)
    span = end - start
    unit = dtype.type(2.0 ** math.floor(math.log2(span))) if span else dtype.type(1)
    return np.stack([unit, span / unit, start / unit, start, end])


# Bounds are traced arguments, so that one trace serves all of them.
@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _uniform(
    g: TorchGenerator,
    bounds: Float[Any, " bounds"] | None,
    shape: tuple[int, ...],
    dtype: np.dtype,
    order: tuple[int, ...],
) -> tuple[Float[Array, "*shape"], TorchGenerator]:
    numbers, g = unit_uniforms(g, math.prod(shape), compute_dtype(dtype))
    return arranged(between(numbers, bounds, dtype), shape, order), g


def between(
    numbers: Float[Array, " n"], bounds: Float[Any, "bounds ..."] | None, dtype: np.dtype
) -> Float[Array, " n"]:
    """Return numbers in [0, 1) as numbers between the bounds of `scaled_bounds`; None is 0, 1."""
    low, high = jnp.zeros((), dtype), jnp.ones((), dtype)
    if bounds is not None:
        unit, span, start, *ends = bounds
        low, high = (end.astype(dtype) for end in ends)
        # The product by a power of two is exact.
        numbers = fused_multiply_add(numbers, span, start) * unit
    numbers = numbers.astype(dtype)
    return jnp.where(numbers == high, low, numbers)


def compute_dtype(dtype: np.dtype) -> np.dtype:
    """Return the dtype in which PyTorch computes numbers of a dtype."""
    return np.dtype(np.float32) if dtype in HALF_TYPES else dtype


def unit_uniforms(
    g: TorchGenerator, count: int, dtype: np.dtype
) -> tuple[Float[Array, " count"], TorchGenerator]:
    """Draw numbers in [0, 1) in float32 or float64."""
    if dtype == np.float64:
        longs, g = draw_longs(g, count)
        return double_uniforms(longs), g
    words, g = draw_words(g, count)
    low_bits = words & np.uint32((1 << FLOAT_DIGITS) - 1)
    return low_bits.astype(np.float32) * np.float32(2.0**-FLOAT_DIGITS), g


def double_uniforms(longs: UInt64[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Return the lowest 53 bits of 64-bit numbers as float64 in [0, 1)."""
    return (longs & _LOWEST_53).astype(np.float64) * np.float64(2.0**-DOUBLE_DIGITS)


def _check_bounds(low: float, high: float, dtype: np.dtype) -> None:
    largest = float(jnp.finfo(dtype).max)
    for name, bound in (("low", low), ("high", high)):
        if abs(bound) > largest:
            raise ValueError(f"{name} must be finite in {dtype}; got {bound}.")
    if low > high:
        raise ValueError(f"low must be at most high; got {low} and {high}.")
    if high - low > largest:
        raise ValueError(
            f"high must exceed low by at most {largest:g} in {dtype}; got {low} and {high}."
        )


def check_dtype(dtype: DTypeLike) -> np.dtype:
    """Return one of the four dtypes that are supported."""
    wanted = "float16, bfloat16, float32 or float64"
    found = check_floating_dtype("dtype", dtype, wanted)
    if found not in (*HALF_TYPES, np.float32, np.float64):
        raise TypeError(f"dtype must be {wanted}; got {found}.")
    return check_precision(found)


def check_precision(dtype: np.dtype) -> np.dtype:
    """Return a dtype, unless it has 64 bits and JAX is limited to 32."""
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError(
            f"dtype must have at most 32 bits without double precision; got {dtype}. Enable it: "
            'jax.config.update("jax_enable_x64", True).'
        )
    return dtype


def concrete_probability(name: str, value: Any) -> float:
    """Return a probability as a float in double precision, which is what PyTorch compares with."""
    probability = check_probability(name, value)
    if not isinstance(probability, float):
        raise TypeError(
            f"{name} must be a number known before tracing, because PyTorch compares it in double "
            f"precision; got {probability!r}. Pass a Python float."
        )
    return probability
