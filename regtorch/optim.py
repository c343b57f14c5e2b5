"""Decays beyond L2 for any optimizer of `torch.optim`, the links of a chain in `regjax.optim`.

    optimizer = torch.optim.Adam(model.named_parameters(), lr=1e-3)
    handle = add_l1_decay(optimizer, 1e-4, mask=lambda name, tensor: tensor.ndim > 1)
    ...                                # loss.backward(), optimizer.step(), scheduler.step()
    handle.remove()

A decay is a pair of step hooks; several act in the order in which they were attached. A coupled
decay adds to `p.grad` in place before the step, after any clipping. It cannot act inside
`step(closure)` or on scaled gradients: `step` raises an error, and a penalty in the loss is the
alternative. A decoupled decay subtracts from the parameter after the step a term computed from a
copy made before it, multiplied by the `lr` of the group at that step.

Masks and references use the names that the optimizer has from `named_parameters()`, or the
positions '0', '1', ... after `parameters()`. A parameter whose gradient is None does not decay.
Hooks are neither copied nor pickled with an optimizer: attach them again.

Each `weight_decay` may be a function from the step, counted from 0, to the coefficient.
`optimizer.param_groups[0]` holds the count, so that `state_dict()` and `load_state_dict` restore it
for decays attached in the same order.

L2 itself is the `weight_decay` of `torch.optim`; the elastic net adds `add_l1_decay(optimizer, l1)`
to a `weight_decay` of `2 * l2`.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch

from regshared.checks import check_bool, check_callable, check_coefficient, check_integer, describe
from regtorch._decay.paths import named_leaves
from regtorch._decay.validation import check_reference, resolve_mask, resolve_reference, widened

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor
    from torch.optim import Optimizer

    from regtorch._decay.paths import Params
    from regtorch._decay.validation import Mask

    Schedule = float | Tensor | Callable[[int], float]
    # From a parameter, the step that is subtracted from it, and its reference.
    Direction = Callable[[Tensor, Tensor, Any], Tensor]


__all__ = [
    "DecayHandle",
    "add_cautious_weight_decay",
    "add_independent_weight_decay",
    "add_l1_decay",
    "add_l2_sp_decay",
    "layerwise_groups",
    "schedule_weight_decay",
]


def __dir__() -> list[str]:
    """List the public names, for `dir` and completion."""
    return __all__


# The counts of each optimizer, so that two schedules of a kind do not share one.
_taken: weakref.WeakKeyDictionary[Optimizer, set[str]] = weakref.WeakKeyDictionary()


class DecayHandle:
    """Handle that removes a decay from its optimizer."""

    def __init__(self, *removals: Callable[[], None]) -> None:
        self._removals = removals

    def remove(self) -> None:
        """Detach the decay and its count; a second call does nothing."""
        for removal in self._removals:
            removal()
        self._removals = ()


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
    decay = _Decay(optimizer, "l1_decay", weight_decay, mask, lambda w, u, other: w.sgn())
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
    leaves = [(name, p) for name, p, _ in _parameters(optimizer)]
    decays = resolve_mask(mask, leaves)
    copies: dict[str, Any] = {}
    for (name, p), (_, origin), decay in zip(
        leaves, resolve_reference(reference, leaves), decays, strict=True
    ):
        if decay:
            check_reference(name, p, origin)
        copies[name] = origin.detach().to(p.device, copy=True) if decay else None
    decay = _Decay(
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
    decay = _Decay(optimizer, "independent_weight_decay", weight_decay, mask, lambda w, u, other: w)
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
    leaves = [(name, p) for name, p, _ in _parameters(optimizer)]
    for (name, p), decays in zip(leaves, resolve_mask(mask, leaves), strict=True):
        if decays and p.is_complex():
            raise TypeError(
                f"parameter '{name}' must be real for cautious decay, which compares signs; got "
                f"{p.dtype}. Use the optimizer's weight_decay, or set it to False in `mask`."
            )
    decay = _Decay(
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
    _check_optimizer(optimizer)
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
    count = _Count(optimizer, "scheduled_weight_decay")

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


def layerwise_groups(
    params: Params,
    layer_of: Callable[[str], int],
    *,
    lr: float,
    lr_factor: float = 1.0,
    weight_decay: float = 0.0,
    decay_factor: float = 1.0,
    depth: int | None = None,
    mask: Mask = None,
) -> list[dict[str, Any]]:
    r"""Return parameter groups whose rates shrink geometrically from the top layer down.

    $$\eta_l = \eta \, \text{lr\_factor}^{\,\text{depth} - l}, \qquad
      \lambda_l = \lambda \, \text{decay\_factor}^{\,\text{depth} - l}$$

    A scheduler multiplies the rates of all groups alike, so that the ratios stay.

    Args:
        params: A module, dict or iterable of parameters; see `regtorch.l2_penalty`.
        layer_of: Maps a parameter's name, such as `'layers.0.weight'`, to its layer: 0 next to the
            input (embeddings), the largest for the head.
        lr: $\eta$, the learning rate of layer `depth`.
        lr_factor: The ratio of a layer's learning rate to that of the layer above, such as 0.75.
        weight_decay: $\lambda$, the decay of layer `depth`.
        decay_factor: The ratio of a layer's decay to that of the layer above.
        depth: The layer with the rates `lr` and `weight_decay`; by default the largest layer.
        mask: Which parameters decay; see `regtorch.l2_penalty`. The others have a decay of 0.

    Returns:
        Groups for any optimizer of `torch.optim`, with the names of their parameters.

    Raises:
        TypeError: `layer_of` is not a function, or does not return an int; a rate is not a number,
            or `depth` not an integer.
        ValueError: A layer is negative or above `depth`, `depth` is negative, a rate is negative,
            infinite or NaN, or the mask does not fit; the message names it.

    Note (JAX):
        `regjax.optim.layerwise_scale`, for `scale_by_leaf` (learning rates) and
        `add_decay_by_leaf`; its names have slashes for dots.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
        >>> groups = layerwise_groups(model, lambda name: int(name[0]), lr=0.1, lr_factor=0.5)
        >>> [(group["lr"], [name for name, _ in group["params"]]) for group in groups]
        [(0.05, ['0.weight', '0.bias']), (0.1, ['1.weight', '1.bias'])]
        >>> optimizer = torch.optim.AdamW(groups)

    References:
        Clark et al. (ELECTRA), [ICLR 2020](https://arxiv.org/abs/2003.10555). Bao et al. (BEiT),
        [ICLR 2022](https://arxiv.org/abs/2106.08254).
    """
    check_callable("layer_of", layer_of, "from a parameter's name to its layer")
    if depth is not None:
        check_integer("depth", depth, minimum=0)
    check_coefficient("lr", lr, fix="Pass maximize=True to ascend.")
    check_coefficient("lr_factor", lr_factor, fix="Pass 1.0 for the same in all layers.")
    check_coefficient("weight_decay", weight_decay, fix="Pass 0.0 for none.")
    check_coefficient("decay_factor", decay_factor, fix="Pass 1.0 for the same in all layers.")
    leaves = named_leaves(params)
    _check_mask(mask, weight_decay, leaves)
    layers = [_layer(name, layer_of(name), depth) for name, _ in leaves]
    top = max(layers, default=0) if depth is None else depth
    groups: dict[tuple[int, bool], list[tuple[str, Tensor]]] = {}
    for leaf, layer, decays in zip(leaves, layers, resolve_mask(mask, leaves), strict=True):
        groups.setdefault((layer, decays), []).append(leaf)
    return [
        {
            "params": members,
            "lr": lr * lr_factor ** (top - layer),
            "weight_decay": weight_decay * decay_factor ** (top - layer) if decays else 0.0,
        }
        for (layer, decays), members in groups.items()
    ]


def _layer(name: str, layer: Any, depth: int | None) -> int:
    if not isinstance(layer, int) or isinstance(layer, bool):
        raise TypeError(f"layer_of('{name}') must be an int; got {layer!r}.")
    if layer < 0 or (depth is not None and layer > depth):
        limit = "not negative" if depth is None else f"in [0, depth={depth}]"
        raise ValueError(f"layer_of('{name}') must be {limit}; got {layer}.")
    return layer


def _check_mask(mask: Mask, weight_decay: Schedule, leaves: Sequence[tuple[str, Any]]) -> None:
    """Raise a ValueError if a mask that is not a function is False for all parameters."""
    is_zero = isinstance(weight_decay, int | float) and weight_decay == 0
    if is_zero or callable(mask) or not leaves or any(resolve_mask(mask, leaves)):
        return
    raise ValueError(
        "mask must be True for some parameter, since weight_decay is not 0; got False for all of "
        f"{len(leaves)}, with which nothing decays. For no decay, pass weight_decay=0.0."
    )


class _Decay:
    """A decay of some parameters of an optimizer, in one direction."""

    def __init__(
        self,
        optimizer: Optimizer,
        kind: str,
        weight_decay: Schedule,
        mask: Mask,
        direction: Direction,
        others: dict[str, Any] | None = None,
    ) -> None:
        if not callable(weight_decay):
            check_coefficient("weight_decay", weight_decay, fix="Pass 0.0 for none.")
        leaves = [(name, p) for name, p, _ in _parameters(optimizer)]
        _check_mask(mask, weight_decay, leaves)
        self.optimizer, self.weight_decay, self.mask = optimizer, weight_decay, mask
        self.direction, self.others = direction, others
        # Check the mask now instead of at the first step.
        list(self.targets())
        self.count = _Count(optimizer, kind)

    def targets(self) -> Iterator[tuple[str, Tensor, dict[str, Any], Any]]:
        """Yield name, parameter, group and reference of each parameter that decays at this step."""
        parameters = _parameters(self.optimizer)
        leaves = [(name, p) for name, p, _ in parameters]
        others = {} if self.others is None else dict(resolve_reference(self.others, leaves))
        decays = resolve_mask(self.mask, leaves)
        for (name, p, group), decay in zip(parameters, decays, strict=True):
            if decay:
                yield name, p, group, others.get(name)

    def coefficient(self) -> float | Tensor:
        if callable(self.weight_decay):
            return self.count.evaluate("weight_decay", self.weight_decay)
        return self.weight_decay

    def couple(self) -> DecayHandle:
        @torch.no_grad()
        def add_to_gradients(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            _check_gradients(optimizer, args, kwargs)
            coefficient = self.coefficient()
            for _, p, group, other in self.targets():
                if p.grad is None:
                    continue
                # With maximize, torch negates the gradient, including the decay in it.
                signed = -coefficient if group.get("maximize", False) else coefficient
                grad = widened(p.grad)
                p.grad.copy_(grad + signed * self.direction(widened(p), grad, other))

        hook = self.optimizer.register_step_pre_hook(add_to_gradients)
        return DecayHandle(hook.remove, self.count.remove)

    def decouple(self, *, times_lr: bool = True) -> DecayHandle:
        pending: list[tuple[Tensor, Tensor, float | Tensor, Any]] = []

        def remember(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            coefficient = self.coefficient()
            pending.clear()
            for _, p, group, other in self.targets():
                rate = group["lr"] * coefficient if times_lr else coefficient
                pending.append((p, p.detach().clone(), rate, other))

        @torch.no_grad()
        def shrink(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            for p, before, rate, other in pending:
                if p.grad is not None:
                    now, before = widened(p), widened(before)
                    p.copy_(now - rate * self.direction(before, before - now, other))
            pending.clear()

        before = self.optimizer.register_step_pre_hook(remember)
        after = self.optimizer.register_step_post_hook(shrink)
        return DecayHandle(before.remove, after.remove, self.count.remove)


class _Count:
    """The step of a schedule, stored where `state_dict` saves it."""

    def __init__(self, optimizer: Optimizer, kind: str) -> None:
        taken = _taken.setdefault(optimizer, set())
        number = 1
        while (key := f"{kind}_step" if number == 1 else f"{kind}_{number}_step") in taken:
            number += 1
        taken.add(key)
        self.optimizer, self.key = optimizer, key

    def evaluate(self, name: str, schedule: Callable[[int], float]) -> float:
        """Return the value of a schedule at this step, and count the step."""
        group = self.optimizer.param_groups[0]
        step = group.get(self.key, 0)
        value = schedule(step)
        check_coefficient(f"{name} at step {step}", value, fix="Correct the schedule.")
        group[self.key] = step + 1
        return value

    def remove(self) -> None:
        _taken[self.optimizer].discard(self.key)
        self.optimizer.param_groups[0].pop(self.key, None)


def _parameters(optimizer: Optimizer) -> list[tuple[str, Tensor, dict[str, Any]]]:
    """List name, parameter and group; without names, the position among all groups is the name."""
    _check_optimizer(optimizer)
    owned = [(p, group) for group in optimizer.param_groups for p in group["params"]]
    names = [name for group in optimizer.param_groups for name in group.get("param_names", ())]
    names = names or [str(position) for position in range(len(owned))]
    return [(name, p, group) for name, (p, group) in zip(names, owned, strict=True)]


def _check_optimizer(optimizer: Any) -> None:
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer; got {describe(optimizer)}.")


def _check_gradients(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if kwargs.get("closure", args[1] if len(args) > 1 else None) is not None:
        raise ValueError(
            "closure must be None with a coupled decay, which needs the gradients before the step; "
            "got a function. Call backward() before step(), or add a penalty to the loss."
        )
    if getattr(optimizer, "grad_scale", None) is not None:
        raise ValueError(
            "gradients must be unscaled for a coupled decay; got scaled ones. Call "
            "scaler.unscale_(optimizer) before scaler.step(optimizer)."
        )
