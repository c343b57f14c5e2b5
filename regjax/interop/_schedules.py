"""Learning rates of `torch.optim.lr_scheduler`, as schedules of optax.

PyTorch computes a rate in double precision from the one before. Here it follows from the step
alone, in whatever precision JAX has, so each form is one that loses no digits in float32: powers
come from tables computed in double, a cosine is a sum of two weights that are never negative, and
how far a phase is from its ends is counted in whole steps.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from regjax.interop._leaves import check_class, number

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import optax
    from jaxtyping import Array, Float, Int

    Count = Int[Array, ""]
    Rate = Callable[[Count], Float[Array, ""]]
