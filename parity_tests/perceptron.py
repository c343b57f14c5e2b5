"""A small model in both frameworks, as a problem with real gradients for optimizers."""

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
    """A perceptron on scikit-learn's digits; each framework computes its own gradients.

    Attributes:
        params: Initial parameters; biases are optional.
        gradients: Empty, since they are not known in advance.
        batches: Images in `x` and their labels in `y`, for each step.
        ascend: Whether the optimizer maximizes; it then receives the negative loss.
    """

    batches: Sequence[Leaves] = ()
    ascend: bool = False

    @property
    def steps(self) -> Sequence[Leaves]:
        """Return the batches."""
        return self.batches

    def torch_gradient(
        self, params: Mapping[str, torch.Tensor], known: Leaves
    ) -> dict[str, torch.Tensor]:
        """Return the gradient of the loss, by name."""
        x = torch.tensor(known["x"])
        for layer in LAYERS:
            x = x if layer == LAYERS[0] else torch.tanh(x)
            x = x @ params[f"{layer}/kernel"]
            x = x + params[f"{layer}/bias"] if f"{layer}/bias" in params else x
        loss = torch.nn.functional.cross_entropy(x, torch.tensor(known["y"]).long())
        gradients = torch.autograd.grad(-loss if self.ascend else loss, list(params.values()))
        return dict(zip(params, gradients, strict=True))

    def jax_gradient(self, params: PyTree, known: Mapping[str, jax.Array]) -> PyTree:
        """Return the gradient of the loss, in the structure of the parameters."""

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
    """Return a training run, whose initial parameters do not depend on the case.

    Args:
        case: The optimizer, which may maximize.
        dtype: Dtype of parameters and images.
        steps: The number of batches.
        shapes: The shapes of the parameters, by name.

    Example:
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
    """Train in torch with the optimizer of the case, and return the recorded gradients.

    Gradients whose square would underflow are recorded as zeros.

    Args:
        case: The optimizer.
        dtype: Dtype of parameters and gradients.
        steps: The number of gradients.
        shapes: The shapes of the parameters, by name.

    Example:
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
        self.kept.append({name: _flush_tiny(leaf.numpy()) for name, leaf in gradients.items()})
        return gradients


def _flush_tiny(gradient: np.ndarray) -> np.ndarray:
    # XLA flushes squares that underflow to zero earlier than torch, and a saturated softmax has
    # many such gradients.
    return np.where(np.abs(gradient) ** 2 < np.finfo(gradient.dtype).tiny, 0, gradient)
