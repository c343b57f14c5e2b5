"""Decays beyond L2, attached to any optimizer of `torch.optim`; links of a chain in `regjax.optim`.

    optimizer = torch.optim.Adam(model.named_parameters(), lr=1e-3)
    handle = add_l1_decay(optimizer, 1e-4, mask=lambda name, tensor: tensor.ndim > 1)
    ...                                # loss.backward(), optimizer.step(), scheduler.step()
    handle.remove()

A decay is a pair of step hooks. A coupled one adds to `p.grad` before the step, after any clipping,
and in place like `torch.nn.utils.clip_grad_norm_`. A decoupled one subtracts from the parameter
after the step a term computed from the parameter before it, which meanwhile takes one copy of the
decaying parameters. Several decays act in the order in which they were attached.

Masks and references use the names of the parameters if the optimizer was made with
`named_parameters()`, and their positions, '0', '1', ..., if with `parameters()`. A parameter whose
gradient is None, which torch skips, does not decay. Parameter groups and learning-rate schedulers
work as before: a decoupled decay is multiplied by the `lr` of its group at the step. Hooks are
neither copied nor pickled with an optimizer: attach them again.

Each `weight_decay` may be a function from the step, counted from 0, to the coefficient. The count
is stored in `optimizer.param_groups[0]`, so `optimizer.state_dict()` saves it and `load_state_dict`
restores it, before or after the decays are attached, in the same order.

Coupled decay cannot act inside `step(closure)`, nor on gradients that are still scaled: `step`
raises an error, and a penalty in the loss does the same there. L2 itself is the `weight_decay` of
`torch.optim`; the elastic net is that, with `2 * l2`, together with `add_l1_decay(optimizer, l1)`.
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
