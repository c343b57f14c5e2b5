"""Decays beyond L2, attached to any optimizer of `torch.optim`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from regshared.checks import check_bool
from regtorch._decay.validation import check_reference, resolve_mask, resolve_reference
from regtorch.optim._hooks import Count, Decay, DecayHandle, check_optimizer, parameters_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.optim import Optimizer

    from regtorch._decay.paths import Params
    from regtorch._decay.validation import Mask
    from regtorch.optim._hooks import Schedule


def add_l1_decay(
    optimizer: Optimizer, weight_decay: Schedule, *, decoupled: bool = False, mask: Mask = None
) -> DecayHandle:
    r"""Add the sign of the parameters, times a coefficient, to their gradients: L1 decay.

    $$g \leftarrow g + \lambda_t \operatorname{sign}(w), \qquad \operatorname{sign}(0) = 0$$

    At every step this equals `regtorch.l1_penalty(params, weight_decay)` in the loss, without a
    factor 2. Decoupled, $w \leftarrow w - \eta_t \lambda_t \operatorname{sign}(w)$ bypasses the
    moments, and no penalty is equal to it.

    Args:
        optimizer: Any optimizer of `torch.optim`.
        weight_decay: $\lambda$: a finite number, not negative, or a function from the step, counted
            from 0, to one.
        decoupled: Whether to shrink the parameters themselves, by learning rate times coefficient.
        mask: Which parameters decay; see `regtorch.l2_penalty`.

    Returns:
        A handle to remove the decay.

    Raises:
        TypeError: `optimizer` is not an optimizer, `weight_decay` is not a number, `decoupled` is
            not a bool, or a value of the mask is not a bool.
        ValueError: `weight_decay` is negative, infinite or NaN (for a schedule, `step` raises it);
            the mask does not fit the parameters, or is False for all of them; or a coupled `step`
            gets a closure or scaled gradients.

    Note (JAX):
        `regjax.optim.add_l1_decay(weight_decay)`, ahead of the optimizer in `optax.chain`, or
        decoupled ahead of the learning rate. With `maximize=True` the parameters still shrink here.

    Example:
        >>> import torch
        >>> weight = torch.tensor([2.0, -2.0, 0.0], requires_grad=True)
        >>> optimizer = torch.optim.SGD([weight], lr=0.5)
        >>> handle = add_l1_decay(optimizer, 0.5)
        >>> weight.grad = torch.ones(3)
        >>> optimizer.step()
        >>> weight.detach()
        tensor([ 1.2500, -2.2500, -0.5000])
        >>> handle.remove()

    References:
        Tibshirani, "Regression Shrinkage and Selection via the Lasso", JRSS B 58(1), 1996.
    """
    check_bool("decoupled", decoupled)
    decay = Decay(optimizer, "l1_decay", weight_decay, mask, lambda w, u, other: w.sgn())
    return decay.decouple() if decoupled else decay.couple()


def add_l2_sp_decay(
    optimizer: Optimizer,
    reference: Params,
    weight_decay: Schedule,
    *,
    decoupled: bool = False,
    mask: Mask = None,
) -> DecayHandle:
    r"""Add the difference from a starting point, times a coefficient, to the gradients: L2-SP.

    $$g \leftarrow g + \lambda_t (w - w^0)$$

    With `weight_decay=2 * c` this equals `regtorch.l2_sp_penalty(params, reference, c)` in the
    loss, whose gradient is $2 c (w - w^0)$. The result and other errors are those of
    `add_l1_decay`.

    Args:
        optimizer: Any optimizer of `torch.optim`.
        reference: $w^0$: a module, tensor, dict or iterable, with the optimizer's names of the
            parameters and, where they decay, their shapes. It is copied to their devices, so that
            the model itself means its current parameters. No state dict holds the copy: pass the
            same reference to resume.
        weight_decay: $\lambda$; see `add_l1_decay`.
        decoupled: See `add_l1_decay`.
        mask: See `add_l1_decay`.

    Raises:
        TypeError: `reference` is none of the four; or the reference of a parameter is not a float
            or complex tensor, or is complex while the parameter is real.
        ValueError: `reference` is a generator that yields nothing, has other names than the
            parameters, or a tensor of another shape; the message names it.

    Example:
        >>> import torch
        >>> weight = torch.tensor([1.0, 3.0], requires_grad=True)
        >>> optimizer = torch.optim.SGD([weight], lr=0.5)
        >>> handle = add_l2_sp_decay(optimizer, [torch.ones(2)], 0.5)
        >>> weight.grad = torch.zeros(2)
        >>> optimizer.step()
        >>> weight.detach()
        tensor([1.0000, 2.5000])

    References:
        Li, Grandvalet and Davoine, [ICML 2018](https://arxiv.org/abs/1802.01483).
    """
    check_bool("decoupled", decoupled)
    leaves = [(name, p) for name, p, _ in parameters_of(optimizer)]
    decays = resolve_mask(mask, leaves)
    copies: dict[str, Any] = {}
    for (name, p), (_, origin), decay in zip(
        leaves, resolve_reference(reference, leaves), decays, strict=True
    ):
        if decay:
            check_reference(name, p, origin)
        copies[name] = origin.detach().to(p.device, copy=True) if decay else None
    decay = Decay(
        optimizer, "l2_sp_decay", weight_decay, mask, lambda w, u, other: w - other.to(w), copies
    )
    return decay.decouple() if decoupled else decay.couple()


def add_independent_weight_decay(
    optimizer: Optimizer, weight_decay: Schedule, *, mask: Mask = None
) -> DecayHandle:
    r"""Shrink the parameters by a rate that the learning rate does not multiply.

    $$w_t = w_{t-1} - \lambda_t w_{t-1} - \eta_t u_t$$

    where $\eta_t u_t$ is the optimizer's step. Each `weight_decay` of `torch.optim`, in contrast,
    is multiplied by the learning rate. The optimizer itself should have no decay. For the authors'
    schedule multiplier, one for both rates, pass `weight_decay=lambda step: c * multiplier(step)`.
    For the arguments, result and errors see `add_l1_decay`.

    Note (JAX):
        `regjax.optim.add_independent_weight_decay(weight_decay)` as the last link of a chain.

    Example:
        >>> import torch
        >>> weight = torch.tensor([2.0, -2.0], requires_grad=True)
        >>> optimizer = torch.optim.SGD([weight], lr=0.5)
        >>> handle = add_independent_weight_decay(optimizer, 0.25)
        >>> weight.grad = torch.ones(2)
        >>> optimizer.step()
        >>> weight.detach()
        tensor([ 1., -2.])

    References:
        Loshchilov and Hutter, [ICLR 2019](https://arxiv.org/abs/1711.05101), algorithms 1 and 2.
    """
    decay = Decay(optimizer, "independent_weight_decay", weight_decay, mask, lambda w, u, other: w)
    return decay.decouple(times_lr=False)


def add_cautious_weight_decay(
    optimizer: Optimizer, weight_decay: Schedule, *, mask: Mask = None
) -> DecayHandle:
    r"""Decay only the coordinates that the step itself moves toward zero.

    $$w_t = w_{t-1} - \eta_t \left(u_t + \lambda_t \, [\, u_t w_{t-1} \ge 0 \,] \, w_{t-1}\right)$$

    There is no decay where $u_t$, the step that is subtracted, and $w_{t-1}$ differ in sign. The
    optimizer itself should have no decay. For the arguments, result and errors see `add_l1_decay`;
    a complex parameter that decays is also a TypeError.

    Note (JAX):
        `regjax.optim.add_cautious_weight_decay(weight_decay)`, ahead of the learning rate. There
        the sign of $u_t$ is known; here it follows from the parameters before and after the step,
        so that a step too small to move a parameter counts as $u_t = 0$.

    Example:
        >>> import torch
        >>> weight = torch.tensor([2.0, -2.0], requires_grad=True)
        >>> optimizer = torch.optim.SGD([weight], lr=0.5)
        >>> handle = add_cautious_weight_decay(optimizer, 0.25)
        >>> weight.grad = torch.ones(2)
        >>> optimizer.step()
        >>> weight.detach()
        tensor([ 1.2500, -2.5000])

    References:
        Chen et al., [Cautious Weight Decay](https://arxiv.org/abs/2510.12402), 2025, algorithm 1.
    """
    leaves = [(name, p) for name, p, _ in parameters_of(optimizer)]
    for (name, p), decays in zip(leaves, resolve_mask(mask, leaves), strict=True):
        if decays and p.is_complex():
            raise TypeError(
                f"parameter '{name}' must be real for cautious decay, which compares signs; got "
                f"{p.dtype}. Use the optimizer's weight_decay, or set it to False in `mask`."
            )
    decay = Decay(
        optimizer,
        "cautious_weight_decay",
        weight_decay,
        mask,
        # Compare signs: the product itself could underflow to 0 and pass.
        lambda w, u, other: torch.where(u.sgn() * w.sgn() >= 0, w, 0.0),
    )
    return decay.decouple()


def schedule_weight_decay(optimizer: Optimizer, multiplier: Callable[[int], float]) -> DecayHandle:
    r"""Set the optimizer's own `weight_decay` by a schedule before each step, group by group.

    $$\lambda_t = \lambda_0 \, s(t)$$

    `torch.optim.lr_scheduler.LambdaLR` does the same for the learning rate. A group without decay
    keeps none.

    Args:
        optimizer: An optimizer whose groups have a `weight_decay`, $\lambda_0$.
        multiplier: $s$, from the step, counted from 0, to a finite number, not negative; such as
            DINO's cosine, which rises from 1 to 10.

    Returns:
        A handle to remove the schedule, which restores $\lambda_0$. `state_dict()` saves the count,
        and $\lambda_0$ as 'initial_weight_decay' of each group.

    Raises:
        TypeError: `optimizer` is not an optimizer, `multiplier` is not callable, or, from `step`,
            its result is not a number.
        ValueError: A group has no `weight_decay`; from `step`, the multiplier is negative, infinite
            or NaN.

    Note (JAX):
        `weight_decay=lambda count: c * multiplier(count)` in `regjax.optim` and each of its decays.

    Example:
        >>> import torch
        >>> weight = torch.ones(1, requires_grad=True)
        >>> optimizer = torch.optim.SGD([weight], lr=0.5, weight_decay=0.5)
        >>> handle = schedule_weight_decay(optimizer, lambda step: 1.0 - step)
        >>> weight.grad = torch.zeros(1)
        >>> optimizer.step()
        >>> optimizer.step()
        >>> weight.item()
        0.75

    References:
        Caron et al. (DINO), [ICCV 2021](https://arxiv.org/abs/2104.14294).
    """
    check_optimizer(optimizer)
    if not callable(multiplier):
        raise TypeError(
            f"multiplier must be a function of the step; got {multiplier!r}. Set weight_decay "
            "itself for a constant decay."
        )
    for position, group in enumerate(optimizer.param_groups):
        if "weight_decay" not in group:
            raise ValueError(
                "optimizer must have a weight_decay in each parameter group; got none in group "
                f"{position} of {type(optimizer).__name__}."
            )
    count = Count(optimizer, "scheduled_weight_decay")

    def set_decay(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        factor = count.evaluate("multiplier", multiplier)
        for group in optimizer.param_groups:
            initial = group.setdefault("initial_weight_decay", group["weight_decay"])
            group["weight_decay"] = initial * factor

    def restore() -> None:
        for group in optimizer.param_groups:
            if "initial_weight_decay" in group:
                group["weight_decay"] = group.pop("initial_weight_decay")

    hook = optimizer.register_step_pre_hook(set_decay)
    return DecayHandle(hook.remove, count.remove, restore)
