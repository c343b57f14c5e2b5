"""Dropout as programs that PyTorch's `torch.compile` makes for a CPU.

A compiled program draws one seed for each call from the generator, and encrypts the index of each
element by Philox.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from regjax.torch_random.cuda import check_size, mask_and_scale, next_float32
from regjax.torch_random.dropouts import check_inputs
from regjax.torch_random.layouts import arranged
from regjax.torch_random.one_stream import check_one_stream
from regjax.torch_random.philox import philox4x32
from regjax.torch_random.state import TorchGenerator, check_generator, draw_words
from regjax.torch_random.uniforms import compute_dtype
from regshared.checks import check_bool

if TYPE_CHECKING:
    from jax.typing import ArrayLike
    from jaxtyping import Array, Float, UInt32

    from regjax.torch_random.layouts import MemoryOrder

_LOWEST_31 = np.uint32(0x7FFFFFFF)
# A little below 2**-31, so that no product rounds to 1.
_UNIT = np.float32(4.6566127342e-10)


def compiled_dropout(
    x: Float[ArrayLike, "*shape"],
    rate: float,
    g: TorchGenerator,
    *,
    deterministic: bool = False,
    memory_order: MemoryOrder = None,
) -> tuple[Float[Array, "*shape"], TorchGenerator]:
    """Apply dropout as a program of `torch.compile` on a CPU.

    Each call consumes 64 bits; an element is kept where a uniform float32 exceeds the rate, rounded
    to the dtype of `x`. The rates 0 and 1, `deterministic`, and an empty `x` consume nothing.

    Args:
        x: As for `dropout`.
        rate: As for `dropout`. The rate 1 returns zeros, also for infinities.
        g: The state of PyTorch's generator for CPUs, which may be traced.
        deterministic: As for `dropout`.
        memory_order: As for `dropout`.

    Returns:
        As `dropout`.

    Raises:
        TypeError: As `dropout`; or `g` is a `CudaGenerator`.
        ValueError: As `dropout`; or `x` has 2**31 elements or more.

    Note (PyTorch):
        Bitwise identical with the default backend, `"inductor"`, and its default settings. A graph
        draws the seeds of all its calls before anything else, in the order of the calls. A graph
        break starts a new graph, and `dropout` is the function for uncompiled code.

    Example:
        >>> import jax.numpy as jnp
        >>> from regjax import torch_random
        >>> torch_random.compiled_dropout(jnp.ones(8), 0.3, torch_random.generator(0))[0]
        Array([0.       , 1.4285715, 1.4285715, 1.4285715, 0.       , 1.4285715,
               1.4285715, 1.4285715], dtype=float32)
    """
    x, rate, order = check_inputs(x, rate, memory_order)
    g = check_generator(g)
    if check_bool("deterministic", deterministic) or rate == 0 or not x.size:
        return x, g
    if rate == 1:
        return jnp.zeros_like(x), g
    check_size(x.size)
    scale = np.asarray(1 / (1 - rate), compute_dtype(x.dtype))
    return _masked(x, g, _threshold(rate, x.dtype), scale, order)


def _threshold(rate: float, dtype: np.dtype) -> Float[Any, ""]:
    """Return the float32 that every kept uniform exceeds."""
    if dtype == np.float64:
        # The largest float32 that is at most the rate: PyTorch compares in 64 bits.
        return -next_float32(-rate)
    return np.asarray(rate, dtype).astype(np.float32)


@functools.partial(jax.jit, static_argnums=4)
def _masked(
    x: Float[Array, "*shape"],
    g: TorchGenerator,
    threshold: Float[Any, ""],
    scale: Float[Any, ""],
    order: tuple[int, ...],
) -> tuple[Float[Array, "*shape"], TorchGenerator]:
    g = check_one_stream(g, lax.stop_gradient(x))
    # The key is the low word of a number of 64 bits, of which the high word is drawn first.
    (_, key), g = draw_words(g, 2)
    keep = _uniforms(key, math.prod(x.shape)) > threshold
    return mask_and_scale(x, arranged(keep, x.shape, order), scale), g


def _uniforms(key: UInt32[Array, ""], size: int) -> Float[Array, " size"]:
    """Return a uniform number in [0, 1) for each index."""
    zero = jnp.zeros(size, np.uint32)
    counter = (jnp.arange(size, dtype=np.uint32), zero, zero, zero)
    bits, *_ = philox4x32((key, jnp.uint32(0)), counter)
    return (bits & _LOWEST_31).astype(np.float32) * _UNIT
