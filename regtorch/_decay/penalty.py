"""Penalties: regularization as a term of the loss, with the values of `regjax`."""

from __future__ import annotations

from itertools import compress
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from regshared.checks import check_coefficient
from regtorch._decay.paths import named_leaves
from regtorch._decay.validation import check_reference, resolve_mask, resolve_reference, widened

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

    from regtorch._decay.paths import Params
    from regtorch._decay.validation import Mask

_T = TypeVar("_T")
_FIX = "Pass 0.0 for no penalty, or the value of a schedule at this step."


def l1_penalty(params: Params, weight_decay: float | Tensor, *, mask: Mask = None) -> Tensor:
    r"""Compute the L1 penalty of parameters (the lasso), to be added to a loss.

    $$\Omega(w) = \lambda \sum_i |w_i|, \qquad
      \nabla \Omega(w) = \lambda \operatorname{sign}(w), \quad \operatorname{sign}(0) = 0$$

    Under SGD and Adam (coupled decay) it trains like `regtorch.optim.add_l1_decay` with the same
    coefficient. Subgradient steps cross zero and return: weights become small, but seldom exactly
    0. Complex numbers contribute their modulus. For the arguments, result and errors see
    `l2_penalty`.

    Note (JAX):
        `regjax.l1_penalty` has the same gradient at 0 (where that of `jnp.abs` is 1).

    Example:
        >>> import torch
        >>> l1_penalty(torch.tensor([1.0, -2.0, 0.0]), 0.5)
        tensor(1.5000)

    References:
        Tibshirani, "Regression Shrinkage and Selection via the Lasso", JRSS B 58(1), 1996.
    """
    check_coefficient("weight_decay", weight_decay, fix=_FIX)
    return _times(weight_decay, _sum(map(torch.abs, _weights("l1_penalty", params, mask))))


def l2_penalty(params: Params, weight_decay: float | Tensor, *, mask: Mask = None) -> Tensor:
    r"""Compute the L2 penalty of parameters, to be added to a loss.

    $$\Omega(w) = \lambda \sum_i |w_i|^2, \qquad \nabla \Omega(w) = 2 \lambda w$$

    There is no factor of one half. The `weight_decay=d` of an optimizer adds $d\,w$ to the
    gradient, so **this penalty with `weight_decay=c` trains like an optimizer with `weight_decay=2
    * c`** if the decay is coupled (SGD, Adam). It matches no setting of AdamW, whose decay never
    passes through the moments.

    Args:
        params: A module, one tensor, a dict from names to tensors, or an iterable of tensors or of
            `(name, tensor)` pairs, float or complex. Not `state_dict()`, which is detached and
            holds buffers. Frozen parameters count in the value; to omit them, pass `mask=lambda
            name, tensor: tensor.requires_grad`.
        weight_decay: $\lambda$: a finite number, not negative; or a 0-d tensor, which may require a
            gradient and whose value is not checked.
        mask: Which parameters count: `None` (all), a dict from each name to a bool, a function of
            name and tensor, or, for tensors without names, a sequence of bools. Masked-out entries
            may be anything.

    Returns:
        A real 0-d tensor on the device of the first parameter that counts; 0.0 if there is none.
        Half precision is summed in float32; the result has the widest dtype of the sums.

    Raises:
        TypeError: A parameter that counts is not a float or complex tensor, a value of the mask is
            not a bool, or `weight_decay` is not a number.
        ValueError: `weight_decay` is negative, infinite or NaN, the mask does not fit the
            parameters, or `params` is a generator that yields nothing, such as a
            `module.parameters()` used twice.

    Example:
        >>> import torch
        >>> kernel, bias = torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([3.0])
        >>> params = {"kernel": kernel, "bias": bias}
        >>> l2_penalty(params, 0.5).item()
        7.0
        >>> l2_penalty(params, 0.5, mask=lambda name, tensor: name == "kernel").backward()
        >>> kernel.grad
        tensor([1., 2.])

    References:
        Hoerl and Kennard, "Ridge Regression", Technometrics 12(1), 1970. Loshchilov and Hutter,
        [ICLR 2019](https://arxiv.org/abs/1711.05101), on the difference between a penalty and
        AdamW.
    """
    check_coefficient("weight_decay", weight_decay, fix=_FIX)
    return _times(weight_decay, _sum(map(_squared, _weights("l2_penalty", params, mask))))


