"""The links that the optimizers are composed of, and the checks of their arguments."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.core import Tracer

from regjax._decay.validation import resolve_mask
from regjax._random import xla
from regjax.optim._gradients import (
    check_arrays,
    check_given,
    check_gradients,
    check_real,
    fill,
    put_back,
    put_state_back,
    state_without,
    without,
)
from regshared.checks import check_bool, check_coefficient

if TYPE_CHECKING:
    from collections.abc import Callable

    from jax.typing import ArrayLike, DTypeLike
    from jaxtyping import Array, Float, Inexact, PyTree, ScalarLike

    from regjax._decay.validation import Mask

    # OFF is a scalar of NumPy.
    WeightDecay = optax.ScalarOrSchedule | np.floating


# A zero that optax.inject_hyperparams does not inject, because it is neither a float nor an array:
# a hyperparameter that was not passed allocates nothing.
OFF: Any = np.float32(0.0)
_SINGLE = np.dtype("float32")


def chain_links(
    moments: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: WeightDecay = OFF,
    mask: Mask = None,
    maximize: bool = False,
    decoupled: bool = False,
    step: optax.GradientTransformation | None = None,
) -> optax.GradientTransformation:
    """Chain the four links of an optimizer, whose decay precedes its moments or is decoupled.

    `step` replaces the multiplication by the learning rate.
    """
    step = optax.scale_by_learning_rate(learning_rate) if step is None else step
    if check_bool("decoupled_weight_decay", decoupled):
        decay = add_in_turn(learning_rate, weight_decay, mask)
        return named_links(maximize, moments=moments, learning_rate=step, weight_decay=decay)
    decay = decay_weights(weight_decay, mask)
    return named_links(maximize, weight_decay=decay, moments=moments, learning_rate=step)


def named_links(
    maximize: bool, **links: optax.GradientTransformation
) -> optax.GradientTransformation:
    """`optax.named_chain` that begins with the sign of the gradient, with a plain dict as state."""
    # optax returns an OrderedDict, which flax.serialization cannot store, and of which {**state}
    # has another tree structure.
    chained = optax.named_chain(("maximize", ascend(maximize)), *links.items())

    def init(params: PyTree) -> dict[str, PyTree]:
        state: Any = chained.init(params)
        return dict(state)

    def update(updates: PyTree, state: Any, params: PyTree | None = None) -> tuple[PyTree, Any]:
        updates, new_state = chained.update(updates, state, params)
        # optax annotates the state as any pytree.
        return updates, dict(new_state)  # pyright: ignore[reportCallIssue, reportArgumentType]

    return optax.GradientTransformation(init, update)


def ascend(maximize: bool) -> optax.GradientTransformation:
    is_ascent = check_bool("maximize", maximize)
    return optax.scale(-1.0) if is_ascent else optax.identity()


def decay_weights(weight_decay: WeightDecay, mask: Mask) -> optax.GradientTransformation:
    """`optax.add_decayed_weights` with a checked mask, always computed from the parameters."""
    if is_zero(weight_decay):
        return optax.identity()
    check_mask(mask, weight_decay)

    def decay(params: PyTree) -> optax.GradientTransformation:
        # Nothing to check without leaves: optax.tree.map_params passes a placeholder.
        leafless = not jax.tree.leaves(params)
        resolved = mask if mask is None or leafless else resolve_mask(mask, params)
        # optax annotates the rate as a float, and accepts a schedule or an array.
        return optax.add_decayed_weights(weight_decay, resolved)  # pyright: ignore[reportArgumentType]

    def init(params: PyTree) -> PyTree:
        return decay(params).init(params)

    def update(
        updates: PyTree, state: PyTree, params: PyTree | None = None
    ) -> tuple[PyTree, PyTree]:
        _check_params(params, weight_decay)
        updates, _ = decay(params).update(updates, state, params)
        # The state of a schedule is its step count, which Optax 0.2.6 does not advance.
        return updates, jax.tree.map(optax.safe_increment, state)

    return optax.GradientTransformation(init, update)


def check_mask(mask: Mask, weight_decay: WeightDecay) -> None:
    """Reject a static mask without any True, and a single bool under `optax.inject_hyperparams`."""
    leaves = jax.tree.leaves(mask)
    is_static = bool(leaves) and all(isinstance(leaf, bool | np.bool_) for leaf in leaves)
    if not is_static:
        return
    fix = (
        "If mask is a function, name it to optax.inject_hyperparams, which otherwise takes it for "
        "a schedule: static_args=('mask',)."
    )
    if not any(leaves):
        raise ValueError(
            "mask must be True for some parameter, since weight_decay is not 0; got "
            f"{_shortened(mask)}, with which nothing decays. {fix} For no decay, pass "
            "weight_decay=0.0."
        )
    is_injected = isinstance(weight_decay, jax.Array)
    if is_injected and isinstance(mask, bool | np.bool_):
        raise ValueError(
            "mask must be a tree of bools over the parameters, or a function that returns one; "
            f"got {mask}. {fix} To decay all parameters, pass mask=None."
        )


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


class Terms(NamedTuple):
    """Two terms of a parameter's step, in the order in which PyTorch adds them."""

    early: Array
    late: Array


