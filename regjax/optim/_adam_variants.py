"""Variants of Adam: NAdam, RAdam and Adamax."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax

from regjax.optim._adam import (
    ScaleByNadamState,
    check_arguments,
    first_moment,
    no_moments,
    with_moments,
)
from regjax.optim._links import (
    OFF,
    Terms,
    add_in_turn,
    bias_correction,
    cast_like,
    chain_links,
    check_float_dtype,
    rounded_once,
    widest,
)
from regshared.checks import check_bool, check_coefficient
from regshared.spellings import explain_names

if TYPE_CHECKING:
    from jax.typing import DTypeLike
    from jaxtyping import Array, Float, Int, PyTree, ScalarLike

    from regjax.optim._adam import Betas
    from regjax.optim._links import Mask, WeightDecay


@explain_names
def nadam(
    learning_rate: optax.ScalarOrSchedule = 2e-3,
    betas: Betas = (0.9, 0.999),
    eps: ScalarLike = 1e-8,
    weight_decay: WeightDecay = OFF,
    momentum_decay: ScalarLike = 4e-3,
    decoupled_weight_decay: bool = False,
    *,
    maximize: bool = False,
    mask: Mask = None,
    mu_dtype: DTypeLike | None = None,
) -> optax.GradientTransformation:
    r"""Create the equivalent of `torch.optim.NAdam`: Adam with Nesterov momentum that warms up.

    $$\mu_t = \beta_1 \bigl(1 - \tfrac12\, 0.96^{t \psi}\bigr), \qquad
      \hat m_t = \frac{\mu_{t+1} m_t}{1 - \prod_{i \le t+1} \mu_i}
        + \frac{(1 - \mu_t) g_t}{1 - \prod_{i \le t} \mu_i}, \qquad
      w_t = w_{t-1} - \eta_t \frac{\hat m_t}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon}$$

    with the gradient $g_t$ and the moments $m_t$ and $v_t$ of `adam`. `momentum_decay` is $\psi$
    and sets how fast the momentum $\mu_t$ grows from half of $\beta_1$ to all of it; with 0.0 it
    stays at one half. With `decoupled_weight_decay`, this is NAdamW. The other arguments are those
    of `adam`.

    Returns:
        An optax transformation; `state["moments"]` is a `ScaleByNadamState`, which holds $m$, $v$
        and the product of $\mu_i$.

    Raises:
        TypeError: As in `adam`.
        ValueError: As in `adam`; or `momentum_decay` is negative, infinite or NaN.

    Note (PyTorch):
        Equal up to rounding, with the decoupled decay of `adamw`. `optax.nadam` is another
        algorithm: its momentum is $\beta_1$ at every step, so it has no product of $\mu_i$, and its
        bias correction is the one described in `adam`. Like PyTorch, the state keeps the product in
        float32 for parameters of any dtype, and the two terms of $\hat m_t$ are added one after the
        other and rounded twice, if `update` is given the parameters.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> params, gradient = jnp.array([1.0, -2.0]), jnp.array([0.25, 1.5])
        >>> optimizer = nadam(0.1, weight_decay=0.5, momentum_decay=0.0)
        >>> updates, state = optimizer.update(gradient, optimizer.init(params), params)
        >>> optax.apply_updates(params, updates).round(2)
        Array([ 0.89, -2.11], dtype=float32)

    References:
        Dozat, [Incorporating Nesterov Momentum into
        Adam](https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ), ICLR workshop 2016.
    """
    check_arguments(learning_rate, betas, eps, weight_decay)
    check_float_dtype("mu_dtype", mu_dtype)
    check_coefficient("momentum_decay", momentum_decay, fix="Pass 4e-3.")
    moments = _scale_by_nadam(betas[0], betas[1], eps, momentum_decay, mu_dtype)
    step = optax.scale_by_learning_rate(learning_rate)
    if not check_bool("decoupled_weight_decay", decoupled_weight_decay):
        step = optax.chain(step, add_in_turn(learning_rate, 0.0, None))
    links = chain_links(
        moments, learning_rate, weight_decay, mask, maximize, decoupled_weight_decay, step
    )
    return rounded_once(links)


@explain_names
def radam(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    betas: Betas = (0.9, 0.999),
    eps: ScalarLike = 1e-8,
    weight_decay: WeightDecay = OFF,
    decoupled_weight_decay: bool = False,
    *,
    maximize: bool = False,
    mask: Mask = None,
) -> optax.GradientTransformation:
    r"""Create the equivalent of `torch.optim.RAdam`: Adam with a rectified adaptive step.

    $$\rho_\infty = \frac{2}{1 - \beta_2} - 1, \qquad
      \rho_t = \rho_\infty - \frac{2 t \beta_2^t}{1 - \beta_2^t}, \qquad
      r_t = \sqrt{\frac{(\rho_t - 4)(\rho_t - 2) \rho_\infty}
                     {(\rho_\infty - 4)(\rho_\infty - 2) \rho_t}}$$

    $$w_t = w_{t-1} - \eta_t \frac{m_t}{1 - \beta_1^t} \begin{cases}
      r_t \sqrt{1 - \beta_2^t} / (\sqrt{v_t} + \epsilon) & \rho_t > 5 \\ 1 & \text{else}
      \end{cases}$$

    with the moments of `adam`. $\rho_t$ is the length of a simple average that is as noisy as
    $v_t$; for $\beta_2 = 0.999$ the first five steps are gradient descent with momentum, and for
    $\beta_2 \le 2/3$ all are. $\epsilon$ is added to $\sqrt{v_t}$, not to the corrected root as in
    `adam`. The paper uses `decoupled_weight_decay`. The arguments, the state and the errors are
    those of `adam`.

    Note (PyTorch):
        Equal up to rounding, with the decoupled decay of `adamw`. `optax.radam` adds $\epsilon$ to
        the root of the corrected moment, divides where $\rho_t = 5$ too, and computes $\rho_t$ in
        float32 as the small difference of two large numbers; here it loses no digits. Its bias
        correction is the one described in `adam`.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> params, gradient = jnp.array([1.0, -2.0]), jnp.array([0.25, 1.5])
        >>> optimizer = radam(0.1, weight_decay=0.5)
        >>> updates, state = optimizer.update(gradient, optimizer.init(params), params)
        >>> optax.apply_updates(params, updates)
        Array([ 0.925, -2.05 ], dtype=float32)

    References:
        Liu et al., "On the Variance of the Adaptive Learning Rate and Beyond", arXiv:1908.03265,
        ICLR 2020.
    """
    check_arguments(learning_rate, betas, eps, weight_decay)
    moments = _scale_by_radam(betas[0], betas[1], eps)
    links = chain_links(
        moments, learning_rate, weight_decay, mask, maximize, decoupled_weight_decay
    )
    return rounded_once(links)


@explain_names
def adamax(
    learning_rate: optax.ScalarOrSchedule = 2e-3,
    betas: Betas = (0.9, 0.999),
    eps: ScalarLike = 1e-8,
    weight_decay: WeightDecay = OFF,
    *,
    maximize: bool = False,
    mask: Mask = None,
) -> optax.GradientTransformation:
    r"""Create the equivalent of `torch.optim.Adamax`: Adam that divides by a decaying maximum.

    $$u_t = \max(\beta_2 u_{t-1},\; |g_t| + \epsilon), \qquad
      w_t = w_{t-1} - \eta_t \frac{m_t / (1 - \beta_1^t)}{u_t}$$

    with the gradient $g_t$, which includes the coupled decay, and the first moment $m_t$ of `adam`.
    The arguments and the errors are those of `adam`.

    Returns:
        An optax transformation; `state["moments"]` is an `optax.ScaleByAdamState`, which holds $m$
        and, as `nu`, $u$.

    Note (PyTorch):
        Equal up to rounding. `optax.adamax` differs only in the bias correction described in
        `adam`.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> params, gradient = jnp.array([1.0, -2.0]), jnp.array([0.25, 1.5])
        >>> optimizer = adamax(0.1, weight_decay=0.5)
        >>> updates, state = optimizer.update(gradient, optimizer.init(params), params)
        >>> optax.apply_updates(params, updates)
        Array([ 0.9, -2.1], dtype=float32)

    References:
        Kingma and Ba, "Adam: A Method for Stochastic Optimization", arXiv:1412.6980, ICLR 2015,
        section 7.1.
    """
    check_arguments(learning_rate, betas, eps, weight_decay)
    moments = _scale_by_adamax(betas[0], betas[1], eps)
    return rounded_once(chain_links(moments, learning_rate, weight_decay, mask, maximize=maximize))


def _scale_by_nadam(
    b1: ScalarLike,
    b2: ScalarLike,
    eps: ScalarLike,
    momentum_decay: ScalarLike,
    mu_dtype: DTypeLike | None,
) -> optax.GradientTransformation:
    def init(params: PyTree) -> ScaleByNadamState:
        start: Any = no_moments(params, mu_dtype)
        return ScaleByNadamState(*start, mu_product=jnp.ones([], jnp.float32))

    def update(
        updates: PyTree, state: Any, params: PyTree | None = None
    ) -> tuple[PyTree, ScaleByNadamState]:
        del params
        new_state = with_moments(state, updates, b1, b2)
        step = jnp.asarray(new_state.count, float)
        limit, growth = widest(b1), math.log(0.96) * widest(momentum_decay)
        short, short_next = (0.5 * limit * jnp.exp(growth * t) for t in (step, step + 1))
        product = state.mu_product * jnp.asarray(limit - short, jnp.float32)
        new_state = new_state._replace(mu_product=product)
        product = product.astype(step.dtype)
        mu_next = limit - short_next
        # Every term of 1 - mu is positive, so nothing cancels where b1 is close to 1.
        of_gradient = (1 - limit + short) / (1 - product)
        of_moment = mu_next / (1 - product * mu_next)
        c2 = bias_correction(b2, new_state.count)

        def directions(g: Array, m: Array, v: Array) -> Terms:
            root = jnp.sqrt(v / c2.astype(g.dtype)) + eps
            first = of_gradient.astype(g.dtype) * g / root
            return Terms(first, of_moment.astype(g.dtype) * m / root)

        mu = cast_like(new_state.mu, updates)
        return jax.tree.map(directions, updates, mu, new_state.nu), new_state

    return optax.GradientTransformation(init, update)


def _scale_by_radam(
    b1: ScalarLike, b2: ScalarLike, eps: ScalarLike
) -> optax.GradientTransformation:
    def update(
        updates: PyTree, state: Any, params: PyTree | None = None
    ) -> tuple[PyTree, optax.ScaleByAdamState]:
        del params
        state = with_moments(state, updates, b1, b2)
        c1, c2 = bias_correction(b1, state.count), bias_correction(b2, state.count)
        length, limit = _average_lengths(b2, state.count)
        # Up to 2/3 no length exceeds 5, but that of many steps may round to more.
        divides = (length > 5.0) & (jnp.asarray(b2) > 2 / 3)
        scale = jnp.where(divides, _rectification(length, limit) * jnp.sqrt(c2), 1.0) / c1

        def direction(m: Array, v: Array) -> Array:
            return scale.astype(m.dtype) * m / jnp.where(divides, jnp.sqrt(v) + eps, 1.0)

        return jax.tree.map(direction, state.mu, state.nu), state

    return optax.GradientTransformation(no_moments, update)


def _average_lengths(
    b2: ScalarLike, count: Int[Array, ""]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    r"""Compute RAdam's $\rho_t$ and $\rho_\infty$."""
    # With L = -log(b2) and h(x) = 1 - x / (exp(x) - 1) they are 1 + 2 (h(tL) - h(L)) / L and 1 + 2
    # (1 - h(L)) / L. PyTorch's formula for rho_t would lose four of seven digits in float32 where
    # b2 = 0.999, just where it is compared with 5.
    if isinstance(b2, int | float):
        rate = jnp.asarray(-math.log(max(b2, _TINY)), float)
    else:
        rate = -jnp.log(jnp.maximum(b2, _TINY)).astype(float)
    start = _shortfall(rate)
    length = 1 + 2 * (_shortfall(jnp.asarray(count, float) * rate) - start) / rate
    return length, 1 + 2 * (1 - start) / rate


