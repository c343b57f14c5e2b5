"""Models and initializers of PyTorch, each with its counterpart in `regjax.torch_random`."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
from torch import nn

from parity_tests.torch_stream import as_numpy
from regjax import torch_random as T
from regjax.torch_random import Layer, init_like

# The functions: in JAX, in PyTorch, and the tolerance. One shape of normal numbers, for the sake of
# compilations.
S = (6, 4)
FUNCTIONS = {
    "xavier_uniform": (T.xavier_uniform, nn.init.xavier_uniform_, (6, 3, 2), (1.3,)),
    "xavier_normal": (T.xavier_normal, nn.init.xavier_normal_, S, (1.3,)),
    "kaiming_uniform": (T.kaiming_uniform, nn.init.kaiming_uniform_, (6, 4, 3), (math.sqrt(5),)),
    "kaiming_uniform, fan_out": (
        *(T.kaiming_uniform, nn.init.kaiming_uniform_, (6, 4, 3), (0.2, "fan_out", "tanh")),
    ),
    "kaiming_normal": (T.kaiming_normal, nn.init.kaiming_normal_, S, ()),
    "kaiming_normal, fan_out": (
        *(T.kaiming_normal, nn.init.kaiming_normal_, S, (0, "fan_out", "relu")),
    ),
    "trunc_normal": (T.trunc_normal, nn.init.trunc_normal_, (50, 8), ()),
    "trunc_normal, narrow": (T.trunc_normal, nn.init.trunc_normal_, (50, 8), (0.2, 0.7, -0.3, 0.5)),
    "trunc_normal, tail": (T.trunc_normal, nn.init.trunc_normal_, (50, 8), (0.0, 1.0, 1.5, 4.0)),
    "orthogonal, tall": (T.orthogonal, nn.init.orthogonal_, S, (1.2,)),
    "orthogonal, wide": (T.orthogonal, nn.init.orthogonal_, (4, 3, 2), (1.2,)),
    "sparse": (T.sparse, nn.init.sparse_, S, (0.3, 0.02)),
}


class Subclass(nn.Linear):
    """A layer with another method, and the same initializer."""

    def extra_repr(self):
        """Describe the layer."""
        return "subclass"


class Nest(nn.Module):
    """Containers, a shared module, a buffer, and no module."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(5, 3), nn.ReLU(), nn.Dropout(0.5))
        self.parts = nn.ModuleDict({"a": nn.ModuleList([nn.Linear(3, 2), nn.Tanh()])})
        self.none = None
        self.shared = self.first
        self.register_buffer("constant", torch.ones(2), persistent=False)
        self.last = Subclass(2, 5)


def encoder_layer(**options):
    """Return a small layer of a transformer."""
    return nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, **options)


class Registered(nn.Module):
    """Copies of registered modules."""

    def __init__(self):
        super().__init__()
        self.layer = encoder_layer()
        self.encoder = nn.TransformerEncoder(self.layer, 2)
        self.head = nn.Linear(8, 2)
        self.target = copy.deepcopy(self.head)
        self.last = nn.Linear(8, 2)


class RegisteredLater(nn.Module):
    """A layer that is registered after its copies."""

    def __init__(self):
        super().__init__()
        layer = encoder_layer()
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.layer = layer
        self.other = encoder_layer()


class Adapted(nn.Linear):
    """A layer with more parameters than its base."""

    def __init__(self):
        super().__init__(5, 3)
        self.adapter = nn.Linear(5, 3)


class Tied(nn.Module):
    """A parameter of two modules, with the value of the second."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.embedding.weight = self.head.weight


class Reinitialized(nn.Module):
    """A model with a parameter of its own and a second initialization, as in transformers."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.LayerNorm(6)
        self.token = nn.Parameter(torch.randn(2, 3))
        self.apply(self._init_weights)

    def _init_weights(self, module):
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)


def reinitialize(g, params):
    """Replay `Reinitialized`."""
    token, g = T.normal(g, (2, 3))
    weight, g = T.normal(g, params["a.weight"].shape, 0.0, 0.02)
    return {"token": token, "a.weight": weight, "a.bias": jnp.zeros(6)}, g


class Xavier(nn.Linear):
    """A layer with another initializer."""

    def reset_parameters(self):
        """Initialize otherwise than nn.Linear."""
        nn.init.xavier_uniform_(self.weight)
        nn.init.ones_(self.bias)


