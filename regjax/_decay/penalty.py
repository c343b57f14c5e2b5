"""Penalties: regularisation as a term of the loss."""

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
    from collections.abc import Callable, Iterable, Sequence

    from jaxtyping import Array, Float, Inexact, PyTree, Scalar, ScalarLike

    Mask = PyTree[bool] | Callable[[PyTree], PyTree[bool]] | None

_T = TypeVar("_T")
_FIX = "pass 0.0 for no penalty, and of a schedule its value at this step"


def l1_penalty(params: PyTree, weight_decay: ScalarLike, *, mask: Mask = None) -> Scalar:
    r"""Compute the L1 penalty of parameters (the lasso), to be added to a loss.

    $$\Omega(w) = \lambda \sum_i |w_i|, \qquad
      \nabla \Omega(w) = \lambda \operatorname{sign}(w), \quad \operatorname{sign}(0) = 0$$

    Under SGD and Adam (coupled decay) it trains as `regjax.optim.add_l1_decay` with the same
    coefficient does at the head of the chain. A subgradient step crosses zero and comes back: it
    makes weights small, and seldom exactly 0.

    Args:
        params: A tree of float or complex arrays of any shapes and dtypes; `None` is skipped. Of a
            complex number the modulus counts.
        weight_decay: The coefficient $\lambda$: a finite number, not negative; may be traced, and
            differentiated. A traced value is not checked.
        mask: Which leaves count, as in `l2_penalty`.

    Returns:
        A real scalar of the dtype that `l2_penalty` has; 0.0 where there is nothing to sum.

    Raises:
        TypeError: As `l2_penalty` does.
        ValueError: As `l2_penalty` does.

    PyTorch: `regtorch.l1_penalty(module, weight_decay)` is the same number, with the same gradient
    at 0, also for a complex 0. The derivative of `jnp.abs` at 0 is 1, that of `torch.abs` is 0: a
    penalty written as `jnp.abs(w).sum()` pushes weights that are 0, this one leaves them.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> params = jnp.array([1.0, -2.0, 0.0])
        >>> float(l1_penalty(params, 0.5))
        1.5
        >>> jax.grad(l1_penalty)(params, 0.5)
        Array([ 0.5, -0.5,  0. ], dtype=float32)

    References:
        Tibshirani, "Regression Shrinkage and Selection via the Lasso", JRSS B 58(1), 1996.
    """
    check_coefficient("weight_decay", weight_decay, fix=_FIX)
    return _times(weight_decay, _sum(map(_absolute, _weights("l1_penalty", params, mask))))


def l2_penalty(params: PyTree, weight_decay: ScalarLike, *, mask: Mask = None) -> Scalar:
    r"""Compute the L2 penalty of parameters, to be added to a loss.

    $$\Omega(w) = \lambda \sum_i |w_i|^2, \qquad \nabla \Omega(w) = 2 \lambda w$$

    There is no one half in it, hence the 2 in the gradient. The `weight_decay=d` of an optimizer
    adds $d\,w$ to the gradient, so **this penalty with `weight_decay=c` trains like an optimizer
    with `weight_decay=2 * c`** where the decay is coupled (SGD, Adam), and like no setting of
    AdamW, whose decay never passes through the moments.

    Args:
        params: A tree of float or complex arrays of any shapes and dtypes; `None` is skipped.
        weight_decay: The coefficient $\lambda$: a finite number, not negative; may be traced, and
            differentiated. A traced value is not checked.
        mask: Which leaves count, as in `regjax.optim`: `None` (all), a tree of bools with the
            structure of `params` or a prefix of it, or a function from `params` to such a tree.
            Leaves masked out may be anything.

    Returns:
        A real scalar. Half precision is summed in float32; the result has the widest dtype in
        which a leaf was summed. It is 0.0 where there is nothing to sum.

    Raises:
        TypeError: A leaf that counts is not a float or complex array, a leaf of the mask is not a
            bool, or `weight_decay` is not a number.
        ValueError: `weight_decay` is negative, infinite or NaN, or the mask has another structure.

    PyTorch: `regtorch.l2_penalty(module, weight_decay)` is the same number. For complex parameters
    `jax.grad` gives the conjugate of PyTorch's gradient, as always.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> params = {"kernel": jnp.array([1.0, 2.0]), "bias": jnp.array([3.0])}
        >>> float(l2_penalty(params, 0.5))
        7.0
        >>> jax.grad(l2_penalty)(params, 0.5, mask={"kernel": True, "bias": False})
        {'bias': Array([0.], dtype=float32), 'kernel': Array([1., 2.], dtype=float32)}

    References:
        Hoerl and Kennard, "Ridge Regression", Technometrics 12(1), 1970.
        Loshchilov and Hutter, [Decoupled Weight Decay Regularization](https://arxiv.org/abs/1711.05101),
        ICLR 2019: why a penalty is not what AdamW does.
    """
    check_coefficient("weight_decay", weight_decay, fix=_FIX)
    return _times(weight_decay, _sum(map(_squared, _weights("l2_penalty", params, mask))))


