"""Training steps for `test_certificate.py`, which other processes import."""

import functools
import itertools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

import regjax

ROOT, ROWS = jax.random.key(0), PartitionSpec("data")
calls = itertools.count()


def train(devices, start, stop):
    """Train with four right sites, one of them a scan, and four wrong ones."""
    mesh = jax.make_mesh((len(devices),), ("data",), devices=devices)
    on_mesh = NamedSharding(mesh, ROWS)
    x, index = jax.device_put((jnp.ones((16, 64)), jnp.arange(16)), on_mesh)

    def apply(x, site, step, number=0):
        key = regjax.site_key(jax.random.fold_in(ROOT, number), step, site)
        return regjax.dropout(x, 0.5, key=key)

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(ROWS, None), out_specs=ROWS)
    def on_each_device(x, step):
        return apply(x, "index", step, jax.lax.axis_index("data"))

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(ROWS, ROWS), out_specs=ROWS)
    def by_example(x, index):
        key = regjax.site_key(ROOT, 0, "rows")
        return regjax.dropout(x, 0.5, key=key, sampler=regjax.by_example(index))

    @jax.jit
    def train_step(x, index, step, call, salt):
        def layer(x, number):
            drop = functools.partial(apply, site="layers", step=step, number=number)
            return jax.checkpoint(drop)(x), None

        x = apply(x, "hidden", step)
        x = regjax.feature_dropout(x, 0.25, key=regjax.site_key(ROOT, step, "features"))
        x, _ = jax.lax.scan(layer, x, jnp.arange(3))
        x = apply(x, "counter", call)
        x = apply(x, "hash", step, salt)
        x = apply(x, "count", step, len(devices))
        return by_example(on_each_device(x, step), index)

    for step in range(start, stop):
        train_step(x, index, step, next(calls), hash("a name") % 2**31)
        yield


def dies(devices, start, stop):
    """End the process, as for lack of memory."""
    import os

    os._exit(9)


def draws_nothing(devices, start, stop):
    """Evaluate."""
    for _ in range(start, stop):
        regjax.dropout(jnp.ones(8), 0.5, deterministic=True)
        yield
