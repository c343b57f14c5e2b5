"""The mesh, and how arrays are sharded over it.

A batch is sharded over "data" and "fsdp", a parameter over "fsdp" and "tensor": each device holds a
part of every kernel and of its optimizer state, and XLA gathers a kernel over "fsdp" where it is
used. The axes are automatic: XLA propagates the shardings that are stated here, of parameters,
batch and activations, through Flax's layers. With explicit axes every matrix product would need an
`out_sharding`, since "fsdp" shards both of its operands.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from examples.sharded_lm.settings import AXES, DATA, FSDP, TENSOR

if TYPE_CHECKING:
    from jaxtyping import Array, Float, PyTree

    from examples.sharded_lm.data import Batch

# By the last two names of the path, so that the moments of the optimizer have the shardings of
# their parameters. All other arrays are replicated.
SPECS = {
    "tokens/embedding": P((FSDP, TENSOR)),
    "positions/embedding": P((FSDP, TENSOR)),
    "qkv/kernel": P(FSDP, None, TENSOR, None),
    "qkv/bias": P(None, TENSOR, None),
    "out/kernel": P(TENSOR, None, FSDP),
    "up/kernel": P(FSDP, TENSOR),
    "up/bias": P(TENSOR),
    "down/kernel": P(TENSOR, FSDP),
    "head/kernel": P(FSDP, TENSOR),
    "head/bias": P(TENSOR),
}
_ROWS = (DATA, FSDP)


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Return a mesh of all devices, or of some."""
    shape, kinds = [sizes[axis] for axis in AXES], (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(shape, AXES, kinds, devices=devices)


def shardings_of(tree: PyTree[Any], mesh: Mesh) -> PyTree[NamedSharding]:
    """Return the sharding of each array of a training state, which may be abstract."""

    def sharding(path: Any, leaf: Any) -> NamedSharding:
        del leaf
        names = jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")
        return NamedSharding(mesh, SPECS.get("/".join(names.split("/")[-2:]), P()))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def shard_activations(x: Float[Array, "batch ..."]) -> Float[Array, "batch ..."]:
    """Shard activations over examples alone, so that XLA gathers kernels and not activations."""
    return jax.lax.with_sharding_constraint(x, P(_ROWS))


def shard_batch(batch: Batch, mesh: Mesh) -> Batch:
    """Return a batch as global arrays, of which every process places only its own examples."""
    sharding = NamedSharding(mesh, P(None, _ROWS))

    def shard(array: np.ndarray) -> Array:
        return jax.make_array_from_callback(array.shape, sharding, lambda part: array[part])

    return type(batch)(*map(shard, batch))
