"""The layers for Flax NNX: as NNX's own to the last bit, and in all that it publishes."""

from __future__ import annotations

import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import regjax
import regjax.nnx
from tests.regjax.training import assert_same_training, digits, filled, snapshot, text

KEY = jax.random.key(3)
X = jnp.linspace(-2.0, 3.0, 6 * 8).reshape(6, 8)
OURS, THEIRS = regjax.nnx.Dropout, nnx.Dropout
both = pytest.mark.parametrize("Dropout", [OURS, THEIRS], ids=["ours", "theirs"])


@pytest.fixture(autouse=True)
def _standard_promotion():
    """Flax's own layers lean on promotion."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def models(Dropout):
    """Models as users write them; all that differs between two calls is the import."""

    class MLP(nnx.Module):
        def __init__(self, rngs):
            self.first, self.second = nnx.Linear(64, 256, rngs=rngs), nnx.Linear(256, 24, rngs=rngs)
            self.dropout, self.out = Dropout(0.2, rngs=rngs), nnx.Linear(24, 10, rngs=rngs)

        def __call__(self, images):
            x = self.dropout(nnx.relu(self.first(images.reshape(len(images), -1))))
            return self.out(self.dropout(nnx.relu(self.second(x))))

    class CNN(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Conv(1, 8, (3, 3), rngs=rngs)
            self.second = nnx.Conv(8, 16, (3, 3), rngs=rngs)
            self.channels = Dropout(0.1, broadcast_dims=(1, 2), rngs=rngs)
            self.features = Dropout(0.3, rngs=rngs)
            self.out = nnx.Linear(64, 10, rngs=rngs)

        def __call__(self, images):
            x = images
            for convolution in (self.first, self.second):
                x = nnx.avg_pool(nnx.relu(convolution(x)), (2, 2), strides=(2, 2))
                x = self.channels(x)
            return self.out(self.features(x.reshape(len(x), -1)))

    class Block(nnx.Module):
        def __init__(self, rngs, width=16):
            self.norm1, self.norm2 = (nnx.LayerNorm(width, rngs=rngs) for _ in range(2))
            self.attention = nnx.MultiHeadAttention(2, width, dropout_rate=0.1, decode=False, rngs=rngs)
            self.up = nnx.Linear(width, 4 * width, rngs=rngs)
            self.down = nnx.Linear(4 * width, width, rngs=rngs)
            self.drop1, self.drop2, self.drop3 = (Dropout(0.1, rngs=rngs) for _ in range(3))

        def __call__(self, x):
            mask = nnx.make_causal_mask(jnp.ones(x.shape[:2]))
            x = x + self.drop1(self.attention(self.norm1(x), mask=mask))
            return x + self.drop3(self.down(self.drop2(nnx.gelu(self.up(self.norm2(x))))))

    class Transformer(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(128, 16, rngs=rngs)
            self.places = nnx.Param(0.02 * rngs.params.normal((1, 16, 16)))
            self.dropout, self.block = Dropout(0.1, rngs=rngs), Block(rngs)
            self.norm, self.out = nnx.LayerNorm(16, rngs=rngs), nnx.Linear(16, 128, rngs=rngs)

        def __call__(self, tokens):
            x = self.dropout(self.embed(tokens) + self.places[...])
            return self.out(self.norm(self.block(x)))

    return {"mlp": MLP, "cnn": CNN, "transformer": Transformer}


@pytest.mark.parametrize(
    ("name", "batches"), [("mlp", digits), ("cnn", digits), ("transformer", text)]
)
def test_a_run_of_training_has_the_same_bits(name, batches):
    @nnx.jit
    def step(model, optimizer, batch):
        def loss(model):
            logits = model(batch[0])
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

        value, gradient = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradient)
        return value

    def walk(Dropout):
        model = nnx.eval_shape(lambda: models(Dropout)[name](nnx.Rngs(0)))
        graph, state = nnx.split(model)
        model = nnx.merge(graph, filled(state))
        model.train()
        optimizer = nnx.Optimizer(model, optax.adam(2e-2), wrt=nnx.Param)
        state = lambda: nnx.to_pure_dict(nnx.state((model, optimizer)))
        return [
            snapshot((step(model, optimizer, batch), state())) for batch in batches(steps=25)
        ]

    assert_same_training(walk(OURS), walk(THEIRS))
