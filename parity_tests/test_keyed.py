"""Ports of one PyTorch model, unmodified and with the keys of its sites, in three frameworks."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen, nnx

import regjax
import regtorch

FEATURES, HEADS = 8, 2
NAMES = {"dropout": "drop", "attention": "mixer"}


class TorchModel(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(FEATURES, FEATURES)
        self.mixer = torch.nn.MultiheadAttention(FEATURES, HEADS, dropout=0.3, batch_first=True)
        self.drop = torch.nn.Dropout(0.1)

    def forward(self, x):
        x = self.drop(self.fc(x))
        return self.drop(x + self.mixer(x, x, x, need_weights=False)[0])


class LinenModel(linen.Module):
    @linen.compact
    def __call__(self, x):
        drop = linen.Dropout(0.1, deterministic=False, name="dropout")
        attend = linen.MultiHeadDotProductAttention(
            HEADS, dropout_rate=0.3, deterministic=False, name="attention"
        )
        x = drop(linen.Dense(FEATURES, name="fc")(x))
        return drop(x + attend(x))


class NnxModel(nnx.Module):
    def __init__(self, rngs):
        self.fc = nnx.Linear(FEATURES, FEATURES, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            HEADS, FEATURES, dropout_rate=0.3, deterministic=False, decode=False, rngs=rngs
        )
        self.dropout = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x):
        x = self.dropout(self.fc(x))
        return self.dropout(x + self.attention(x))


class EquinoxModel(eqx.Module):
    fc: eqx.nn.Linear
    attention: eqx.nn.MultiheadAttention
    dropout: eqx.nn.Dropout

    def __call__(self, x):
        x = self.dropout(jax.vmap(self.fc)(x))
        return self.dropout(x + self.attention(x, x, x))


def attention_weights(weights):
    """Return kernel and bias of each projection, in PyTorch's layout."""
    ends = zip(
        np.split(weights["mixer.in_proj_weight"], 3),
        np.split(weights["mixer.in_proj_bias"], 3),
        strict=True,
    )
    out = weights["mixer.out_proj.weight"], weights["mixer.out_proj.bias"]
    return dict(zip(("query", "key", "value", "out"), (*ends, out), strict=True))


def flax_params(weights):
    depth = FEATURES // HEADS
    projections = attention_weights(weights)
    attention = {
        name: {
            "kernel": weight.T.reshape(FEATURES, HEADS, depth),
            "bias": bias.reshape(HEADS, depth),
        }
        for name, (weight, bias) in projections.items()
    }
    weight, bias = projections["out"]
    attention["out"] = {"kernel": weight.T.reshape(HEADS, depth, FEATURES), "bias": bias}
    fc = {"kernel": weights["fc.weight"].T, "bias": weights["fc.bias"]}
    return jax.tree.map(jnp.asarray, {"fc": fc, "attention": attention})


def linen_port(weights):
    variables = {"params": flax_params(weights)}

    def call(x, root, step):
        bound = regjax.keyed.bind(LinenModel(), root, step, names=NAMES, broadcast_dropout=False)
        return bound.apply(variables, x)

    return call


def nnx_port(weights):
    model = NnxModel(nnx.Rngs(0))
    for name, leaves in flax_params(weights)["attention"].items():
        nnx.update(getattr(model.attention, name), leaves)
    nnx.update(model.fc, flax_params(weights)["fc"])
    graph, state = nnx.split(model)

    def call(x, root, step):
        model = nnx.merge(graph, state)
        return regjax.keyed.bind(model, root, step, names=NAMES, broadcast_dropout=False)(x)

    return call


def equinox_port(weights):
    key = jax.random.key(0)
    biases = dict.fromkeys([f"use_{n}_bias" for n in ("query", "key", "value", "output")], True)
    model = EquinoxModel(
        eqx.nn.Linear(FEATURES, FEATURES, key=key),
        eqx.nn.MultiheadAttention(HEADS, FEATURES, dropout_p=0.3, key=key, **biases),
        eqx.nn.Dropout(0.1),
    )

    def layers(model):
        attention = [
            getattr(model.attention, f"{name}_proj") for name in ("query", "key", "value", "output")
        ]
        return [leaf for layer in (model.fc, *attention) for leaf in (layer.weight, layer.bias)]

    fc = weights["fc.weight"], weights["fc.bias"]
    values = [leaf for pair in (fc, *attention_weights(weights).values()) for leaf in pair]
    model = eqx.tree_at(layers, model, [jnp.asarray(value) for value in values])
    return lambda x, root, step: jax.vmap(regjax.keyed.bind(model, root, step, names=NAMES))(x)


PORTS = [linen_port, nnx_port, equinox_port]


@pytest.mark.parametrize("port", PORTS, ids=lambda port: port.__name__)
@pytest.mark.sample(2)
def test_an_unmodified_port_drops_the_same_elements(port):
    torch.manual_seed(0)
    reference = regtorch.keyed.convert(TorchModel())
    call = port({name: leaf.detach().numpy() for name, leaf in reference.named_parameters()})

    @jax.jit
    def value_and_grad(x, step):
        def loss(x):
            y = call(x, jax.random.key(7), step)
            return (y**2).sum(), y

        (_, y), grad = jax.value_and_grad(loss, has_aux=True)(x)
        return y, grad

    x = np.linspace(-2, 2, 3 * 5 * FEATURES, dtype=np.float32).reshape(3, 5, FEATURES)
    for step in (0, 3):
        given = torch.tensor(x, requires_grad=True)
        regtorch.keyed.set_key(reference, regtorch.key(7), step)
        expected = reference(given)
        (expected**2).sum().backward()
        y, grad = value_and_grad(x, step)
        np.testing.assert_array_equal(y == 0, expected.detach().numpy() == 0)
        np.testing.assert_allclose(y, expected.detach().numpy(), rtol=1e-5, atol=1e-6)
        assert given.grad is not None
        np.testing.assert_allclose(grad, given.grad.numpy(), rtol=1e-4, atol=1e-5)
