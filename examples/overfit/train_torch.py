"""The run in PyTorch; `train_jax.py` is the same in JAX, function by function."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import regtorch
from examples.overfit.curves import Curve

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from jaxtyping import Int

    from examples.overfit.data import Images, Problem, Weights
    from examples.overfit.recipes import Recipe
    from examples.overfit.settings import Settings


class Perceptron(nn.Module):
    """A perceptron with dropout before each layer, the input's included.

    In training, each layer's mask at each step comes from a key of its own, so there is no
    generator to save.
    """

    def __init__(self, weights: Weights, rate: float) -> None:
        super().__init__()
        self.dropout = regtorch.nn.Dropout(rate)
        self.layers = nn.ModuleDict({name: _linear(layer) for name, layer in weights.items()})

    def forward(self, pixels: Tensor, *, root: Tensor | None = None, step: int = 0) -> Tensor:
        """Computes logits; `root` and `step` name the masks and are not needed in evaluation."""
        x = pixels
        for name, layer in self.layers.items():
            if self.training and root is not None:
                x = self.dropout(x, key=regtorch.site_key(root, step, name))
            x = layer(x)
            if name != "output":
                x = torch.relu(x)
        return x
