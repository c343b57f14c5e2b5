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

from regtorch.optim._decays import (
    add_cautious_weight_decay,
    add_independent_weight_decay,
    add_l1_decay,
    add_l2_sp_decay,
    schedule_weight_decay,
)
from regtorch.optim._groups import layerwise_groups
from regtorch.optim._hooks import DecayHandle

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
