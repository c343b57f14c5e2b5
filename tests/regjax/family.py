"""Code that the tests of the layers for Flax share: each layer, and its function."""

from __future__ import annotations

import jax.numpy as jnp

import regjax

X = jnp.linspace(-2.0, 3.0, 6 * 8).reshape(6, 8)
IDS = jnp.arange(6) % 4
IMAGES = jnp.ones((2, 9, 9, 3))
FAMILY = {  # settings, inputs, the function of the layer
    "Dropout": ({"broadcast_dims": (0,)}, (X,), regjax.dropout),
    "FeatureDropout": ({"channel_axis": 1}, (IMAGES,), regjax.feature_dropout),
    "AlphaDropout": ({"broadcast_dims": (1,)}, (X,), regjax.alpha_dropout),
    "FeatureAlphaDropout": ({"channel_axis": 1}, (IMAGES,), regjax.feature_alpha_dropout),
    "DropPath": ({"mode": "row", "scale_by_keep": False}, (X,), regjax.drop_path),
    "DropBlock": (
        {"block_size": 3, "share_channels": True, "gamma_scale": 2.0, "with_noise": True},
        (IMAGES,),
        regjax.drop_block,
    ),
    "VariationalDropout": ({"time_axis": 0}, (X,), regjax.variational_dropout),
    "DropConnect": ({"rule": "**"}, ({"a": X, "b": X},), regjax.drop_connect),
    "EmbeddingDropout": ({}, (X, IDS), regjax.embedding_dropout),
    "GaussianDropout": ({}, (X,), regjax.gaussian_dropout),
    "GaussianNoise": ({}, (X,), regjax.gaussian_noise),
}
AMOUNT = dict.fromkeys(FAMILY, "rate") | {"GaussianNoise": "stddev"}  # its name in a layer
