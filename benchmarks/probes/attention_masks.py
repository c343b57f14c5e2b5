"""Attention: what its mask depends on, and whether it stores the matrix of weights.

Kernels with dropout, such as axlearn's splash attention, seed a generator for each block of the
matrix. `key_per_block` draws in that way, in a few lines.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import regjax
from benchmarks.probes.attention import materializes

# attend(query, key, value, rng, block) -> result; `block` is a number of keys.
Attend = Callable[..., Any]
KEYS, HEADS, RATE = 128, 2, 0.5
BLOCKS = (32, 64, KEYS)


def own(
    query: Any, key: Any, value: Any, rng: Any, *, block: int, sampler: Any = regjax.bernoulli
) -> Any:
    """Compute attention in blocks of regjax; in one block of all keys, from the whole matrix."""
    size = None if block == KEYS else block
    return regjax.dot_product_attention(
        query, key, value, dropout_rng=rng, dropout_rate=RATE, block_size=size, sampler=sampler
    )


def flax(query: Any, key: Any, value: Any, rng: Any, *, block: int) -> Any:
    """Compute attention with Linen's function, which has no blocks."""
    from flax import linen

    del block
    return linen.dot_product_attention(
        query, key, value, dropout_rng=rng, dropout_rate=RATE, broadcast_dropout=False
    )


def key_per_block(query: Any, key: Any, value: Any, rng: Any, *, block: int) -> Any:
    """Compute attention in blocks, the mask of each drawn from a key of its own."""
    total, result = 0.0, 0.0
    for number in range(key.shape[1] // block):
        rows = slice(number * block, (number + 1) * block)
        powers = jnp.exp(jnp.einsum("bqhd,bkhd->bhqk", query, key[:, rows]))
        keep = jax.random.bernoulli(jax.random.fold_in(rng, number), 1 - RATE, powers.shape)
        dropped = jnp.where(keep, powers, 0) / (1 - RATE)
        total += powers.sum(-1)
        result += jnp.einsum("bhqk,bkhd->bqhd", dropped, value[:, rows])
    return result / jnp.swapaxes(total, 1, 2)[..., None]


CANDIDATES: Mapping[str, Attend] = {
    "regjax": own,
    "regjax, packed": functools.partial(own, sampler=regjax.packed_bernoulli),
    "a key per block": key_per_block,
    "Flax Linen": flax,
}


def mask(attend: Attend, block: int, devices: int = 1) -> np.ndarray:
    """Return the mask: with equal scores, and an identity as values, the weights are the result.

    Devices share the heads. A kernel cannot be divided by the compiler, so that `key_per_block` is
    called for the heads of each.
    """
    query = jnp.zeros((1, KEYS, HEADS, 8))
    value = jnp.broadcast_to(jnp.eye(KEYS)[None, :, None, :], (1, KEYS, HEADS, KEYS))
    run = functools.partial(attend, block=block)
    mesh = jax.make_mesh((devices,), ("heads",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec(None, None, "heads")
    if attend is key_per_block:
        specs = spec, spec, spec, PartitionSpec()
        run = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=spec)
    arrays = jax.device_put((query, query, value), NamedSharding(mesh, spec))
    return np.asarray(jax.jit(run)(*arrays, jax.random.key(0))) != 0


def is_the_same_for_every_block(attend: Attend) -> bool:
    """Return whether blocks of each size, and one of all keys, have one mask."""
    masks = [mask(attend, block) for block in BLOCKS]
    return all(np.array_equal(masks[0], other) for other in masks[1:])


def is_the_same_on_two_devices(attend: Attend) -> bool:
    """Return whether the mask of two devices is that of one."""
    return np.array_equal(mask(attend, BLOCKS[0]), mask(attend, BLOCKS[0], HEADS))


def stores_no_matrix(attend: Attend) -> bool:
    """Return whether neither the result nor the gradient has an array of all queries and keys."""
    query, key = jnp.ones((1, 96, HEADS, 8)), jnp.ones((1, 160, HEADS, 8))
    run = functools.partial(attend, block=BLOCKS[0])
    return not materializes(lambda *arrays: run(*arrays, jax.random.key(0)), query, key, key)


PROPERTIES: Mapping[str, Callable[[Attend], bool]] = {
    "one mask for every block size": is_the_same_for_every_block,
    "one mask on one device and on two": is_the_same_on_two_devices,
    "in blocks, no array of all queries and keys": stores_no_matrix,
}


def answers() -> dict[str, dict[str, bool]]:
    """Return for each property whether each candidate has it."""
    return {
        title: {name: holds(attend) for name, attend in CANDIDATES.items()}
        for title, holds in PROPERTIES.items()
    }


def table() -> str:
    """Return the answers in Markdown."""
    lines = ["properties of the mask", *CANDIDATES], ["---"] * (len(CANDIDATES) + 1)
    body = (
        [title, *("yes" if has else "no" for has in cells.values())]
        for title, cells in answers().items()
    )
    return "\n".join(f"| {' | '.join(line)} |" for line in (*lines, *body))
