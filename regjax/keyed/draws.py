"""Dropout whose mask also covers the axes that `jax.vmap` maps."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

from regjax._dropout.attention import attend, dot_product_attention
from regjax._dropout.core import (
    apply_dropout,
    check_inexact,
    guard_rate,
    inverse_keep_prob,
    keep_prob_of,
    mask_sharding,
    real_dtype,
    where_kept,
)
from regjax._layers import wrapped_dims
from regjax._random.bernoulli import EXACT

if TYPE_CHECKING:
    from jax.typing import ArrayLike
    from jaxtyping import Array, Bool, Float, Inexact

    from regjax._random.keys import KeyLike


def drop(
    x: Inexact[ArrayLike, "*shape"],
    rate: ArrayLike,
    draw_key: Callable[[], KeyLike],
    deterministic: ArrayLike,
    broadcast_dims: Sequence[int] = (),
) -> Any:
    """Apply `regjax.dropout`; under `vmap` the mask is that of the whole batch, batch first.

    No key is drawn in evaluation or at rate 0.
    """
    if deterministic is True or (isinstance(rate, int | float) and rate == 0):
        return x
    x = check_inexact(x)
    dims = wrapped_dims(broadcast_dims, x.ndim)
    return apply_dropout(BatchMask(dims), x, rate, draw_key(), deterministic)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class BatchMask:
    """The mask of `regjax.dropout`, in the shape of the array before `vmap` mapped it."""

    dims: tuple[int, ...]
    name: str = "dropout"

    @guard_rate
    def __call__(
        self, x: Inexact[Array, "*shape"], key: KeyLike, rate: float | Float[Array, ""]
    ) -> tuple[Inexact[Array, "*shape"], Bool[Array, "*mask"]]:
        """Draw the mask and scale."""
        keep_prob = keep_prob_of(rate, x.dtype)
        keep = keep_of_batch(x, key, keep_prob, self.dims)
        realized: Any = EXACT.realized_keep_prob(keep_prob)
        if isinstance(realized, jax.Array):
            realized = realized.astype(real_dtype(x.dtype))
        return where_kept(keep, x, inverse_keep_prob(realized, x.dtype)), keep


def keep_of_batch(
    x: Inexact[Array, "*shape"],
    key: KeyLike,
    keep_prob: float | Float[Array, ""],
    dims: tuple[int, ...] = (),
) -> Bool[Array, "*mask"]:
    """Return a mask of size 1 along `dims`; under `vmap`, a part of that of the whole batch."""
    number = keep_prob if isinstance(keep_prob, float) else None
    probability = jnp.zeros(()) if number is not None else keep_prob
    return _mapped(_Whole(dims, number))(key, probability, lax.stop_gradient(x))


@functools.wraps(dot_product_attention)  # Linen reads the names of the arguments
def attention(*args: Any, broadcast_dropout: bool = True, **options: Any) -> Any:
    """Compute attention; under `vmap`, the mask is that of the whole batch unless it is shared."""
    if broadcast_dropout:
        return dot_product_attention(*args, broadcast_dropout=True, **options)
    return attend(lambda _, dims: BatchMask(dims, "dot_product_attention"), *args, **options)


def without_vmap(key: KeyLike, inputs: Any, layer: str) -> KeyLike:
    """Return the key of a layer whose mask cannot be that of the whole batch.

    Raises:
        ValueError: Under `vmap` of the inputs, later, unless it maps the key, too.
    """

    @custom_vmap
    def same(key: Any, inputs: Any) -> Any:
        del inputs
        return key

    @same.def_vmap
    def _(size: int, is_mapped: Any, key: Any, inputs: Any) -> tuple[Any, bool]:
        del size
        if not is_mapped[0] and any(jax.tree.leaves(is_mapped[1])):
            raise ValueError(
                f"inputs of {layer} must be the whole batch in a bound model; got a row of "
                "jax.vmap, and all rows would share a mask. Call the model with the batch."
            )
        return same(key, inputs), is_mapped[0]

    return same(key, jax.tree.map(lax.stop_gradient, inputs))


@runtime_checkable
class _Draw(Protocol):
    """A function of a key, a keep probability and an array that draws the mask of the array."""

    def __call__(self, key: Any, keep_prob: Any, x: Any) -> Any: ...

    def batched(self) -> _Draw:
        """Return the function for arrays with another axis in front, and the same key."""
        ...


@dataclasses.dataclass(frozen=True)
class _Whole:
    """One mask, of size 1 along `dims`; a concrete probability is that of the class."""

    dims: tuple[int, ...]
    number: float | None

    def __call__(self, key: Any, keep_prob: Any, x: Any) -> Any:
        shape = tuple(1 if dim in self.dims else size for dim, size in enumerate(x.shape))
        given = keep_prob if self.number is None else self.number
        return EXACT.draw(key, given, shape, mask_sharding(x, self.dims))

    def batched(self) -> _Whole:
        return _Whole(tuple(dim + 1 for dim in self.dims), self.number)


@dataclasses.dataclass(frozen=True)
class _Rows:
    """A mask for each of several keys or probabilities, along axis `out` of the result."""

    draw: _Draw
    axes: tuple[int | None, int | None, int | None]
    out: int = 0

    def __call__(self, key: Any, keep_prob: Any, x: Any) -> Any:
        return jax.vmap(self.draw, self.axes, self.out)(key, keep_prob, x)

    def batched(self) -> _Rows:
        key, keep_prob, x = self.axes
        axes = key, keep_prob, None if x is None else x + 1
        return _Rows(self.draw.batched(), axes, self.out + 1)


def _mapped(draw: _Draw) -> Callable[..., Any]:
    """Return the function with the rule that an axis mapped by `vmap` belongs to the mask."""
    mapped = custom_vmap(draw)

    @mapped.def_vmap
    def _(size: int, is_mapped: Any, *args: Any) -> tuple[Any, bool]:
        del size
        key, keep_prob, x = is_mapped
        if key or keep_prob:
            axes: Any = tuple(0 if is_axis else None for is_axis in is_mapped)
            return _mapped(_Rows(draw, axes))(*args), True
        return _mapped(draw.batched() if x else draw)(*args), x

    return mapped
