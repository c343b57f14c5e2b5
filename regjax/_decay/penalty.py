"""Penalties: regularization as a term of the loss.

None of the squared penalties has a factor of one half, hence the factor 2 in their gradients.
"""

from __future__ import annotations

from itertools import compress
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from regjax._decay.paths import named_leaves
from regjax._decay.validation import check_reference, resolve_mask, resolve_reference
from regshared.checks import check_coefficient

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from jaxtyping import Array, Float, Inexact, PyTree, Scalar, ScalarLike

    from regjax._decay.validation import Mask


_T = TypeVar("_T")
_FIX = "Pass 0.0 for no penalty, or the value of a schedule at this step."


def l1_penalty(params: PyTree, weight_decay: ScalarLike, *, mask: Mask = None) -> Scalar:
    r"""Compute the L1 penalty of parameters (the lasso), to be added to a loss.

    $$\Omega(w) = \lambda \sum_i |w_i|, \qquad
      \nabla \Omega(w) = \lambda \operatorname{sign}(w), \quad \operatorname{sign}(0) = 0$$

    Under SGD and Adam (coupled decay) it trains like `regjax.optim.add_l1_decay` with the same
    coefficient at the head of the chain. Subgradient steps cross zero and return: weights become
    small, but seldom exactly 0. Complex numbers contribute their modulus. For the arguments, result
    and errors see `l2_penalty`.

    Note (PyTorch):
        `regtorch.l1_penalty(module, weight_decay)` has the same value and gradient. The derivative
        of `jnp.abs` at 0 is 1, that of `torch.abs` is 0: `jnp.abs(w).sum()` pushes weights that are
        0, this penalty leaves them.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> jax.value_and_grad(l1_penalty)(jnp.array([1.0, -2.0, 0.0]), 0.5)
        (Array(1.5, dtype=float32), Array([ 0.5, -0.5,  0. ], dtype=float32))

    References:
        Tibshirani, "Regression Shrinkage and Selection via the Lasso", JRSS B 58(1), 1996.
    """
    check_coefficient("weight_decay", weight_decay, fix=_FIX)
    return _times(weight_decay, _sum(map(_absolute, _weights("l1_penalty", params, mask))))


def l2_penalty(params: PyTree, weight_decay: ScalarLike, *, mask: Mask = None) -> Scalar:
    r"""Compute the L2 penalty of parameters, to be added to a loss.

    $$\Omega(w) = \lambda \sum_i |w_i|^2, \qquad \nabla \Omega(w) = 2 \lambda w$$

    The `weight_decay=d` of an optimizer adds $d\,w$ to the gradient, so **this penalty with
    `weight_decay=c` trains like an optimizer with `weight_decay=2 * c`** if the decay is coupled
    (SGD, Adam). It matches no setting of AdamW, whose decay never passes through the moments.

    Args:
        params: A pytree of float or complex arrays; `None` is skipped.
        weight_decay: $\lambda$: a finite number, not negative. It may be traced, and then is not
            checked, and it may be differentiated.
        mask: The leaves that count, as in `regjax.optim`: `None` (all), a pytree of bools with the
            structure of `params` or a prefix of it, or a function from `params` to such a pytree.
            Masked-out leaves may be anything.

    Returns:
        A real scalar, 0.0 if there is nothing to sum. Half types are summed in float32; the result
        has the widest dtype of the sums.

    Raises:
        TypeError: A leaf that counts is not a float or complex array, a leaf of the mask is not a
            bool, or a coefficient is not a number.
        ValueError: A coefficient is negative, infinite or NaN, or the mask has another structure.

    Note (PyTorch):
        `regtorch.l2_penalty(module, weight_decay)` has the same value. For complex parameters
        `jax.grad` gives the conjugate of PyTorch's gradient, as always.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> params = {"kernel": jnp.array([1.0, 2.0]), "bias": jnp.array([3.0])}
        >>> float(l2_penalty(params, 0.5))
        7.0
        >>> jax.grad(l2_penalty)(params, 0.5, mask={"kernel": True, "bias": False})
        {'bias': Array([0.], dtype=float32), 'kernel': Array([1., 2.], dtype=float32)}

    References:
        Hoerl and Kennard, "Ridge Regression", Technometrics 12(1), 1970. Loshchilov and Hutter,
        "Decoupled Weight Decay Regularization", ICLR 2019, on the difference between a penalty and
        AdamW.
    """
    check_coefficient("weight_decay", weight_decay, fix=_FIX)
    return _times(weight_decay, _sum(map(_squared, _weights("l2_penalty", params, mask))))


def elastic_net_penalty(
    params: PyTree, l1: ScalarLike, l2: ScalarLike, *, mask: Mask = None
) -> Scalar:
    r"""Compute the elastic net, L1 and L2 in one penalty, to be added to a loss.

    $$\Omega(w) = \lambda_1 \sum_i |w_i| + \lambda_2 \sum_i |w_i|^2, \qquad
      \nabla \Omega(w) = \lambda_1 \operatorname{sign}(w) + 2 \lambda_2 w$$

    `l1` is $\lambda_1$ and `l2` is $\lambda_2$; the other arguments, the result and the errors are
    those of `l2_penalty`. scikit-learn's `ElasticNet(alpha, l1_ratio)` minimizes half the mean
    squared error plus this penalty with `l1 = alpha * l1_ratio` and `l2 = alpha * (1 - l1_ratio) /
    2`, intercept masked out. With the full mean squared error, double both.

    Note (PyTorch):
        `regtorch.elastic_net_penalty(module, l1, l2)` has the same value.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> jax.value_and_grad(elastic_net_penalty)(jnp.array([1.0, -2.0, 0.0]), 0.5, 0.25)
        (Array(2.75, dtype=float32), Array([ 1. , -1.5,  0. ], dtype=float32))

    References:
        Zou and Hastie, JRSS B 67(2), 2005.
    """
    check_coefficient("l1", l1, fix=_FIX)
    check_coefficient("l2", l2, fix=_FIX)
    weights = _weights("elastic_net_penalty", params, mask)
    absolute, squares = _sum(map(_absolute, weights)), _sum(map(_squared, weights))
    return _times(l1, absolute) + _times(l2, squares)


