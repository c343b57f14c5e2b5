"""Adam and AdamW, and the code that they share with their variants in `_adam_variants.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax

from regjax.optim._gradients import SPLIT, check_real
from regjax.optim._links import (
    OFF,
    bias_correction,
    cast_like,
    chain_links,
    check_float_dtype,
    check_pair,
    check_rates,
    promoted,
    rounded_once,
    rounded_product,
    zeros_like,
)
from regshared.checks import check_bool, check_coefficient
from regshared.spellings import explain_names

if TYPE_CHECKING:
    import numpy as np
    from jax.typing import DTypeLike
    from jaxtyping import Array, Float, Int, PyTree, ScalarLike

    from regjax.optim._links import Mask, WeightDecay

    Betas = tuple[ScalarLike, ScalarLike] | Float[Array | np.ndarray, " 2"]

State = TypeVar("State", bound=Any)


@explain_names
def adam(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    betas: Betas = (0.9, 0.999),
    eps: ScalarLike = 1e-8,
    weight_decay: WeightDecay = OFF,
    amsgrad: bool = False,
    *,
    maximize: bool = False,
    decoupled_weight_decay: bool = False,
    mask: Mask = None,
    mu_dtype: DTypeLike | None = None,
) -> optax.GradientTransformation:
    r"""Create the equivalent of `torch.optim.Adam`, with coupled weight decay by default.

    $$g_t = \pm\nabla f(w_{t-1}) + \lambda w_{t-1}, \qquad
      m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad
      v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2, \qquad
      w_t = w_{t-1} - \eta_t \frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon}$$

    With `amsgrad`, the largest $v$ so far replaces $v_t$. Coupled decay enters the gradient and is
    rescaled with it, so `weight_decay=2 * c` equals the penalty `regjax.l2_penalty(params, c)` in
    the loss at every step.

    Args:
        learning_rate: $\eta$ (PyTorch: `lr`), or a schedule from the step count, starting at 0.
        betas: $\beta_1, \beta_2$, each in [0, 1): a pair of numbers, or an array of two.
        eps: $\epsilon$, added outside the root.
        weight_decay: $\lambda$ or a schedule. With 0.0, `update` does not need `params`.
        amsgrad: Divide by the largest second moment so far.
        maximize: Ascend. The decay still shrinks the parameters.
        decoupled_weight_decay: Decay as in `adamw`.
        mask: The parameters that decay: `None` (all), a pytree of bools with their structure or a
            prefix of it, or a function from the parameters to such a pytree. PyTorch: parameter
            groups.
        mu_dtype: The dtype in which $m$ is stored, as in `optax.adam`; `None` for that of the
            parameters. A step rounds $m$ at its end and uses it unrounded.

    Returns:
        An optax transformation; `state["moments"]` is an `optax.ScaleByAdamState` (with amsgrad
        `optax.ScaleByAmsgradState`), which holds $m$ and $v$.

    Raises:
        TypeError: An argument is not a number, or a flag or a leaf of the mask is not a bool; from
            `init`, parameters are complex.
        ValueError: A coefficient is negative, infinite or NaN, or a beta outside [0, 1); from
            `init`, the mask has another structure than the parameters; from `update`, `params` is
            missing although they decay.

    Note (PyTorch):
        Equal up to rounding, but not bitwise: a chain multiplies by the learning rate last, PyTorch
        first. Three parts of optax differ and are replaced here. Its bias correction
        `1 - decay**count` is off in float32 (by 1e-5 of its value for $\beta_2 = 0.999$, by 1e-3
        for 0.99999); `optax.amsgrad` takes the maximum of corrected second moments, PyTorch that of
        uncorrected ones; and its moments round in another order, which coupled decay feeds back.
        PyTorch treats the real and imaginary parts of complex parameters as two parameters, and so
        does `optax.contrib.split_real_and_imaginary(adam(...))`.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> params, gradient = jnp.array([1.0, -2.0]), jnp.array([0.25, 1.5])
        >>> optimizer = adam(0.1, weight_decay=0.5)
        >>> updates, state = optimizer.update(gradient, optimizer.init(params), params)
        >>> optax.apply_updates(params, updates)
        Array([ 0.9, -2.1], dtype=float32)

    References:
        Kingma and Ba, "Adam: A Method for Stochastic Optimization", arXiv:1412.6980, ICLR 2015.
        Reddi et al., [On the Convergence of Adam and
        Beyond](https://openreview.net/forum?id=ryQu7f-RZ), ICLR 2018.
    """
    check_arguments(learning_rate, betas, eps, weight_decay)
    check_float_dtype("mu_dtype", mu_dtype)
    moments = _scale_by_adam(betas[0], betas[1], eps, check_bool("amsgrad", amsgrad), mu_dtype)
    links = chain_links(
        moments, learning_rate, weight_decay, mask, maximize, decoupled_weight_decay
    )
    return rounded_once(links)


@explain_names
def adamw(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    betas: Betas = (0.9, 0.999),
    eps: ScalarLike = 1e-8,
    weight_decay: WeightDecay = 1e-2,
    amsgrad: bool = False,
    *,
    maximize: bool = False,
    mask: Mask = None,
    mu_dtype: DTypeLike | None = None,
) -> optax.GradientTransformation:
    r"""Create the equivalent of `torch.optim.AdamW`: Adam with decoupled weight decay.

    $$w_t = (1 - \eta_t \lambda)\, w_{t-1}
      - \eta_t \frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon}$$

    with the moments of `adam`, computed from the gradient alone: the decay never passes through
    them. **No penalty in the loss is equivalent**, not even `regjax.l2_penalty`.

    The arguments, the state and the errors are those of `adam` with `decoupled_weight_decay=True`;
    the learning rate scales the decay too.

    Note (PyTorch):
        Equal up to rounding. In float32, PyTorch and this function shrink by the rounded number
        $1 - \eta\lambda$, which keeps few digits of a small decay (0.14 % are lost at
        $\eta\lambda = 10^{-5}$), and none below $3 \cdot 10^{-8}$. Where they matter, chain
        `add_independent_weight_decay` or `optax.add_decayed_weights`, which keep them.
        `optax.adamw` keeps them too, so a float32 run is 2e-5 from PyTorch's after a thousand
        steps; it also has another default, `weight_decay=1e-4`, and the differences listed in
        `adam`.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> params, gradient = jnp.array([1.0, -2.0]), jnp.array([0.25, 1.5])
        >>> optimizer = adamw(0.1, weight_decay=0.5)
        >>> updates, state = optimizer.update(gradient, optimizer.init(params), params)
        >>> optax.apply_updates(params, updates)
        Array([ 0.85, -2.  ], dtype=float32)

    References:
        Loshchilov and Hutter, "Decoupled Weight Decay Regularization", arXiv:1711.05101, ICLR 2019.
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
        mu_dtype=mu_dtype,
    )