def add_in_turn(
    learning_rate: optax.ScalarOrSchedule, weight_decay: WeightDecay, mask: Mask
) -> optax.GradientTransformation:
    """Shrink the parameters, then add the terms of their steps, rounding between as PyTorch does.

    The last link of a chain, after the learning rate. Its input is one term per parameter, or
    `Terms`; its output is their sum with the decay.
    """
    # All but the last term are rounded to the digits of the parameter, and so is 1 - learning_rate
    # * weight_decay: without this a float32 run is 2e-5 from PyTorch's after a thousand steps.
    decaying = not is_zero(weight_decay)
    if decaying:
        check_mask(mask, weight_decay)
    scheduled = decaying and (callable(learning_rate) or callable(weight_decay))

    def decays(params: PyTree) -> PyTree[bool]:
        return resolve_mask(mask if decaying else False, params)

    def init(params: PyTree) -> PyTree:
        # Nothing to check without leaves: optax.tree.map_params passes a placeholder.
        if jax.tree.leaves(params):
            decays(params)
        first = jnp.zeros([], jnp.int32)
        return optax.ScaleByScheduleState(first) if scheduled else optax.EmptyState()

    def share(state: Any) -> ScalarLike:
        rate, decay = (x(state.count) if callable(x) else x for x in (learning_rate, weight_decay))
        return 1 - widest(rate) * widest(decay)

    def update(updates: PyTree, state: Any, params: PyTree | None = None) -> tuple[PyTree, Any]:
        if decaying:
            _check_params(params, weight_decay)
        elif params is None:
            return jax.tree.map(_sum, updates, is_leaf=lambda x: isinstance(x, Terms)), state
        kept: Any = share(state) if decaying else None

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


def _check_params(params: PyTree | None, weight_decay: WeightDecay) -> None:
    if params is None:
        fix = ", or pass weight_decay=0.0"
        check_given(params, f"weight_decay={weight_decay} needs them", fix)


def bias_correction(decay: ScalarLike, count: ArrayLike) -> Float[Array, ""]:
    """Compute `1 - decay**count` without cancellation."""
    if isinstance(decay, int | float):
        # In double, because float32(0.999) alone would cost 3e-5 of the logarithm.
        log_decay = math.log(decay) if decay > 0 else -math.inf
    else:
        log_decay = jnp.log(widest(decay))
    return -jnp.expm1(jnp.asarray(count, float) * log_decay)


def rounded_product(x: Inexact[Array, "*shape"], factor: ScalarLike) -> Inexact[Array, "*shape"]:
    """Multiply, and round the product before it enters a sum, as PyTorch's kernels do."""
    # lax, because jnp functions take longer to trace, which shows with a thousand leaves.
    return xla.rounded(lax.mul(x, in_dtype_of(x, factor)))


def rounded_once(
    inner: optax.GradientTransformation | Callable[[PyTree], optax.GradientTransformation],
) -> optax.GradientTransformationExtraArgs:
    """Complete a public transformation: check its gradients, and round once at the end.

    `inner` is the transformation, or a function that creates it from the parameters, in their own
    dtypes. Extra arguments, such as `value` for a line search in the same chain, are ignored. A
    parameter whose gradient is None keeps its state, and its update is None.
    """
    # Half types are computed in float32 and rounded to their dtypes at the end: in bfloat16 a
    # momentum of 0.99 is 0.988, which sums up 85 gradients instead of 100.

    def chain(params: PyTree | None) -> optax.GradientTransformation:
        return inner if isinstance(inner, optax.GradientTransformation) else inner(params)

    def init(params: PyTree) -> PyTree:
        params = jax.tree.map(_as_array, params)
        return chain(params).init(params)

    def update(
        updates: PyTree, state: PyTree, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, PyTree]:
        del extra_args
        updates, state, params = jax.tree.map(_as_array, (updates, state, params))
        gaps = check_gradients(updates, state, params)
        if not gaps:
            return rounded(updates, state, params)
        filled, removed = fill(gaps, updates, params)
        new_updates, new_state = rounded(
            without(removed, filled), state_without(removed, state), without(removed, params)
        )
        return (
            put_back(gaps, removed, updates, new_updates),
            put_state_back(gaps, removed, state, new_state),
        )

    def rounded(updates: PyTree, state: PyTree, params: PyTree | None) -> tuple[PyTree, PyTree]:
        results = chain(params).update(*jax.tree.map(_widened, (updates, state, params)))
        return jax.tree.map(_cast_like, results, (updates, state))

    return optax.GradientTransformationExtraArgs(init, update)


def _as_array(leaf: Any) -> Any:
    is_number = isinstance(leaf, int | float | complex | np.ndarray | np.generic)
    return jnp.asarray(leaf) if is_number else leaf


