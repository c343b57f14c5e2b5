"""Digests of the dropout masks, to compare runs on different meshes."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from examples.sharded_lm.data import Batch
from examples.sharded_lm.model import Dropout
from examples.sharded_lm.settings import Recipe

if TYPE_CHECKING:
    from jaxtyping import Array, Bool


def sites(recipe: Recipe) -> dict[str, tuple[int, ...]]:
    """Return the shape of the mask of one example at each site."""
    features = (recipe.context, recipe.width)
    weights = (recipe.heads, recipe.context, recipe.context)
    found = {"embedding": features}
    for block in (f"blocks/{number}" for number in range(recipe.depth)):
        found[f"{block}/attention"] = weights
        found[f"{block}/attention_residual"] = found[f"{block}/mlp_residual"] = features
    return found


def masks_of_step(
    recipe: Recipe, mesh: Mesh, batch: Batch, step: int
) -> dict[str, Bool[Array, "micro batch ..."]]:
    """Return the masks of a step, each drawn in the sharding of the batch."""
    root = jax.random.key(recipe.seed, impl="threefry2x32")
    shapes = sites(recipe)

    def draw(rows: Array) -> dict[str, Array]:
        drop = Dropout(recipe.rate, root, jnp.asarray(step), rows)
        return {
            site: drop(jnp.ones((len(rows), *shape), jnp.float32), site) != 0
            for site, shape in shapes.items()
        }

    draws = jax.jit(
        lambda rows: jax.lax.map(draw, rows),
        out_shardings=dict.fromkeys(shapes, batch.rows.sharding),
    )
    with jax.set_mesh(mesh):
        return draws(batch.rows)


def digests(recipe: Recipe, mesh: Mesh, batch: Batch, step: int) -> dict[str, str]:
    """Return the SHA-256 of the mask of the whole batch at each site."""
    found = {}
    for site, mask in masks_of_step(recipe, mesh, batch, step).items():
        whole = np.asarray(multihost_utils.process_allgather(mask, tiled=True))
        found[site] = hashlib.sha256(np.packbits(whole).tobytes()).hexdigest()
    return found
