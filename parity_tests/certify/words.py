"""The likely cause of a difference between a script and its port, in words."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from parity_tests import causes
from parity_tests.recording import value_deviations

if TYPE_CHECKING:
    from parity_tests.compare import Tier
    from parity_tests.replays import Replay
    from parity_tests.seeded import SeededDraw

    Arrays = Mapping[str, np.ndarray]

SHOWN = 4


def initial_difference(
    name: str,
    in_jax: Arrays,
    in_torch: Arrays,
    beyond: Sequence[str],
    bound: float,
    *,
    draws: Sequence[SeededDraw],
) -> str:
    """Describe a difference of initial weights; `draws` are those of PyTorch up to the first step.

    Example:
        >>> import numpy as np
        >>> one, other = {"a": np.array([2.0, 4.0])}, {"a": np.array([1.0, 2.0])}
        >>> initial_difference("a", one, other, ["a"], 1e-6, draws=[])
        '1 of 1 arrays differ; JAX has 2 times the value of PyTorch'
    """
    here, there = in_jax[name], in_torch[name]
    parts = [f"{len(beyond)} of {len(in_torch)} arrays differ"]
    if here.dtype != there.dtype:
        parts.append(f"{here.dtype} in JAX and {there.dtype} in PyTorch")
    elif twin := _twin(here, {n: array for n, array in in_torch.items() if n != name}):
        parts.append(f"JAX has the numbers of PyTorch's '{twin}': look at the order of the layers")
    elif here.size > 1 and np.allclose(np.sort(here, axis=None), np.sort(there, axis=None)):
        parts.append("the same numbers in another order: look at the order of the axes")
    else:
        found = causes.describe("", name, in_jax, in_torch, [*beyond], bound)
        parts += [part for part in found.split("; ") if part.startswith("JAX has ")]
    if len(parts) == 1 and (drawn := [str(draw) for draw in draws if draw.rate is None]):
        listed = ", ".join(text.removesuffix(" in '(outside the model)'") for text in drawn[:SHOWN])
        more = ", ..." if len(drawn) > SHOWN else ""
        parts.append(
            "other numbers, of another distribution or from another place of the stream; PyTorch "
            f"draws {listed}{more}"
        )
    return "; ".join(parts)


def _twin(array: np.ndarray, others: Arrays) -> str:
    """Return the name of another array with the same numbers, unless they are all equal."""
    if array.size < 2 or (array == array.flat[0]).all():
        return ""
    same = (name for name, other in others.items() if np.array_equal(array, other))
    return next(same, "")


def batch_difference(
    in_jax: np.ndarray, in_torch: np.ndarray, others: Sequence[np.ndarray | None]
) -> str:
    """Describe a difference of the indices of a step; `others` are those of PyTorch's steps.

    Example:
        >>> import numpy as np
        >>> batch_difference(np.array([0, 1, 2]), np.array([5, 1, 4]), [])
        'JAX takes the examples in the order of the dataset, and PyTorch shuffles them'
    """
    if in_jax.size != in_torch.size:
        return f"JAX takes {in_jax.size} examples, and PyTorch {in_torch.size}"
    for step, other in enumerate(others, start=1):
        if other is not None and np.array_equal(in_jax, other):
            return f"JAX takes the batch of step {step} of the script"
    if np.array_equal(np.sort(in_jax), np.sort(in_torch)):
        return "the same examples in another order"
    sides = {"JAX": in_jax, "PyTorch": in_torch}
    in_order = [name for name, indices in sides.items() if (np.diff(indices) == 1).all()]
    if len(in_order) == 1:
        (other,) = sides.keys() - set(in_order)
        return (
            f"{in_order[0]} takes the examples in the order of the dataset, and {other} shuffles "
            "them"
        )
    differ = int(np.count_nonzero(in_jax != in_torch))
    return f"{differ} of {in_torch.size} indices differ"


def loss_difference(replay: Replay, tier: Tier) -> str:
    """Return the first dropout that other values enter; an empty string if there are no masks."""
    if not replay.in_torch or replay.difference():
        return ""
    in_norm = dataclasses.replace(tier, in_norm=True)
    for site, apart in value_deviations(replay.in_jax, replay.in_torch, in_norm).items():
        if not apart <= (tier.tolerance or 0.0):
            return f"masks agree, and '{site}' is the first dropout that other values enter"
    return f"masks agree, and so do the values that enter them up to '{replay.in_torch[-1].site}'"


def buffer_difference(
    name: str, in_jax: Arrays, in_torch: Arrays, beyond: Sequence[str], bound: float
) -> str:
    """Describe a difference of buffers."""
    detail = causes.describe("buffer", name, in_jax, in_torch, [*beyond], bound)
    if name.endswith(("running_var", "var")):
        detail += "; PyTorch's running variance is unbiased: correct JAX's by n / (n - 1)"
    return detail
