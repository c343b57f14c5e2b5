"""Convert PyTorch training recipes by reading torch objects; torch itself is not imported."""

from regjax.interop._leaves import Leaf
from regjax.interop._optimizers import optimizer_from_torch
from regjax.interop._params import leaves_from_torch, params_from_torch
from regjax.interop._registry import register_optimizer
from regjax.interop._schedules import ScheduledMomentumState, schedule_from_torch
from regjax.interop._states import state_from_torch, state_to_torch

__all__ = [
    "Leaf",
    "ScheduledMomentumState",
    "leaves_from_torch",
    "optimizer_from_torch",
    "params_from_torch",
    "register_optimizer",
    "schedule_from_torch",
    "state_from_torch",
    "state_to_torch",
]


def __dir__() -> list[str]:
    """List the public names."""
    return __all__
