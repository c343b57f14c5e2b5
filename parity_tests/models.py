"""Models with dropout in both frameworks, side by side.

A `Pair` makes both sides from one seed; `plant` names a defect to build into the JAX side, for the
tests of the tests.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

import regjax
import regtorch
from parity_tests.frameworks import to_torch
from parity_tests.harness import JaxSide, Leaf, TorchSide

ROOT = 7
RATE = 0.1


@dataclasses.dataclass(frozen=True)
class Pair:
    """One model in both frameworks.

    Attributes:
        params: The shapes of the JAX parameters, as a tree.
        forward: `forward(params, x, drop)` in JAX, where `drop(x, site)` is its dropout.
        module: Makes the PyTorch module; its `forward(x, drop)` is the same.
        names: From JAX path to PyTorch name.
        shared: Dimensions along which a site of the JAX model shares its mask, by site.
        keyed: Whether the PyTorch module has the layers of `torch.nn`, without keys, and is called
            as `forward(x)`: `regtorch.keyed.convert` then gives it keys.
    """

    params: Any
    forward: Callable[..., jax.Array]
    module: Callable[[], torch.nn.Module]
    names: Mapping[str, Leaf]
    shared: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    keyed: bool = False


def sides(
    pair: Pair,
    jax_optimizer: optax.GradientTransformation,
    torch_optimizer: Callable[[torch.nn.Module], torch.optim.Optimizer],
    *,
    dtype: str = "float32",
    plant: str = "",
) -> tuple[JaxSide, TorchSide]:
    """Return both sides of a pair, ready to be trained on batches `(x, labels)`.

    Args:
        pair: The model.
        jax_optimizer: The optimizer of the JAX side.
        torch_optimizer: Makes the optimizer of the PyTorch side.
        dtype: The dtype of the parameters.
        plant: `"key"` moves one site's key by one step in JAX, `"rate"` uses 0.11 instead of 0.1
            there.
    """
    torch.manual_seed(0)
    model = pair.module().to(getattr(torch, dtype))
    if pair.keyed:
        regtorch.keyed.convert(model)

    def jax_loss(params: Any, batch: Any, step: Any) -> jax.Array:
        def drop(x: jax.Array, site: str) -> jax.Array:
            late = int(plant == "key" and site == "out")
            return regjax.dropout(
                x,
                0.11 if plant == "rate" and site == "out" else RATE,
                key=regjax.site_key(jax.random.key(ROOT), step + late, site),
                broadcast_dims=pair.shared.get(site, ()),
            )

        logits = pair.forward(params, batch[0], drop)
        losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch[1][:, None], axis=1)
        return losses.mean()

    def torch_loss(model: torch.nn.Module, batch: Any, step: int) -> torch.Tensor:
        root, x = regtorch.key(ROOT), to_torch(batch[0])

        def drop(x: torch.Tensor, site: str) -> torch.Tensor:
            return regtorch.dropout(x, RATE, key=regtorch.site_key(root, step, site))

        if pair.keyed:
            regtorch.keyed.set_key(model, root, step)
        logits = model(x) if pair.keyed else model(x, drop)
        return torch.nn.functional.cross_entropy(logits, to_torch(batch[1]).long())

    params = jax.tree.map(lambda shape: jnp.zeros(shape, dtype), pair.params, is_leaf=_is_shape)
    return (
        JaxSide(params, jax_loss, jax_optimizer),
        TorchSide(model, torch_loss, torch_optimizer(model)),
    )


def _is_shape(node: Any) -> bool:
    return isinstance(node, tuple)


def _dense(path: str, name: str) -> dict[str, Leaf]:
    return {f"{path}/kernel": Leaf(f"{name}.weight", (1, 0)), f"{path}/bias": Leaf(f"{name}.bias")}


def _linear(params: Any, x: jax.Array) -> jax.Array:
    bias = params["bias"]
    return x @ params["kernel"] + bias.reshape(*[1] * (x.ndim - 1), -1)


class _Perceptron(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.out = torch.nn.Linear(64, 32), torch.nn.Linear(32, 10)

    def forward(self, x: torch.Tensor, drop: Any) -> torch.Tensor:
        hidden = drop(torch.nn.functional.silu(self.hidden(drop(x, "in"))), "out")
        return self.out(hidden)


def _perceptron(params: Any, x: jax.Array, drop: Any) -> jax.Array:
    return _linear(
        params["out"], drop(jax.nn.silu(_linear(params["hidden"], drop(x, "in"))), "out")
    )


def _perceptron_dropped_before(params: Any, x: jax.Array, drop: Any) -> jax.Array:
    return _linear(
        params["out"], jax.nn.silu(drop(_linear(params["hidden"], drop(x, "in")), "out"))
    )


PERCEPTRON = Pair(
    params={
        "hidden": {"kernel": (64, 32), "bias": (32,)},
        "out": {"kernel": (32, 10), "bias": (10,)},
    },
    forward=_perceptron,
    module=_Perceptron,
    names=_dense("hidden", "hidden") | _dense("out", "out"),
)
DROPPED_BEFORE = dataclasses.replace(PERCEPTRON, forward=_perceptron_dropped_before)


class _Convolutional(torch.nn.Module):
    """A model as a PyTorch user writes it, without keys."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(1, 8, 3, padding=1)
        self.channels, self.features = torch.nn.Dropout2d(RATE), torch.nn.Dropout(RATE)
        self.out = torch.nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.nn.functional.silu(self.conv(x.reshape(-1, 1, 8, 8)))
        return self.out(self.features(self.channels(x).mean((2, 3))))


