"""Muon."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from regjax._decay.paths import named_leaves
from regjax.optim._gradients import PARTITION, check_real
from regjax.optim._links import (
    cast_like,
    chain_links,
    check_float_dtype,
    check_pair,
    check_rates,
    is_dtype_of,
    promoted,
    rounded_once,
    zeros_like,
)
from regshared.checks import check_bool, check_coefficient, check_integer
from regshared.spellings import explain_names

if TYPE_CHECKING:
    from collections.abc import Callable

    from jax.typing import DTypeLike
    from jaxtyping import Array, Float, PyTree, ScalarLike

    from regjax.optim._links import Mask, WeightDecay

    Matrix = Float[Array, "m n"]
    Coefficients = tuple[ScalarLike, ScalarLike, ScalarLike]


@explain_names
def muon(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    weight_decay: WeightDecay = 0.1,
    momentum: ScalarLike = 0.95,
    nesterov: bool = True,
    ns_coefficients: Coefficients = (3.4445, -4.7750, 2.0315),
    eps: ScalarLike = 1e-7,
    ns_steps: int | Array = 5,
    adjust_lr_fn: str | None = None,
    *,
    mask: Mask = None,
    ns_dtype: DTypeLike = "bfloat16",
    transposed: bool = False,
    mu_dtype: DTypeLike | None = None,
) -> optax.GradientTransformation:
    r"""Create the equivalent of `torch.optim.Muon`: orthogonalized momentum, decoupled decay.

    $$b_t = \mu b_{t-1} + (1 - \mu) \nabla f(w_{t-1}), \qquad
      u_t = \begin{cases} (1 - \mu) \nabla f(w_{t-1}) + \mu b_t & \text{nesterov} \\
      b_t & \text{else} \end{cases}, \qquad
      w_t = (1 - \eta_t \lambda)\, w_{t-1} - \eta_t\, s\, O(u_t)$$

    $O$ brings the singular values of a matrix near 1 by Newton-Schulz steps,

    $$X_0 = \frac{u}{\max(\lVert u \rVert_F, \epsilon)}, \qquad
      X_{k+1} = a X_k + (b A + c A^2) X_k, \qquad A = X_k X_k^\top$$

    on the transpose if the matrix has more rows than columns. The factor $s$ depends only on the
    shape. Every parameter must be a matrix; send biases, embeddings and the rest to another
    optimizer with `optax.partition`, as in the example.

    Args:
        learning_rate: $\eta$ (PyTorch: `lr`), or a schedule from the step count, starting at 0. It
            scales the decay too, without $s$.
        weight_decay: $\lambda$ or a schedule. With 0.0, `update` does not need `params`. No penalty
            in the loss is equivalent.
        momentum: $\mu$.
        nesterov: Look ahead along the average of gradients.
        ns_coefficients: $a, b, c$.
        eps: $\epsilon$: a matrix of smaller norm is not scaled up to norm 1.
        ns_steps: The number of Newton-Schulz steps, below 100. As in PyTorch, 0 is allowed: $O(u)$
            is then $u$ scaled to norm 1, and not orthogonal.
        adjust_lr_fn: The formula of $s$ for `m` outputs and `n` inputs: `None` or "original" for
            $\sqrt{\max(1, m / n)}$; "match_rms_adamw" for $0.2 \sqrt{\max(m, n)}$, which gives the
            update the RMS usual for AdamW.
        mask: See `adam`.
        ns_dtype: The dtype in which Newton-Schulz steps are stored. In "bfloat16", as in PyTorch,
            an update is off by 1 to 3 % of its length; "float32" gives float32 precision.
        transposed: The matrices are (inputs, outputs), as in Flax, not (outputs, inputs), as in
            PyTorch. Only the "original" $s$ depends on it.
        mu_dtype: The dtype in which $b$ is stored; see `adam`.

    Returns:
        An optax transformation; `state["moments"]` begins with an `optax.EmaState`, which holds
        $b$.

    Raises:
        TypeError: As in `adam`; or `ns_steps` is not an integer.
        ValueError: As in `adam`; or `ns_coefficients` are not three finite numbers, `ns_steps` lies
            outside [0, 100), `adjust_lr_fn` is unknown or `ns_dtype` is not a float dtype; from
            `init`, a parameter is not a matrix.

    Note (PyTorch):
        Equal up to bfloat16: each framework sums in its own order, and five steps amplify a
        rounding by up to $a^5 \approx 480$. Everything else agrees up to rounding: to 1e-12 where
        both iterate in float64; the decay is that of `adamw`. PyTorch has no `ns_dtype` and no
        `transposed`. `optax.contrib.muon` mixes the Nesterov momentum in other proportions,
        iterates in the dtype of the gradients, has a default decay of 0, and sends parameters that
        are not matrices to AdamW.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from regjax.optim import adamw
        >>> params = {"kernel": jnp.eye(2), "bias": jnp.zeros(2)}
        >>> kinds = jax.tree.map(lambda p: "muon" if p.ndim == 2 else "adamw", params)
        >>> parts = {"muon": muon(0.5, ns_dtype="float32"), "adamw": adamw(0.1)}
        >>> optimizer = optax.partition(parts, kinds)
        >>> gradient = {"kernel": jnp.diag(jnp.array([3.0, -4.0])), "bias": jnp.ones(2)}
        >>> updates, state = optimizer.update(gradient, optimizer.init(params), params)
        >>> jnp.sign(updates["kernel"] + 0.5 * 0.1 * params["kernel"])  # without the decay
        Array([[-1.,  0.], [ 0.,  1.]], dtype=float32)
        >>> muon().init(params)
        Traceback (most recent call last):
        ValueError: params must be matrices for Muon; got shape (2,) at 'bias'. Send it to another
        optimizer with optax.partition.

    References:
        Jordan et al., [Muon: An optimizer for hidden layers in neural
        networks](https://kellerjordan.github.io/posts/muon/), 2024. Liu et al., "Muon is Scalable
        for LLM Training", arXiv:2502.16982, 2025.
    """
    check_rates(learning_rate, weight_decay)
    check_coefficient("momentum", momentum, fix="Pass 0.95.")
    check_coefficient("eps", eps, fix="Pass 1e-7.")
    check_bool("nesterov", nesterov)
    check_bool("transposed", transposed)
    check_float_dtype("mu_dtype", mu_dtype)
    check_pair("ns_coefficients", ns_coefficients, fix="Pass (3.4445, -4.7750, 2.0315).", length=3)
    _check_coefficients(ns_coefficients)
    _check_steps(ns_steps)
    if not isinstance(adjust_lr_fn, str | None) or adjust_lr_fn not in _SCALES:
        raise ValueError(
            'adjust_lr_fn must be None, "original" or "match_rms_adamw"; got '
            f"{adjust_lr_fn!r}. Pass None."
        )
    if not is_dtype_of(jnp.floating, ns_dtype):
        raise ValueError(
            f'ns_dtype must be a float dtype; got {ns_dtype!r}. Pass "bfloat16" or "float32".'
        )

    def step(u: Matrix) -> Matrix:
        outputs, inputs = reversed(u.shape) if transposed else u.shape
        scale = _SCALES[adjust_lr_fn](outputs, inputs)
        return scale * orthogonalize(u, ns_coefficients, eps, ns_steps, ns_dtype)

    # PyTorch's Muon only descends.
    moments = optax.chain(_average(momentum, nesterov, mu_dtype), _on_matrices(step))
    return rounded_once(chain_links(moments, learning_rate, weight_decay, mask, decoupled=True))


_SCALES: dict[str | None, Callable[[int, int], float]] = {
    "original": lambda m, n: math.sqrt(max(1.0, m / n)),
    "match_rms_adamw": lambda m, n: 0.2 * math.sqrt(max(m, n)),
}
_SCALES[None] = _SCALES["original"]


def orthogonalize(
    u: Matrix,
    coefficients: Coefficients,
    eps: ScalarLike,
    steps: int | Array,
    dtype: DTypeLike,
) -> Matrix:
    """Bring the singular values of a matrix near 1 by Newton-Schulz steps.

    Each step applies the odd polynomial of degree 5 with these `coefficients` to the singular
    values. The matrix is first divided by its norm, or by `eps` if that is larger. Every
    intermediate matrix is rounded to `dtype`; sums are in float32 at least.
    """
    # Half types are multiplied as they are, other types at the highest precision.
    is_half = jnp.finfo(dtype).bits < 32
    wide, precision = (jnp.float32, None) if is_half else (dtype, "highest")
    a, b, c = (jnp.asarray(x, wide) for x in coefficients)

    def dot(
        left: Float[Array, "m k"], right: Float[Array, "k n"], layout: Any
    ) -> Float[Array, "m n"]:
        return jnp.matmul(
            left, right, precision=precision, preferred_element_type=wide, out_sharding=layout
        )

    def step(_: Any, x: Matrix) -> Matrix:
        gram = dot(x, x.T, whole).astype(dtype)
        polynomial = (b * gram.astype(wide) + c * dot(gram, gram, whole)).astype(dtype)
        return (a * x.astype(wide) + dot(polynomial, x, by_columns)).astype(dtype)

    x = u.astype(dtype)
    is_tall = u.shape[0] > u.shape[1]
    if is_tall:
        x = x.T
    # Under an Explicit mesh the longer axis stays sharded, so a step communicates only the sums for
    # the small Gram matrix. Otherwise both are None.
    whole, by_columns = _layouts(x)
    if by_columns is not None:
        x = jax.sharding.reshard(x, by_columns)
    norm = jnp.sqrt(jnp.sum(jnp.square(x.astype(wide)))).astype(dtype)
    x = x / jnp.maximum(norm, jnp.asarray(eps, dtype))
    x = jax.lax.fori_loop(0, steps, step, x)
    x = (x.T if is_tall else x).astype(u.dtype)
    return x if by_columns is None else jax.sharding.reshard(x, jax.typeof(u).sharding)


def _layouts(x: Matrix) -> tuple[Any, Any]:
    """Return the layouts of a Gram matrix and of `x` with whole columns, or None for both."""
    sharding = jax.typeof(x).sharding
    if all(axis is None for axis in sharding.spec):
        return None, None
    specs = jax.P(None, None), jax.P(None, sharding.spec[1])
    whole, by_columns = (sharding.update(spec=spec) for spec in specs)
    return whole, by_columns


def _average(
    momentum: ScalarLike, nesterov: bool, dtype: DTypeLike | None
) -> optax.GradientTransformation:
    """`optax.ema` without bias correction; with `nesterov`, mixed with the gradient once more."""
    # Momentum and iteration are our own, because optax.contrib.muon
    # - corrects the bias of b and of the gradient, each by its own number, so that nesterov mixes
    #   them in other proportions; without nesterov the scaling to norm 1 undoes it;
    # - iterates in the dtype of the gradients, and stores the norm in it too;
    # - adds eps = 1e-8 to the norm, where PyTorch takes the larger of the two;
    # - counts the last axis as outputs, like transposed=True here.
    ema = optax.ema(momentum, debias=False)

    def init(params: PyTree) -> optax.EmaState:
        return optax.EmaState(jnp.zeros([], jnp.int32), zeros_like(params, dtype))

    def update(updates: PyTree, state: Any, params: PyTree | None = None) -> tuple[PyTree, Any]:
        gradients, old = promoted(updates, state.ema)
        average, state = ema.update(gradients, state._replace(ema=old), params)
        if nesterov:
            average = optax.tree.update_moment(gradients, average, momentum, 1)
        return cast_like(average, updates), state

    return optax.GradientTransformation(init, update)


def _on_matrices(function: Callable[[Matrix], Matrix]) -> optax.GradientTransformation:
    def init(params: PyTree) -> optax.EmptyState:
        check_real(params, "Muon", PARTITION)
        for name, leaf in named_leaves(params):
            if leaf.ndim != 2:
                raise ValueError(
                    f"params must be matrices for Muon; got shape {leaf.shape} at '{name}'. "
                    f"{PARTITION}"
                )
        return optax.EmptyState()

    def update(updates: PyTree, state: Any, params: PyTree | None = None) -> tuple[PyTree, Any]:
        del params
        return jax.tree.map(function, updates), state

    return optax.GradientTransformation(init, update)


def _check_steps(steps: Any) -> None:
    if not isinstance(steps, Tracer):
        check_integer("ns_steps", steps, minimum=0, maximum=99)
    elif steps.shape or not jnp.issubdtype(steps.dtype, jnp.integer):
        raise TypeError(f"ns_steps must be an integer; got {steps!r}.")


def _check_coefficients(coefficients: Any) -> None:
    numbers = tuple(coefficients)
    known = [x for x in numbers if not isinstance(x, Tracer)]
    if not np.all(np.isfinite([float(x) for x in known])):
        raise ValueError(
            f"ns_coefficients must be finite; got {coefficients}. Pass (3.4445, -4.7750, 2.0315)."
        )
