"""The state of PyTorch's generator for CPUs, as a pytree and as PyTorch's bytes."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Literal, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from regjax.torch_random.cuda import (
    CUDA_STATE_SIZE,
    CudaGenerator,
    cuda_generator,
    from_cuda_bytes,
    to_cuda_bytes,
)
from regjax.torch_random.mt19937 import SIZE, advance, seeded_block
from regjax.torch_random.words import as_number, as_words
from regshared.checks import check_integer, describe

if TYPE_CHECKING:
    from jaxtyping import Array, UInt8, UInt32, UInt64

# The bytes of `torch.Generator.get_state()`. PyTorch has written this layout since version 0.1, and
# no longer uses `unused_x` and `unused_rho`.
_STATE = np.dtype(
    {
        "names": [
            *("seed", "left", "seeded", "next", "words"),
            *("unused_x", "double_sample", "unused_rho", "has_double_sample"),
            *("float_sample", "has_float_sample"),
        ],
        "formats": [
            *("<u8", "<i4", "<i4", "<u8", ("<u8", SIZE)),
            *("<f8", "<u8", "<f8", "<i4", "<u4", "?"),
        ],
        "offsets": [0, 8, 12, 16, 24, 5016, 5024, 5032, 5040, 5048, 5052],
        "itemsize": 5056,
    }
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class TorchGenerator:
    """The state of PyTorch's generator for CPUs; make one by `generator(seed)` or `from_torch`.

    A pytree of integer arrays, which can be carried through `jit` and `scan`, and saved. Functions
    that draw from it return the next state; a state that is used twice gives the same numbers.

    Attributes:
        seed: The seed as a high and a low word: uint32 of shape (2,).
        state: The current block of the Mersenne Twister: uint32 of shape (624,).
        position: The number of words of the block that are drawn, 0 before the first draw: int32.
        next_float_normal_sample: Whether a float32 normal is cached, and its bits: uint32 of shape
            (2,). PyTorch 2.13 preserves it and does not use it.
        next_double_normal_sample: Whether a float64 normal is cached, and the high and the low word
            of its bits: uint32 of shape (3,). A tensor of fewer than 16 normals consumes it first.
    """

    # A transformation may put stacks of arrays here, or flags.
    seed: Any
    state: Any
    position: Any
    next_float_normal_sample: Any
    next_double_normal_sample: Any

    def __repr__(self) -> str:
        is_one = jnp.shape(self.position) == () and not isinstance(self.position, Tracer)
        seed = as_number(self.seed) if is_one else self.seed
        return f"TorchGenerator(seed={seed}, position={self.position})"


@overload
def generator(seed: int, device: Literal["cpu"] = "cpu") -> TorchGenerator: ...
@overload
def generator(
    seed: int,
    device: Literal["cuda"],
    multiprocessors: int,
    threads_per_multiprocessor: int,
) -> CudaGenerator: ...
def generator(
    seed: int,
    device: str = "cpu",
    multiprocessors: int | None = None,
    threads_per_multiprocessor: int | None = None,
) -> TorchGenerator | CudaGenerator:
    """Return the state of PyTorch's generator after `torch.manual_seed(seed)`.

    Args:
        seed: An integer in [-2**63, 2**64). PyTorch adds 2**64 to a negative one, and draws on a
            CPU depend only on the lowest 32 bits.
        device: "cpu", or "cuda" for the masks of `dropout` on a GPU of NVIDIA, by formula: they
            were never checked on a GPU.
        multiprocessors: For "cuda" alone: the `multi_processor_count` among the device properties
            that `torch.cuda` returns. The masks depend on it.
        threads_per_multiprocessor: For "cuda" alone: `max_threads_per_multi_processor`.

    Returns:
        A `TorchGenerator`, or for "cuda" a `CudaGenerator`.

    Raises:
        TypeError: `seed` or a property of the GPU is not an integer, or a property is missing.
        ValueError: An argument is out of range, or a property is given for "cpu".

    Note (PyTorch):
        `torch.Generator()` without a seed has the seed 67280421310721. The default generator of a
        process that was never seeded has a random one.

    Example:
        >>> import torch
        >>> from regjax import torch_random
        >>> torch_random.uniform(torch_random.generator(0), (3,))[0]
        Array([0.4962566 , 0.7682218 , 0.08847743], dtype=float32)
        >>> torch.rand(3, generator=torch.Generator().manual_seed(0))
        tensor([0.4963, 0.7682, 0.0885])
        >>> torch_random.generator(0, "cuda", 132, 2048)
        CudaGenerator(seed=0, offset=0, multiprocessors=132, threads_per_multiprocessor=2048)
    """
    seed = check_integer("seed", seed)
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed must lie in [-2**63, 2**64), as in PyTorch; got {seed}.")
    if device not in ("cpu", "cuda"):
        raise ValueError(f'device must be "cpu" or "cuda"; got {device!r}.')
    gpu = _check_gpu(device == "cuda", multiprocessors, threads_per_multiprocessor)
    if gpu:
        return cuda_generator(seed % 2**64, 0, *gpu)
    return seeded(np.array([seed >> 32 & 0xFFFFFFFF, seed & 0xFFFFFFFF], np.uint32))


def seeded(seed: UInt32[Any, " pair"]) -> TorchGenerator:
    """Return the state after seeding with a high and a low word, which may be traced."""
    seed = jnp.asarray(seed)
    return TorchGenerator(
        seed=seed,
        state=seeded_block(seed[1]),
        position=jnp.int32(0),
        next_float_normal_sample=jnp.zeros(2, np.uint32),
        next_double_normal_sample=jnp.zeros(3, np.uint32),
    )


@overload
def from_torch(generator_or_state: Any) -> TorchGenerator: ...
@overload
def from_torch(
    generator_or_state: Any, *, multiprocessors: int, threads_per_multiprocessor: int
) -> CudaGenerator: ...
def from_torch(
    generator_or_state: Any,
    *,
    multiprocessors: int | None = None,
    threads_per_multiprocessor: int | None = None,
) -> TorchGenerator | CudaGenerator:
    """Return the state of a generator of PyTorch, which draws the same numbers from there on.

    Args:
        generator_or_state: A `torch.Generator` of device "cpu", such as `torch.default_generator`;
            or the result of its `get_state()` or of `torch.get_rng_state()`: a tensor, a NumPy
            array of uint8, or bytes. With the properties of a GPU, a generator of device "cuda",
            or its state.
        multiprocessors: For CUDA alone, as for `generator`.
        threads_per_multiprocessor: For CUDA alone, as for `generator`.

    Returns:
        A `TorchGenerator`, or for CUDA a `CudaGenerator`.

    Raises:
        TypeError: It is none of these, or one property of a GPU is given without the other.
        ValueError: The state has another length, as that of a generator of another device, or is
            not a state that PyTorch writes.

    Example:
        >>> import torch
        >>> from regjax import torch_random
        >>> g = torch.Generator().manual_seed(7)
        >>> _ = torch.rand(100, generator=g)
        >>> torch_random.from_torch(g)
        TorchGenerator(seed=7, position=100)
        >>> torch_random.uniform(torch_random.from_torch(g), (2,))[0].tolist() == torch.rand(
        ...     2, generator=g
        ... ).tolist()
        True
    """
    needs_gpu = (multiprocessors, threads_per_multiprocessor) != (None, None)
    if gpu := _check_gpu(needs_gpu, multiprocessors, threads_per_multiprocessor):
        return from_cuda_bytes(_state_bytes(generator_or_state, CUDA_STATE_SIZE), *gpu)
    fields = read_fields(generator_or_state)
    seed, double = (int(fields[name]) for name in ("seed", "double_sample"))
    has_float, has_double = (bool(fields[f"has_{n}_sample"]) for n in ("float", "double"))
    return TorchGenerator(
        seed=as_words(seed),
        state=jnp.asarray(fields["words"].astype(np.uint32)),
        position=jnp.int32(fields["next"]),
        next_float_normal_sample=jnp.array([has_float, fields["float_sample"]], np.uint32),
        next_double_normal_sample=jnp.append(jnp.uint32(has_double), as_words(double)),
    )


def to_torch(g: TorchGenerator | CudaGenerator) -> UInt8[np.ndarray, " bytes"]:
    """Return a state in the form of `torch.Generator.get_state()`, byte for byte.

    Args:
        g: A concrete state.

    Raises:
        TypeError: `g` is not a generator, or is traced.

    Example:
        >>> import torch
        >>> from regjax import torch_random
        >>> value, g = torch_random.uniform(torch_random.generator(7), (100,))
        >>> _ = torch.manual_seed(7)
        >>> _ = torch.rand(100)
        >>> torch.equal(torch.from_numpy(torch_random.to_torch(g)), torch.get_rng_state())
        True
    """
    g = check_any_generator(g)
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(g)):
        raise TypeError("g must be known before tracing; got a traced state. Return it from jit.")
    if isinstance(g, CudaGenerator):
        return to_cuda_bytes(g)
    fields = np.zeros(1, _STATE)
    (has_float, single), (has_double, *double) = (
        np.asarray(cache).tolist()
        for cache in (g.next_float_normal_sample, g.next_double_normal_sample)
    )
    position = int(g.position)
    left = SIZE + 1 - position if position else 1
    values = {
        "seed": as_number(g.seed),
        "left": left,
        "seeded": 1,
        "next": position,
        "words": np.asarray(g.state),
        "double_sample": as_number(double),
        "has_double_sample": has_double,
        "float_sample": single,
        "has_float_sample": has_float,
    }
    for name, value in values.items():
        fields[name] = value
    return fields.view(np.uint8)


def check_generator(g: Any) -> TorchGenerator:
    """Return `g` if it is one state for CPUs, not a stack of them."""
    g = check_any_generator(g)
    if isinstance(g, CudaGenerator):
        raise TypeError(
            "g must be a TorchGenerator for this function; got a CudaGenerator, which only dropout "
            'accepts. Make one by regjax.torch_random.generator(seed, "cpu").'
        )
    return g


def check_any_generator(g: Any) -> TorchGenerator | CudaGenerator:
    """Return `g` if it is one state for CPUs or CUDA, not a stack of them."""
    if not isinstance(g, TorchGenerator | CudaGenerator):
        raise TypeError(
            f"g must be a TorchGenerator; got {describe(g)}. Make one by "
            "regjax.torch_random.generator(seed) or from_torch(torch_generator)."
        )
    stack = jnp.shape(g.position) if isinstance(g, TorchGenerator) else jnp.shape(g.offset)[:-1]
    if stack:
        raise ValueError(
            f"g must be a single generator; got a stack of shape {stack}. Map over it with "
            "jax.vmap."
        )
    return g


def draw_words(g: TorchGenerator, count: int) -> tuple[UInt32[Array, " count"], TorchGenerator]:
    """Return the next `count` 32-bit words of the stream, and the next state."""
    words, state, position = advance(g.state, g.position, count)
    return words, dataclasses.replace(g, state=state, position=position)


def next_words(g: TorchGenerator) -> tuple[UInt32[Array, ""], UInt32[Array, ""]]:
    """Return the next two words of the stream, the key of a draw in the events of observers."""
    high, low = draw_words(g, 2)[0]
    return high, low


def draw_longs(g: TorchGenerator, count: int) -> tuple[UInt64[Array, " count"], TorchGenerator]:
    """Return the next `count` 64-bit numbers, and the next state.

    The caller enables 64-bit numbers, as `jax.enable_x64(True)` does inside a function whatever
    `jax_enable_x64` is.
    """
    words, g = draw_words(g, 2 * count)
    return as_longs(words), g


def as_longs(words: UInt32[Array, " words"]) -> UInt64[Array, " count"]:
    """Return each two words as one number, of which PyTorch draws the high word first."""
    # Strided slices of the high and of the low words would take three times as long.
    reversed_longs = lax.bitcast_convert_type(words.reshape(-1, 2), np.uint64)
    shift = np.uint64(32)
    return (reversed_longs << shift) | (reversed_longs >> shift)


def read_fields(generator_or_state: Any) -> np.void:
    """Return the fields of a state on the CPU, as `from_torch` accepts it, after checks."""
    fields = np.frombuffer(_state_bytes(generator_or_state, _STATE.itemsize), _STATE)[0]
    _check_state(fields)
    return fields


def _check_gpu(
    is_needed: bool, multiprocessors: int | None, threads: int | None
) -> tuple[int, int] | None:
    """Return the properties of a GPU if they are needed, for they have no default."""
    given = {"multiprocessors": multiprocessors, "threads_per_multiprocessor": threads}
    for name, value in given.items():
        if is_needed and value is None:
            raise TypeError(
                f'{name} must be an integer for the device "cuda"; got None. Take it from '
                "torch.cuda.get_device_properties()."
            )
        if value is not None and not is_needed:
            raise ValueError(f'{name} must be None for the device "cpu"; got {value!r}.')
    return None if multiprocessors is None or threads is None else (multiprocessors, threads)


def _state_bytes(source: Any, size: int) -> bytes:
    if hasattr(source, "get_state"):
        source = source.get_state()
    if hasattr(source, "numpy"):
        source = source.numpy()
    if isinstance(source, jax.Array):
        source = np.asarray(source)
    if isinstance(source, np.ndarray) and source.dtype == np.uint8:
        source = source.tobytes()
    if not isinstance(source, bytes | bytearray):
        raise TypeError(
            "generator_or_state must be a torch.Generator, or its get_state() as a tensor, a uint8 "
            f"array or bytes; got {describe(source)}."
        )
    if len(source) != size:
        kinds = {_STATE.itemsize: "a generator on a CPU", CUDA_STATE_SIZE: "a generator on CUDA"}
        raise ValueError(
            f"generator_or_state must have {size} bytes, as the state of {kinds[size]}; got "
            f"{len(source)}, as of {kinds.get(len(source), 'another generator')}. For CUDA, and "
            "only for CUDA, pass multiprocessors and threads_per_multiprocessor."
        )
    return bytes(source)


def _check_state(fields: np.void) -> None:
    left, position = int(fields["left"]), int(fields["next"])
    is_fresh = (left, position) == (1, 0)
    in_step = 1 <= position <= SIZE and left + position == SIZE + 1
    has_words = int(fields["words"].max()) < 2**32
    if not (fields["seeded"] == 1 and (is_fresh or in_step) and has_words):
        raise ValueError(
            "generator_or_state must be a state that PyTorch 2 writes; got one with seeded="
            f"{fields['seeded']}, left={left}, next={position}, largest word "
            f"{int(fields['words'].max())}. Take it from torch.Generator.get_state()."
        )
