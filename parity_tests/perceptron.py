"""A small model in both frameworks for an optimizer to train: a problem with real gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

from parity_tests.models import batches
from parity_tests.optimizers.case import Case, Leaves
from parity_tests.trajectories import Problem, walk_torch

if TYPE_CHECKING:
    from jaxtyping import PyTree

LAYERS = ("first", "second", "out")
# 10,062 parameters in 6 leaves.
SHAPES = {
    "first/bias": (100,),
    "first/kernel": (64, 100),
    "second/bias": (32,),
    "second/kernel": (100, 32),
    "out/bias": (10,),
    "out/kernel": (32, 10),
}


@dataclass(frozen=True)
class Training(Problem):
    """A perceptron that learns scikit-learn's digits; each side finds its own gradients.

    Attributes:
        params: Where to start; biases may be left out.
        gradients: Not known beforehand, so empty.
        batches: Images in `x` and their labels in `y`, for each step.
        ascend: Whether the optimizer maximizes: it is then given the negative loss.
    """

    batches: Sequence[Leaves] = ()
    ascend: bool = False

    @property
    def steps(self) -> Sequence[Leaves]:
        """The batches."""
        return self.batches

    def torch_gradient(
        self, params: Mapping[str, torch.Tensor], known: Leaves
    ) -> dict[str, torch.Tensor]:
        """The gradient of the loss, by name."""
        x = torch.tensor(known["x"])
        for layer in LAYERS:
            x = x if layer == LAYERS[0] else torch.tanh(x)
            x = x @ params[f"{layer}/kernel"]
            x = x + params[f"{layer}/bias"] if f"{layer}/bias" in params else x
        loss = torch.nn.functional.cross_entropy(x, torch.tensor(known["y"]).long())
        gradients = torch.autograd.grad(-loss if self.ascend else loss, list(params.values()))
        return dict(zip(params, gradients, strict=True))

    def jax_gradient(self, params: PyTree, known: Mapping[str, jax.Array]) -> PyTree:
        """The gradient of the loss, in the structure of the parameters."""

        def objective(params: dict[str, dict[str, jax.Array]]) -> jax.Array:
            x = known["x"]
            for layer in LAYERS:
                x = x if layer == LAYERS[0] else jnp.tanh(x)
                x = x @ params[layer]["kernel"]
                x = x + params[layer]["bias"][None] if "bias" in params[layer] else x
            losses = optax.softmax_cross_entropy_with_integer_labels(x, known["y"])
            return -losses.mean() if self.ascend else losses.mean()

        return jax.grad(objective)(params)


def training(
    case: Case, dtype: str, steps: int, shapes: Mapping[str, tuple[int, ...]] = SHAPES
) -> Training:
    """Make a training run, from a start that does not depend on the case.

    Args:
        case: What will train; ascends if it does.
        dtype: Dtype of parameters and images.
        steps: How many batches.
        shapes: Of the parameters by name.

    Examples:
        >>> problem = training(Case("plain", "SGD", {"lr": 0.1}), "float32", steps=3)
        >>> sum(leaf.size for leaf in problem.params.values()), len(problem.steps)
        (10062, 3)
    """
    rng = np.random.default_rng(1)
    params = {
        name: (rng.standard_normal(shape) / np.sqrt(shape[0])).astype(dtype)
        for name, shape in shapes.items()
    }
    known = [{"x": x, "y": y} for x, y in batches(steps, dtype)]
    return Training(params, (), known, ascend=bool(case.options.get("maximize")))


def recorded(
    case: Case, dtype: str, steps: int, shapes: Mapping[str, tuple[int, ...]] = SHAPES
) -> Problem:
    """Train with torch by the very optimizer, and keep the gradients that it was given.

    Gradients whose square would underflow are kept as zeros.

    Args:
        case: What trains.
        dtype: Dtype of parameters and gradients.
        steps: How many gradients.
        shapes: Of the parameters by name.

    Examples:
        >>> problem = recorded(Case("plain", "SGD", {"lr": 0.1}), "float32", steps=3)
        >>> len(problem.gradients), problem.gradients[0]["out/bias"].shape
        (3, (10,))
    """
    source = training(case, dtype, steps, shapes)
    recording = _Recording(source.params, (), source.batches, source.ascend)
    walk_torch(case, recording)
    return Problem(source.params, recording.kept)


@dataclass(frozen=True)
class _Recording(Training):
    kept: list[dict[str, np.ndarray]] = field(default_factory=list)

    def torch_gradient(self, params: Mapping[str, torch.Tensor], known: Leaves) -> dict[str, Any]:
        gradients = super().torch_gradient(params, known)
        self.kept.append({name: _without_dust(leaf.numpy()) for name, leaf in gradients.items()})
        return gradients


def _without_dust(gradient: np.ndarray) -> np.ndarray:
    # Of numbers whose square underflows, XLA makes zeros earlier than torch; a saturated softmax
    # has many of them.
    return np.where(np.abs(gradient) ** 2 < np.finfo(gradient.dtype).tiny, 0, gradient)