class Doubled(nn.Linear):
    """A layer that changes its parameters afterwards."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        with torch.no_grad():
            self.weight.mul_(2)


def xavier(g, params):
    """Replay `Xavier`."""
    assert params == {}
    weight, g = T.xavier_uniform(g, (3, 5))
    return {"weight": weight, "bias": jnp.ones(3)}, g


def adapt(g, params):
    """Replay `Adapted`."""
    assert params == {}
    base, g = init_like(Layer("Linear", LINEAR), g)
    adapter, g = init_like({"adapter": Layer("Linear", LINEAR)}, g)
    return base | adapter, g


LINEAR = {"weight": (3, 5), "bias": (3,)}


def attention(**options):
    """Return a constructor of attention."""
    return lambda: nn.MultiheadAttention(8, 2, **options)


def recurrent(kind, **options):
    """Return a constructor of a recurrent layer."""
    return lambda: getattr(nn, kind)(5, 4, **options)


CASES = {
    "Linear": lambda: nn.Linear(5, 3),
    "Linear without bias": lambda: nn.Linear(5, 3, bias=False),
    "Linear of several blocks": lambda: nn.ModuleList(
        [nn.Linear(90, 60), nn.Linear(60, 90), nn.Linear(90, 91)]
    ),
    "Linear, bfloat16": lambda: nn.Linear(5, 3, dtype=torch.bfloat16),
    "Bilinear": lambda: nn.ModuleList([nn.Bilinear(3, 4, 5), nn.Bilinear(2, 4, 5, bias=False)]),
    "Conv": lambda: nn.Sequential(
        nn.Conv1d(4, 6, 3, groups=2), nn.Conv2d(4, 6, (3, 2)), nn.Conv3d(2, 3, 2, bias=False)
    ),
    "ConvTranspose": lambda: nn.Sequential(
        nn.ConvTranspose1d(4, 6, 3, groups=2),
        nn.ConvTranspose2d(4, 6, (3, 2)),
        nn.ConvTranspose3d(2, 3, 2),
    ),
    "Embedding": lambda: nn.Sequential(nn.Embedding(6, 4), nn.Linear(5, 3)),
    "Embedding with padding": lambda: nn.Sequential(
        nn.Embedding(6, 4, padding_idx=0), nn.EmbeddingBag(6, 4, padding_idx=-2)
    ),
    "MultiheadAttention": attention(),
    "MultiheadAttention, kdim": attention(kdim=6),
    "MultiheadAttention, vdim": attention(vdim=4, bias=False),
    "MultiheadAttention, bias_kv": attention(add_bias_kv=True),
    "LSTM": recurrent("LSTM", num_layers=2, bidirectional=True, proj_size=3),
    "LSTM without bias": recurrent("LSTM", bias=False, batch_first=True),
    "GRU": recurrent("GRU", num_layers=2, bidirectional=True),
    "RNN": recurrent("RNN", nonlinearity="relu", bidirectional=True),
    **{kind: recurrent(kind) for kind in ("LSTMCell", "GRUCell", "RNNCell")},
    "norms": lambda: nn.Sequential(
        *(nn.BatchNorm1d(3), nn.BatchNorm2d(3, affine=False), nn.LayerNorm([2, 3])),
        *(nn.GroupNorm(1, 3), nn.RMSNorm(3), nn.InstanceNorm2d(3, affine=True), nn.PReLU(2, 0.1)),
        *(nn.BatchNorm3d(3, track_running_stats=False), nn.LayerNorm(3, bias=False)),
    ),
    "TransformerEncoderLayer": encoder_layer,
    "TransformerDecoderLayer": lambda: nn.TransformerDecoderLayer(8, 2, 12, bias=False),
    "TransformerEncoder": lambda: nn.TransformerEncoder(encoder_layer(), 3, nn.LayerNorm(8)),
    "TransformerDecoder": lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 12), 2),
    "Transformer": lambda: nn.Transformer(8, 2, 2, 2, 12, batch_first=True),
    "AdaptiveLogSoftmaxWithLoss": lambda: nn.AdaptiveLogSoftmaxWithLoss(16, 20, [5, 10]),
    "Nest": Nest,
    "Registered": Registered,
    "RegisteredLater": RegisteredLater,
    "Adapted": lambda: nn.Sequential(Adapted()),
    "Tied": Tied,
    "Reinitialized": lambda: nn.Sequential(nn.Linear(5, 3), Reinitialized(), nn.Linear(3, 2)),
    "Xavier": lambda: nn.Sequential(Xavier(5, 3)),
    "Doubled": lambda: Doubled(5, 3),
}
OPTIONS = {
    "Registered": {"copies": {"encoder.layers.0": "layer", "target": "head"}},
    "RegisteredLater": {"copies": {"layer": "encoder.layers.0", "other": None}},
    "Adapted": {"initializers": {"0": adapt}},
    "Tied": {"initializers": {"": lambda g, p: ({"embedding.weight": p["head.weight"]}, g)}},
    "Reinitialized": {"initializers": {"1": reinitialize}},
    "Xavier": {"initializers": {"0": xavier}},
    "Doubled": {"initializers": {"": lambda g, p: ({"weight": 2 * p["weight"]}, g)}},
}


def constructed(build, seed):
    """Return a model that PyTorch initialized, one with other values, and the state before."""
    other = build()
    torch.manual_seed(seed)
    torch.rand(seed)
    g = T.from_torch(torch.get_rng_state())
    return build(), other, g


def pairs() -> Iterator[tuple[str, Any, Any]]:
    """Yield the tensors of all models, and the states of the generator, in JAX and in PyTorch."""
    with torch.random.fork_rng(devices=[]):
        for name in CASES:
            model, structure, g = constructed(CASES[name], 3)
            params, g = init_like(structure, g, **OPTIONS.get(name, {}))
            for entry, tensor in model.state_dict().items():
                if tensor.dtype != torch.int64:  # num_batches_tracked, int32 in JAX
                    yield f"{name}, {entry}", np.asarray(params[entry]), as_numpy(tensor)
            yield f"{name}, state", T.to_torch(g), torch.get_rng_state().numpy()
