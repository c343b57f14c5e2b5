"""The step hooks by which a decay acts, and the count of its schedule."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from regshared.checks import check_coefficient, describe
from regtorch._decay.validation import resolve_mask, resolve_reference, widened

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

    from regtorch._decay.validation import Mask

    Schedule = float | Tensor | Callable[[int], float]
    # From a parameter, the step that is subtracted from it, and its reference.
    Direction = Callable[[Tensor, Tensor, Any], Tensor]


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


def check_mask(mask: Mask, weight_decay: Schedule, leaves: Sequence[tuple[str, Any]]) -> None:
    """Raise a ValueError if a mask that is not a function is False for all parameters."""
    is_zero = isinstance(weight_decay, int | float) and weight_decay == 0
    if is_zero or callable(mask) or not leaves or any(resolve_mask(mask, leaves)):
        return
    raise ValueError(
        "mask must be True for some parameter, since weight_decay is not 0; got False for all of "
        f"{len(leaves)}, with which nothing decays. For no decay, pass weight_decay=0.0."
    )


class Decay:
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
        leaves = [(name, p) for name, p, _ in parameters_of(optimizer)]
        check_mask(mask, weight_decay, leaves)
        self.optimizer, self.weight_decay, self.mask = optimizer, weight_decay, mask
        self.direction, self.others = direction, others
        # Check the mask now instead of at the first step.
        list(self.targets())
        self.count = Count(optimizer, kind)

    def targets(self) -> Iterator[tuple[str, Tensor, dict[str, Any], Any]]:
        """Yield name, parameter, group and reference of each parameter that decays at this step."""
        parameters = parameters_of(self.optimizer)
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


class Count:
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


def parameters_of(optimizer: Optimizer) -> list[tuple[str, Tensor, dict[str, Any]]]:
    """List name, parameter and group; without names, the position among all groups is the name."""
    check_optimizer(optimizer)
    owned = [(p, group) for group in optimizer.param_groups for p in group["params"]]
    names = [name for group in optimizer.param_groups for name in group.get("param_names", ())]
    names = names or [str(position) for position in range(len(owned))]
    return [(name, p, group) for name, (p, group) in zip(names, owned, strict=True)]


def check_optimizer(optimizer: Any) -> None:
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
