"""Masks by the number of the example: a part of a batch has the masks of the whole batch."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from regjax._random.bernoulli import MaskSampler, Sampler, bernoulli
from regjax._random.packed import PackedSampler, mask_sampler
from regjax._random.threefry import Places, spec_of, with_spec
from regshared.checks import check_integer, describe
from regshared.examples import check_attention_axis, check_reach, check_rows

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Integer

    from regjax._random.keys import KeyLike
    from regjax._random.threefry import Layout


_INDEX_BITS = {False: 64, True: 60}  # with and without a `PackedSampler`


def by_example(
    examples: Integer[Array | np.ndarray, "*examples"] | Sequence[int] | int,
    sampler: Sampler = bernoulli,
    *,
    axis: int = 0,
) -> ExampleSampler:
    """Return a sampler that draws the mask of each example from its number in the data.

    Pass it as `sampler`. An example then has the mask that it has in a batch of all examples,

        dropout(batch, rate, key=key)[examples]

    bit for bit, however the batch is split into micro-batches, shards or pipeline stages, shuffled
    or padded, with the **same key** in each part: fold in neither the number of the micro-batch nor
    that of the device.

    The mask of example i begins at the row-major index `i * size`, where `size` is the number of
    elements of one example; so the number of examples does not matter. `i * size` must be below
    2**64, or 2**60 with `packed_bernoulli`.

    Args:
        examples: The numbers of the examples in `x` along `axis`, as integers of at least 0 of
            shape (n,); or one number, for `x` without such an axis, as under `jax.vmap`. May be
            traced, and sharded. NumPy integers may exceed 32 bits without `jax_enable_x64`.
        sampler: The sampler of the whole batch. `packed_bernoulli` chooses the axis that packs from
            the shape of one example, and equals `dropout(batch, ...)[examples]` where the shape of
            the batch leads to the same axis. Any other function draws each example separately, with
            the key `jax.random.fold_in(key, i)` for an example i below 2**32.
        axis: The dimension of the examples in `x`. If it is not the first, the mask is that of `x`
            with this dimension moved to the front.

    Returns:
        A function like `bernoulli`, and a pytree whose leaves are the numbers: new numbers of the
        same shape and dtype cause no compilation. `dropout` stores them, and the key, for the
        backward pass.

    Raises:
        TypeError: `examples` are not integers, or `sampler` is not a function.
        ValueError: `examples` has more than one dimension, or a concrete example is negative;
            `sampler` is itself by example. On use: the length of `examples` is not that of `x`
            along `axis`, a concrete example is above the limit, or the function shares one mask
            along that dimension.

    Note (PyTorch):
        `regtorch.by_example` draws the same masks.

    Example:
        >>> import jax, jax.numpy as jnp, regjax
        >>> key, x = jax.random.key(0), jnp.ones((6, 4))
        >>> whole = regjax.dropout(x, 0.5, key=key)
        >>> rows = jnp.array([4, 1])
        >>> y = regjax.dropout(x[rows], 0.5, key=key, sampler=regjax.by_example(rows))
        >>> bool((y == whole[rows]).all())
        True
    """
    inner = mask_sampler(sampler)
    if isinstance(inner, ExampleSampler):
        raise ValueError(f"sampler must not be by_example itself; got {sampler!r}.")
    return ExampleSampler(inner, _check_examples(examples), check_integer("axis", axis))


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["examples"], meta_fields=["function", "axis"]
)
@dataclasses.dataclass(frozen=True, repr=False)
class ExampleSampler(MaskSampler):
    """The sampler that `by_example` returns.

    Attributes:
        function: The sampler of the whole batch.
        examples: The words of the examples, of shape (n,), or () for a single one.
        axis: The dimension of the examples.
    """

    function: MaskSampler
    examples: Places
    axis: int

    def __repr__(self) -> str:
        return f"by_example({describe(self.examples.low)}, axis={self.axis})"

    @property
    def draws_parts(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.function.draws_parts

    @property
    def numbers(self) -> Places:
        return self.examples

    @property
    def is_single(self) -> bool:
        """Whether `x` is one example, without a dimension for examples."""
        return not self.examples.low.ndim

    def draw(
        self,
        key: KeyLike,
        keep_prob: float | Float[Array, ""],
        shape: tuple[int, ...],
        out_sharding: Layout,
    ) -> Bool[Array, "*shape"]:
        return self.draw_part(key, keep_prob, shape, (None,) * len(shape), out_sharding)

    def draw_part(
        self,
        key: KeyLike,
        keep_prob: float | Float[Array, ""],
        whole: tuple[Any, ...],
        part: Any,
        out_sharding: Layout,
    ) -> Bool[Array, "*_part"]:
        """Draw part of a mask of shape `whole`, which is whole along the axis of the examples."""
        spec = spec_of(out_sharding, len(whole))
        if self.is_single:
            high, low = self.examples
            places = Places(None if high is None else high[None], low[None])
            layout = with_spec(out_sharding, (None, *spec))
            mask = self.function.draw_part(key, keep_prob, (None, *whole), (places, *part), layout)
            return jnp.squeeze(mask, 0)
        self.check_fit(tuple(whole), ())
        axis = self.axis % len(whole)

        def front(entries: Sequence[Any], first: Any) -> tuple[Any, ...]:
            return (first, *entries[:axis], *entries[axis + 1 :])

        layout = with_spec(out_sharding, front(spec, spec[axis]))
        mask = self.function.draw_part(
            key, keep_prob, front(whole, None), front(part, self.examples), layout
        )
        return jnp.moveaxis(mask, 0, axis)

    def realized_keep_prob(self, keep_prob: float | Float[Array, ""]) -> float | Float[Array, ""]:
        return self.function.realized_keep_prob(keep_prob)

    def check_fit(self, shape: tuple[int, ...], shared: tuple[int, ...]) -> None:
        """Raise a ValueError if there is not one example for each row of x, below the limit."""
        if not self.is_single:
            check_rows(self.axis, self.examples.low.shape[0], shape, shared)
            shared = (*shared, self.axis)
        if self.draws_parts and (highest := _highest(self.examples)):
            check_reach(
                highest, shape, shared, _INDEX_BITS[isinstance(self.function, PackedSampler)]
            )


def check_batch_axis(sampler: MaskSampler, ndim: int) -> None:
    """Reject examples along another than the first `ndim` dimensions of attention."""
    if isinstance(sampler, ExampleSampler) and not sampler.is_single:
        check_attention_axis(sampler.axis, ndim)


def check_one_mask(sampler: MaskSampler) -> MaskSampler:
    """Return a sampler that draws one mask for all rows of x."""
    if isinstance(sampler, ExampleSampler) and not sampler.is_single:
        raise ValueError(
            "sampler must draw one mask for all rows of x; got by_example with examples of shape "
            f"{sampler.examples.low.shape}. Map over single examples with jax.vmap."
        )
    return sampler


def _highest(examples: Places) -> int:
    """Return the highest example if it is known and may be above the limit, and otherwise 0."""
    high, low = examples
    if high is None or isinstance(high, Tracer) or not high.is_fully_addressable or not high.size:
        return 0
    words = np.asarray(high).astype(np.uint64) << 32 | np.asarray(low)
    return int(words.max())


def _check_examples(examples: Any) -> Places:
    # NumPy's integers are read before JAX rounds them to 32 bits.
    is_host = not isinstance(examples, jax.Array | Tracer)
    array: Any = _as_numpy(examples) if is_host else examples
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"examples must be integers; got dtype {array.dtype}.")
    if array.ndim > 1:
        raise ValueError(
            f"examples must be one number for each row, of shape (n,); got shape {array.shape}."
        )
    can_be_read = not isinstance(array, Tracer) and (is_host or array.is_fully_addressable)
    # JAX's minimum would be traced inside a trace; NumPy's is not.
    if can_be_read and array.size and (lowest := np.asarray(array).min()) < 0:
        raise ValueError(
            f"examples must not be negative; got {lowest}. Count them from the start of the data."
        )
    high = jnp.asarray((array >> 32).astype(np.uint32)) if array.dtype.itemsize == 8 else None
    return Places(high, jnp.asarray(array.astype(np.uint32)))


def _as_numpy(examples: Any) -> np.ndarray:
    try:
        array = None if examples is None else np.asarray(examples)
    except (TypeError, ValueError):
        array = None
    if array is None or array.dtype == object:
        raise TypeError(f"examples must be an array of integers; got {describe(examples)}.")
    return array if array.size else array.astype(np.int64)
