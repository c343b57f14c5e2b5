"""Gradient descent: SGD, averaged SGD, and Rprop.

The three stay in one file, because pickled states name the module of their classes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from regjax.optim._gradients import SPLIT, check_given, check_real
from regjax.optim._links import (
    OFF,
    chain_links,
    check_bounds,
    check_float_dtype,
    check_pair,
    check_rates,
    decay_weights,
    in_dtype_of,
    is_known,
    is_zero,
    named_links,
    promoted,
    rounded_once,
    rounded_product,
    widest,
    zeros_like,
)
from regshared.checks import check_bool, check_coefficient
from regshared.spellings import explain_names

if TYPE_CHECKING:
    from jax.typing import DTypeLike
    from jaxtyping import Array, Float, Int, PyTree, ScalarLike

    from regjax.optim._links import Mask, WeightDecay


@explain_names
def sgd(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    momentum: ScalarLike = OFF,
    dampening: ScalarLike = OFF,
    weight_decay: WeightDecay = OFF,
    nesterov: bool = False,
    *,
    maximize: bool = False,
    mask: Mask = None,
    accumulator_dtype: DTypeLike | None = None,
) -> optax.GradientTransformation:
    r"""Create the equivalent of `torch.optim.SGD`: momentum and coupled weight decay.

    $$g_t = \pm\nabla f(w_{t-1}) + \lambda w_{t-1}, \qquad
      b_1 = g_1,\; b_t = \mu b_{t-1} + (1 - \tau) g_t, \qquad
      w_t = w_{t-1} - \eta_t \begin{cases} g_t + \mu b_t & \text{nesterov} \\ b_t & \text{else}
      \end{cases}$$

    Coupled decay enters the gradient, so `weight_decay=2 * c` equals the penalty
    `regjax.l2_penalty(params, c)` in the loss at every step.

    Args:
        learning_rate: $\eta$ (PyTorch: `lr`), or a schedule from the step count, starting at 0.
        momentum: $\mu$. With 0.0 no buffer is kept and `dampening` has no effect. An array may
            change, so it always has a buffer; `optax.inject_hyperparams` makes an array of every
            number that is passed, even 0.0, but not of the default.
        dampening: $\tau$. As in PyTorch, the first gradient enters the buffer undamped.
        weight_decay: $\lambda$ or a schedule. With 0.0, `update` does not need `params`.
        nesterov: Look ahead along the buffer; requires momentum and no dampening.
        maximize: Ascend. The decay still shrinks the parameters.
        mask: The parameters that decay; see `adam`.
        accumulator_dtype: The dtype in which $b$ is stored, as in `optax.sgd`; `None` for that of
            the parameters. A step rounds $b$ at its end and uses it unrounded.

    Returns:
        An optax transformation; `state["moments"]` is an `optax.TraceState`, which holds $b$. With
        dampening, it is a pair that begins with `optax.ScaleByScheduleState` (the step count).

    Raises:
        TypeError: An argument is not a number, or a flag or a leaf of the mask is not a bool.
        ValueError: A coefficient is negative, infinite or NaN; `nesterov` without momentum or with
            dampening; from `init`, the mask has another structure than the parameters; from
            `update`, `params` is missing although they decay.

    Note (PyTorch):
        Bitwise identical in float32 on a CPU at every step, where `update` and
        `optax.apply_updates` are compiled together; compiled separately, each product is rounded
        before it is added, and the two agree up to rounding. They also agree up to rounding where
        only one framework has fused multiply-adds, as under `ATEN_CPU_CAPABILITY=default`, and
        below 1.2e-38, which XLA flushes to zero. `optax.trace` is replaced here, because when
        compiled it adds the gradient to an unrounded product.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> params = {"kernel": jnp.array([1.0, -2.0]), "bias": jnp.array([3.0])}
        >>> optimizer = sgd(0.1, weight_decay=0.5, mask={"kernel": True, "bias": False})
        >>> gradient = {"kernel": jnp.array([1.0, 1.0]), "bias": jnp.array([1.0])}
        >>> updates, state = optimizer.update(gradient, optimizer.init(params), params)
        >>> optax.apply_updates(params, updates)
        {'bias': Array([2.9], dtype=float32), 'kernel': Array([ 0.85, -2.  ], dtype=float32)}

    References:
        Sutskever et al., [On the importance of initialization and momentum in deep
        learning](https://proceedings.mlr.press/v28/sutskever13.html), ICML 2013.
    """
    check_rates(learning_rate, weight_decay)
    check_coefficient("momentum", momentum, fix="Pass 0.0 for none.")
    check_bounds("dampening", dampening, low=-1e30, high=1e30, fix="Pass 0.0 for none.")
    check_bool("nesterov", nesterov)
    check_float_dtype("accumulator_dtype", accumulator_dtype)
    damped = is_known(dampening) and dampening != 0
    if nesterov and (is_zero(momentum) or damped):
        raise ValueError(
            "nesterov must be False without momentum or with dampening; got True, momentum="
            f"{momentum} and dampening={dampening}. Pass momentum=0.9, or leave nesterov out."
        )
    moments = _accumulate(momentum, dampening, nesterov, accumulator_dtype)
    return rounded_once(chain_links(moments, learning_rate, weight_decay, mask, maximize=maximize))


class DescendState(NamedTuple):
    """The number of steps that `asgd` has taken, and the size of the next one."""

    count: Int[Array, ""]  # pyright: ignore[reportIncompatibleMethodOverride]  # not tuple.count
    eta: Float[Array, ""]


class AverageState(NamedTuple):
    """The number of steps taken, and the average of the parameters (PyTorch: `ax`)."""

    count: Int[Array, ""]  # pyright: ignore[reportIncompatibleMethodOverride]  # not tuple.count
    ax: PyTree


class RpropState(NamedTuple):
    """The previous gradient (0 where its sign changed) and the step size of each element."""

    prev: PyTree
    step_size: PyTree


@explain_names
def asgd(
    learning_rate: optax.ScalarOrSchedule = 1e-2,
    lambd: ScalarLike = 1e-4,
    alpha: ScalarLike = 0.75,
    t0: ScalarLike = 1e6,
    weight_decay: WeightDecay = OFF,
    *,
    maximize: bool = False,
    mask: Mask = None,
) -> optax.GradientTransformation:
    r"""Create the equivalent of `torch.optim.ASGD`: gradient descent with averaged parameters.

    $$w_t = (1 - \eta_t \Lambda)\, w_{t-1} - \eta_t (\pm\nabla f(w_{t-1}) + \lambda w_{t-1}), \qquad
      \bar w_t = \bar w_{t-1} + \mu_t (w_t - \bar w_{t-1}),$$
    $$\eta_1 = \eta,\quad \eta_{t+1} = \frac{\eta}{(1 + \Lambda \eta t)^\alpha}, \qquad
      \mu_t = \frac{1}{\max(1,\, t - 1 - t_0)}$$

    Evaluate with the average after more than `t0 + 1` steps; until then it is the last parameters.
    Read it from the state: `state["moments"].ax` or `optax.tree.get(state, "ax")`.

    Args:
        learning_rate: $\eta$ (PyTorch: `lr`), or a schedule from the step count, starting at 0. As
            in PyTorch, its value at a step applies to the step after; the first is used twice.
        lambd: $\Lambda$, a decay of all parameters, without a mask; it also shrinks the steps.
        alpha: $\alpha$, the power with which the steps shrink.
        t0: $t_0$, the step after which averaging starts.
        weight_decay: $\lambda$ or a schedule: coupled, as in `sgd`.
        maximize: Ascend. Both decays still shrink the parameters.
        mask: The parameters that `weight_decay` applies to; see `adam`.

    Returns:
        An optax transformation whose `update` needs `params`. `state["learning_rate"].eta` is
        $\eta_t$, `state["moments"].ax` the average. Errors are those of `sgd`.

    Note (PyTorch):
        Equal up to rounding. As in PyTorch, $\eta_t$ and $\mu_t$ are rounded to float32, even for
        float64 parameters. optax has no such optimizer; `optax.add_decayed_weights` followed by a
        schedule would be equivalent except in float32, where PyTorch and this function shrink by
        the rounded number $1 - \eta_t \Lambda$, 1 % off at the defaults.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> params = jnp.array([1.0, -2.0])
        >>> optimizer = asgd(0.5, t0=0)
        >>> state = optimizer.init(params)
        >>> for _ in range(3):
        ...     updates, state = optimizer.update(jnp.array([0.0, -1.0]), state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> print(params.round(2), state["moments"].ax.round(2))
        [ 1.  -0.5] [ 1.   -0.75]

    References:
        Polyak and Juditsky, [Acceleration of Stochastic Approximation by
        Averaging](https://doi.org/10.1137/0330046), SIAM J. Control Optim. 30(4), 1992. Bottou,
        [Stochastic Gradient Descent Tricks](https://doi.org/10.1007/978-3-642-35289-8_25), 2012.
    """
    check_rates(learning_rate, weight_decay)
    check_coefficient("lambd", lambd, fix="Pass 0.0 for none.")
    check_coefficient("alpha", alpha, fix="Pass 0.0 for steps of one size.")
    check_coefficient("t0", t0, fix="Pass 0 to average from the first step on.")
    return rounded_once(
        named_links(
            maximize,
            weight_decay=decay_weights(weight_decay, mask),
            learning_rate=_descend_and_shrink(learning_rate, lambd, alpha),
            moments=_average(t0),
        )
    )


@explain_names
def rprop(
    learning_rate: ScalarLike = 1e-2,
    etas: tuple[ScalarLike, ScalarLike] = (0.5, 1.2),
    step_sizes: tuple[ScalarLike, ScalarLike] = (1e-6, 50.0),
    *,
    maximize: bool = False,
) -> optax.GradientTransformation:
    r"""Create the equivalent of `torch.optim.Rprop`: descent by signs, for full batches.

    $$s_t = \operatorname{clip}\bigl(s_{t-1} \cdot \begin{cases}
          \eta_+ & g_{t-1} g_t > 0 \\ \eta_- & g_{t-1} g_t < 0 \\ 1 & \text{else}
        \end{cases},\; s_{\min}, s_{\max}\bigr), \qquad
      g_t \leftarrow 0 \text{ where } g_{t-1} g_t < 0, \qquad
      w_t = w_{t-1} - s_t \operatorname{sign}(g_t)$$

    The size of a gradient does not matter, so no weight decay can be coupled to it; like PyTorch,
    this function has none. A penalty in the loss only moves the points where signs change.

    Args:
        learning_rate: $s_0$, the first step size (PyTorch: `lr`). It cannot be a schedule.
        etas: $\eta_-, \eta_+$, the factors of a step size; $0 < \eta_- < 1 < \eta_+$.
        step_sizes: $s_{\min}, s_{\max}$.
        maximize: Ascend.

    Returns:
        An optax transformation; `state["moments"]` holds $g_t$ in `prev` and $s_t$ in `step_size`.

    Raises:
        TypeError: An argument is not a number; from `init`, parameters are complex.
        ValueError: A number is out of range.

    Note (PyTorch):
        Bitwise identical in float32 on a CPU, compiled or not, where both frameworks have fused
        multiply-adds or neither has; where only one has, as under `ATEN_CPU_CAPABILITY=default`,
        the two agree up to rounding. Gradients below 1e-22 are an exception: the product of two
        underflows in PyTorch, which then keeps the step size. (Below 1.2e-38, XLA flushes a
        gradient to zero.) `optax.rprop` 0.2.8 is another optimizer: its update is the one due at
        the previous step, and its first is zero.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> params = jnp.array([1.0, -2.0])
        >>> optimizer = rprop(0.5, etas=(0.5, 1.5))
        >>> state = optimizer.init(params)
        >>> for _ in range(2):
        ...     updates, state = optimizer.update(params, state)
        ...     params = optax.apply_updates(params, updates)
        >>> params
        Array([-0.25, -0.75], dtype=float32)

    References:
        Riedmiller and Braun, [A direct adaptive method for faster backpropagation learning: the
        RPROP algorithm](https://doi.org/10.1109/ICNN.1993.298623), ICNN 1993.
    """
    check_coefficient("learning_rate", learning_rate, fix="Pass 0.01, the first step size.")
    _check_rprop(etas, step_sizes)
    moments = _resilient(learning_rate, etas, step_sizes)
    return rounded_once(chain_links(moments, 1.0, maximize=maximize))


def _accumulate(
    momentum: ScalarLike, dampening: ScalarLike, nesterov: bool, dtype: DTypeLike | None
) -> optax.GradientTransformation:
    """Keep PyTorch's momentum buffer, whose first gradient is not damped."""
    if is_zero(momentum):
        return optax.identity()
    trace = _trace(momentum, nesterov, dtype)
    if is_zero(dampening):
        return trace
    damp = optax.scale_by_schedule(lambda count: jnp.where(count == 0, 1.0, 1.0 - dampening))
    return optax.chain(damp, trace)


def _trace(
    momentum: ScalarLike, nesterov: bool, dtype: DTypeLike | None
) -> optax.GradientTransformation:
    """`optax.trace`, rounded where PyTorch rounds."""
    # PyTorch scales the buffer in a separate kernel, so that product is rounded. Its other
    # products, of decay, dampening, Nesterov's look-ahead and the learning rate, are each a fused
    # multiply-add; XLA fuses them too where update and optax.apply_updates are compiled together.

    def init(params: PyTree) -> optax.TraceState:
        return optax.TraceState(zeros_like(params, dtype))

    def update(updates: PyTree, state: Any, params: PyTree | None = None) -> tuple[PyTree, Any]:
        del params
        updates, old = promoted(updates, state.trace)
        trace = jax.tree.map(lambda g, b: g + rounded_product(b, momentum), updates, old)
        ahead = jax.tree.map(lambda g, b: g + momentum * b, updates, trace) if nesterov else trace
        return ahead, optax.TraceState(trace)

    return optax.GradientTransformation(init, update)


def _descend_and_shrink(
    learning_rate: optax.ScalarOrSchedule, lambd: ScalarLike, alpha: ScalarLike
) -> optax.GradientTransformation:
    """Take the step of PyTorch's ASGD, whose size is that of the state: one step behind."""

    def rate(count: Int[Array, ""]) -> Float[Array, ""]:
        value = learning_rate(count) if callable(learning_rate) else learning_rate
        return jnp.asarray(value, float)

    def init(params: PyTree) -> DescendState:
        del params
        count = jnp.zeros([], jnp.int32)
        return DescendState(count, rate(count).astype(jnp.float32))

    def update(updates: PyTree, state: Any, params: PyTree | None = None) -> tuple[PyTree, Any]:
        check_given(params, "asgd shrinks and averages them")

        def step(g: Array, p: Array) -> Array:
            eta = state.eta.astype(jnp.finfo(p.dtype).dtype)
            shrunk = rounded_product(p, 1.0 - rounded_product(eta, lambd))
            return (shrunk - p) - eta * g

        count = jnp.asarray(optax.safe_increment(state.count))
        eta = rate(state.count)
        # (1 + x)^alpha without losing digits of a small x.
        eta = eta / jnp.exp(widest(alpha) * jnp.log1p(widest(lambd) * eta * count.astype(float)))
        return jax.tree.map(step, updates, params), DescendState(count, eta.astype(jnp.float32))

    return optax.GradientTransformation(init, update)


def _average(t0: ScalarLike) -> optax.GradientTransformation:
    """Update the average with the new parameters, and return the update unchanged."""

    def init(params: PyTree) -> AverageState:
        return AverageState(jnp.zeros([], jnp.int32), zeros_like(params))

    def update(updates: PyTree, state: Any, params: PyTree | None = None) -> tuple[PyTree, Any]:
        # optax passes no parameters only if its user does, which is an error in apply_updates.
        new = optax.apply_updates(params, updates)  # pyright: ignore[reportArgumentType]
        past = jnp.maximum(1.0, state.count.astype(float) - widest(t0))
        mu = (1.0 / past).astype(jnp.float32)

        def average(ax: Array, p: Array) -> Array:
            weight = mu.astype(jnp.finfo(p.dtype).dtype)
            return jnp.where(past == 1.0, p, ax + weight * (p - ax))

        ax = jax.tree.map(average, state.ax, new)
        return updates, AverageState(jnp.asarray(optax.safe_increment(state.count)), ax)

    return optax.GradientTransformation(init, update)


def _resilient(
    learning_rate: ScalarLike,
    etas: tuple[ScalarLike, ScalarLike],
    step_sizes: tuple[ScalarLike, ScalarLike],
) -> optax.GradientTransformation:
    """Replace gradients with the steps of Rprop."""
    shrink, grow = etas
    smallest, largest = step_sizes

    def init(params: PyTree) -> RpropState:
        check_real(params, "Rprop", SPLIT)
        return RpropState(
            optax.tree.zeros_like(params), optax.tree.full_like(params, learning_rate)
        )

    def update(updates: PyTree, state: Any, params: PyTree | None = None) -> tuple[PyTree, Any]:
        del params

        def clipped(size: Array) -> Array:
            return lax.clamp(in_dtype_of(size, smallest), size, in_dtype_of(size, largest))

        def resized(g: Array, prev: Array, size: Array) -> Array:
            # Signs, because the product of two small gradients would underflow, as in PyTorch.
            turn = jnp.sign(g) * jnp.sign(prev)
            other = jnp.where(turn < 0, size * shrink, size)
            # Two clips, because XLA would repeat a single one for the step, from a copy of `size`.
            return jnp.where(turn > 0, clipped(size * grow), clipped(other))

        def remembered(g: Array, prev: Array, size: Array) -> Array:
            # The new size changes no sign, but using it first frees `prev` to be overwritten.
            return jnp.where(size * jnp.sign(g) * jnp.sign(prev) < 0, 0.0, g)

        step_size = jax.tree.map(resized, updates, state.prev, state.step_size)
        prev = jax.tree.map(remembered, updates, state.prev, step_size)
        steps = jax.tree.map(lambda size, g: size * jnp.sign(g), step_size, prev)
        return steps, RpropState(prev, step_size)

    return optax.GradientTransformation(init, update)


def _check_rprop(etas: tuple[Any, Any], step_sizes: tuple[Any, Any]) -> None:
    fix = "Pass (0.5, 1.2)."
    check_pair("etas", etas, fix=fix)
    check_pair("step_sizes", step_sizes, fix="Pass (1e-6, 50.0).")
    check_coefficient("etas[0]", etas[0], fix=fix, below=1.0)
    check_coefficient("etas[1]", etas[1], fix=fix)
    check_coefficient("step_sizes[0]", step_sizes[0], fix="Pass 1e-6.")
    check_coefficient("step_sizes[1]", step_sizes[1], fix="Pass 50.0.")
    if is_known(*etas) and (etas[0] == 0 or etas[1] <= 1):
        raise ValueError(f"etas must be 0 < etas[0] < 1 < etas[1]; got {etas}. {fix}")
    if is_known(*step_sizes) and step_sizes[0] > step_sizes[1]:
        raise ValueError(
            f"step_sizes must be the smallest and the largest step; got {step_sizes}. Pass "
            "(1e-6, 50.0)."
        )