def _convolutional(params: Any, x: jax.Array, drop: Any) -> jax.Array:
    x = jax.lax.conv_general_dilated(
        x.reshape(-1, 8, 8, 1),
        params["conv"]["kernel"],
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    x = jax.nn.silu(x + params["conv"]["bias"][None, None, None])
    x = drop(x, "channels")
    return _linear(params["out"], drop(x.mean((1, 2)), "features"))


CONVOLUTIONAL = Pair(
    params={
        "conv": {"kernel": (3, 3, 1, 8), "bias": (8,)},
        "out": {"kernel": (8, 10), "bias": (10,)},
    },
    forward=_convolutional,
    module=_Convolutional,
    names={
        "conv/kernel": Leaf("conv.weight", (2, 3, 1, 0)),
        "conv/bias": Leaf("conv.bias"),
        **_dense("out", "out"),
    },
    # Whole channels, as in torch.nn.Dropout2d; in JAX they are last.
    shared={"channels": (1, 2)},
    keyed=True,
)

_WIDTH, _HEADS, _LENGTH = 16, 2, 8


class _Encoder(torch.nn.Module):
    """A post-norm encoder layer like torch.nn.TransformerEncoderLayer, over image rows."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Linear(8, _WIDTH)
        self.qkv, self.proj = torch.nn.Linear(_WIDTH, 3 * _WIDTH), torch.nn.Linear(_WIDTH, _WIDTH)
        self.up, self.down = torch.nn.Linear(_WIDTH, 32), torch.nn.Linear(32, _WIDTH)
        self.norm1, self.norm2 = torch.nn.LayerNorm(_WIDTH), torch.nn.LayerNorm(_WIDTH)
        self.out = torch.nn.Linear(_WIDTH, 10)

    def forward(self, x: torch.Tensor, drop: Any) -> torch.Tensor:
        x = self.embed(x.reshape(-1, _LENGTH, 8))
        q, k, v = (
            t.reshape(*t.shape[:2], _HEADS, -1).transpose(1, 2) for t in self.qkv(x).chunk(3, -1)
        )
        weights = torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, -1)
        mixed = (drop(weights, "attention") @ v).transpose(1, 2).reshape(x.shape)
        x = self.norm1(x + drop(self.proj(mixed), "residual1"))
        hidden = drop(torch.relu(self.up(x)), "feed-forward")
        x = self.norm2(x + drop(self.down(hidden), "residual2"))
        return self.out(drop(x.mean(1), "out"))


def _norm(params: Any, x: jax.Array) -> jax.Array:
    x = jax.nn.standardize(x, axis=-1, epsilon=1e-5)
    return x * params["scale"][None, None] + params["bias"][None, None]


def _encoder(params: Any, x: jax.Array, drop: Any) -> jax.Array:
    x = _linear(params["embed"], x.reshape(-1, _LENGTH, 8))
    q, k, v = (
        t.reshape(*t.shape[:2], _HEADS, -1)
        for t in jnp.split(_linear(params["qkv"], x), 3, axis=-1)
    )
    weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5)
    mixed = jnp.einsum("bhqk,bkhd->bqhd", drop(weights, "attention"), v).reshape(x.shape)
    x = _norm(params["norm1"], x + drop(_linear(params["proj"], mixed), "residual1"))
    hidden = drop(jax.nn.relu(_linear(params["up"], x)), "feed-forward")
    x = _norm(params["norm2"], x + drop(_linear(params["down"], hidden), "residual2"))
    return _linear(params["out"], drop(x.mean(1), "out"))


_SIZES = {
    "embed": (8, _WIDTH),
    "qkv": (_WIDTH, 3 * _WIDTH),
    "proj": (_WIDTH, _WIDTH),
    "up": (_WIDTH, 32),
    "down": (32, _WIDTH),
    "out": (_WIDTH, 10),
}
_NORMS = ("norm1", "norm2")

ENCODER = Pair(
    params={n: {"kernel": size, "bias": size[1:]} for n, size in _SIZES.items()}
    | {n: {"scale": (_WIDTH,), "bias": (_WIDTH,)} for n in _NORMS},
    forward=_encoder,
    module=_Encoder,
    names={k: v for n in _SIZES for k, v in _dense(n, n).items()}
    | {f"{n}/scale": Leaf(f"{n}.weight") for n in _NORMS}
    | {f"{n}/bias": Leaf(f"{n}.bias") for n in _NORMS},
)

PAIRS = {"perceptron": PERCEPTRON, "convolutional": CONVOLUTIONAL, "encoder": ENCODER}


def batches(
    steps: int, dtype: str = "float32", size: int = 32
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the handwritten digits of scikit-learn, as the same random batches in every call."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    rng = np.random.default_rng(0)
    order = [rng.integers(0, len(labels), size) for _ in range(steps)]
    return [((images[i] / 16).astype(dtype), labels[i].astype(np.int32)) for i in order]


class _UnmodifiedEncoder(torch.nn.Module):
    """The encoder as a PyTorch user writes it, without keys."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Linear(8, _WIDTH)
        self.layer = torch.nn.TransformerEncoderLayer(_WIDTH, _HEADS, 32, RATE, batch_first=True)
        self.drop, self.out = torch.nn.Dropout(RATE), torch.nn.Linear(_WIDTH, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer(self.embed(x.reshape(-1, _LENGTH, 8)))
        return self.out(self.drop(x.mean(1)))


_SITES = {
    "attention": "layer.self_attn",
    "residual1": "layer.dropout1",
    "feed-forward": "layer.dropout",
    "residual2": "layer.dropout2",
    "out": "drop",
}
_PLACES = {
    "embed": "embed",
    "proj": "layer.self_attn.out_proj",
    "up": "layer.linear1",
    "down": "layer.linear2",
    "out": "out",
}

# The same JAX model as ENCODER, with its sites named after PyTorch's modules.
UNMODIFIED_ENCODER = Pair(
    params=ENCODER.params,
    forward=lambda params, x, drop: _encoder(params, x, lambda y, site: drop(y, _SITES[site])),
    module=_UnmodifiedEncoder,
    names={path: leaf for n, place in _PLACES.items() for path, leaf in _dense(n, place).items()}
    | {
        "qkv/kernel": Leaf("layer.self_attn.in_proj_weight", (1, 0)),
        "qkv/bias": Leaf("layer.self_attn.in_proj_bias"),
    }
    | {f"{n}/scale": Leaf(f"layer.{n}.weight") for n in _NORMS}
    | {f"{n}/bias": Leaf(f"layer.{n}.bias") for n in _NORMS},
    keyed=True,
)