# In this file, because pickled states name the module of their class.
class ScaleByNadamState(NamedTuple):
    r"""State of `nadam`.

    Attributes:
        count: The number of steps taken.
        mu: The first moment.
        nu: The second moment.
        mu_product: $\prod_{i \le t} \mu_i$ over the steps taken, in float32 as in PyTorch. It falls
            to 0, where it does no harm.
    """

    count: Int[Array, ""]  # pyright: ignore[reportIncompatibleMethodOverride]  # not tuple.count
    mu: PyTree
    nu: PyTree
    mu_product: Float[Array, ""]


def check_arguments(
    learning_rate: optax.ScalarOrSchedule,
    betas: Betas,
    eps: ScalarLike,
    weight_decay: WeightDecay,
) -> None:
    check_rates(learning_rate, weight_decay)
    check_coefficient("eps", eps, fix="Pass 1e-8.")
    check_pair("betas", betas, fix="Pass (0.9, 0.999).")
    b1, b2 = betas
    check_coefficient("betas[0]", b1, fix="Pass 0.9.", below=1.0)
    check_coefficient("betas[1]", b2, fix="Pass 0.999.", below=1.0)


def _scale_by_adam(
    b1: ScalarLike, b2: ScalarLike, eps: ScalarLike, amsgrad: bool, mu_dtype: DTypeLike | None
) -> optax.GradientTransformation:
    """`optax.scale_by_adam` with an exact bias correction, and PyTorch's maximum for amsgrad."""

    def init(params: PyTree) -> optax.ScaleByAdamState | optax.ScaleByAmsgradState:
        start = no_moments(params, mu_dtype)
        if amsgrad:
            largest = zeros_like(params)
            return optax.ScaleByAmsgradState(**start._asdict(), nu_max=largest)
        return start

    def update(updates: PyTree, state: Any, params: PyTree | None = None) -> tuple[PyTree, Any]:
        del params
        new_state = with_moments(state, updates, b1, b2)
        divisor = new_state.nu
        if amsgrad:
            divisor = jax.tree.map(jnp.maximum, state.nu_max, divisor)
            new_state = new_state._replace(nu_max=divisor)
        c1, c2 = bias_correction(b1, new_state.count), bias_correction(b2, new_state.count)
        updates = jax.tree.map(
            lambda m, v: (m / c1.astype(m.dtype)) / (jnp.sqrt(v / c2.astype(v.dtype)) + eps),
            cast_like(new_state.mu, divisor),
            divisor,
        )
        return updates, new_state

    return optax.GradientTransformation(init, update)


def no_moments(params: PyTree, mu_dtype: DTypeLike | None = None) -> optax.ScaleByAdamState:
    check_real(params, "Adam and its variants", SPLIT)
    count = jnp.zeros([], jnp.int32)
    return optax.ScaleByAdamState(count, zeros_like(params, mu_dtype), zeros_like(params))


def with_moments(state: State, updates: PyTree, b1: ScalarLike, b2: ScalarLike) -> State:
    """Count the step and update both moments, in PyTorch's order of rounding."""

    def second(v: Array, g: Array) -> Array:
        return rounded_product(v, b2) + (1 - b2) * g * g

    return state._replace(
        count=optax.safe_increment(state.count),
        mu=first_moment(state.mu, updates, b1),
        nu=jax.tree.map(second, state.nu, updates),
    )


def first_moment(mu: PyTree, updates: PyTree, b1: ScalarLike) -> PyTree:
    # From the nearer end, like PyTorch's lerp: starting from the other would round the gradient
    # off.
    def from_moment(m: Array, g: Array) -> Array:
        return m + (1 - b1) * (g - m)

    def from_gradient(m: Array, g: Array) -> Array:
        return g - b1 * (g - m)

    def from_either(m: Array, g: Array) -> Array:
        return jnp.where(jnp.greater(b1, 0.5), from_moment(m, g), from_gradient(m, g))

    is_known = isinstance(b1, int | float)
    lerp = from_either if not is_known else from_moment if b1 > 0.5 else from_gradient
    updates, mu = promoted(updates, mu)
    return jax.tree.map(lerp, mu, updates)
