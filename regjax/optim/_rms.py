"""Optimizers that divide by the root of a sum or a mean of squared gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax

from regjax._decay.paths import named_leaves
from regjax.optim._gradients import check_arrays
from regjax.optim._links import OFF, ascend, check_rates, decay_weights, is_zero, rounded_once
from regshared.checks import check_bool, check_coefficient

if TYPE_CHECKING:
    from jax.typing import ArrayLike
    from jaxtyping import Array, Float, PyTree, ScalarLike

    from regjax.optim._links import Mask, WeightDecay


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
    r"""Make `torch.optim.Adagrad`: steps shrink with the sum of all squared gradients.

    $$g_t = \pm\nabla f(w_{t-1}) + \lambda w_{t-1}, \qquad
      s_0 = \tau,\; s_t = s_{t-1} + g_t^2, \qquad
      w_t = w_{t-1} - \frac{\eta_t}{1 + (t - 1)\,\delta} \frac{g_t}{\sqrt{s_t} + \epsilon}$$

    The decay is coupled: it enters the gradient and is rescaled with it, so `weight_decay=2 * c` is
    the same at every step as adding `regjax.l2_penalty(params, c)` to the loss.

    Args:
        learning_rate: $\eta$ (torch: `lr`), or a schedule from the step, counted from 0, to it.
        lr_decay: $\delta$: after $t$ steps the learning rate is divided by $1 + t\delta$, on top of
            a schedule.
        weight_decay: $\lambda$, or a schedule. With 0.0 `update` can do without `params`.
        initial_accumulator_value: $\tau$, where the sums start.
        eps: $\epsilon$, added outside the root.
        maximize: Ascend. The decay still shrinks the parameters.
        mask: Which parameters decay: `None` (all), a tree of bools with their structure or a prefix
            of it, or a function from the parameters to such a tree. Torch: parameter groups.

    Returns:
        An optax transformation; `optax.ScaleByRssState` in part 2 of its state holds $s$. With
        `lr_decay` or a schedule, part 3 is `optax.ScaleByScheduleState`, the step count.

    Raises:
        TypeError: An argument is not a number, a flag or a leaf of the mask not a bool; from
            `init`, complex parameters.
        ValueError: A coefficient is negative, infinite or NaN; from `init`, a mask of another
            structure than the parameters; from `update`, no `params` to decay.

    PyTorch: the same numbers to rounding. `optax.adagrad` differs, hence the link of its own here:
    it adds `eps`, 1e-7, inside the root, takes no step at all where a sum is zero, starts the sums
    at 0.1, and knows no `lr_decay`. For complex parameters torch treats real and imaginary part as
    two parameters: so does `optax.contrib.split_real_and_imaginary(adagrad(...))`.

    Examples:
        >>> import jax.numpy as jnp, optax
        >>> params = jnp.array([1.0, -2.0])
        >>> optimizer = adagrad(0.1, weight_decay=0.5)
        >>> state = optimizer.init(params)
        >>> updates, state = optimizer.update(jnp.array([0.25, 1.5]), state, params)
        >>> optax.apply_updates(params, updates)
        Array([ 0.9, -2.1], dtype=float32)

    References:
        Duchi, Hazan and Singer, [Adaptive Subgradient Methods for Online Learning and Stochastic
        Optimization](https://jmlr.org/papers/v12/duchi11a.html), JMLR 2011.
    """
    check_rates(learning_rate, weight_decay)
    check_coefficient("lr_decay", lr_decay, fix="pass 0.0 for none")
    check_coefficient("initial_accumulator_value", initial_accumulator_value, fix="pass 0.0, say")
    check_coefficient("eps", eps, fix="pass 1e-10, say")
    return rounded_once(
        _of_real_parameters(
            "Adagrad",
            optax.chain(
                ascend(maximize),
                decay_weights(weight_decay, mask),
                _scale_by_root_of_sum(initial_accumulator_value, eps),
                optax.scale_by_learning_rate(_decayed(learning_rate, lr_decay)),
            ),
        )
    )


def adadelta(
    learning_rate: optax.ScalarOrSchedule = 1.0,
    rho: ScalarLike = 0.9,
    eps: ScalarLike = 1e-6,
    weight_decay: WeightDecay = OFF,
    *,
    maximize: bool = False,
    mask: Mask = None,
) -> optax.GradientTransformation:
    r"""Make `torch.optim.Adadelta`: steps as large as the steps before them.

    $$g_t = \pm\nabla f(w_{t-1}) + \lambda w_{t-1}, \qquad
      v_t = \rho v_{t-1} + (1 - \rho) g_t^2, \qquad
      d_t = \frac{\sqrt{u_{t-1} + \epsilon}}{\sqrt{v_t + \epsilon}}\, g_t$$
    $$u_t = \rho u_{t-1} + (1 - \rho) d_t^2, \qquad w_t = w_{t-1} - \eta_t d_t$$

    The decay is coupled: it enters the gradient and is rescaled with it, so `weight_decay=2 * c` is
    the same at every step as adding `regjax.l2_penalty(params, c)` to the loss.

    Args:
        learning_rate: $\eta$ (torch: `lr`), or a schedule from the step, counted from 0, to it.
            $u$, the mean of squared steps, does not see it.
        rho: $\rho$ of both means, in [0, 1).
        eps: $\epsilon$, added inside both roots. It sets the size of the first steps.
        weight_decay: $\lambda$, or a schedule. With 0.0 `update` can do without `params`.
        maximize: Ascend. The decay still shrinks the parameters.
        mask: Which parameters decay: `None` (all), a tree of bools with their structure or a prefix
            of it, or a function from the parameters to such a tree. Torch: parameter groups.

    Returns:
        An optax transformation; `optax.ScaleByAdaDeltaState` in part 2 of its state holds $v$, as
        `e_g`, and $u$, as `e_x`.

    Raises:
        TypeError: An argument is not a number, a flag or a leaf of the mask not a bool; from
            `init`, complex parameters.
        ValueError: A coefficient is negative, infinite or NaN, or `rho` outside [0, 1); from
            `init`, a mask of another structure than the parameters; from `update`, no `params` to
            decay.

    PyTorch: the same numbers to rounding; torch lets `rho=1` through, with which no mean ever
    moves. The same parts make `optax.adadelta(1.0)`; without a learning rate, its default, that one
    keeps the sign of the gradient, and so ascends. For complex parameters torch treats real and
    imaginary part as two parameters: so does
    `optax.contrib.split_real_and_imaginary(adadelta(...))`.

    Examples:
        >>> import jax.numpy as jnp, optax
        >>> params = jnp.array([1.0, -2.0])
        >>> optimizer = adadelta(rho=0.75, eps=1.0, weight_decay=0.5)
        >>> state = optimizer.init(params)
        >>> updates, state = optimizer.update(jnp.array([-0.5, 1.0]), state, params)
        >>> optax.apply_updates(params, updates)
        Array([ 1., -2.], dtype=float32)

    References:
        Zeiler, [ADADELTA: An Adaptive Learning Rate Method](https://arxiv.org/abs/1212.5701), 2012.
    """
    check_rates(learning_rate, weight_decay)
    check_coefficient("rho", rho, fix="pass 0.9, say", below=1.0)
    check_coefficient("eps", eps, fix="pass 1e-6, say")
    return rounded_once(
        _of_real_parameters(
            "Adadelta",
            optax.chain(
                ascend(maximize),
                decay_weights(weight_decay, mask),
                optax.scale_by_adadelta(rho, eps),
                optax.scale_by_learning_rate(learning_rate),
            ),
        )
    )


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
    r"""Make `torch.optim.RMSprop`: divide by the root of a running mean of squared gradients.

    $$g_t = \pm\nabla f(w_{t-1}) + \lambda w_{t-1}, \qquad
      v_t = \alpha v_{t-1} + (1 - \alpha) g_t^2, \qquad
      b_t = \mu b_{t-1} + \frac{g_t}{\sqrt{v_t} + \epsilon}, \qquad
      w_t = w_{t-1} - \eta_t b_t$$

    With `centered`, the variance $v_t - m_t^2$ stands in for $v_t$, where $m_t = \alpha m_{t-1} +
    (1 - \alpha) g_t$. The decay is coupled: it enters the gradient and is rescaled with it, so
    `weight_decay=2 * c` is the same at every step as adding `regjax.l2_penalty(params, c)` to the
    loss.

    Args:
        learning_rate: $\eta$ (torch: `lr`), or a schedule from the step, counted from 0, to it. It
            scales the buffer of the momentum as it leaves, not what enters.
        alpha: $\alpha$, in [0, 1).
        eps: $\epsilon$, added outside the root.
        weight_decay: $\lambda$, or a schedule. With 0.0 `update` can do without `params`.
        momentum: $\mu$. With 0.0 no buffer is kept; see `sgd` for `optax.inject_hyperparams`.
        centered: Divide by the standard deviation. As in torch, a gradient that stays the same for
            some $10 / (1 - \alpha)$ steps ends in NaN: rounding may take the variance below zero.
        maximize: Ascend. The decay still shrinks the parameters.
        mask: Which parameters decay: `None` (all), a tree of bools with their structure or a prefix
            of it, or a function from the parameters to such a tree. Torch: parameter groups.

    Returns:
        An optax transformation; `optax.ScaleByRmsState` (centered: `optax.ScaleByRStdDevState`) in
        part 2 of its state holds $v$, as `nu`, and $m$, as `mu`. With momentum, part 2 is a pair,
        `optax.TraceState` after it, which holds $b$.

    Raises:
        TypeError: An argument is not a number, a flag or a leaf of the mask not a bool; from
            `init`, complex parameters.
        ValueError: A coefficient is negative, infinite or NaN, or `alpha` outside [0, 1); from
            `init`, a mask of another structure than the parameters; from `update`, no `params` to
            decay.

    PyTorch: the same numbers to rounding; torch lets `alpha` of 1 and more through. The parts are
    optax's, but `optax.rmsprop` joins them otherwise: the momentum comes after the learning rate,
    so that a schedule leaves old rates in the buffer, `eps` is inside the root unless told
    otherwise, and the default `decay` is 0.9. For complex parameters torch treats real and
    imaginary part as two parameters: so does
    `optax.contrib.split_real_and_imaginary(rmsprop(...))`.

    Examples:
        >>> import jax.numpy as jnp, optax
        >>> params = jnp.array([1.0, -2.0])
        >>> optimizer = rmsprop(0.1, alpha=0.75, weight_decay=0.5)
        >>> state = optimizer.init(params)
        >>> updates, state = optimizer.update(jnp.array([0.25, 1.5]), state, params)
        >>> optax.apply_updates(params, updates)
        Array([ 0.8, -2.2], dtype=float32)

    References:
        Tieleman and Hinton, [Lecture 6.5, Neural Networks for Machine
        Learning](https://www.cs.toronto.edu/~tijmen/csc321/slides/lecture_slides_lec6.pdf), 2012.
        Graves, [Generating Sequences With Recurrent Neural
        Networks](https://arxiv.org/abs/1308.0850), 2013 (centered).
    """
    check_rates(learning_rate, weight_decay)
    check_coefficient("alpha", alpha, fix="pass 0.99, say", below=1.0)
    check_coefficient("eps", eps, fix="pass 1e-8, say")
    check_coefficient("momentum", momentum, fix="pass 0.0 for none")
    scale = optax.scale_by_stddev if check_bool("centered", centered) else optax.scale_by_rms
    scaled = scale(alpha, eps, eps_in_sqrt=False)
    return rounded_once(
        _of_real_parameters(
            "RMSprop",
            optax.chain(
                ascend(maximize),
                decay_weights(weight_decay, mask),
                scaled if is_zero(momentum) else optax.chain(scaled, optax.trace(momentum)),
                optax.scale_by_learning_rate(learning_rate),
            ),
        )
    )


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
        # All in one dtype: strict promotion would not divide a float32 by a float64.
        rate, slope, steps = (jnp.asarray(value, float) for value in (rate, lr_decay, count))
        return rate / (1.0 + steps * slope)

    return schedule


def _of_real_parameters(
    name: str, inner: optax.GradientTransformation
) -> optax.GradientTransformation:
    """Refuse complex parameters, of which optax's means of squares are not torch's."""

    def init(params: PyTree) -> PyTree:
        check_arrays(params)
        for path, leaf in named_leaves(params):
            if jnp.iscomplexobj(leaf):
                raise TypeError(
                    f"{name} has no one square to average for the complex parameter '{path}': "
                    "torch takes real and imaginary part as two parameters, and so does "
                    "optax.contrib.split_real_and_imaginary around this optimizer"
                )
        return inner.init(params)

    return optax.GradientTransformation(init, inner.update)
