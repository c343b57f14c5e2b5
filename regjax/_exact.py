"""Arithmetic that rounds where it is written, whatever a compiler makes of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
from jax import lax

if TYPE_CHECKING:
    from jaxtyping import Array, Float


@jax.custom_jvp
def rounded(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Returns `x`, and keeps a product that `x` is from being joined with a sum that it goes into.

    XLA contracts `a * b + c` to one operation that rounds once, where PyTorch rounds twice, and
    neither `lax.optimization_barrier` nor `lax.reduce_precision` hinders it. An operation between
    the two does. This one is the identity for every value, and so is its derivative.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> x = jnp.float32(1 + 2**-12)
        >>> jax.jit(lambda x: rounded(x * x) - x)(x) == x * x - x
        Array(True, dtype=bool)
    """
    # Below 1 it is x, else the greater one of x and 1. A simpler choice does not do: of a product
    # LLVM may know that it is not NaN, or not negative, but not how large it is.
    one = lax.full_like(x, 1)
    return lax.select(lax.lt(x, one), x, lax.max(x, one))


@rounded.defjvp
def _derivative(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    return rounded(*primals), tangents[0]
