"""A PyTorch recipe, read off the torch objects that it is made of; torch itself is not imported."""

from regjax.interop._leaves import Leaf as Leaf
from regjax.interop._optimizers import optimizer_from_torch as optimizer_from_torch
from regjax.interop._params import leaves_from_torch as leaves_from_torch
from regjax.interop._params import params_from_torch as params_from_torch
from regjax.interop._schedules import ScheduledMomentumState as ScheduledMomentumState
from regjax.interop._schedules import schedule_from_torch as schedule_from_torch
from regjax.interop._states import state_from_torch as state_from_torch
from regjax.interop._states import state_to_torch as state_to_torch
