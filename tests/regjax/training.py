"""Code that the tests of layers share: data, and training runs."""

from __future__ import annotations

import zlib
from pydoc_data.topics import topics

import chex
import jax
import jax.numpy as jnp
import numpy as np


def digits(steps, size=32):
    """Return batches of scikit-learn's handwritten digits, of shape (N, 8, 8, 1)."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32).reshape(-1, 8, 8, 1)
    order = np.random.default_rng(0).integers(0, len(labels), (steps, size))
    return [(images[chosen], labels[chosen].astype(np.int32)) for chosen in order]


def text(steps, size=8, length=16):
    """Return batches of characters of Python's documentation, and the next characters."""
    letters = np.frombuffer(topics["for"].encode("ascii", "replace"), np.uint8).astype(np.int32)
    starts = np.random.default_rng(0).integers(0, len(letters) - length, (steps, size))
    windows = np.lib.stride_tricks.sliding_window_view(letters, length + 1)[starts]
    return [(window[:, :-1], window[:, 1:]) for window in windows]


def filled(shapes):
    """Return values for a state of these shapes, without compilation; keys differ."""
    rng = np.random.default_rng(0)

    def fill(path, leaf):
        name = jax.tree_util.keystr(path)
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.key(zlib.crc32(name.encode()))
        if not jax.numpy.issubdtype(leaf.dtype, jax.numpy.floating):
            return jax.numpy.zeros(leaf.shape, leaf.dtype)
        values = rng.normal(size=leaf.shape) / np.sqrt(max(leaf.shape[0], 8))
        return jax.numpy.asarray(values + ("scale" in name), leaf.dtype)

    return jax.tree.map_with_path(fill, shapes)


def train(step, state, batches):
    """Train on the batches; return the loss and the state after each step.

    `step(state, batch, number)` returns the next state and the loss; it is jitted here.
    """
    step, walked = jax.jit(step), []
    for number, batch in enumerate(batches):
        state, loss = step(state, batch, number)
        walked.append(snapshot((loss, state)))
    return walked


def snapshot(tree):
    """Return the values of a tree, including keys, as NumPy arrays."""

    def array(leaf):
        is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(leaf) if is_key else leaf)

    return jax.tree.map(array, tree)


def same_bits(tree, other):
    """Return whether two trees of float32 have the same bits, including signs of zeros."""
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True)
    words = [[np.asarray(leaf).view(np.uint32) for leaf in pair] for pair in pairs]
    return all(np.array_equal(*pair) for pair in words)


def assert_same_training(actual, expected):
    """Assert equal bits of all losses and states at every step, and that the model learned."""
    for number, (mine, other) in enumerate(zip(actual, expected, strict=True)):
        assert jax.tree.structure(mine) == jax.tree.structure(other)
        leaves = jax.tree.leaves_with_path(mine)
        for (path, one), two in zip(leaves, jax.tree.leaves(other), strict=True):
            same = one.dtype == two.dtype and one.tobytes() == two.tobytes()
            assert same, f"step {number}: {jax.tree_util.keystr(path)} differs"
    losses = [float(loss) for loss, _ in actual]
    assert np.mean(losses[-3:]) < 0.9 * np.mean(losses[:3])


def assert_one_compilation(function, x, rates, rtol):
    """Assert that one compilation serves changing rates, flags and keys, and agrees with calls."""
    traces = []

    @jax.jit
    def step(x, key, rate, deterministic):
        traces.append(None)
        return function(x, rate, key=key, deterministic=deterministic)

    for i, rate in enumerate(rates):
        for deterministic in (False, True):
            y = step(x, jax.random.key(i), jnp.float32(rate), jnp.bool_(deterministic))
            expected = x if deterministic else function(x, rate, key=jax.random.key(i))
            chex.assert_trees_all_close(y, expected, rtol=rtol)
    assert len(traces) == 1
