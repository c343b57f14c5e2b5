"""The links that the optimizers are chained from, and the checks of what they are given."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.core import Tracer

from regjax._decay import check_coefficient, resolve_mask

if TYPE_CHECKING:
    from collections.abc import Callable

    from jax.typing import ArrayLike
    from jaxtyping import Array, Float, Inexact, PyTree, ScalarLike

    Mask = PyTree[bool] | Callable[[PyTree], PyTree[bool]] | None


def ascend(maximize: bool) -> optax.GradientTransformation:
    return optax.scale(-1.0) if maximize else optax.identity()


def decay_weights(weight_decay: optax.ScalarOrSchedule, mask: Mask) -> optax.GradientTransformation:
    """`optax.add_decayed_weights` whose mask is checked, and is always read off the parameters.

    `optax.masked` asks a callable mask about the gradients at each update, and a tree of the wrong
    structure fails there with no word about where.
    """
    if is_zero(weight_decay):
        return optax.identity()

    def decay(params: PyTree) -> optax.GradientTransformation:
        # Without leaves there is nothing to check: optax.tree.map_params passes a placeholder.
        leafless = not jax.tree.leaves(params)
        resolved = mask if mask is None or leafless else resolve_mask(mask, params)
        return optax.add_decayed_weights(weight_decay, resolved)

    def init(params: PyTree) -> PyTree:
        return decay(params).init(params)

    def update(
        updates: PyTree, state: PyTree, params: PyTree | None = None
    ) -> tuple[PyTree, PyTree]:
        _check_given(params, weight_decay)
        return decay(params).update(updates, state, params)

    return optax.GradientTransformation(init, update)


class Terms(NamedTuple):
    """Two terms of a parameter's step, in the order in which torch adds them."""

    early: Array
    late: Array


def add_in_turn(
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: optax.ScalarOrSchedule,
    mask: Mask,
    two_terms: bool = False,
) -> optax.GradientTransformation:
    """Shrink the parameters, then add the terms of their steps, rounding between as torch does.

    The last link of a chain, behind the learning rate. What reaches it is a term for each
    parameter, or `Terms` with `two_terms`. What leaves it is their sum with the decay, in which all
    but the last term are rounded to the digits of the parameter, and so is `1 - learning_rate *
    weight_decay`: without this a run in float32 is 2e-5 from torch's after a thousand steps.
    """
    decaying = not is_zero(weight_decay)
    if not decaying and not two_terms:
        return optax.identity()
    scheduled = decaying and (callable(learning_rate) or callable(weight_decay))

    def decays(params: PyTree) -> PyTree[bool]:
        return resolve_mask(mask if decaying else False, params)

    def init(params: PyTree) -> PyTree:
        # Without leaves there is nothing to check: optax.tree.map_params passes a placeholder.
        if jax.tree.leaves(params):
            decays(params)
        first = jnp.zeros([], jnp.int32)
        return optax.ScaleByScheduleState(first) if scheduled else optax.EmptyState()

    def share(state: Any) -> ScalarLike:
        rate, decay = (x(state.count) if callable(x) else x for x in (learning_rate, weight_decay))
        return 1 - widest(rate) * widest(decay)

    def update(updates: PyTree, state: Any, params: PyTree | None = None) -> tuple[PyTree, Any]:
        if decaying:
            _check_given(params, weight_decay)
        elif params is None:
            return jax.tree.map(_sum, updates, is_leaf=lambda x: isinstance(x, Terms)), state
        kept = share(state) if decaying else 1.0

        def total(p: Array, is_decaying: bool, step: Array | Terms) -> Array:
            early, late = step if isinstance(step, Terms) else (None, step)
            old = _cast_like(p, late)
            new = rounded_product(old, kept) if is_decaying else old
            new = new if early is None else lax.add(new, early)
            return late if new is old else lax.add(lax.sub(new, old), late)

        if scheduled:
            state = optax.ScaleByScheduleState(optax.safe_increment(state.count))
        return jax.tree.map(total, params, decays(params), updates), state

    return optax.GradientTransformation(init, update)


def _sum(step: Array | Terms) -> Array:
    return lax.add(step.early, step.late) if isinstance(step, Terms) else step