def _widened(leaf: Any) -> Any:
    if not hasattr(leaf, "dtype"):
        return leaf
    is_half = leaf.dtype.itemsize < _SINGLE.itemsize and jnp.issubdtype(leaf.dtype, jnp.floating)
    return leaf.astype(_SINGLE) if is_half else leaf


def _cast_like(leaf: Any, like: Any) -> Any:
    # Over a thousand leaves, casts that do nothing take time to trace.
    return leaf if leaf.dtype == like.dtype else leaf.astype(like.dtype)


def in_dtype_of(x: Inexact[Array, "*shape"], coefficient: ScalarLike) -> Inexact[ArrayLike, ""]:
    """Cast a coefficient to the dtype of `x`, for functions of lax, which promote nothing."""
    if isinstance(coefficient, int | float):
        return np.asarray(coefficient, x.dtype)
    return jnp.asarray(coefficient).astype(x.dtype)


def widest(coefficient: ScalarLike) -> ScalarLike:
    """Cast an array to the default float, to combine with a step count; leave a number as it is."""
    is_number = isinstance(coefficient, int | float)
    return coefficient if is_number else jnp.asarray(coefficient, float)


def zeros_like(params: PyTree, dtype: DTypeLike | None = None) -> PyTree:
    """Return zeros with the shapes and sharding of the parameters, in one dtype if given."""
    if dtype is None:
        check_arrays(params)
    else:
        check_real(params, "moments of a given dtype", "Pass None as the dtype.")
    return optax.tree.zeros_like(params, dtype=dtype and jnp.dtype(dtype))


def promoted(updates: PyTree, moments: PyTree) -> tuple[PyTree, PyTree]:
    """Cast gradients and moments, which may be stored in another dtype, to the wider of the two."""
    pairs = zip(jax.tree.leaves(updates), jax.tree.leaves(moments), strict=True)
    if all(g.dtype == m.dtype for g, m in pairs):
        return updates, moments

    def wider(g: Array, m: Array) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            return jnp.promote_types(g.dtype, m.dtype)

    dtypes = jax.tree.map(wider, updates, moments)
    return jax.tree.map(jnp.astype, updates, dtypes), jax.tree.map(jnp.astype, moments, dtypes)


def cast_like(tree: PyTree, like: PyTree) -> PyTree:
    return jax.tree.map(_cast_like, tree, like)


def check_pair(name: str, value: Any, *, fix: str, length: int = 2) -> None:
    """Reject a value that is not a sequence or an array of `length` numbers."""
    count = {2: "two", 3: "three"}[length]
    if isinstance(value, jax.Array | np.ndarray):
        fits = value.shape == (length,)
    else:
        fits = isinstance(value, tuple | list) and len(value) == length
    if not fits:
        kind = ValueError if isinstance(value, tuple | list | jax.Array | np.ndarray) else TypeError
        raise kind(f"{name} must be {count} numbers; got {value!r}. {fix}")


def check_float_dtype(name: str, dtype: DTypeLike | None) -> None:
    if dtype is not None and not is_dtype_of(jnp.floating, dtype):
        raise TypeError(
            f"{name} must be a float dtype or None; got {dtype!r}. Pass 'bfloat16' or 'float32'."
        )


def is_dtype_of(kind: Any, dtype: Any) -> bool:
    """Return whether a value is a dtype of a kind; False for anything that is not a dtype."""
    try:
        return dtype is not None and jnp.issubdtype(jnp.dtype(dtype), kind)
    except TypeError:
        return False


def check_bounds(
    name: str, value: Any, *, fix: str, low: float = -np.inf, high: float = np.inf
) -> None:
    """Reject a number outside `[low, high]`; a traced one is not checked."""
    if isinstance(value, Tracer):
        return
    is_scalar = isinstance(value, int | float | np.generic) or (
        isinstance(value, jax.Array | np.ndarray) and value.shape == ()
    )
    if not is_scalar or isinstance(value, bool):
        raise TypeError(f"{name} must be a real number; got {value!r}. {fix}")
    if not low <= float(value) <= high:
        raise ValueError(f"{name} must lie in [{low:g}, {high:g}]; got {value}. {fix}")


def check_rates(learning_rate: optax.ScalarOrSchedule, weight_decay: WeightDecay) -> None:
    if not callable(learning_rate):
        check_coefficient("learning_rate", learning_rate, fix="Pass maximize=True to ascend.")
    if not callable(weight_decay):
        check_coefficient("weight_decay", weight_decay, fix="Pass 0.0 for none.")


def is_known(*values: Any) -> bool:
    """Return whether none of the values is traced."""
    return not any(isinstance(value, Tracer) for value in values)


def is_zero(value: Any) -> bool:
    """Return whether the value is a static zero; an array may change, so it counts as nonzero."""
    return isinstance(value, int | float | np.generic) and bool(value == 0)
