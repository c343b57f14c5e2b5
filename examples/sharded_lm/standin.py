"""Stand-in for `regjax.by_example`."""

import math

import jax.numpy as jnp
import numpy as np

from regjax._random.bernoulli import bernoulli_at, check_probability


def by_example(index):  # noqa: D103
    def sampler(key, keep_prob, shape, *, out_sharding=None):
        size = math.prod(shape[1:])
        within = jnp.arange(size, dtype=np.uint32).reshape(1, *shape[1:])
        first = index.astype(np.uint32).reshape(-1, *[1] * (len(shape) - 1)) * np.uint32(size)
        low = jnp.broadcast_to(first, shape) + jnp.broadcast_to(within, shape)
        return bernoulli_at(
            key, check_probability("keep_prob", keep_prob), (jnp.zeros_like(low), low)
        )

    return sampler
