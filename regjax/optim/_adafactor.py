"""Adafactor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax

from regjax.optim._gradients import PARTITION, check_given, check_real
from regjax.optim._links import (
    OFF,
    chain_links,
    check_bounds,
    check_mask,
    check_pair,
    check_rates,
    is_zero,
    rounded_once,
    widest,
)
from regshared.checks import check_bool, check_coefficient
from regshared.spellings import explain_names

if TYPE_CHECKING:
    from collections.abc import Callable

    from jax.typing import ArrayLike
    from jaxtyping import Array, Float, PyTree, ScalarLike

    from regjax.optim._links import Mask, WeightDecay


@explain_names
def adafactor(
    learning_rate: optax.ScalarOrSchedule = 1e-2,
    beta2_decay: ScalarLike = -0.8,
    eps: tuple[ScalarLike | None, ScalarLike] = (None, 1e-3),
    d: ScalarLike = 1.0,
    weight_decay: WeightDecay = OFF,
    *,
    maximize: bool = False,
    mask: Mask = None,
) -> optax.GradientTransformation:
    r"""Create the equivalent of `torch.optim.Adafactor`: factored second moments, decoupled decay.

    With $g_t = \pm\nabla f(w_{t-1})$ and $\beta_t = 1 - t^{\gamma}$, a leaf of shape (…, m, n)
    keeps the averages of its squared gradients along each of its last two axes,

    $$R_t = \beta_t R_{t-1} + \frac{1 - \beta_t}{n} \sum_j g_{t,ij}^2, \qquad
      C_t = \beta_t C_{t-1} + \frac{1 - \beta_t}{m} \sum_i g_{t,ij}^2, \qquad
      v_t = \frac{R_t C_t}{\max(\operatorname{mean}_i R_t, \epsilon_1)}$$

    and a leaf of fewer axes keeps $v_t = \beta_t v_{t-1} + (1 - \beta_t) g_t^2$ itself. Then

    $$u_t = \frac{g_t}{\max(\sqrt{v_t}, \epsilon_1)}, \qquad
      w_t = (1 - \eta_t \lambda)\, w_{t-1} - \min\left(\eta_t, \frac{1}{\sqrt t}\right)
      \frac{\max(\epsilon_2, \operatorname{RMS}(w_{t-1}))}{\max(1, \operatorname{RMS}(u_t) / d)}\,
      u_t$$

    Args:
        learning_rate: $\eta$ (PyTorch: `lr`) or a schedule: the largest step, relative to the RMS
            of a leaf. It scales the decay too, even where $1/\sqrt t$ caps the step.
        beta2_decay: $\gamma$, at most 0; sets how fast $\beta_t$ approaches 1.
        eps: $\epsilon_1$, the lower bound of the root of a second moment, and $\epsilon_2$, that of
            the RMS of a leaf in the step. `None` is the machine epsilon of the leaf's dtype.
        d: The largest RMS of $u_t$, at least 1; infinity for no clipping.
        weight_decay: $\lambda$ or a schedule. No penalty in the loss is equivalent.
        maximize: See `adam`.
        mask: See `adam`.

    Returns:
        An optax transformation whose `update` always needs `params`. `state["moments"]` begins with
        an `optax.FactoredState`: `v_row` of shape (…, m, 1) and `v_col` of shape (…, 1, n),
        PyTorch's `row_var` and `col_var`, and `v` for leaves of fewer than two axes;
        `optax.MaskedNode()` where a field has no array for a leaf. An (m, n) leaf thus costs m + n
        numbers.

    Raises:
        TypeError: As in `adam`.
        ValueError: As in `adam`; or `beta2_decay` is above 0, or `d` below 1.

    Note (PyTorch):
        Equal up to rounding, with the decay of `adamw`, with one exception: where `eps[0]` is
        `None` and a group mixes dtypes, PyTorch takes the epsilon of the first one for all.
        `optax.adafactor` is another algorithm: it factors other axes, and its bounds and its
        learning rate differ.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> params = {"kernel": jnp.array([[3.0, -4.0, 0.0]]), "bias": jnp.array([1.0, -1.0])}
        >>> gradient = {"kernel": jnp.array([[0.5, -0.5, 0.5]]), "bias": jnp.array([2.0, -1.0])}
        >>> optimizer = adafactor(0.25, weight_decay=0.5)
        >>> updates, state = optimizer.update(gradient, optimizer.init(params), params)
        >>> optax.apply_updates(params, updates)["bias"]
        Array([ 0.625, -0.625], dtype=float32)
        >>> factored = state["moments"][0]
        >>> factored.v_row["kernel"].shape, factored.v_col["kernel"].shape
        ((1, 1), (1, 3))

    References:
        Shazeer and Stern, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost",
        arXiv:1804.04235, ICML 2018.
    """
    check_rates(learning_rate, weight_decay)
    check_bounds("beta2_decay", beta2_decay, high=0.0, fix="Pass -0.8.")
    check_pair("eps", eps, fix="Pass (None, 1e-3).")
    eps1, eps2 = eps
    if eps1 is not None:
        check_coefficient("eps[0]", eps1, fix="Pass None for the machine epsilon.")
    check_coefficient("eps[1]", eps2, fix="Pass 1e-3.")
    check_bounds("d", d, low=1.0, fix="Pass 1.0, or math.inf for no clipping.")

    def floor(leaf: Array) -> ScalarLike:
        return float(jnp.finfo(leaf.dtype).eps) if eps1 is None else eps1

    def chain(params: PyTree | None) -> optax.GradientTransformation:
        check_given(params, "Adafactor's step is relative to them")

        # Computed here, because inside the chain half types are float32, with another epsilon.
        def floors() -> PyTree[ScalarLike]:
            return jax.tree.map(floor, params)

        moments = optax.chain(
            _scale_by_factored_rms(beta2_decay, floors),
            optax.clip_by_block_rms(d),
            optax.scale_by_param_block_rms(eps2),
        )
        step = optax.chain(
            _cap_learning_rate(learning_rate), optax.scale_by_learning_rate(learning_rate)
        )
        options = {"maximize": maximize, "decoupled": True, "step": step}
        return chain_links(moments, learning_rate, weight_decay, mask, **options)

    check_bool("maximize", maximize)
    if not is_zero(weight_decay):
        check_mask(mask, weight_decay)
    return rounded_once(chain)


def _scale_by_factored_rms(
    beta2_decay: ScalarLike, floors: Callable[[], PyTree[ScalarLike]]
) -> optax.GradientTransformation:
    """`optax.scale_by_factored_rms` on the last two axes, with PyTorch's lower bounds."""
    # The second moment and the step size are our own, because optax.adafactor
    # - factors the two largest axes, and only from 128 on; PyTorch always factors the last two. In
    #   a convolution kernel these are height and width in PyTorch's layout, and channels in Flax's:
    #   only for matrices does the layout make no difference;
    # - adds 1e-30 to the squared gradient, where PyTorch bounds the mean of R by eps1 and v by
    #   eps1**2 from below;
    # - computes beta in float32, also for float64 parameters;
    # - does not cap its learning rate by 1 / sqrt(t), nor scale its decay by it.

    def init(params: PyTree) -> optax.FactoredState:
        check_real(params, "Adafactor", PARTITION)
        return optax.FactoredState(
            jnp.zeros([], jnp.int32),
            v_row=jax.tree.map(lambda p: _zeros(p, -1, if_factored=True), params),
            v_col=jax.tree.map(lambda p: _zeros(p, -2, if_factored=True), params),
            v=jax.tree.map(lambda p: _zeros(p, None, if_factored=False), params),
        )

    def update(updates: PyTree, state: Any, params: PyTree | None = None) -> tuple[PyTree, Any]:
        del params
        count = optax.safe_increment(state.count)
        share = jnp.asarray(count, float) ** widest(beta2_decay)

        def average(g: Array, old: Any, axis: int | None) -> Any:
            if isinstance(old, optax.MaskedNode):
                return old
            squared = jnp.square(g)
            new = squared if axis is None else squared.mean(axis, keepdims=True)
            return old + share.astype(g.dtype) * (new - old)

        def scale(g: Array, row: Any, col: Any, v: Any, floor: ScalarLike) -> Array:
            if g.ndim > 1:
                v = row * col / jnp.maximum(row.mean(-2, keepdims=True), floor)
            # The bound is outside the root, because the square of a small one is 0 in float32.
            return g / jnp.maximum(jnp.sqrt(v), floor)

        v_row = jax.tree.map(lambda g, old: average(g, old, -1), updates, state.v_row)
        v_col = jax.tree.map(lambda g, old: average(g, old, -2), updates, state.v_col)
        v = jax.tree.map(lambda g, old: average(g, old, None), updates, state.v)
        scaled = jax.tree.map(scale, updates, v_row, v_col, v, floors())
        return scaled, optax.FactoredState(count, v_row, v_col, v)

    return optax.GradientTransformation(init, update)


def _zeros(leaf: Array, axis: int | None, *, if_factored: bool) -> Array | optax.MaskedNode:
    if (leaf.ndim > 1) != if_factored:
        return optax.MaskedNode()
    zeros = jnp.zeros_like(leaf)
    # A reduction, as at each update, so that the factor is sharded as its parameter is.
    return zeros if axis is None else zeros.sum(axis, keepdims=True)


def _cap_learning_rate(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    """Cap the learning rate that follows in the chain at `1 / sqrt(t)`."""

    def factor(count: ArrayLike) -> Float[Array, ""]:
        rate = learning_rate(count) if callable(learning_rate) else learning_rate
        root = jnp.sqrt(jnp.asarray(count, float) + 1)
        # min(rate, 1 / root) / rate without a 0 / 0.
        return 1 / jnp.maximum(1.0, jnp.asarray(rate, root.dtype) * root)

    return optax.scale_by_schedule(factor)
