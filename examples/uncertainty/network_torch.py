"""The same network in PyTorch, with the weights that JAX trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

import regtorch

if TYPE_CHECKING:
    from examples.uncertainty.network import Params


def from_jax(params: Params, rate: float) -> nn.Module:
    """Return the model, whose dropouts draw from the keys of the sites "2" and "5"."""
    first, second, last = (np.asarray(layer["kernel"]) for layer in params.values())
    model = nn.Sequential(
        nn.Linear(*first.shape),
        nn.ReLU(),
        nn.Dropout(rate),
        nn.Linear(*second.shape),
        nn.ReLU(),
        nn.Dropout(rate),
        nn.Linear(*last.shape),
    )
    state = {}
    for name, layer in params.items():
        state[f"{name}.weight"] = torch.from_numpy(np.array(layer["kernel"]).T.copy())
        state[f"{name}.bias"] = torch.from_numpy(np.array(layer["bias"]))
    model.load_state_dict(state)
    return regtorch.keyed.convert(model)


def predict(
    model: nn.Module, pixels: np.ndarray, *, seed: int, samples: int
) -> regtorch.Prediction:
    """Predict with many stochastic forward passes, with the masks of JAX for this seed."""
    x, key = torch.from_numpy(np.array(pixels)), regtorch.key(seed)
    return regtorch.mc_dropout(model, x, key=key, outputs="logits", samples=samples)
