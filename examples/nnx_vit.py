"""A vision transformer in Flax NNX, as a user of Flax writes it.

It has the layers and the names of Flax, and imports nothing of regjax. Its attention has separate
projections, and dropping paths is a dropout that shares its mask within an example.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx
from jax import Array


class Block(nnx.Module):
    """A transformer block with normalization first, layer scale and dropped paths.

    Args:
        width: The size of a token.
        heads: The number of heads.
        dropout: The rate of each dropout, also of attention.
        drop_path: The rate at which a path is dropped.
        rngs: The keys.
    """

    def __init__(
        self, width: int, heads: int, dropout: float, drop_path: float, rngs: nnx.Rngs
    ) -> None:
        drop = functools.partial(nnx.Dropout, rngs=rngs)
        self.attention_norm = nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            heads, width, dropout_rate=dropout, decode=False, rngs=rngs
        )
        self.attention_dropout = drop(dropout)
        self.attention_scale = nnx.Param(jnp.full(width, 0.1))
        self.attention_path = drop(drop_path, broadcast_dims=(1, 2))
        self.mlp_norm = nnx.LayerNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.up_dropout = drop(dropout)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)
        self.down_dropout = drop(dropout)
        self.mlp_scale = nnx.Param(jnp.full(width, 0.1))
        self.mlp_path = drop(drop_path, broadcast_dims=(1, 2))

    def __call__(self, x: Array) -> Array:
        """Return new tokens for tokens of shape (batch, length, width)."""
        y = self.attention_dropout(self.attention(self.attention_norm(x)))
        x = x + self.attention_path(y * self.attention_scale)
        y = self.up_dropout(nnx.gelu(self.up(self.mlp_norm(x)), approximate=False))
        y = self.down_dropout(self.down(y))
        return x + self.mlp_path(y * self.mlp_scale)


class VisionTransformer(nnx.Module):
    """A classifier of images, from the token of the class.

    Args:
        classes: The number of classes.
        size: The height and width of an image.
        patch: The height and width of a patch.
        channels: The number of channels of an image.
        width: The size of a token.
        heads: The number of heads.
        dropout: The rate of each dropout.
        drop_paths: The rate at which paths are dropped, for each block.
        rngs: The keys.
    """

    def __init__(
        self,
        classes: int,
        *,
        size: int,
        patch: int,
        channels: int,
        width: int,
        heads: int,
        dropout: float,
        drop_paths: Sequence[float],
        rngs: nnx.Rngs,
    ) -> None:
        window = (patch, patch)
        self.embed = nnx.Conv(channels, width, window, window, padding="VALID", rngs=rngs)
        self.class_token = nnx.Param(jnp.zeros((1, 1, width)))
        self.positions = nnx.Param(jnp.zeros((1, (size // patch) ** 2 + 1, width)))
        self.position_dropout = nnx.Dropout(dropout, rngs=rngs)
        self.blocks = nnx.List(Block(width, heads, dropout, rate, rngs) for rate in drop_paths)
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head_dropout = nnx.Dropout(dropout, rngs=rngs)
        self.head = nnx.Linear(width, classes, rngs=rngs)

    def __call__(self, images: Array) -> Array:
        """Return logits for images of shape (batch, height, width, channels)."""
        x = self.embed(images)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        token = jnp.broadcast_to(self.class_token[...], (x.shape[0], 1, x.shape[-1]))
        x = self.position_dropout(jnp.concatenate([token, x], axis=1) + self.positions)
        for block in self.blocks:
            x = block(x)
        return self.head(self.head_dropout(self.norm(x)[:, 0]))