def _shortfall(x: Float[Array, ""]) -> Float[Array, ""]:
    """Compute `1 - x / (exp(x) - 1)`, by its series where the difference would cancel."""
    series = jnp.polyval(jnp.asarray(_SHORTFALL, x.dtype), jnp.minimum(x, 0.25))
    return jnp.where(x < 0.25, series, 1 - x / jnp.expm1(x))


def _rectification(length: Float[Array, ""], limit: Float[Array, ""]) -> Float[Array, ""]:
    # The result is unused below 5, where the poles lie.
    length, limit = jnp.maximum(length, 5.0), jnp.maximum(limit, 5.0)
    return jnp.sqrt((length - 4) * (length - 2) / length * limit / ((limit - 4) * (limit - 2)))


def _scale_by_adamax(
    b1: ScalarLike, b2: ScalarLike, eps: ScalarLike
) -> optax.GradientTransformation:
    """`optax.scale_by_adamax` with an exact bias correction."""

    def update(
        updates: PyTree, state: Any, params: PyTree | None = None
    ) -> tuple[PyTree, optax.ScaleByAdamState]:
        del params
        count = optax.safe_increment(state.count)
        mu = first_moment(state.mu, updates, b1)
        nu = optax.tree.update_infinity_moment(updates, state.nu, b2, eps)
        c1 = bias_correction(b1, count)
        updates = jax.tree.map(lambda m, u: m / c1.astype(m.dtype) / u, mu, nu)
        return updates, state._replace(count=count, mu=mu, nu=nu)

    return optax.GradientTransformation(no_moments, update)


# Replaces a b2 of 0, whose logarithm is infinite.
_TINY = 1e-30
# x/2 - sum of B_2k x^2k / (2k)!, highest power first: exact to float64 up to 0.25.
_SHORTFALL = (-1 / 47900160, 0, 1 / 1209600, 0, -1 / 30240, 0, 1 / 720, 0, -1 / 12, 1 / 2, 0)
