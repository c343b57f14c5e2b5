"""Base classes of the modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from regtorch._checks import check_generator
from regtorch._random.bernoulli import check_probability


class GeneratorModule(nn.Module):
    """A module that draws a key from its generator if a call has none."""

    @property
    def generator(self) -> torch.Generator | None:
        """Return the generator, or None."""
        return self.__dict__["generator"]

    @generator.setter
    def generator(self, generator: torch.Generator | None) -> None:
        self.__dict__["generator"] = check_generator("generator", generator)


class Layer(GeneratorModule):
    """A module with a rate, which calls one function."""

    def __init__(self, rate: float = 0.5, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.rate = check_probability("rate", rate)
        self.generator = generator

    def forward(self, x: Tensor, *, key: Tensor | torch.Generator | None = None) -> Tensor:
        """Drop in training, nothing in evaluation; `key` takes precedence over the generator."""
        key = self.generator if key is None else key
        return self.drop(x, self.rate, key=key, deterministic=not self.training, **self.options())

    @classmethod
    def drop(cls, x: Tensor, rate: float | Tensor, **options: Any) -> Tensor:
        """Call the function of the layer, after its own check of the shape of `x`."""
        raise NotImplementedError

    def options(self) -> dict[str, Any]:
        """Return the arguments of the function besides the rate, the key and the mode."""
        return {}

    def extra_repr(self) -> str:
        """Return the text between the parentheses of the printed module."""
        return f"rate={self.rate}"