def elastic_net_penalty(
    params: Params, l1: float | Tensor, l2: float | Tensor, *, mask: Mask = None
) -> Tensor:
    r"""Compute the elastic net, L1 and L2 in one penalty, to be added to a loss.

    $$\Omega(w) = \lambda_1 \sum_i |w_i| + \lambda_2 \sum_i |w_i|^2, \qquad
      \nabla \Omega(w) = \lambda_1 \operatorname{sign}(w) + 2 \lambda_2 w$$

    `l1` is $\lambda_1$ and `l2` is $\lambda_2$; the other arguments, the result and the errors are
    those of `l2_penalty`. scikit-learn's `ElasticNet(alpha, l1_ratio)` minimizes half the mean
    squared error plus this penalty with `l1 = alpha * l1_ratio` and `l2 = alpha * (1 - l1_ratio) /
    2`, intercept masked out. With the full mean squared error (`nn.MSELoss`), double both.

    Example:
        >>> import torch
        >>> elastic_net_penalty(torch.tensor([1.0, -2.0, 0.0]), 0.5, 0.25)
        tensor(2.7500)

    References:
        Zou and Hastie, JRSS B 67(2), 2005.
    """
    check_coefficient("l1", l1, fix=_FIX)
    check_coefficient("l2", l2, fix=_FIX)
    weights = _weights("elastic_net_penalty", params, mask)
    absolute, squares = _sum(map(torch.abs, weights)), _sum(map(_squared, weights))
    return _times(l1, absolute) + _times(l2, squares)


def l2_sp_penalty(
    params: Params, reference: Params, weight_decay: float | Tensor, *, mask: Mask = None
) -> Tensor:
    r"""Compute the squared distance of parameters from a starting point (L2-SP).

    $$\Omega(w) = \lambda \sum_i |w_i - w^0_i|^2, \qquad
      \nabla \Omega(w) = 2 \lambda (w - w^0)$$

    In fine-tuning it pulls weights toward those of the pretrained model instead of zero. Under SGD
    and Adam (coupled decay) it trains like `regtorch.optim.add_l2_sp_decay(optimizer, reference, 2
    * weight_decay)`. The usual recipe applies `l2_penalty`, with its own coefficient, to layers
    that were not pretrained. The other arguments, the result and other errors are those of
    `l2_penalty`.

    Args:
        params: See `l2_penalty`.
        reference: $w^0$, in any form that `params` may have, such as `copy.deepcopy(module)` or a
            checkpoint without its buffers, with the names of `params` in any order and the shapes
            of those that count. It gets no gradient, and is cast to the dtype and device of the
            sums.
        weight_decay: See `l2_penalty`.
        mask: See `l2_penalty`.

    Raises:
        TypeError: The reference of a parameter is not a float or complex tensor, or is complex
            while the parameter is real.
        ValueError: The reference has other names than `params`, or a tensor of another shape; the
            message names it.

    Example:
        >>> import torch
        >>> l2_sp_penalty({"w": torch.tensor([1.0, 2.0])}, {"w": torch.ones(2)}, 0.5)
        tensor(0.5000)

    References:
        Li, Grandvalet and Davoine, [ICML 2018](https://arxiv.org/abs/1802.01483). Its coefficient
        is halved: $\alpha / 2$ there is $\lambda$ here.
    """
    check_coefficient("weight_decay", weight_decay, fix=_FIX)
    leaves = named_leaves(params)
    weights = _weights("l2_sp_penalty", leaves, mask)
    origins = _counted(resolve_reference(reference, leaves), leaves, mask)
    apart = map(lambda w, origin: w - _origin(w, *origin), weights, origins)
    return _times(weight_decay, _sum(map(_squared, apart)))


def _counted(things: Sequence[_T], leaves: Sequence[tuple[str, Any]], mask: Mask) -> list[_T]:
    """Return the items, one for each parameter, whose parameter the mask selects."""
    decays = resolve_mask(mask, leaves)
    return list(compress(things, decays))


def _weights(function: str, params: Params, mask: Mask) -> list[Tensor]:
    leaves = named_leaves(params)
    return [_widened(function, name, leaf) for name, leaf in _counted(leaves, leaves, mask)]


def _widened(function: str, name: str, leaf: Any) -> Tensor:
    is_tensor = isinstance(leaf, torch.Tensor)
    if not is_tensor or not (leaf.is_floating_point() or leaf.is_complex()):
        found = f"a tensor of {leaf.dtype}" if is_tensor else repr(leaf)
        raise TypeError(
            f"params at '{name}' must be a float or complex tensor for {function}; got {found}. "
            "Set it to False in `mask`, or pass the trainable tensors only, such as "
            "module.named_parameters()."
        )
    return widened(leaf)


def _origin(leaf: Tensor, name: str, reference: Any) -> Tensor:
    check_reference(name, leaf, reference)
    return reference.detach().to(leaf)


def _squared(leaf: Tensor) -> Tensor:
    return (leaf * leaf.conj()).real


def _sum(terms: Iterable[Tensor]) -> Tensor:
    """Sum all elements of all tensors in the widest of their dtypes, on the device of the first."""
    sums = [term.sum() for term in terms]
    dtype = max(
        (s.dtype for s in sums), key=lambda d: d.itemsize, default=torch.get_default_dtype()
    )
    total = torch.zeros((), dtype=dtype, device=sums[0].device if sums else None)
    for s in sums:
        total = total + s.to(total)
    return total


def _times(coefficient: float | Tensor, total: Tensor) -> Tensor:
    if isinstance(coefficient, torch.Tensor):
        coefficient = coefficient.to(total)
    return coefficient * total
