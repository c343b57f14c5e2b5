"""Whether every draw of a model has a key after `regtorch.keyed.convert`."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import regtorch
from regtorch import keyed
from regtorch.keyed.calls import states_of
from tests.zoo.models import Case


class Draws(NamedTuple):
    """The draws of a forward pass in training.

    Attributes:
        unmodified: The operators that advance PyTorch's generator in the unmodified model.
        outside: The generators of NumPy and Python that it advances.
        keyed: The draws with a key in the converted model.
        sites: The number of their names.
        refused: The error of the converted model; empty if there is none.
    """

    unmodified: int
    outside: tuple[str, ...]
    keyed: int
    sites: int
    refused: str = ""


def states() -> dict[str, Any]:
    """Return the states of the global generators, which can be compared."""
    name, keys, *rest = np.random.get_state()  # noqa: NPY002 - the global generator is tested
    return {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "numpy": (name, keys.tobytes(), *rest),
        "random": random.getstate(),
    }


def moved(before: dict[str, Any]) -> tuple[str, ...]:
    """Return the names of the generators that were used since `before`."""
    now = states()
    return tuple(name for name in before if now[name] != before[name])


class _Counter(TorchDispatchMode):
    """Counts the operators that advance PyTorch's generator."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = torch.get_rng_state()
        result = func(*args, **(kwargs or {}))
        self.count += not torch.equal(before, torch.get_rng_state())
        return result


def seed() -> None:
    """Seed all global generators."""
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002 - the global generator is tested
    random.seed(5)


def same(left: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    """Return whether outputs have equal bits; NaNs are equal."""
    return len(left) == len(right) and all(
        torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(left, right, strict=True)
    )


def step(case: Case, model: nn.Module, number: int) -> list[Tensor]:
    """Return the outputs of a converted model in one step of training."""
    keyed.set_key(model, regtorch.key(0), number)
    return case.run(model)


def count(case: Case, model: nn.Module) -> tuple[int, tuple[str, ...]]:
    """Return the draws of an unmodified model in training, and the generators that it advances."""
    seed()
    before = states()
    with _Counter() as counter:
        case.run(model)
    return counter.count, moved(before)


def examine(case: Case) -> Draws:
    """Convert a model, and check each promise of `regtorch.keyed`.

    Raises:
        AssertionError: A draw has no key and is no error, or anything else is not as promised.
    """
    model = case.build()
    original = copy.deepcopy(model)
    unmodified, generators = count(case, copy.deepcopy(model))
    outside = tuple(name for name in generators if name != "torch")
    keyed.convert(model)
    assert same(evaluate(case, original), evaluate(case, model)), "evaluation differs"
    before = states()
    try:
        first = step(case, model, 0)
    except RuntimeError as error:
        if "must draw from keys; got" not in str(error) or not generators:
            raise
        return Draws(unmodified, outside, 0, 0, str(error))
    drawn = {name: n for s in states_of(model) for name, n in s.keys.counts.items()}
    assert same(first, step(case, model, 0)), "a step cannot be repeated"
    # A rare drop may miss in several steps.
    changed = any(not same(first, step(case, model, number)) for number in range(1, 99))
    assert changed == bool(drawn), "another step, the same output"
    sum(y.float().square().sum() for y in first if y.requires_grad).backward()
    assert not moved(before), f"a draw without a key from {moved(before)}"
    # Batch statistics have changed in training.
    original.load_state_dict(model.state_dict())
    assert same(evaluate(case, original), evaluate(case, model)), "evaluation differs later"
    keyed.revert(model)
    assert same(train(case, original), train(case, model)), "revert does not restore the draws"
    return Draws(unmodified, outside, sum(drawn.values()), len(drawn))


def evaluate(case: Case, model: nn.Module) -> list[Tensor]:
    """Return the outputs in evaluation."""
    seed()  # some models draw in evaluation, too
    with torch.no_grad():
        outputs = case.run(model.eval())
    model.train()
    return outputs


def train(case: Case, model: nn.Module) -> list[Tensor]:
    """Return the outputs in training, as they follow from the seed."""
    seed()
    return case.run(model)
