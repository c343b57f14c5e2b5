"""A GPT in Flax NNX, with dropout on embeddings, attention weights and residual branches.

The model holds parameters and nothing else: no random state and no flag of training. Its caller
passes the dropout of a step as a value, so that the forward pass is a pure function of parameters,
tokens and that value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import nnx

import regjax
from examples.sharded_lm.mesh import shard_activations
from examples.sharded_lm.settings import VOCABULARY, Recipe

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int, Key


@dataclass(frozen=True)
class Dropout:
    """The dropout of one step: each site of the model has its own key.

    Attributes:
        rate: The dropout rate; with 0 the other attributes are not used.
        root: The key of the run.
        step: The step of training.
        rows: The position of each example in the whole batch, whatever its micro-batch or device.
    """

    rate: float
    root: Key[Array, ""]
    step: Int[Array, ""]
    rows: Int[Array, " batch"]

    def __call__(self, x: Float[Array, "batch ..."], site: str) -> Float[Array, "batch ..."]:
        """Drop elements of activations or attention weights at a site."""
        if self.rate == 0:
            return x
        key = regjax.site_key(self.root, self.step, site)
        return regjax.dropout(x, self.rate, key=key, sampler=regjax.by_example(self.rows))


def no_dropout(x: Array, site: str) -> Array:
    """Return `x`, in evaluation."""
    del site
    return x


class Block(nnx.Module):
    """A transformer block with normalization before attention and before the perceptron."""

    def __init__(self, recipe: Recipe, rngs: nnx.Rngs) -> None:
        dtypes = {"dtype": recipe.dtype, "param_dtype": recipe.dtype, "rngs": rngs}
        width, heads = recipe.width, recipe.heads
        depth = width // heads
        self.attention_norm = nnx.LayerNorm(width, **dtypes)
        self.qkv = nnx.LinearGeneral(width, (3, heads, depth), **dtypes)
        self.out = nnx.LinearGeneral((heads, depth), width, axis=(-2, -1), **dtypes)
        self.mlp_norm = nnx.LayerNorm(width, **dtypes)
        self.up = nnx.Linear(width, 4 * width, **dtypes)
        self.down = nnx.Linear(4 * width, width, **dtypes)

    def __call__(
        self, x: Float[Array, "batch length width"], drop: Dropout, name: str
    ) -> Float[Array, "batch length width"]:
        """Add attention and perceptron to `x`."""
        q, k, v = jnp.moveaxis(self.qkv(self.attention_norm(x)), 2, 0)
        attended = self.out(causal_attention(q, k, v, drop, f"{name}/attention"))
        x = shard_activations(x + drop(attended, f"{name}/attention_residual"))
        hidden = self.down(nnx.gelu(self.up(self.mlp_norm(x))))
        return shard_activations(x + drop(hidden, f"{name}/mlp_residual"))


class GPT(nnx.Module):
    """A causal language model over bytes."""

    def __init__(self, recipe: Recipe, rngs: nnx.Rngs) -> None:
        dtypes = {"dtype": recipe.dtype, "param_dtype": recipe.dtype, "rngs": rngs}
        self.tokens = nnx.Embed(VOCABULARY, recipe.width, **dtypes)
        self.positions = nnx.Embed(recipe.context, recipe.width, **dtypes)
        self.blocks = nnx.List(Block(recipe, rngs) for _ in range(recipe.depth))
        self.norm = nnx.LayerNorm(recipe.width, **dtypes)
        self.head = nnx.Linear(recipe.width, VOCABULARY, **dtypes)

    def __call__(
        self, tokens: Int[Array, "batch length"], drop: Dropout
    ) -> Float[Array, "batch length vocabulary"]:
        """Return the logits of each next token."""
        positions = self.positions(jnp.arange(tokens.shape[1]))
        x = shard_activations(drop(self.tokens(tokens) + positions[None], "embedding"))
        for number, block in enumerate(self.blocks):
            x = block(x, drop, f"blocks/{number}")
        return self.head(self.norm(x))


def causal_attention(
    q: Float[Array, "batch length heads depth"],
    k: Float[Array, "batch length heads depth"],
    v: Float[Array, "batch length heads depth"],
    drop: Dropout,
    site: str,
) -> Float[Array, "batch length heads depth"]:
    """Compute attention with dropout of its weights."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    causal = jnp.tril(jnp.ones(scores.shape[-2:], bool))[None, None]
    weights = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf))
    return jnp.einsum("bhqk,bkhd->bqhd", drop(weights, site), v)