def _check_given(params: PyTree | None, weight_decay: optax.ScalarOrSchedule) -> None:
    if params is None:
        raise ValueError(
            f"params is None, but weight_decay={weight_decay} needs the parameters: call "
            "update(updates, state, params), or pass weight_decay=0.0"
        )


def bias_correction(decay: ScalarLike, count: ArrayLike) -> Float[Array, ""]:
    """Compute `1 - decay**count` without cancellation."""
    if isinstance(decay, int | float):
        # In double: float32(0.999) alone would cost 3e-5 of the logarithm.
        log_decay = math.log(decay) if decay > 0 else -math.inf
    else:
        log_decay = jnp.log(widest(decay))
    return -jnp.expm1(jnp.asarray(count, float) * log_decay)


def rounded_product(x: Inexact[Array, ...], factor: ScalarLike) -> Inexact[Array, ...]:
    """Multiply, and keep the compiler from fusing the product into a sum that it enters.

    XLA on a CPU contracts `a * b + c` into one fused multiply-add, which rounds once where torch's
    kernels round twice. Neither `lax.optimization_barrier` nor `lax.reduce_precision` nor
    `--xla_allow_excess_precision=false` hinders it; an operation between product and sum does. Here
    it is the sum of two halves, which rounds nothing (a half below 1.2e-38, though, is zero to
    XLA). It costs nothing measurable, and XLA does not see through it.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> x = jnp.float32(1 + 2**-12)
        >>> jax.jit(lambda x: rounded_product(x, x) - x)(x) == x * x - x
        Array(True, dtype=bool)
    """
    # Of lax, not of jnp, whose functions take longer to trace: a thousand leaves feel it.
    half = lax.mul(x, in_dtype_of(x, 0.5 * factor))
    return lax.add(half, half)


def rounded_once(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Do the arithmetic on half types in float32, and round updates and state once at the end.

    In bfloat16 itself a momentum of 0.99 is 0.988, which sums up 85 gradients in place of 100.
    """

    def update(
        updates: PyTree, state: PyTree, params: PyTree | None = None
    ) -> tuple[PyTree, PyTree]:
        results = inner.update(*jax.tree.map(_widened, (updates, state, params)))
        return jax.tree.map(_cast_like, results, (updates, state))

    return optax.GradientTransformation(inner.init, update)


def _widened(leaf: Any) -> Any:
    is_half = leaf.dtype.itemsize < 4 and jnp.issubdtype(leaf.dtype, jnp.floating)
    return leaf.astype(jnp.float32) if is_half else leaf


def _cast_like(leaf: Any, like: Any) -> Any:
    # Asked first: over a thousand leaves, casts that do nothing take time to trace.
    return leaf if leaf.dtype == like.dtype else leaf.astype(like.dtype)


def in_dtype_of(x: Inexact[Array, ...], coefficient: ScalarLike) -> Inexact[ArrayLike, ""]:
    """Make a coefficient what functions of lax, which promote nothing, take beside `x`."""
    if isinstance(coefficient, int | float):
        return np.asarray(coefficient, x.dtype)
    return jnp.asarray(coefficient).astype(x.dtype)


def widest(coefficient: ScalarLike) -> ScalarLike:
    """Bring an array into the default float, to meet a step count in it; a number meets any."""
    is_number = isinstance(coefficient, int | float)
    return coefficient if is_number else jnp.asarray(coefficient, float)


def check_rates(
    learning_rate: optax.ScalarOrSchedule, weight_decay: optax.ScalarOrSchedule
) -> None:
    if not callable(learning_rate):
        check_coefficient("learning_rate", learning_rate, fix="to ascend, pass maximize=True")
    if not callable(weight_decay):
        check_coefficient("weight_decay", weight_decay, fix="pass 0.0 for none")


def is_known(*values: Any) -> bool:
    """Tell values that can be compared now from those that are traced."""
    return not any(isinstance(value, Tracer) for value in values)


def is_zero(value: Any) -> bool:
    """Tell a zero known when the chain is made: an array may change, so it counts as non-zero."""
    return isinstance(value, int | float) and value == 0
