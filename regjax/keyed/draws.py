"""Dropout whose mask also covers the axes that `jax.vmap` maps, and the key of each draw."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

from regjax._dropout.core import (
    apply_dropout,
    check_inexact,
    guard_rate,
    inverse_keep_prob,
    keep_prob_of,
    real_dtype,
    where_kept,
)
from regjax._random.bernoulli import EXACT
from regjax._random.keys import site_key

if TYPE_CHECKING:
    from jax.typing import ArrayLike
    from jaxtyping import Array, Bool, Float, Inexact

    from regjax._random.keys import KeyLike


class Keys:
    """The keys of a bound model, and the number of calls of each site."""

    def __init__(self, root: KeyLike, step: ArrayLike) -> None:
        site_key(root, step, "")  # check the arguments
        self._root, self._step = root, step
        self._calls: dict[str, int] = {}

    def draw(self, name: str) -> KeyLike:
        """Return the key of the next call of a site."""
        count = self._calls.get(name, 0)
        self._calls[name] = count + 1
        return nth_key(self._root, self._step, name, count)


def nth_key(root: KeyLike, step: ArrayLike, name: str, count: int) -> KeyLike:
    """Return the key of call `count` of a site, counted from 0."""
    return site_key(root, step, f"{name}#{count}" if count else name)


def drop(
    x: Inexact[ArrayLike, "*shape"],
    rate: ArrayLike,
    key: KeyLike,
    deterministic: ArrayLike = False,
    broadcast_dims: Sequence[int] = (),
) -> Inexact[Array, "*shape"]:
    """Apply `regjax.dropout`; under `vmap` the mask is that of the whole batch, batch first."""
    x = check_inexact(x)
    dims = tuple(sorted(dim % x.ndim for dim in broadcast_dims))
    return apply_dropout(_BatchMask(dims), x, rate, key, deterministic)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _BatchMask:
    """The mask of `regjax.dropout`, in the shape of the array before `vmap` mapped it."""

    dims: tuple[int, ...]
    name: str = "dropout"

    @guard_rate
    def __call__(
        self, x: Inexact[Array, "*shape"], key: KeyLike, rate: float | Float[Array, ""]
    ) -> tuple[Inexact[Array, "*shape"], Bool[Array, "*mask"]]:
        keep_prob = keep_prob_of(rate, x.dtype)
        keep = _mask(self.dims, key, keep_prob, lax.stop_gradient(x))
        realized: Any = EXACT.realized_keep_prob(keep_prob)
        if isinstance(realized, jax.Array):
            realized = realized.astype(real_dtype(x.dtype))
        return where_kept(keep, x, inverse_keep_prob(realized, x.dtype)), keep


def _mask(
    dims: tuple[int, ...], key: KeyLike, keep_prob: Any, x: Inexact[Array, "*shape"]
) -> Bool[Array, "*mask"]:
    is_number = isinstance(keep_prob, float)

    @custom_vmap
    def draw(key: KeyLike, probability: Any, x: Any) -> Any:
        shape = tuple(1 if dim in dims else size for dim, size in enumerate(x.shape))
        return EXACT.draw(key, keep_prob if is_number else probability, shape, None)

    @draw.def_vmap
    def _(size: int, is_mapped: Any, key: KeyLike, probability: Any, x: Any) -> tuple[Any, bool]:
        key_mapped, probability_mapped, x_mapped = is_mapped
        given = keep_prob if is_number else probability
        if key_mapped or probability_mapped:
            axes = (0 if key_mapped else None, 0 if probability_mapped else None)

            def row(key: KeyLike, probability: Any, x: Any) -> Any:
                return _mask(dims, key, keep_prob if is_number else probability, x)

            return jax.vmap(row, (*axes, 0 if x_mapped else None))(key, probability, x), True
        if x_mapped:
            return _mask(tuple(dim + 1 for dim in dims), key, given, x), True
        return _mask(dims, key, given, x), False

    probability = jnp.zeros(()) if is_number else keep_prob
    return draw(key, probability, x)
