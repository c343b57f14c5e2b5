"""A model of every kind of layer in each library, and which of its parameters decay."""

from __future__ import annotations

import functools
from typing import Any

import equinox as eqx
import flax.linen as linen
import haiku as hk
import jax
import jax.numpy as jnp
from flax import nnx

KEY = jax.random.key(0)
TOKENS = jnp.zeros((2, 3), jnp.int32)


class Linen(linen.Module):
    """Most layers of Linen, and a bare parameter."""

    @linen.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Return the head of all layers."""
        x = linen.Embed(5, 4)(tokens)
        x = linen.MultiHeadDotProductAttention(2, name="attention")(linen.LayerNorm()(x))
        x = linen.BatchNorm(use_running_average=False)(x)
        x = linen.RMSNorm()(linen.GroupNorm(2)(linen.Conv(4, (3,))(x)))
        x = linen.RNN(linen.GRUCell(4))(linen.PReLU()(x))
        x = linen.WeightNorm(linen.Dense(4, name="inner"))(x)
        x = x + self.param("pos_embedding", linen.initializers.zeros, (1, 3, 4))
        return linen.DenseGeneral((2, 3), name="head")(x)


class Block(linen.Module):
    """A norm and a dense layer."""

    @linen.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        """Return the next carry of a scan."""
        return linen.Dense(4)(linen.LayerNorm()(x)), None


class Scanned(linen.Module):
    """Three blocks whose parameters are stacked."""

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the last carry."""
        stack = linen.scan(
            Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        return stack(name="layers")(x, None)[0]


class Equinox(eqx.Module):
    """Most layers of Equinox, and a part that is missing."""

    embed: eqx.nn.Embedding
    # A linear layer with any name.
    patch_embed: eqx.nn.Linear
    layers: list
    attention: eqx.nn.MultiheadAttention
    cell: eqx.nn.LSTMCell
    batch: eqx.nn.BatchNorm
    slope: eqx.nn.PReLU
    mlp: eqx.nn.MLP
    nothing: Any = None


@functools.cache
def equinox_model() -> Equinox:
    """Return the model of Equinox."""
    return Equinox(
        eqx.nn.Embedding(3, 4, key=KEY),
        eqx.nn.Linear(2, 3, key=KEY),
        [eqx.nn.LayerNorm(4), eqx.nn.Conv2d(2, 2, 3, key=KEY), eqx.nn.GroupNorm(2, 4)],
        eqx.nn.MultiheadAttention(2, 4, use_query_bias=True, key=KEY),
        eqx.nn.LSTMCell(2, 3, key=KEY),
        eqx.nn.BatchNorm(4, "batch", mode="batch"),
        eqx.nn.PReLU(),
        eqx.nn.MLP(2, 2, 3, 1, use_final_bias=False, key=KEY),
    )


def nnx_model() -> nnx.Module:
    """Return the model of NNX."""
    rngs = nnx.Rngs(0)
    return nnx.Sequential(
        nnx.Embed(5, 4, rngs=rngs),
        nnx.LayerNorm(4, rngs=rngs),
        nnx.MultiHeadAttention(2, 4, rngs=rngs),
        nnx.BatchNorm(4, rngs=rngs),
        nnx.Conv(4, 4, 3, rngs=rngs),
        nnx.LoRA(4, 2, 4, rngs=rngs),
        nnx.Dropout(0.1, rngs=rngs),
    )


@functools.cache
def haiku_params() -> Any:
    """Return the shapes of the parameters of most layers of Haiku."""

    def forward(tokens):
        x = hk.Embed(5, 4)(tokens)
        x = hk.LayerNorm(-1, create_scale=True, create_offset=True)(x)
        x = hk.MultiHeadAttention(2, 2, w_init=hk.initializers.Constant(1.0), name="mha")(x, x, x)
        x = hk.nets.MLP([4, 4])(hk.BatchNorm(True, True, 0.9)(x, True))
        x, _ = hk.GRU(4)(x[0], jnp.zeros((3, 4)))
        return hk.Bias()(hk.RMSNorm(-1)(x))

    # Haiku's moving averages promote dtypes.
    with jax.numpy_dtype_promotion("standard"):
        params, _ = jax.eval_shape(hk.transform_with_state(forward).init, KEY, TOKENS)
    return params


@functools.cache
def linen_variables() -> Any:
    """Return the shapes of all variables of the model of Linen."""
    return jax.eval_shape(Linen().init, KEY, TOKENS)


def linen_params() -> Any:
    """Return the shapes of its parameters."""
    return linen_variables()["params"]


GRU = [f"GRUCell_0/{name}/kernel" for name in ("hn", "hr", "hz", "in", "ir", "iz")]
HEADS = ("key", "out", "query", "value")
LINEN = {
    "Conv_0/kernel",
    "head/kernel",
    "inner/kernel",
    *GRU,
    *(f"attention/{name}/kernel" for name in HEADS),
}
NNX = {
    "layers/4/kernel/value",
    "layers/5/lora_a/value",
    "layers/5/lora_b/value",
    *(f"layers/2/{name}/kernel/value" for name in HEADS),
}
EQUINOX = {
    "patch_embed/weight",
    "layers/1/weight",
    *(f"attention/{name}_proj/weight" for name in ("query", "key", "value", "output")),
    "cell/weight_ih",
    "cell/weight_hh",
    "mlp/layers/0/weight",
    "mlp/layers/1/weight",
}
HAIKU = {
    "gru/w_h",
    "gru/w_i",
    *(f"mha/{name}/w" for name in ("key", "linear", "query", "value")),
    "mlp/~/linear_0/w",
    "mlp/~/linear_1/w",
}


# The tree, the leaves that decay, and the number of parameters.
MODELS = {
    "linen-params": (linen_params, LINEN, 35),
    "linen-variables": (linen_variables, {f"params/{name}" for name in LINEN}, 35),
    "linen-scanned": (
        lambda: jax.eval_shape(Scanned().init, KEY, jnp.zeros((2, 4)))["params"],
        {"layers/Dense_0/kernel"},
        4,
    ),
    "nnx-state": (lambda: nnx.state(nnx_model(), nnx.Param), NNX, 17),
    "nnx-whole-state": (lambda: nnx.state(nnx_model()), NNX, 17),
    "nnx-module": (nnx_model, NNX, 17),
    "equinox": (equinox_model, EQUINOX, 23),
    "equinox-filtered": (lambda: eqx.filter(equinox_model(), eqx.is_inexact_array), EQUINOX, 23),
    "haiku": (haiku_params, HAIKU, 22),
}
