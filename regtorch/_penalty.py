"""L2 as a term of the loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from regtorch._decay import check_coefficient, resolve_mask
from regtorch._paths import named_leaves

if TYPE_CHECKING:
    from torch import Tensor

    from regtorch._decay import Mask
    from regtorch._paths import Params


def l2_penalty(params: Params, weight_decay: float | Tensor, *, mask: Mask = None) -> Tensor:
    r"""Compute the L2 penalty of parameters, to be added to a loss.

    $$\Omega(w) = \lambda \sum_i |w_i|^2, \qquad \nabla \Omega(w) = 2 \lambda w$$

    There is no one half in it, hence the 2 in the gradient. The `weight_decay=d` of an optimizer
    adds $d\,w$ to the gradient, so **this penalty with `weight_decay=c` trains like an optimizer
    with `weight_decay=2 * c`** where the decay is coupled (SGD, Adam), and like no setting of
    AdamW, whose decay never passes through the moments.

    A frozen parameter (`requires_grad=False`) counts in the value, as the formula has it, and gets
    no gradient; the `weight_decay` of `torch.optim` leaves it alone too. Mask it out where the
    value should go without it: `mask=lambda name, tensor: tensor.requires_grad`.

    Args:
        params: A module, one tensor, a dict from names to tensors, or an iterable of tensors or of
            `(name, tensor)` pairs, float or complex, of any shapes and dtypes. Not `state_dict()`:
            it is detached, and holds buffers too.
        weight_decay: The coefficient $\lambda$: a finite number, not negative; or a 0-d tensor,
            which may require a gradient and whose value is not checked.
        mask: Which parameters count: `None` (all), a dict from each name to a bool, a function of
            name and tensor, or, for tensors without names, a sequence of bools. What is masked out
            may be anything.

    Returns:
        A real 0-d tensor on the device of the first parameter that counts. Half precision is summed
        in float32; the result has the widest dtype in which a parameter was summed. It is 0.0 where
        there is nothing to sum.

    Raises:
        TypeError: A parameter that counts is not a float or complex tensor, the mask says something
            else than True or False, or `weight_decay` is not a number.
        ValueError: `weight_decay` is negative, infinite or NaN, the mask does not fit the
            parameters, or `params` is a generator that yields nothing (`module.parameters()` can be
            walked only once).

    JAX: `regjax.l2_penalty(params, weight_decay)` is the same number.

    Examples:
        >>> import torch
        >>> kernel, bias = torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([3.0])
        >>> l2_penalty([kernel, bias], 0.5).item()
        7.0
        >>> params = {"kernel": kernel, "bias": bias}
        >>> l2_penalty(params, 0.5, mask=lambda name, tensor: name == "kernel").backward()
        >>> kernel.grad
        tensor([1., 2.])

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
    leaves = named_leaves(params)
    decays = resolve_mask(mask, leaves)
    sums = [
        _sum_of_squares(name, leaf)
        for (name, leaf), decay in zip(leaves, decays, strict=True)
        if decay
    ]
    dtype = max(
        (s.dtype for s in sums), key=lambda d: d.itemsize, default=torch.get_default_dtype()
    )
    total = torch.zeros((), dtype=dtype, device=sums[0].device if sums else None)
    for s in sums:
        total = total + s.to(total)
    if isinstance(weight_decay, torch.Tensor):
        weight_decay = weight_decay.to(total)
    return weight_decay * total


def _sum_of_squares(name: str, leaf: Any) -> Tensor:
    is_tensor = isinstance(leaf, torch.Tensor)
    if not is_tensor or not (leaf.is_floating_point() or leaf.is_complex()):
        found = f"a tensor of {leaf.dtype}" if is_tensor else repr(leaf)
        raise TypeError(
            f"l2_penalty squares float or complex tensors, but params at '{name}' is {found}: give "
            "it False in `mask`, or pass the trainable tensors only (module.named_parameters())"
        )
    wide = _widened(leaf)
    return (wide * wide.conj()).real.sum()


def _widened(tensor: Tensor) -> Tensor:
    # A half type has too few digits to add up in, and float16 overflows at 256 squared.
    if tensor.is_complex():
        return tensor.to(torch.complex64) if tensor.dtype.itemsize < 8 else tensor
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor
