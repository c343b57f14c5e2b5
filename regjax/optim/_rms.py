"""Optimizers that divide by the root of a sum or a mean of squared gradients.

In all of them the decay is coupled: it enters the gradient and is rescaled with it, so
`weight_decay=2 * c` equals the penalty `regjax.l2_penalty(params, c)` in the loss at every step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax

from regjax.optim._gradients import SPLIT, check_real
from regjax.optim._links import OFF, chain_links, check_rates, is_zero, rounded_once
from regshared.checks import check_bool, check_coefficient
from regshared.spellings import explain_names

if TYPE_CHECKING:
    from jax.typing import ArrayLike
    from jaxtyping import Array, Float, PyTree, ScalarLike

    from regjax.optim._links import Mask, WeightDecay


@explain_names
def adagrad(
    learning_rate: optax.ScalarOrSchedule = 1e-2,
    lr_decay: ScalarLike = OFF,
    weight_decay: WeightDecay = OFF,
    initial_accumulator_value: ScalarLike = 0.0,
    eps: ScalarLike = 1e-10,
    *,
    maximize: bool = False,
    mask: Mask = None,
) -> optax.GradientTransformation:
    r"""Create the equivalent of `torch.optim.Adagrad`: steps shrink with the squared gradients.

    $$g_t = \pm\nabla f(w_{t-1}) + \lambda w_{t-1}, \qquad
      s_0 = \tau,\; s_t = s_{t-1} + g_t^2, \qquad
      w_t = w_{t-1} - \frac{\eta_t}{1 + (t - 1)\,\delta} \frac{g_t}{\sqrt{s_t} + \epsilon}$$

    `lr_decay` is $\delta$ and applies on top of a schedule; `initial_accumulator_value` is $\tau$.
    The other arguments and the errors are those of `adam`; the decay is coupled.

    Returns:
        An optax transformation; `state["moments"]` is an `optax.ScaleByRssState`, which holds $s$.
        With `lr_decay` or a schedule, `state["learning_rate"]` is an `optax.ScaleByScheduleState`,
        the step count.

    Note (PyTorch):
        Equal up to rounding. `optax.adagrad` adds `eps`, 1e-7, inside the root, takes no step where
        a sum is zero, starts the sums at 0.1, and has no `lr_decay`. PyTorch treats the real and
        imaginary parts of complex parameters as two parameters, and so does
        `optax.contrib.split_real_and_imaginary(adagrad(...))`.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> params, gradient = jnp.array([1.0, -2.0]), jnp.array([0.25, 1.5])
        >>> optimizer = adagrad(0.1, weight_decay=0.5)
        >>> updates, state = optimizer.update(gradient, optimizer.init(params), params)
        >>> optax.apply_updates(params, updates)
        Array([ 0.9, -2.1], dtype=float32)

    References:
        Duchi, Hazan and Singer, [Adaptive Subgradient Methods for Online Learning and Stochastic
        Optimization](https://jmlr.org/papers/v12/duchi11a.html), JMLR 2011.
    """
    check_rates(learning_rate, weight_decay)
    check_coefficient("lr_decay", lr_decay, fix="Pass 0.0 for none.")
    check_coefficient("initial_accumulator_value", initial_accumulator_value, fix="Pass 0.0.")
    check_coefficient("eps", eps, fix="Pass 1e-10.")
    moments = _of_real("Adagrad", _scale_by_root_of_sum(initial_accumulator_value, eps))
    rate = _decayed(learning_rate, lr_decay)
    return rounded_once(chain_links(moments, rate, weight_decay, mask, maximize=maximize))


@explain_names
def adadelta(
    learning_rate: optax.ScalarOrSchedule = 1.0,
    rho: ScalarLike = 0.9,
    eps: ScalarLike = 1e-6,
    weight_decay: WeightDecay = OFF,
    *,
    maximize: bool = False,
    mask: Mask = None,
) -> optax.GradientTransformation:
    r"""Create the equivalent of `torch.optim.Adadelta`: steps scaled by the size of previous steps.

    $$g_t = \pm\nabla f(w_{t-1}) + \lambda w_{t-1}, \qquad
      v_t = \rho v_{t-1} + (1 - \rho) g_t^2, \qquad
      d_t = \frac{\sqrt{u_{t-1} + \epsilon}}{\sqrt{v_t + \epsilon}}\, g_t$$
    $$u_t = \rho u_{t-1} + (1 - \rho) d_t^2, \qquad w_t = w_{t-1} - \eta_t d_t$$

    `rho` lies in [0, 1). `eps` is added inside both roots and sets the size of the first steps. The
    learning rate does not enter $u$. The other arguments and the errors are those of `adam`; the
    decay is coupled.

    Returns:
        An optax transformation; `state["moments"]` is an `optax.ScaleByAdaDeltaState`, which holds
        $v$ as `e_g` and $u$ as `e_x`.

    Note (PyTorch):
        Equal up to rounding; PyTorch accepts `rho=1`, with which no mean ever moves.
        `optax.adadelta(1.0)` has the same links; its default, no learning rate, keeps the sign of
        the gradient and so ascends. For complex parameters, see `adagrad`.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> params, gradient = jnp.array([1.0, -2.0]), jnp.array([-0.5, 1.0])
        >>> optimizer = adadelta(rho=0.75, eps=1.0, weight_decay=0.5)
        >>> updates, state = optimizer.update(gradient, optimizer.init(params), params)
        >>> optax.apply_updates(params, updates)
        Array([ 1., -2.], dtype=float32)

    References:
        Zeiler, "ADADELTA: An Adaptive Learning Rate Method", arXiv:1212.5701, 2012.
    """
    check_rates(learning_rate, weight_decay)
    check_coefficient("rho", rho, fix="Pass 0.9.", below=1.0)
    check_coefficient("eps", eps, fix="Pass 1e-6.")
    moments = _of_real("Adadelta", optax.scale_by_adadelta(rho, eps))
    return rounded_once(chain_links(moments, learning_rate, weight_decay, mask, maximize=maximize))


@explain_names
def rmsprop(
    learning_rate: optax.ScalarOrSchedule = 1e-2,
    alpha: ScalarLike = 0.99,
    eps: ScalarLike = 1e-8,
    weight_decay: WeightDecay = OFF,
    momentum: ScalarLike = OFF,
    centered: bool = False,
    *,
    maximize: bool = False,
    mask: Mask = None,
) -> optax.GradientTransformation:
    r"""Create the equivalent of `torch.optim.RMSprop`: divide by a running RMS of the gradients.

    $$g_t = \pm\nabla f(w_{t-1}) + \lambda w_{t-1}, \qquad
      v_t = \alpha v_{t-1} + (1 - \alpha) g_t^2, \qquad
      b_t = \mu b_{t-1} + \frac{g_t}{\sqrt{v_t} + \epsilon}, \qquad
      w_t = w_{t-1} - \eta_t b_t$$

    `alpha` lies in [0, 1). `momentum` is $\mu$; with 0.0 no buffer is kept (see `sgd`), and the
    learning rate scales the buffer's output, not its input. With `centered`, the variance
    $v_t - m_t^2$ replaces $v_t$, where $m_t = \alpha m_{t-1} + (1 - \alpha) g_t$. As in PyTorch, a
    gradient that stays constant for some $10 / (1 - \alpha)$ steps then ends in NaN, because
    rounding may make the variance negative. The other arguments and the errors are those of `adam`;
    the decay is coupled.

    Returns:
        An optax transformation; `state["moments"]` is an `optax.ScaleByRmsState` (centered:
        `optax.ScaleByRStdDevState`), which holds $v$ as `nu` and $m$ as `mu`. With momentum, it is
        a pair that ends with `optax.TraceState`, which holds $b$.

    Note (PyTorch):
        Equal up to rounding; PyTorch accepts `alpha` of 1 and more. `optax.rmsprop` chains the same
        links otherwise: the momentum follows the learning rate, so a schedule leaves old rates in
        the buffer; `eps` is inside the root by default; and the default `decay` is 0.9. For complex
        parameters, see `adagrad`.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> params, gradient = jnp.array([1.0, -2.0]), jnp.array([0.25, 1.5])
        >>> optimizer = rmsprop(0.1, alpha=0.75, weight_decay=0.5)
        >>> updates, state = optimizer.update(gradient, optimizer.init(params), params)
        >>> optax.apply_updates(params, updates)
        Array([ 0.8, -2.2], dtype=float32)

    References:
        Tieleman and Hinton, [Lecture 6.5, Neural Networks for Machine
        Learning](https://www.cs.toronto.edu/~tijmen/csc321/slides/lecture_slides_lec6.pdf), 2012.
        Graves, "Generating Sequences With Recurrent Neural Networks", arXiv:1308.0850, 2013
        (centered).
    """
    check_rates(learning_rate, weight_decay)
    check_coefficient("alpha", alpha, fix="Pass 0.99.", below=1.0)
    check_coefficient("eps", eps, fix="Pass 1e-8.")
    check_coefficient("momentum", momentum, fix="Pass 0.0 for none.")
    scale = optax.scale_by_stddev if check_bool("centered", centered) else optax.scale_by_rms
    moments = _of_real("RMSprop", scale(alpha, eps, eps_in_sqrt=False))
    if not is_zero(momentum):
        moments = optax.chain(moments, optax.trace(momentum))
    return rounded_once(chain_links(moments, learning_rate, weight_decay, mask, maximize=maximize))


def _scale_by_root_of_sum(initial: ScalarLike, eps: ScalarLike) -> optax.GradientTransformation:
    """`optax.scale_by_rss` with `eps` outside the root."""

    def init(params: PyTree) -> optax.ScaleByRssState:
        return optax.ScaleByRssState(optax.tree.full_like(params, initial))

    def update(updates: PyTree, state: Any, params: PyTree | None = None) -> tuple[PyTree, Any]:
        del params
        sums = jax.tree.map(lambda g, s: s + g * g, updates, state.sum_of_squares)
        updates = jax.tree.map(lambda g, s: g / (jnp.sqrt(s) + eps), updates, sums)
        return updates, optax.ScaleByRssState(sums)

    return optax.GradientTransformation(init, update)


def _decayed(learning_rate: optax.ScalarOrSchedule, lr_decay: ScalarLike) -> optax.ScalarOrSchedule:
    if is_zero(lr_decay):
        return learning_rate

    def schedule(count: ArrayLike) -> Float[Array, ""]:
        rate = learning_rate(count) if callable(learning_rate) else learning_rate
        # One dtype, because strict promotion would not divide a float32 by a float64.
        rate, slope, steps = (jnp.asarray(value, float) for value in (rate, lr_decay, count))
        return rate / (1.0 + steps * slope)

    return schedule


def _of_real(name: str, inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Reject complex parameters, for which optax's means of squares differ from PyTorch's."""

    def init(params: PyTree) -> PyTree:
        check_real(params, name, SPLIT)
        return inner.init(params)

    return optax.GradientTransformation(init, inner.update)
