"""Adam and its kin."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax

from regjax._decay import check_coefficient
from regjax._paths import named_leaves
from regjax.optim._links import (
    ascend,
    bias_correction,
    check_rates,
    decay_weights,
    rounded_once,
)

if TYPE_CHECKING:
    from jaxtyping import PyTree, ScalarLike

    from regjax.optim._links import Mask


def adam(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    betas: tuple[ScalarLike, ScalarLike] = (0.9, 0.999),
    eps: ScalarLike = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    amsgrad: bool = False,
    *,
    maximize: bool = False,
    decoupled_weight_decay: bool = False,
    mask: Mask = None,
) -> optax.GradientTransformation:
    r"""Make `torch.optim.Adam`, whose weight decay is coupled unless told otherwise.

    $$g_t = \pm\nabla f(w_{t-1}) + \lambda w_{t-1}, \qquad
      m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad
      v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2, \qquad
      w_t = w_{t-1} - \eta_t \frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon}$$

    With `amsgrad`, the largest $v$ so far stands in for $v_t$. Coupled decay enters the gradient
    and is rescaled with it, so `weight_decay=2 * c` is the same at every step as adding
    `regjax.l2_penalty(params, c)` to the loss (the penalty has no one half).

    Args:
        learning_rate: $\eta$ (torch: `lr`), or a schedule from the step, counted from 0, to it.
        betas: $\beta_1, \beta_2$, each in [0, 1).
        eps: $\epsilon$, added outside the root.
        weight_decay: $\lambda$, or a schedule. With 0.0 `update` can do without `params`.
        amsgrad: Divide by the largest second moment so far.
        maximize: Ascend. The decay still shrinks the parameters.
        decoupled_weight_decay: Decay as `adamw` does.
        mask: Which parameters decay: `None` (all), a tree of bools with their structure or a prefix
            of it, or a function from the parameters to such a tree. Torch: parameter groups.

    Returns:
        An optax transformation; `optax.ScaleByAdamState` (with amsgrad `optax.ScaleByAmsgradState`)
        in part 2 of its state, or 1 where the decay is decoupled, holds $m$ and $v$.

    Raises:
        TypeError: An argument is not a number, or a leaf of the mask not a bool; from `init`,
            complex parameters.
        ValueError: A coefficient is negative, infinite or NaN, or a beta outside [0, 1); from
            `init`, a mask of another structure than the parameters; from `update`, no `params` to
            decay.

    PyTorch: the same numbers to rounding. Two parts of optax would differ, and have a substitute
    here: its bias correction `1 - decay**count` is off in float32 (by 1e-5 of its value for
    $\beta_2 = 0.999$, by 1e-3 for 0.99999), and `optax.amsgrad` takes the maximum of corrected
    second moments, torch that of uncorrected ones. For complex parameters torch treats real and
    imaginary part as two parameters: so does `optax.contrib.split_real_and_imaginary(adam(...))`.

    Examples:
        >>> import jax.numpy as jnp, optax
        >>> params = jnp.array([1.0, -2.0])
        >>> optimizer = adam(0.1, weight_decay=0.5)
        >>> state = optimizer.init(params)
        >>> updates, state = optimizer.update(jnp.array([0.25, 1.5]), state, params)
        >>> optax.apply_updates(params, updates)
        Array([ 0.9, -2.1], dtype=float32)

    References:
        Kingma and Ba, [Adam: A Method for Stochastic Optimization](https://arxiv.org/abs/1412.6980),
        ICLR 2015. Reddi et al., [On the Convergence of Adam and
        Beyond](https://openreview.net/forum?id=ryQu7f-RZ), ICLR 2018.
    """
    check_rates(learning_rate, weight_decay)
    check_coefficient("eps", eps, fix="pass 1e-8, say")
    b1, b2 = betas
    check_coefficient("betas[0]", b1, fix="pass 0.9, say", below=1.0)
    check_coefficient("betas[1]", b2, fix="pass 0.999, say", below=1.0)
    decay = decay_weights(weight_decay, mask)
    moments = _scale_by_adam(b1, b2, eps, amsgrad)
    return rounded_once(
        optax.chain(
            ascend(maximize),
            *((moments, decay) if decoupled_weight_decay else (decay, moments)),
            optax.scale_by_learning_rate(learning_rate),
        )
    )


def adamw(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    betas: tuple[ScalarLike, ScalarLike] = (0.9, 0.999),
    eps: ScalarLike = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 1e-2,
    amsgrad: bool = False,
    *,
    maximize: bool = False,
    mask: Mask = None,
) -> optax.GradientTransformation:
    r"""Make `torch.optim.AdamW`: Adam with decoupled weight decay.

    $$w_t = (1 - \eta_t \lambda)\, w_{t-1}
      - \eta_t \frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon}$$

    with the moments of `adam`, of the bare gradient: the decay never passes through them. **No
    penalty in the loss does the same**, `regjax.l2_penalty` neither.

    Args:
        learning_rate: $\eta$ (torch: `lr`), or a schedule from the step, counted from 0, to it. It
            scales the decay too.
        betas: $\beta_1, \beta_2$, each in [0, 1).
        eps: $\epsilon$, added outside the root.
        weight_decay: $\lambda$, or a schedule. With 0.0 `update` can do without `params`.
        amsgrad: Divide by the largest second moment so far.
        maximize: Ascend. The decay still shrinks the parameters.
        mask: Which parameters decay: `None` (all), a tree of bools with their structure or a prefix
            of it, or a function from the parameters to such a tree. Torch: parameter groups.

    Returns:
        An optax transformation; `optax.ScaleByAdamState` (with amsgrad `optax.ScaleByAmsgradState`)
        in part 1 of its state holds $m$ and $v$.

    Raises:
        TypeError: As `adam` does.
        ValueError: As `adam` does.

    PyTorch: the same numbers to rounding. In float32 torch shrinks by the rounded number
    $1 - \eta\lambda$, which loses digits of a small decay (0.14 % of it at $\eta\lambda =
    10^{-5}$); here the decay keeps them. `optax.adamw` has another default, `weight_decay=1e-4`,
    and the differences that `adam` names.

    Examples:
        >>> import jax.numpy as jnp, optax
        >>> params = jnp.array([1.0, -2.0])
        >>> optimizer = adamw(0.1, weight_decay=0.5)
        >>> state = optimizer.init(params)
        >>> updates, state = optimizer.update(jnp.array([0.25, 1.5]), state, params)
        >>> optax.apply_updates(params, updates)
        Array([ 0.85, -2.  ], dtype=float32)

    References:
        Loshchilov and Hutter, [Decoupled Weight Decay Regularization](https://arxiv.org/abs/1711.05101),
        ICLR 2019.
    """
    return adam(
        learning_rate,
        betas,
        eps,
        weight_decay,
        amsgrad,
        maximize=maximize,
        decoupled_weight_decay=True,
        mask=mask,
    )


def _scale_by_adam(
    b1: ScalarLike, b2: ScalarLike, eps: ScalarLike, amsgrad: bool
) -> optax.GradientTransformation:
    """`optax.scale_by_adam` with an exact bias correction, and the maximum that torch takes."""

    def init(params: PyTree) -> optax.ScaleByAdamState | optax.ScaleByAmsgradState:
        for name, leaf in named_leaves(params):
            if jnp.iscomplexobj(leaf):
                raise TypeError(
                    f"Adam has no one second moment for the complex parameter '{name}': torch "
                    "takes real and imaginary part as two parameters, and so does "
                    "optax.contrib.split_real_and_imaginary around this optimizer"
                )
        zeros = optax.tree.zeros_like
        moments = (jnp.zeros([], jnp.int32), zeros(params), zeros(params))
        if amsgrad:
            return optax.ScaleByAmsgradState(*moments, nu_max=zeros(params))
        return optax.ScaleByAdamState(*moments)

    def update(updates: PyTree, state: Any, params: PyTree | None = None) -> tuple[PyTree, Any]:
        del params
        count = optax.safe_increment(state.count)
        mu = optax.tree.update_moment(updates, state.mu, b1, 1)
        nu = optax.tree.update_moment(updates, state.nu, b2, 2)
        new_state, divisor = state._replace(count=count, mu=mu, nu=nu), nu
        if amsgrad:
            divisor = jax.tree.map(jnp.maximum, state.nu_max, nu)
            new_state = new_state._replace(nu_max=divisor)
        c1, c2 = bias_correction(b1, count), bias_correction(b2, count)
        updates = jax.tree.map(
            lambda m, v: (m / c1.astype(m.dtype)) / (jnp.sqrt(v / c2.astype(v.dtype)) + eps),
            mu,
            divisor,
        )
        return updates, new_state

    return optax.GradientTransformation(init, update)
