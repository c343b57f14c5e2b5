"""One training run, walked by NumPy, by regjax and by torch.optim, with every step kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

import regjax.optim
from parity_tests import reference_optim
from regjax._paths import named_leaves
from regjax._penalty import l2_penalty as jax_l2_penalty
from regtorch._penalty import l2_penalty as torch_l2_penalty

STEPS = 100

Run = list[dict[str, np.ndarray]]


@dataclass(frozen=True)
class Case:
    """What to train with.

    Attributes:
        name: For the test report.
        optimizer: The class in `torch.optim`; in lower case, the function in `regjax.optim`.
        options: Its arguments under torch's names, `lr` among them.
        half_life: Steps in which the learning rate halves; None keeps it.
        mask: Which parameters decay, by name; None for all.
        penalty: Coefficient of the L2 penalty in the loss, under the same mask.
    """

    name: str
    optimizer: str
    options: Mapping[str, Any]
    half_life: int | None = None
    mask: Mapping[str, bool] | None = None
    penalty: float = 0.0

    def __str__(self) -> str:
        return self.name


def problem(dtype: str) -> tuple[dict[str, np.ndarray], list[dict[str, np.ndarray]]]:
    """Make parameters to start from, and the gradient of the bare loss at each step.

    Sizes of gradients shrink over time, so that the largest second moment is not the last one, and
    differ between parameters; every fifth element or so has none at all in a step.

    Args:
        dtype: Dtype of parameters and gradients.

    Returns:
        Parameters by name, and gradients by name for each of `STEPS` steps.

    Examples:
        >>> params, gradients = problem("float32")
        >>> sorted(params), len(gradients)
        (['dense/bias', 'dense/kernel'], 100)
    """
    rng = np.random.default_rng(0)
    shapes = {"dense/bias": (8,), "dense/kernel": (5, 8)}
    params = {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}
    gradients = []
    for step in range(STEPS):
        noise = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
        kept = {name: rng.random(shape) > 0.2 for name, shape in shapes.items()}
        size = {"dense/bias": 0.1, "dense/kernel": 1.0}
        gradients.append(
            {n: (noise[n] * kept[n] * size[n] * 0.97**step).astype(dtype) for n in shapes}
        )
    return params, gradients


def walk_numpy(case: Case, dtype: str) -> Run:
    """Walk by the written-out recursions.

    Args:
        case: What to train with.
        dtype: Dtype of parameters and gradients.

    Returns:
        Parameters by name after each step.

    Examples:
        >>> run = walk_numpy(Case("plain", "SGD", {"lr": 0.1}), "float32")
        >>> len(run), run[0]["dense/kernel"].shape
        (100, (5, 8))
    """
    params, gradients = problem(dtype)

    def gradient(current: Mapping[str, np.ndarray], step: int) -> dict[str, np.ndarray]:
        penalty = reference_optim.l2_gradient(current, case.penalty, case.mask)
        return {name: g + penalty[name] for name, g in gradients[step].items()}

    walk = getattr(reference_optim, case.optimizer.lower())
    options = dict(case.options)
    if case.half_life is not None:
        base, half_life = options["lr"], case.half_life
        options["lr"] = lambda step: base * 0.5 ** (step / half_life)
    return list(islice(walk(params, gradient, mask=case.mask, **options), STEPS))


def walk_torch(case: Case, dtype: str) -> Run:
    """Walk with `torch.optim`, parameter groups for a mask, and `LambdaLR` for a schedule.

    Args:
        case: What to train with.
        dtype: Dtype of parameters and gradients.

    Returns:
        Parameters by name after each step.

    Examples:
        >>> run = walk_torch(Case("plain", "SGD", {"lr": 0.1}), "float32")
        >>> len(run), run[0]["dense/kernel"].shape
        (100, (5, 8))
    """
    arrays, gradients = problem(dtype)
    params = {n: torch.tensor(array, requires_grad=True) for n, array in arrays.items()}
    optimizer = getattr(torch.optim, case.optimizer)(
        _groups(params, case.mask), **dict(case.options)
    )
    scheduler = None
    if case.half_life is not None:
        half_life = case.half_life
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.5 ** (t / half_life))
    run = []
    for step in range(STEPS):
        optimizer.zero_grad()
        terms = [(p * torch.tensor(gradients[step][n])).sum() for n, p in params.items()]
        loss = torch.stack(terms).sum()
        if case.penalty:
            loss += torch_l2_penalty(params, case.penalty, mask=case.mask)
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        run.append({n: p.detach().numpy().copy() for n, p in params.items()})
    return run


def walk_jax(
    case: Case, dtype: str, make: Callable[..., optax.GradientTransformation] | None = None
) -> Run:
    """Walk with `regjax.optim`, a tree of bools for a mask, and an optax schedule.

    Args:
        case: What to train with.
        dtype: Dtype of parameters and gradients; float64 switches x64 on for the walk.
        make: Another function to make the optimizer with, for the tests of the tests.

    Returns:
        Parameters by name after each step.

    Examples:
        >>> run = walk_jax(Case("plain", "SGD", {"lr": 0.1}), "float32")
        >>> len(run), run[0]["dense/kernel"].shape
        (100, (5, 8))
    """
    arrays, gradients = problem(dtype)
    make_optimizer = make or getattr(regjax.optim, case.optimizer.lower())
    options = dict(case.options)
    learning_rate = options.pop("lr")
    if case.half_life is not None:
        learning_rate = _halving(learning_rate, case.half_life)
    with jax.enable_x64(dtype == "float64"):
        params = _nested({n: jnp.asarray(array) for n, array in arrays.items()})
        mask = None if case.mask is None else _nested(case.mask)
        optimizer = make_optimizer(learning_rate, **options, mask=mask)
        stacked = {n: jnp.asarray(np.stack([g[n] for g in gradients])) for n in arrays}

        def loss(params, gradient):
            total = optax.tree.vdot(params, gradient)
            if case.penalty:
                total += jax_l2_penalty(params, case.penalty, mask=mask)
            return total

        def train_step(carry, gradient):
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params, gradient), state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), params

        carry = (params, optimizer.init(params))
        _, visited = jax.jit(lambda carry, xs: jax.lax.scan(train_step, carry, xs))(
            carry, _nested(stacked)
        )
        leaves = {name: np.asarray(leaf) for name, leaf in named_leaves(visited)}
    return [{name: leaf[step] for name, leaf in leaves.items()} for step in range(STEPS)]


def _halving(learning_rate: float, half_life: int) -> optax.Schedule:
    schedule = optax.exponential_decay(learning_rate, half_life, 0.5)
    # On an integer count optax would compute in float32, and strict promotion forbids its division.
    return lambda count: schedule(jnp.asarray(count, float))


def _groups(
    params: Mapping[str, torch.Tensor], mask: Mapping[str, bool] | None
) -> list[dict[str, Any]]:
    if mask is None:
        return [{"params": list(params.values())}]
    return [
        {"params": [p for n, p in params.items() if mask[n]]},
        {"params": [p for n, p in params.items() if not mask[n]], "weight_decay": 0.0},
    ]


def _nested(leaves: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    tree: dict[str, dict[str, Any]] = {}
    for name, leaf in leaves.items():
        layer, kind = name.split("/")
        tree.setdefault(layer, {})[kind] = leaf
    return tree
