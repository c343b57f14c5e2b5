"""One training run by NumPy, by regjax and by torch.optim, with the parameters of every step."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

import regjax.optim
from parity_tests import optimizers, reference_penalty
from parity_tests.optimizers.case import Case, Leaves
from regjax._decay.paths import named_leaves
from regjax._decay.penalty import l2_penalty as jax_l2_penalty
from regtorch._decay.penalty import l2_penalty as torch_l2_penalty

if TYPE_CHECKING:
    from jaxtyping import PyTree

Run = list[dict[str, np.ndarray]]

SMALL = {"dense/bias": (8,), "dense/kernel": (5, 8)}
# 10,062 parameters in 6 leaves, of sizes that fill SIMD vectors and sizes that do not.
LARGE = {
    "conv/bias": (16,),
    "conv/kernel": (16, 3, 3, 3),
    "hidden/bias": (64,),
    "hidden/kernel": (64, 140),
    "out/bias": (10,),
    "out/kernel": (10, 58),
}


@dataclass(frozen=True)
class Problem:
    """Initial parameters, and the gradient of the bare loss at each step.

    Attributes:
        params: Arrays by name, `layer/kind`.
        gradients: The same for each step.
    """

    params: Leaves
    gradients: Sequence[Leaves]

    @property
    def dtype(self) -> str:
        """Return the dtype of parameters and gradients."""
        return str(next(iter(self.params.values())).dtype)

    @property
    def steps(self) -> Sequence[Leaves]:
        """Return the data known before each step: here the whole gradient."""
        return self.gradients

    def torch_gradient(
        self, params: Mapping[str, torch.Tensor], known: Leaves
    ) -> dict[str, torch.Tensor]:
        """Return the gradient at one step, by name."""
        return {name: torch.tensor(known[name]) for name in params}

    def jax_gradient(self, params: PyTree, known: Mapping[str, jax.Array]) -> PyTree:
        """Return the gradient at one step, in the structure of the parameters."""
        del params
        return nested(known)


def synthetic(
    dtype: str, shapes: Mapping[str, tuple[int, ...]] = SMALL, steps: int = 100
) -> Problem:
    """Return random parameters, and random gradients that do not depend on them.

    The gradients shrink by a factor of 20 over the run, so that the largest second moment is not
    the last one. Their sizes differ between parameters, and about every fifth element is 0 in a
    step. `shapes` are by name, `layer/kind`.

    Example:
        >>> problem = synthetic("float32")
        >>> sorted(problem.params), len(problem.gradients), problem.dtype
        (['dense/bias', 'dense/kernel'], 100, 'float32')
    """
    rng = np.random.default_rng(0)
    params = {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}
    gradients = []
    for step in range(steps):
        noise = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
        kept = {name: rng.random(shape) > 0.2 for name, shape in shapes.items()}
        size = 0.05 ** (step / steps)
        gradients.append(
            {
                n: (noise[n] * kept[n] * size * (0.1 if n.endswith("bias") else 1.0)).astype(dtype)
                for n in shapes
            }
        )
    return Problem(params, gradients)


def walk_numpy(case: Case, problem: Problem) -> Run:
    """Return the parameters by name after each step, computed by the written-out recursions.

    Example:
        >>> run = walk_numpy(Case("plain", "SGD", {"lr": 0.1}), synthetic("float32"))
        >>> len(run), run[0]["dense/kernel"].shape
        (100, (5, 8))
    """
    mask = _mask(case, problem)

    def gradient(current: Leaves, step: int) -> dict[str, np.ndarray]:
        penalty = reference_penalty.l2_gradient(current, case.penalty, mask)
        return {name: g + penalty[name] for name, g in problem.gradients[step].items()}

    walk = getattr(optimizers, case.optimizer.lower())
    options = dict(case.options)
    if case.half_life is not None:
        base, half_life = options["lr"], case.half_life
        options["lr"] = lambda step: base * 0.5 ** (step / half_life)
    steps = walk(problem.params, gradient, **_masked(walk, case.mask), **options)
    return list(islice(steps, len(problem.gradients)))


def walk_torch(case: Case, problem: Problem, **options: Any) -> Run:
    """Return the parameters by name after each step of `torch.optim`.

    A mask becomes parameter groups, and a schedule `LambdaLR`; `options` are further options of the
    optimizer, such as `fused=True`.

    Example:
        >>> run = walk_torch(Case("plain", "SGD", {"lr": 0.1}), synthetic("float32"))
        >>> len(run), run[0]["dense/kernel"].shape
        (100, (5, 8))
    """
    params = {n: torch.tensor(array, requires_grad=True) for n, array in problem.params.items()}
    mask = _mask(case, problem)
    optimizer = getattr(torch.optim, case.optimizer)(
        _groups(params, mask), **dict(case.options), **options
    )
    scheduler = None
    if case.half_life is not None:
        half_life = case.half_life
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.5 ** (t / half_life))
    run = []
    for known in problem.steps:
        for name, gradient in problem.torch_gradient(params, known).items():
            params[name].grad = gradient
        if case.penalty:
            torch_l2_penalty(params, case.penalty, mask=mask).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        run.append({n: p.detach().numpy().copy() for n, p in params.items()})
    return run


def walk_jax(
    case: Case,
    problem: Problem,
    make: Callable[..., optax.GradientTransformation] | None = None,
) -> Run:
    """Return the parameters by name after each step of `regjax.optim`.

    A mask becomes a tree of bools, and a schedule one of optax; in float64 the run enables x64.
    `make` replaces the constructor of the optimizer, for the tests of the tests.

    Example:
        >>> run = walk_jax(Case("plain", "SGD", {"lr": 0.1}), synthetic("float32"))
        >>> len(run), run[0]["dense/kernel"].shape
        (100, (5, 8))
    """
    (run,) = walk_jax_together([case], problem, make)
    return run


def walk_jax_together(
    cases: Sequence[Case],
    problem: Problem,
    make: Callable[..., optax.GradientTransformation] | None = None,
) -> list[Run]:
    """Return what `walk_jax` returns for each case, from one program for all of them.

    It compiles in half the time of a program for each case.

    Example:
        >>> cases = [Case("slow", "SGD", {"lr": 0.1}), Case("fast", "SGD", {"lr": 1.0})]
        >>> len(walk_jax_together(cases, synthetic("float32")))
        2
    """
    with jax.enable_x64(problem.dtype == "float64"):
        params = nested({n: jnp.asarray(array) for n, array in problem.params.items()})
        stacked = {
            name: jnp.asarray(np.stack([known[name] for known in problem.steps]))
            for name in problem.steps[0]
        }
        carries, steps = zip(
            *(_jax_training(case, problem, params, make) for case in cases), strict=True
        )

        def train_step(carries, known):
            carries = tuple(step(c, known) for step, c in zip(steps, carries, strict=True))
            return carries, [params for params, _ in carries]

        walk = jax.jit(lambda carries, xs: jax.lax.scan(train_step, carries, xs))
        _, visited = walk(carries, stacked)
        runs = [{n: np.asarray(leaf) for n, leaf in named_leaves(tree)} for tree in visited]
    steps = range(len(problem.steps))
    return [[{n: leaf[step] for n, leaf in run.items()} for step in steps] for run in runs]


def _jax_training(
    case: Case,
    problem: Problem,
    params: PyTree,
    make: Callable[..., optax.GradientTransformation] | None,
) -> tuple[Any, Callable[..., Any]]:
    """Return parameters with the state of the optimizer, and the step from them to the next."""
    make_optimizer = make or getattr(regjax.optim, case.optimizer.lower())
    options = dict(case.options)
    learning_rate = options.pop("lr")
    if case.half_life is not None:
        learning_rate = _halving(learning_rate, case.half_life, len(problem.steps))
    by_name = _mask(case, problem)
    mask = None if by_name is None else nested(by_name)
    optimizer = make_optimizer(learning_rate, **options, **_masked(make_optimizer, mask))

    def step(carry, known):
        params, state = carry
        gradient = problem.jax_gradient(params, known)
        if case.penalty:
            penalty = jax.grad(jax_l2_penalty)(params, case.penalty, mask=mask)
            gradient = optax.tree.add(gradient, penalty)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    return (params, optimizer.init(params)), step


WALKS = {"numpy": walk_numpy, "jax": walk_jax, "torch": walk_torch}


def _halving(learning_rate: float, half_life: int, steps: int) -> optax.Schedule:
    # A table, computed as in torch: a power in float32 would differ in the last digit.
    table = np.array([learning_rate * 0.5 ** (step / half_life) for step in range(steps)])
    return lambda count: jnp.asarray(table, float)[count]


def _masked(function: Callable[..., Any], mask: Any) -> dict[str, Any]:
    # An optimizer without decay has no argument `mask`.
    takes_mask = mask is not None or "mask" in inspect.signature(function).parameters
    return {"mask": mask} if takes_mask else {}


def _mask(case: Case, problem: Problem) -> dict[str, bool] | None:
    return None if case.mask is None else {name: case.mask(name) for name in problem.params}


def _groups(
    params: Mapping[str, torch.Tensor], mask: Mapping[str, bool] | None
) -> list[dict[str, Any]]:
    if mask is None:
        return [{"params": list(params.values())}]
    return [
        {"params": [p for n, p in params.items() if mask[n]]},
        {"params": [p for n, p in params.items() if not mask[n]], "weight_decay": 0.0},
    ]


def nested(leaves: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return a tree with one level for the layers, from leaves named `layer/kind`.

    Example:
        >>> nested({"out/bias": 1, "out/kernel": 2})
        {'out': {'bias': 1, 'kernel': 2}}
    """
    tree: dict[str, dict[str, Any]] = {}
    for name, leaf in leaves.items():
        layer, kind = name.split("/")
        tree.setdefault(layer, {})[kind] = leaf
    return tree
