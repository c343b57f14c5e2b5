"""Gradient descent."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.numpy as jnp
import optax

from regjax._decay import check_coefficient
from regjax.optim._links import ascend, check_rates, decay_weights, is_zero, rounded_once

if TYPE_CHECKING:
    from jaxtyping import ScalarLike

    from regjax.optim._links import Mask


def sgd(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    momentum: ScalarLike = 0.0,
    dampening: ScalarLike = 0.0,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    nesterov: bool = False,
    *,
    maximize: bool = False,
    mask: Mask = None,
) -> optax.GradientTransformation:
    r"""Make `torch.optim.SGD`: gradient descent with momentum and coupled weight decay.

    $$g_t = \pm\nabla f(w_{t-1}) + \lambda w_{t-1}, \qquad
      b_1 = g_1,\; b_t = \mu b_{t-1} + (1 - \tau) g_t, \qquad
      w_t = w_{t-1} - \eta_t \begin{cases} g_t + \mu b_t & \text{nesterov} \\ b_t & \text{else}
      \end{cases}$$

    The decay is coupled: it enters the gradient, so `weight_decay=2 * c` is the same at every step
    as adding `regjax.l2_penalty(params, c)` to the loss (the penalty has no one half).

    Args:
        learning_rate: $\eta$ (torch: `lr`), or a schedule from the step, counted from 0, to it.
        momentum: $\mu$. With 0.0 no buffer is kept and `dampening` has no effect.
        dampening: $\tau$. As in torch, the first gradient enters the buffer undamped.
        weight_decay: $\lambda$, or a schedule. With 0.0 `update` can do without `params`.
        nesterov: Look ahead along the buffer; needs momentum and no dampening.
        maximize: Ascend. The decay still shrinks the parameters.
        mask: Which parameters decay: `None` (all), a tree of bools with their structure or a prefix
            of it, or a function from the parameters to such a tree. Torch: parameter groups.

    Returns:
        An optax transformation; `optax.TraceState` in part 2 of its state holds $b$. With
        dampening, part 2 is a pair, `optax.ScaleByScheduleState` (the step count) before it.

    Raises:
        TypeError: An argument is not a number, or a leaf of the mask not a bool.
        ValueError: A coefficient is negative, infinite or NaN; `nesterov` without momentum or with
            dampening; from `init`, a mask of another structure than the parameters; from `update`,
            no `params` to decay.

    PyTorch: the same numbers to rounding.

    Examples:
        >>> import jax.numpy as jnp, optax
        >>> params = {"kernel": jnp.array([1.0, -2.0]), "bias": jnp.array([3.0])}
        >>> optimizer = sgd(0.1, weight_decay=0.5, mask={"kernel": True, "bias": False})
        >>> state = optimizer.init(params)
        >>> gradient = {"kernel": jnp.array([1.0, 1.0]), "bias": jnp.array([1.0])}
        >>> updates, state = optimizer.update(gradient, state, params)
        >>> optax.apply_updates(params, updates)
        {'bias': Array([2.9], dtype=float32), 'kernel': Array([ 0.85, -2.  ], dtype=float32)}

    References:
        Sutskever et al., [On the importance of initialization and momentum in deep
        learning](https://proceedings.mlr.press/v28/sutskever13.html), ICML 2013.
    """
    check_rates(learning_rate, weight_decay)
    check_coefficient("momentum", momentum, fix="pass 0.0 for none")
    if nesterov and (is_zero(momentum) or not is_zero(dampening)):
        raise ValueError(
            "nesterov=True needs momentum > 0 and dampening = 0, but they are "
            f"momentum={momentum} and dampening={dampening}: pass momentum=0.9, say, or leave "
            "nesterov out"
        )
    return rounded_once(
        optax.chain(
            ascend(maximize),
            decay_weights(weight_decay, mask),
            _accumulate(momentum, dampening, nesterov),
            optax.scale_by_learning_rate(learning_rate),
        )
    )


def _accumulate(
    momentum: ScalarLike, dampening: ScalarLike, nesterov: bool
) -> optax.GradientTransformation:
    """Keep torch's momentum buffer, whose first gradient is not damped."""
    if is_zero(momentum):
        return optax.identity()
    trace = optax.trace(momentum, nesterov)
    if is_zero(dampening):
        return trace
    damp = optax.scale_by_schedule(lambda count: jnp.where(count == 0, 1.0, 1.0 - dampening))
    return optax.chain(damp, trace)
