"""L2 as a term of the loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from regjax._decay import check_coefficient, resolve_mask
from regjax._paths import named_leaves

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Array, Float, PyTree, Scalar, ScalarLike


def l2_penalty(
    params: PyTree,
    weight_decay: ScalarLike,
    *,
    mask: PyTree[bool] | Callable[[PyTree], PyTree[bool]] | None = None,
) -> Scalar:
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
    check_coefficient(
        "weight_decay",
        weight_decay,
        fix="pass 0.0 for no penalty, and of a schedule its value at this step",
    )
    decays = jax.tree.leaves(resolve_mask(mask, params))
    sums = [
        _sum_of_squares(name, leaf)
        for (name, leaf), decay in zip(named_leaves(params), decays, strict=True)
        if decay
    ]
    dtype = max((s.dtype for s in sums), key=lambda d: d.itemsize, default=jnp.result_type(float))
    total = sum((s.astype(dtype) for s in sums), start=jnp.zeros((), dtype))
    return jnp.asarray(weight_decay, dtype) * total


def _sum_of_squares(name: str, leaf: Any) -> Float[Array, ""]:
    is_array = isinstance(leaf, jax.Array | np.ndarray | np.generic)
    if not is_array or not jnp.issubdtype(leaf.dtype, jnp.inexact):
        found = f"an array of {leaf.dtype}" if is_array else repr(leaf)
        raise TypeError(
            f"l2_penalty squares float or complex arrays, but params at '{name}' is {found}: give "
            "it False in `mask`, or pass the trainable arrays only "
            "(such as equinox.filter(model, equinox.is_inexact_array))"
        )
    # A half type has too few digits to add up in, and float16 overflows at 256 squared.
    wide = jnp.asarray(leaf, jnp.float32 if jnp.finfo(leaf.dtype).bits < 32 else None)
    return jnp.sum((wide * wide.conj()).real)
