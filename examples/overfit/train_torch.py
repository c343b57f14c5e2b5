"""Training in PyTorch; `train_jax.py` has the same functions in JAX."""

from __future__ import annotations

import time
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import regtorch
from examples.overfit.curves import Curve

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from examples.overfit.data import Images, Problem, Weights
    from examples.overfit.recipes import Recipe
    from examples.overfit.settings import Settings


def load_params(weights: Weights) -> nn.ModuleDict:
    """Return the layers, with the shared initial weights."""
    layers = nn.ModuleDict()
    for name, layer in weights.items():
        linear = nn.Linear(*layer["kernel"].shape)
        with torch.no_grad():
            linear.weight.copy_(torch.tensor(layer["kernel"].T))  # shape (outputs, inputs)
            linear.bias.copy_(torch.tensor(layer["bias"]))
        layers[name] = linear
    return layers


class Perceptron(nn.Module):
    """A perceptron with dropout before each layer, including the first.

    In evaluation mode there is no dropout, and no key is needed. In training, each mask has its own
    key, derived from layer and step, so there is no generator state to carry or to checkpoint.
    """

    def __init__(self, layers: nn.ModuleDict, rate: float) -> None:
        super().__init__()
        self.layers = layers
        self.dropout = regtorch.nn.Dropout(rate)

    def forward(self, pixels: Tensor, *, root: Tensor | None = None, step: int = 0) -> Tensor:
        """Compute logits (batch, 10) from pixels (batch, 64)."""
        x = pixels
        for name, layer in self.layers.items():
            key = None if root is None else regtorch.site_key(root, step, name)
            x = self.dropout(x, key=key)
            x = layer(x)
            if name != "output":
                x = torch.relu(x)
        return x


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the mean cross-entropy, in nats."""
    return F.cross_entropy(logits, labels)


def decays(name: str, param: Tensor) -> bool:
    """Return whether a parameter is regularized; a bias does not make a function less smooth."""
    return param.ndim > 1


def make_optimizer(settings: Settings, recipe: Recipe, model: Perceptron) -> torch.optim.Optimizer:
    """Return the optimizer, with the weight decay of the recipe on kernels."""
    make = {
        "sgd": partial(torch.optim.SGD, momentum=0.9),
        "adam": torch.optim.Adam,
        "adamw": torch.optim.AdamW,
    }[settings.optimizer]
    named = list(model.named_parameters())
    groups = [
        {
            "params": [p for name, p in named if decays(name, p)],
            "weight_decay": recipe.weight_decay,
        },
        {"params": [p for name, p in named if not decays(name, p)], "weight_decay": 0.0},
    ]
    return make(groups, lr=settings.learning_rate)


def training_loss(
    model: Perceptron,
    pixels: Tensor,
    labels: Tensor,
    recipe: Recipe,
    root: Tensor | None,
    step: int,
) -> Tensor:
    """Compute the training loss: cross-entropy with dropout on, plus the penalty."""
    logits = model(pixels, root=root, step=step)
    loss = cross_entropy(logits, labels)
    if recipe.penalty:
        loss = loss + regtorch.l2_penalty(model, recipe.penalty, mask=decays)
    return loss


def make_train_chunk(
    images: Images,
    recipe: Recipe,
    settings: Settings,
    model: Perceptron,
    optimizer: torch.optim.Optimizer,
) -> Callable[[range, Tensor], None]:
    """Return a function that loops over many steps."""
    # Without dropout the keys are unused, but eager PyTorch would compute them.
    root = regtorch.key(settings.seed) if recipe.rate else None
    pixels, labels = as_tensors(images)

    def train_step(step: int, batch: Tensor) -> None:
        optimizer.zero_grad()
        training_loss(model, pixels[batch], labels[batch], recipe, root, step).backward()
        optimizer.step()

    def train_chunk(steps: range, batches: Tensor) -> None:
        model.train()
        for step, batch in zip(steps, batches, strict=True):
            train_step(step, batch)

    return train_chunk


@torch.no_grad()
def evaluate(model: Perceptron, pixels: Tensor, labels: Tensor) -> tuple[float, float]:
    """Compute cross-entropy (nats) and accuracy over a whole set, without dropout and penalty."""
    model.eval()
    logits = model(pixels)
    correct = logits.argmax(dim=-1) == labels
    return cross_entropy(logits, labels).item(), correct.float().mean().item()


def train(
    problem: Problem,
    recipe: Recipe,
    settings: Settings,
    on_evaluation: Callable[[int], None] = lambda step: None,
) -> Curve:
    """Train a network with a recipe.

    Args:
        problem: Images, initial weights and batches.
        recipe: The regularization.
        settings: The optimizer, its learning rate, and the seed of the masks.
        on_evaluation: Called with the number of completed steps at each evaluation.

    Returns:
        The curves of losses and accuracy.
    """
    start = time.perf_counter()
    model = Perceptron(load_params(problem.weights), recipe.rate)
    optimizer = make_optimizer(settings, recipe, model)
    train_chunk = make_train_chunk(problem.train, recipe, settings, model, optimizer)
    train_set, validation_set = as_tensors(problem.train), as_tensors(problem.validation)
    curve = Curve(recipe, "torch")

    def record(step: int) -> None:
        curve.record(
            step,
            train=evaluate(model, *train_set),
            validation=evaluate(model, *validation_set),
        )
        on_evaluation(step)

    every = settings.steps_between_evaluations
    with one_thread():
        record(0)
        for first in range(0, settings.steps, every):
            batches = torch.tensor(problem.batches[first : first + every])
            steps = range(first, first + len(batches))
            train_chunk(steps, batches)
            record(first + len(batches))
    curve.seconds = time.perf_counter() - start
    return curve


def as_tensors(images: Images) -> tuple[Tensor, Tensor]:
    """Return pixels and labels, which PyTorch's loss requires as int64."""
    return torch.tensor(images.pixels), torch.tensor(images.labels).long()


@contextmanager
def one_thread() -> Iterator[None]:
    """Limit PyTorch to one thread.

    Small layers do not benefit from more. If another program uses the cores, every operation would
    wait for its slowest thread.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
