"""PyTorch's dropout masks on CUDA, by formula. They have never been checked on a GPU.

PyTorch launches blocks of 256 threads. Each thread has its own sequence of Philox counters, and
fills one vector of elements after another, a whole grid apart.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from regjax._random.xla import rounded
from regjax.torch_random.layouts import arranged
from regjax.torch_random.one_stream import check_one_stream
from regjax.torch_random.philox import philox4x32
from regjax.torch_random.words import as_number, as_words
from regshared.checks import check_integer

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, UInt8, UInt32

CUDA_STATE_SIZE = 16
_BLOCK = 256
_LANES = 4
_VECTOR_BYTES = 16
_MAX_SIZE = 2**31


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class CudaGenerator:
    """The state of PyTorch's generator on CUDA: make it by `generator(seed, device="cuda", ...)`.

    A pytree, as `TorchGenerator`. Of the functions that draw, `dropout` alone accepts it.

    Attributes:
        seed: The seed as a high and a low word: uint32 of shape (2,).
        offset: The count of numbers drawn by each thread, in two words: uint32 of shape (2,).
        multiprocessors: The number of multiprocessors of the GPU, on which the masks depend.
        threads_per_multiprocessor: The most threads that are resident on one of them.
    """

    # A transformation may put stacks of arrays here, or flags.
    seed: Any
    offset: Any
    multiprocessors: int = dataclasses.field(metadata={"static": True})
    threads_per_multiprocessor: int = dataclasses.field(metadata={"static": True})

    def __repr__(self) -> str:
        is_one = jnp.shape(self.offset) == (2,) and not isinstance(self.offset, Tracer)
        seed, offset = (as_number(w) if is_one else w for w in (self.seed, self.offset))
        return (
            f"CudaGenerator(seed={seed}, offset={offset}, multiprocessors={self.multiprocessors}, "
            f"threads_per_multiprocessor={self.threads_per_multiprocessor})"
        )


def cuda_generator(
    seed: int, offset: int, multiprocessors: int, threads_per_multiprocessor: int
) -> CudaGenerator:
    """Return a state, having checked the two properties of the GPU."""
    multiprocessors = check_integer("multiprocessors", multiprocessors)
    threads = check_integer("threads_per_multiprocessor", threads_per_multiprocessor)
    if multiprocessors < 1:
        raise ValueError(f"multiprocessors must be at least 1; got {multiprocessors}.")
    if threads < _BLOCK:
        raise ValueError(f"threads_per_multiprocessor must be at least {_BLOCK}; got {threads}.")
    return CudaGenerator(as_words(seed), as_words(offset), multiprocessors, threads)


def from_cuda_bytes(state: bytes, multiprocessors: int, threads: int) -> CudaGenerator:
    """Return the state that 16 bytes of PyTorch describe: the seed and the offset."""
    seed, offset = (int(number) for number in np.frombuffer(state, "<u8"))
    if offset % _LANES or offset >= 2**63:
        raise ValueError(
            "generator_or_state must have an offset that is a multiple of 4 below 2**63; got "
            f"{offset}. Take it from torch.Generator.get_state()."
        )
    return cuda_generator(seed, offset, multiprocessors, threads)


def to_cuda_bytes(g: CudaGenerator) -> UInt8[np.ndarray, " bytes"]:
    """Return a state in the form of `get_state()` of a generator on CUDA."""
    return np.array([as_number(g.seed), as_number(g.offset)], "<u8").view(np.uint8)


def cuda_dropout(
    x: Float[Array, "*shape"], rate: float, g: CudaGenerator, order: tuple[int, ...]
) -> tuple[Float[Array, "*shape"], CudaGenerator]:
    """Apply dropout at a rate strictly between 0 and 1."""
    check_size(x.size)
    return _masked(x, g, *_threshold_and_scale(1 - rate, x.dtype), order)


def check_size(size: int) -> None:
    """Raise an error if indices of elements exceed 31 bits."""
    if size >= _MAX_SIZE:
        raise ValueError(f"x must have fewer than 2**31 elements; got {size}.")


def _threshold_and_scale(
    keep_prob: float, dtype: np.dtype
) -> tuple[Float[Any, ""], Float[Any, ""]]:
    """Return the bound of kept uniforms, and the factor of kept elements.

    The uniforms have 32 bits. PyTorch compares them with a probability in 32 bits, or in 64 for
    float64: then the next number of 32 bits is the same bound.
    """
    if dtype == np.float64:
        return next_float32(keep_prob), np.float64(1) / np.float64(keep_prob)
    return np.float32(keep_prob), np.float32(1) / np.float32(keep_prob)


def next_float32(number: float) -> np.float32:
    """Return the smallest float32 that is at least `number`."""
    near = np.float32(number)
    return near if near >= number else np.nextafter(near, np.float32(np.inf))


@functools.partial(jax.jit, static_argnums=4)
def _masked(
    x: Float[Array, "*shape"],
    g: CudaGenerator,
    threshold: Float[Any, ""],
    scale: Float[Any, ""],
    order: tuple[int, ...],
) -> tuple[Float[Array, "*shape"], CudaGenerator]:
    g = check_one_stream(g, lax.stop_gradient(x))
    width = vector_width(x.size, x.dtype)
    keep = _uniforms(words(g, x.size, width)) < threshold
    # PyTorch's kernel for single elements visits them in row-major order in every layout.
    order = tuple(range(x.ndim)) if width == 1 else order
    return mask_and_scale(x, arranged(keep, x.shape, order), scale), _advanced(g, x.size)


def vector_width(size: int, dtype: np.dtype) -> int:
    """Return how many elements a thread fills at once: up to 16 bytes, and a divisor of `size`."""
    width = _VECTOR_BYTES // dtype.itemsize
    while size % width:
        width //= 2
    return width


def words(g: CudaGenerator, size: int, width: int) -> UInt32[Array, " size"]:
    """Return the 32 bits of each element, in the order in which the kernel visits them."""
    threads = _threads(g, size)
    if width == 1:
        # An element of each grid takes the next word of its thread.
        rounds = -(-size // (_LANES * threads))
        call, thread = (
            lax.broadcasted_iota(np.uint32, (rounds, threads), axis) for axis in range(2)
        )
        return jnp.stack(_blocks(g, call, thread), axis=1).reshape(-1)[:size]
    lanes = min(width, _LANES)
    calls_per_vector = width // lanes
    index = jnp.arange(size // lanes, dtype=np.uint32)
    vector, part = _divmod(index, calls_per_vector)
    grid, thread = _divmod(vector, threads)
    blocks = _blocks(g, grid * np.uint32(calls_per_vector) + part, thread)
    return jnp.stack(blocks[:lanes], axis=-1).reshape(-1)


def _divmod(index: UInt32[Array, " n"], divisor: int) -> tuple[Array, Array]:
    return index // np.uint32(divisor), index % np.uint32(divisor)


def _threads(g: CudaGenerator, size: int) -> int:
    """Return the threads of the grid: no more than fit on the GPU at once."""
    resident = g.multiprocessors * (g.threads_per_multiprocessor // _BLOCK)
    return _BLOCK * min(resident, -(-size // _BLOCK))


def _blocks(g: CudaGenerator, call: Any, thread: Any) -> tuple[Array, Array, Array, Array]:
    """Return the four words that a thread draws in a call."""
    high, low = g.offset
    # A counter numbers blocks of four numbers.
    start = (low >> np.uint32(2)) | (high << np.uint32(30))
    first = start + call
    second = (high >> np.uint32(2)) + (first < start).astype(np.uint32)
    zero = jnp.zeros_like(first)
    return philox4x32((g.seed[1], g.seed[0]), (first, second, zero + thread, zero))


def _uniforms(bits: UInt32[Array, " n"]) -> Float[Array, " n"]:
    """Return the uniforms in (0, 1] of CUDA."""
    # The product is exact, so that it does not matter whether a compiler contracts it.
    return bits.astype(np.float32) * np.float32(2.0**-32) + np.float32(2.0**-33)


def _advanced(g: CudaGenerator, size: int) -> CudaGenerator:
    step = np.uint32(_LANES * -(-size // (_LANES * _threads(g, size))))
    low = g.offset[1] + step
    high = g.offset[0] + (low < step).astype(np.uint32)
    return dataclasses.replace(g, offset=jnp.stack([high, low]))


def mask_and_scale(
    x: Float[Array, "*shape"], keep: Bool[Array, "*shape"], scale: Float[Array, ""]
) -> Float[Array, "*shape"]:
    """Multiply in the dtype of `scale`, then round once to that of `x`."""

    def scaled(x: Array, keep: Array) -> Array:
        noise = jnp.where(keep, scale, jnp.zeros((), scale.dtype))
        return rounded((x.astype(scale.dtype) * noise).astype(x.dtype))

    # The backward pass needs the mask alone; prevent_cse would keep XLA from fusing it.
    return jax.checkpoint(scaled, prevent_cse=False)(x, keep)
