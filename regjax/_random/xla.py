"""Workarounds for XLA: no function here changes a value, only the program that XLA compiles.

The functions know nothing of dropout or of optimizers. `rounded` fixes how results are rounded; the
others fix where they are computed, hence the time. PyTorch runs operation by operation, so regtorch
has a counterpart of `rounded` alone, for `torch.compile`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

if TYPE_CHECKING:
    from jaxtyping import Array, Inexact, Shaped, UInt, UInt8, UInt32


# jit, because an optimizer calls it for each of a thousand leaves: traced once for each shape and
# dtype, it takes a fourth of the time to trace and lower.
@jax.jit
def rounded(x: Inexact[Array, "*shape"]) -> Inexact[Array, "*shape"]:
    """Return `x`, and prevent a compiler from contracting the product `x` with a later sum.

    XLA on a CPU contracts `a * b + c` to one fused multiply-add, which rounds once where PyTorch's
    kernels round twice. An operation between the two prevents it. This one is the identity for
    every value, and so is its derivative.

    Measured on 10,000 float32 sums `a * b + c` under `jit`, with `a` and `b` from a standard normal
    distribution: 2,366 differ from the sums of rounded products, as many with
    `lax.optimization_barrier(a * b)`, `lax.reduce_precision(a * b, 8, 23)` or
    `--xla_allow_excess_precision=false`, and none with `rounded(a * b)`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> x = jnp.float32(1 + 2**-12)
        >>> jax.jit(lambda x: rounded(x * x) - x)(x) == x * x - x
        Array(True, dtype=bool)
    """
    if jnp.iscomplexobj(x):
        return lax.complex(_identity(x.real), _identity(x.imag))
    return _identity(x)


@jax.custom_jvp
def _identity(x: Array) -> Array:
    # x below 1, otherwise max(x, 1). A simpler selection fails: LLVM may know that a product is
    # not NaN or not negative, but not how large it is.
    one = lax.full_like(x, 1)
    return lax.select(lax.lt(x, one), x, lax.max(x, one))


@_identity.defjvp
def _identity_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    return (_identity(*primals), *tangents)


def materialize(x: Shaped[Array, "*shape"]) -> Shaped[Array, "*shape"]:
    """Return random booleans or integers `x`; a CPU stores them before they are read.

    XLA treats a draw as cheap, and repeats it in the loop that reads it, for every element that
    shares it: all elements along a dimension that shares a mask, or the 32 elements of a word. XLA
    does not fuse an expensive operation into one that reads it many times, and it treats division
    as expensive. It does not see that the divisor is 1. (With a barrier in front of a literal 1, it
    does, up to JAX 0.8.)

    Measured in CPU time on arrays of (64, 256, 1024): a mask shared along one of the first two axes
    takes half as long as without it, and 8 million packed bits a twelfth.
    """

    def divided(x: Array) -> Array:
        integers = x.astype(np.uint8) if x.dtype == np.bool_ else x
        one = integers.dtype.type(1)
        divisor = (integers == ~integers).astype(integers.dtype) + one
        return (integers // divisor).astype(x.dtype)

    return lax.platform_dependent(x, cpu=divided, default=lambda x: x)


def read_bytes_on_gpus(
    words: UInt32[Array, "*words"], read: Callable[[tuple[UInt[Array, "*words"], ...]], Any]
) -> Any:
    """Return `read((words,))`, or on a GPU `read(word_bytes(words))`, which is equal and faster.

    On a GPU each element reads the container of its bit: a word has twice as many bytes as a
    bfloat16 of the array itself, a byte half as many.
    """
    return lax.platform_dependent(
        words,
        cuda=lambda words: read(word_bytes(words)),
        default=lambda words: read((words,)),
    )


def word_bytes(words: UInt32[Array, "*words"]) -> tuple[UInt8[Array, "*words"], ...]:
    """Return the bytes of each word as four arrays, least significant first.

    One kernel draws the words and writes the four arrays. The barrier preserves this: without it
    XLA may store words, and split them where they are read.
    """
    places = [np.uint32(8 * i) for i in range(4)]
    return lax.optimization_barrier(tuple((words >> place).astype(jnp.uint8) for place in places))


def iota_in_place(
    shape: tuple[int, ...], axis: int, out_sharding: NamedSharding | PartitionSpec | None
) -> UInt32[Array, "*shape"]:
    """Return the index along one axis, in a form that hides that it depends on that axis only.

    Xor with the index along the last axis, applied twice, changes no number. XLA:TPU would compute
    a value that depends on one axis separately from its consumer, and starting a kernel takes as
    long as drawing tens of thousands of words.
    """
    index = lax.broadcasted_iota(np.uint32, shape, axis, out_sharding=out_sharding)
    if axis == len(shape) - 1:
        return index
    last = lax.broadcasted_iota(np.uint32, shape, len(shape) - 1, out_sharding=out_sharding)
    return (index ^ last) ^ last
