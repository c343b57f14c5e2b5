"""Packed dropout as a Pallas kernel for NVIDIA GPUs, compiled by Triton.

A thread draws a word, and applies it to the 32 elements that share it: the word stays in a
register. XLA draws words in one kernel and applies them in another, because its loops compute one
element at a time. The result is the same, bit for bit.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from regjax._compat import make_user_context, type_like, vary_together
from regjax._dropout.kernels import check_mesh, require_platform
from regjax._random.events import observer
from regjax._random.keys import consume, key_words
from regjax._random.packed import LANES, PackedSampler, bits_of, compare_words, packed_axis

if TYPE_CHECKING:
    from jaxtyping import Array, Inexact

    from regjax._random.bernoulli import MaskSampler
    from regjax._random.keys import KeyLike

_DTYPES = ("float32", "bfloat16", "float16")
_LARGEST = 2**31  # Triton counts the elements of an array in 32 bits
# One column for each thread: with several, Triton moves every mask between threads.
_WARPS = 4
_COLUMNS = 32 * _WARPS
_UNROLLED = 8  # loads in flight; more would take the interpreter long to compile
_CHOSEN = "with implementation='triton'"
_WAY_OUT = "Omit implementation, or pass implementation='xla'."

# Whether the kernel runs in Pallas's interpreter, as in tests.
interpreted = make_user_context(default=False)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class TritonDropout:
    """Dropout in a kernel, a `DropoutSpec`; the mask is never stored."""

    sampler: PackedSampler
    name: str = "dropout"

    def __call__(
        self, x: Inexact[Array, "*shape"], key: KeyLike, rate: Any
    ) -> tuple[Inexact[Array, "*shape"], Any]:
        """Draw the mask and scale."""
        # Rounded as in the XLA form, whose numbers of these dtypes are float32.
        keep_prob = float(np.float32(1 - rate))
        scale = np.float32(1) / np.float32(self.sampler.realized_keep_prob(keep_prob))
        threshold = int(self.sampler.threshold(keep_prob))
        consume(key)
        operands = jnp.stack(key_words(key)), jnp.full(1, scale, np.float32), x
        kernel = _Kernel(threshold, self.sampler.bits, interpreted.value)
        return _drop(kernel, *vary_together(operands)), None


def kernel_dropout(
    x: Inexact[Array, "*shape"], rate: Any, dims: tuple[int, ...], sampler: MaskSampler
) -> TritonDropout:
    """Return dropout in a kernel.

    Raises:
        TypeError, ValueError: The kernel does not support an argument, which the error names.
    """
    if not isinstance(sampler, PackedSampler):
        raise ValueError(
            f"sampler must be packed_bernoulli {_CHOSEN}; got {sampler.function}. {_WAY_OUT}"
        )
    if dims:
        raise ValueError(f"broadcast_dims must be empty {_CHOSEN}; got {dims}. {_WAY_OUT}")
    if str(x.dtype) not in _DTYPES:
        raise TypeError(f"x must be {', '.join(_DTYPES)} {_CHOSEN}; got {x.dtype}. {_WAY_OUT}")
    if packed_axis(x.shape) is None or x.size >= _LARGEST:
        raise ValueError(
            "x must have from 4,096 to 2**31 - 1 elements, and an axis before the last whose "
            f"length is a multiple of 32, {_CHOSEN}; got shape {x.shape}. {_WAY_OUT}"
        )
    if isinstance(rate, jax.Array):
        raise TypeError(f"rate must be a number {_CHOSEN}; got an array, {rate}. {_WAY_OUT}")
    if observer():
        raise ValueError(
            "implementation must be 'xla' while masks are observed: the kernel never stores one; "
            f"got 'triton'. {_WAY_OUT}"
        )
    check_mesh("triton")
    if any(jax.typeof(x).sharding.spec):
        raise ValueError(
            f"x must not be sharded {_CHOSEN}; got {jax.typeof(x)}. Omit implementation, or call "
            "dropout with sampler=by_example inside jax.shard_map."
        )
    return TritonDropout(sampler)


class _Kernel(NamedTuple):
    """The static part of a call: `threshold` of the integers of `bits` bits keep an element."""

    threshold: int
    bits: int
    interpret: bool

    def __call__(self, inner: int, words: Any, scale: Any, x: Any, y: Any) -> None:
        """Draw a word for each column, and apply it to the 32 rows."""
        count = -(-inner // _COLUMNS)
        program = pl.program_id(0)
        row, first = lax.div(program, count), lax.rem(program, count) * _COLUMNS
        column = lax.broadcasted_iota(np.int32, (1, _COLUMNS), 1) + first
        index = (row * inner + column).astype(np.uint32)
        bits_of_t, everything = bits_of(self.threshold, self.bits)
        counter = jnp.zeros_like(index), index
        drawn = compare_words((words[0], words[1]), counter, bits_of_t, everything)
        inside = column < inner if inner % _COLUMNS else None
        factor = scale[0]

        def apply(group: Any, drawn: Any) -> Any:
            for i in range(_UNROLLED):
                at = pl.ds(group * _UNROLLED + i, 1), slice(None)
                value = plgpu.load(x.at[at], mask=inside)
                scaled = (value.astype(np.float32) * factor).astype(value.dtype)
                is_kept = (drawn >> np.uint32(i)) & np.uint32(1) != 0
                kept = jnp.where(is_kept, scaled, jnp.zeros_like(scaled))
                plgpu.store(y.at[at], kept, mask=inside)
            return drawn >> np.uint32(_UNROLLED)

        lax.fori_loop(0, LANES // _UNROLLED, apply, drawn)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _drop(kernel: _Kernel, words: Array, scale: Array, x: Array) -> Array:
    """Return the kept elements, scaled, and zeros elsewhere.

    Args:
        kernel: The static part.
        words: The two words of the key.
        scale: The factor of kept elements, of shape (1,).
        x: The array.
    """
    x = x if kernel.interpret else require_platform("triton", x)
    axis = packed_axis(x.shape)
    assert axis is not None
    inner = math.prod(x.shape[axis + 1 :])
    split = jnp.reshape(x, (-1, LANES, inner))
    count = -(-inner // _COLUMNS)
    tile = pl.BlockSpec(
        (None, LANES, _COLUMNS), lambda i: (lax.div(i, count), 0, lax.rem(i, count))
    )
    y = pl.pallas_call(
        functools.partial(kernel, inner),
        grid=(split.shape[0] * count,),
        in_specs=[pl.BlockSpec((n,), lambda i: (0,)) for n in (2, 1)] + [tile],
        out_specs=tile,
        out_shape=type_like(split.shape, split.dtype, split),
        compiler_params=plgpu.CompilerParams(num_warps=_WARPS),
        interpret=kernel.interpret,
        name="regjax_packed_dropout",
    )(words, scale, split)
    return jnp.reshape(y, x.shape)


def _save(kernel: _Kernel, words: Array, scale: Array, x: Array) -> tuple[Array, Any]:
    return _drop(kernel, words, scale, x), (words, scale)


def _pull_back(kernel: _Kernel, saved: Any, cotangent: Array) -> tuple[None, None, Array]:
    return None, None, _drop(kernel, *saved, cotangent)


_drop.defvjp(_save, _pull_back)
