"""How the tests depend on the versions of JAX and Flax: no other file of the tests does."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx

# Outside of jit, JAX before 0.10 divides by a number where it otherwise multiplies by its inverse:
# the layers of Flax, Equinox and Haiku then differ from themselves under jit in the last bit.
EAGER_DIVISION_IS_EXACT = jax.__version_info__ < (0, 10)

# XLA of JAX 0.12 may fuse a mask with the gradient of a convolution, and contracts other products
# and sums there than in a program that draws the mask apart.
CONVOLUTIONS_MAY_FUSE_WITH_MASKS = jax.__version_info__ >= (0, 12)


def assert_same_eagerly(mine: Any, theirs: Any) -> None:
    """Assert equal bits outside of jit; before JAX 0.10, equality to one unit in the last place."""
    for one, two in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
        if EAGER_DIVISION_IS_EXACT:
            np.testing.assert_array_max_ulp(np.asarray(one), np.asarray(two), maxulp=1)
        else:
            assert np.asarray(one).tobytes() == np.asarray(two).tobytes()


def causal_options(x: jax.Array) -> dict[str, Any]:
    """Return what makes `nnx.MultiHeadAttention` causal: a mask for Flax before 0.12.8."""
    if "is_causal" in inspect.signature(nnx.MultiHeadAttention.__call__).parameters:
        return {"is_causal": True}
    return {"mask": nnx.make_causal_mask(x[..., 0])}


@contextlib.contextmanager
def debug_key_reuse() -> Iterator[None]:
    """Check the reuse of keys, also in compiled functions, which JAX before 0.10 overlooks."""
    if jax.__version_info__ < (0, 10):
        jax.clear_caches()
    with jax.debug_key_reuse(True):
        yield
