"""PyTorch's own random numbers on a CPU, replayed in JAX from PyTorch's seed.

    g = torch_random.generator(0)                     # torch.manual_seed(0)
    weights, g = torch_random.uniform(g, (8, 4))      # torch.rand(8, 4)
    y, g = torch_random.dropout(x, 0.1, g)            # torch.nn.functional.dropout(x, 0.1)

Each function takes the state of the generator, and returns a value and the next state, as PyTorch
2.13 would leave it. Calls in the order of a PyTorch program reproduce its numbers, under `jit`,
`scan` and `grad`. The stream is serial, and made for checking a port against the original; to train
in JAX, use `regjax.dropout` and a key.
"""

from __future__ import annotations

from regjax.torch_random.compiled import compiled_dropout
from regjax.torch_random.cuda import CudaGenerator
from regjax.torch_random.data import (
    distributed_sampler,
    loader_seed,
    random_sampler,
    random_split,
    shuffled_batches,
    subset_random_sampler,
    weighted_random_sampler,
)
from regjax.torch_random.dropouts import (
    alpha_dropout,
    dropout,
    feature_alpha_dropout,
    feature_dropout,
)
from regjax.torch_random.initializers import (
    calculate_gain,
    kaiming_normal,
    kaiming_uniform,
    orthogonal,
    sparse,
    trunc_normal,
    xavier_normal,
    xavier_uniform,
)
from regjax.torch_random.integers import permutation, randint
from regjax.torch_random.layers import Layer
from regjax.torch_random.normals import normal
from regjax.torch_random.replay import init_like
from regjax.torch_random.state import TorchGenerator, from_torch, generator, to_torch
from regjax.torch_random.uniforms import bernoulli, uniform

__all__ = [
    "CudaGenerator",
    "Layer",
    "TorchGenerator",
    "alpha_dropout",
    "bernoulli",
    "calculate_gain",
    "compiled_dropout",
    "distributed_sampler",
    "dropout",
    "feature_alpha_dropout",
    "feature_dropout",
    "from_torch",
    "generator",
    "init_like",
    "kaiming_normal",
    "kaiming_uniform",
    "loader_seed",
    "normal",
    "orthogonal",
    "permutation",
    "randint",
    "random_sampler",
    "random_split",
    "shuffled_batches",
    "sparse",
    "subset_random_sampler",
    "to_torch",
    "trunc_normal",
    "uniform",
    "weighted_random_sampler",
    "xavier_normal",
    "xavier_uniform",
]


def __dir__() -> list[str]:
    """List the public names."""
    return __all__