def l2_sp_penalty(
    params: PyTree, reference: PyTree, weight_decay: ScalarLike, *, mask: Mask = None
) -> Scalar:
    r"""Compute the squared distance of parameters from a starting point (L2-SP).

    $$\Omega(w) = \lambda \sum_i |w_i - w^0_i|^2, \qquad \nabla \Omega(w) = 2 \lambda (w - w^0)$$

    In fine-tuning it pulls weights toward those of the pretrained model instead of zero. Under SGD
    and Adam (coupled decay) it trains like `regjax.optim.add_l2_sp_decay(reference, 2 *
    weight_decay)` at the head of the chain. The usual recipe applies `l2_penalty`, with its own
    coefficient, to layers that were not pretrained.

    `reference` is $w^0$, a pytree with the structure of `params`, and its shapes for leaves that
    count. It gets no gradient, and is cast to the dtype of the sums. The other arguments, the
    result and other errors are those of `l2_penalty`.

    Raises:
        TypeError: A leaf of the reference is not a float or complex array, or is complex while the
            parameter is real.
        ValueError: The reference has another structure than `params`, or a leaf of another shape;
            the message names the path.

    Note (PyTorch):
        `regtorch.l2_sp_penalty(module, reference, weight_decay)` has the same value.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> params, pretrained = jnp.array([1.0, 2.0]), jnp.array([1.0, 1.0])
        >>> jax.value_and_grad(l2_sp_penalty)(params, pretrained, 0.5)
        (Array(0.5, dtype=float32), Array([0., 1.], dtype=float32))

    References:
        Li, Grandvalet and Davoine, "Explicit Inductive Bias for Transfer Learning with
        Convolutional Networks", ICML 2018. Its coefficient is halved: $\alpha / 2$ there is
        $\lambda$ here.
    """
    check_coefficient("weight_decay", weight_decay, fix=_FIX)
    weights = _weights("l2_sp_penalty", params, mask)
    origins = _counted(named_leaves(resolve_reference(reference, params)), params, mask)
    apart = map(lambda w, origin: w - _origin(w, *origin), weights, origins)
    return _times(weight_decay, _sum(map(_squared, apart)))


def _counted(leaves: Sequence[_T], params: PyTree, mask: Mask) -> list[_T]:
    """Return the items, one per parameter, for which the mask is True."""
    decays = jax.tree.leaves(resolve_mask(mask, params))
    return list(compress(leaves, decays))


def _weights(function: str, params: PyTree, mask: Mask) -> list[Inexact[Array, "*_"]]:
    named = _counted(named_leaves(params), params, mask)
    return [_widened(function, name, leaf) for name, leaf in named]


def _widened(function: str, name: str, leaf: Any) -> Inexact[Array, "*shape"]:
    is_array = isinstance(leaf, jax.Array | np.ndarray | np.generic)
    if not is_array or not jnp.issubdtype(leaf.dtype, jnp.inexact):
        found = f"an array of {leaf.dtype}" if is_array else repr(leaf)
        raise TypeError(
            f"params at '{name}' must be a float or complex array for {function}; got {found}. Set "
            "it to False in `mask`, or pass the trainable arrays only, such as "
            "equinox.filter(model, equinox.is_inexact_array)."
        )
    # Half types have too few digits to accumulate in, and float16 overflows at 256 squared.
    leaf = jnp.asarray(leaf)
    return leaf.astype(np.promote_types(leaf.dtype, np.float32))


def _origin(leaf: Inexact[Array, "*shape"], name: str, reference: Any) -> Inexact[Array, "*shape"]:
    check_reference(name, leaf, reference)
    return lax.stop_gradient(jnp.asarray(reference, leaf.dtype))


def _absolute(leaf: Inexact[Array, "*shape"]) -> Float[Array, "*shape"]:
    # The derivative of jnp.abs at 0 is 1; here it is 0, as in PyTorch.
    return jnp.abs(jnp.where(leaf == 0, jnp.zeros_like(leaf), leaf))


def _squared(leaf: Inexact[Array, "*shape"]) -> Float[Array, "*shape"]:
    return (leaf * leaf.conj()).real


def _sum(terms: Iterable[Float[Array, "*_"]]) -> Scalar:
    """Sum all elements of all arrays, in the widest of their dtypes."""
    sums = [jnp.sum(term) for term in terms]
    dtype = max((s.dtype for s in sums), key=lambda d: d.itemsize, default=jnp.result_type(float))
    return sum((s.astype(dtype) for s in sums), start=jnp.zeros((), dtype))


def _times(coefficient: ScalarLike, total: Scalar) -> Scalar:
    return jnp.asarray(coefficient, total.dtype) * total
