"""Dependence of the tests on versions of JAX, Flax and Optax, for all test files."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import optax
import pytest
from flax import nnx

# Outside of jit, JAX before 0.10 divides by a number; otherwise it multiplies by its inverse. The
# layers of Flax, Equinox and Haiku then differ in the last bit from themselves under jit.
EAGER_DIVISION_IS_EXACT = jax.__version_info__ < (0, 10)

# XLA of JAX 0.12 may fuse a mask with the gradient of a convolution, and contracts other products
# and sums there than in a program that draws the mask apart.
CONVOLUTIONS_MAY_FUSE_WITH_MASKS = jax.__version_info__ >= (0, 12)

kinds_of_keys_of_jax_0_10 = pytest.mark.skipif(
    jax.__version_info__ < (0, 10), reason="JAX 0.10 adds this kind of key"
)

# `optax.add_decayed_weights` of Optax 0.2.6 evaluates a schedule at step 0 only.
OPTAX_COUNTS_DECAY_STEPS = not optax.__version__.startswith("0.2.6")


def as_pure(tree: Any) -> Any:
    """Return `nnx.as_pure` of a tree; the function is `nnx.pure` in Flax 0.12.6."""
    return (nnx.as_pure if hasattr(nnx, "as_pure") else nnx.pure)(tree)


def assert_same_eagerly(mine: Any, peer: Any, *, layers: int = 1) -> None:
    """Assert equal bits outside of jit; before JAX 0.10, to a unit in the last place per layer."""
    for one, two in zip(jax.tree.leaves(mine), jax.tree.leaves(peer), strict=True):
        if EAGER_DIVISION_IS_EXACT:
            np.testing.assert_array_max_ulp(np.asarray(one), np.asarray(two), maxulp=layers)
        else:
            assert np.asarray(one).tobytes() == np.asarray(two).tobytes()


def causal_options(x: jax.Array) -> dict[str, Any]:
    """Return what makes `nnx.MultiHeadAttention` causal: a mask for Flax before 0.12.8."""
    if "is_causal" in inspect.signature(nnx.MultiHeadAttention.__call__).parameters:
        return {"is_causal": True}
    return {"mask": nnx.make_causal_mask(x[..., 0])}


@contextlib.contextmanager
def debug_key_reuse() -> Iterator[None]:
    """Check the reuse of keys; JAX before 0.10 does not check compiled functions."""
    if jax.__version_info__ < (0, 10):
        jax.clear_caches()
    with jax.debug_key_reuse(True):
        yield