def elastic_net_penalty(
    params: PyTree, l1: ScalarLike, l2: ScalarLike, *, mask: Mask = None
) -> Scalar:
    r"""Compute the elastic net, L1 and L2 in one penalty, to be added to a loss.

    $$\Omega(w) = \lambda_1 \sum_i |w_i| + \lambda_2 \sum_i |w_i|^2, \qquad
      \nabla \Omega(w) = \lambda_1 \operatorname{sign}(w) + 2 \lambda_2 w$$

    scikit-learn's `ElasticNet(alpha, l1_ratio)` minimises half the mean squared error plus this
    penalty with `l1 = alpha * l1_ratio` and `l2 = alpha * (1 - l1_ratio) / 2`, intercept masked
    out. Beside the mean squared error without the half, double both.

    Args:
        params: As in `l1_penalty`.
        l1: The coefficient $\lambda_1$ of the absolute values, as `l1_penalty` takes it.
        l2: The coefficient $\lambda_2$ of the squares, as `l2_penalty` takes it: no one half.
        mask: Which leaves count, as in `l2_penalty`.

    Returns:
        A real scalar of the dtype that `l2_penalty` has; 0.0 where there is nothing to sum.

    Raises:
        TypeError: As `l2_penalty` does, of `l1` and `l2`.
        ValueError: As `l2_penalty` does, of `l1` and `l2`.

    PyTorch: `regtorch.elastic_net_penalty(module, l1, l2)` is the same number.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> params = jnp.array([1.0, -2.0, 0.0])
        >>> float(elastic_net_penalty(params, 0.5, 0.25))
        2.75
        >>> jax.grad(elastic_net_penalty)(params, 0.5, 0.25)
        Array([ 1. , -1.5,  0. ], dtype=float32)

    References:
        Zou and Hastie, "Regularization and Variable Selection via the Elastic Net", JRSS B 67(2),
        2005.
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

    $$\Omega(w) = \lambda \sum_i |w_i - w^0_i|^2, \qquad
      \nabla \Omega(w) = 2 \lambda (w - w^0)$$

    For fine-tuning: weights are drawn to those of the pretrained model, not to zero. As in
    `l2_penalty` there is no one half, so under SGD and Adam (coupled decay) it trains as
    `regjax.optim.add_l2_sp_decay(reference, 2 * weight_decay)` does at the head of the chain.
    Layers that were not pretrained take `l2_penalty`, in the usual recipe with a coefficient of
    their own.

    Args:
        params: As in `l2_penalty`.
        reference: $w^0$: a tree with the structure of `params`, and the same shapes where leaves
            count. It gets no gradient. A leaf is cast to the dtype in which its parameter is
            summed.
        weight_decay: The coefficient $\lambda$, as in `l2_penalty`.
        mask: Which leaves count, as in `l2_penalty`.

    Returns:
        A real scalar of the dtype that `l2_penalty` has; 0.0 where there is nothing to sum.

    Raises:
        TypeError: As `l2_penalty` does; or a leaf of the reference is not a float or complex array,
            or complex beside a real parameter.
        ValueError: As `l2_penalty` does; or the reference has another structure than `params`, or a
            leaf of it another shape: the message names the place.

    PyTorch: `regtorch.l2_sp_penalty(module, reference, weight_decay)` is the same number.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> params, pretrained = jnp.array([1.0, 2.0]), jnp.array([1.0, 1.0])
        >>> float(l2_sp_penalty(params, pretrained, 0.5))
        0.5
        >>> jax.grad(l2_sp_penalty)(params, pretrained, 0.5)
        Array([0., 1.], dtype=float32)

    References:
        Li, Grandvalet and Davoine, [Explicit Inductive Bias for Transfer Learning with
        Convolutional Networks](https://arxiv.org/abs/1802.01483), ICML 2018. Its coefficient is
        halved: $\alpha / 2$ there is $\lambda$ here.
    """
    check_coefficient("weight_decay", weight_decay, fix=_FIX)
    weights = _weights("l2_sp_penalty", params, mask)
    origins = _counted(named_leaves(resolve_reference(reference, params)), params, mask)
    apart = map(lambda w, origin: w - _origin(w, *origin), weights, origins)
    return _times(weight_decay, _sum(map(_squared, apart)))


def _counted(leaves: Sequence[_T], params: PyTree, mask: Mask) -> list[_T]:
    """Choose, of one thing for each parameter, those that the mask lets through."""
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
            f"{function} takes float or complex arrays, but params at '{name}' is {found}: give it "
            "False in `mask`, or pass the trainable arrays only "
            "(such as equinox.filter(model, equinox.is_inexact_array))"
        )
    # A half type has too few digits to add up in, and float16 overflows at 256 squared.
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
    """Add up all elements of all arrays, in the widest of their dtypes."""
    sums = [jnp.sum(term) for term in terms]
    dtype = max((s.dtype for s in sums), key=lambda d: d.itemsize, default=jnp.result_type(float))
    return sum((s.astype(dtype) for s in sums), start=jnp.zeros((), dtype))


def _times(coefficient: ScalarLike, total: Scalar) -> Scalar:
    return jnp.asarray(coefficient, total.dtype) * total
