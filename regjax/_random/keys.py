"""PRNG keys: the input of every mask, and their derivation for each training step.

A key is made once, from a seed; `site_key` derives a key from it, without state, for each place in
a model and each step of training. A resumed run continues exactly, and no RNG state is saved.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from regjax._random.events import observer
from regjax._random.threefry import threefry2x32
from regshared.checks import check_integer, check_string, describe

if TYPE_CHECKING:
    from jax.typing import ArrayLike
    from jaxtyping import Array, Key, UInt32

    from regjax._random.threefry import Words

    KeyLike = Key[Array, ""] | UInt32[Array | np.ndarray, " _words"]

_THREEFRY = "threefry2x32"


def check_key(key: KeyLike | None, name: str = "key") -> KeyLike:
    """Return `key` if it is a single key, typed or raw; `name` is the name of the argument."""
    is_array = isinstance(key, jax.Array | np.ndarray)
    typed = is_array and is_typed(key)
    if not is_array or not (typed or key.dtype == np.uint32):
        raise TypeError(
            f"{name} must be a JAX random key, such as jax.random.key(seed); got {describe(key)}."
        )
    if key.ndim != (0 if typed else 1):
        raise ValueError(
            f"{name} must be a single key; got a batch of keys, {describe(key)}. Map over keys and "
            "rows with jax.vmap, or select one key by its index."
        )
    if not typed and key.shape[0] not in (2, 4):
        raise ValueError(
            f"{name} must have shape (2,), or (4,) for rbg, if it is raw; got {describe(key)}."
        )
    return key


def key_words(key: KeyLike) -> Words:
    """Return the two uint32 words that a mask is drawn from.

    A threefry key is its own two words, so that masks equal those of `jax.random`. Keys of other
    implementations are hashed to two words, block by block; a mask drawn from those equals no mask
    of `jax.random`, but is of the same quality. `check_key` has checked the key.
    """
    data = jnp.asarray(jax.random.key_data(key) if is_typed(key) else key)
    if is_threefry(key):
        high, low = data
        return high, low
    blocks = max(2, -(-data.size // 2))
    (high, low), *others = jnp.pad(data, (0, 2 * blocks - data.size)).reshape(blocks, 2)
    for first, second in others:
        high, low = threefry2x32((high, low), (first, second))
    return high, low


def consume(key: KeyLike) -> None:
    """Report to `jax_debug_key_reuse` that a mask is drawn from this key.

    That check does not see a read of the key's data. It sees these bits, which XLA removes because
    they are unused.
    """
    if is_typed(key):
        jax.random.bits(key, ())


def site_key(root: KeyLike, step: ArrayLike, site: str) -> KeyLike:
    """Return the key of one place in a model at one step of training, derived without state.

    Two blocks of threefry: the root key encrypts a 64-bit hash of the site's name, and the result
    encrypts the step. Equal arguments give equal keys in every process, on every device, under
    every configuration of JAX, and in regtorch; different sites or steps give independent keys.

    Args:
        root: One key, typed or raw, of any implementation. As with `jax.random.fold_in`, it is not
            consumed.
        step: The training step, an integer of at least 0. A traced one is not checked.
        site: The name of the place, such as `"encoder/3/attention"`.

    Returns:
        A threefry key: typed if the root is typed, raw (uint32 of shape (2,)) if it is raw.

    Raises:
        TypeError: `step` is not an integer, `site` is not a string, or `root` is not a key.
        ValueError: `step` is negative or not below 2**64, or `root` is a batch of keys.

    Note (PyTorch):
        `regtorch.site_key` returns the same two words. PyTorch itself has no keys.

    Example:
        >>> import jax, regjax
        >>> keys = [regjax.site_key(jax.random.key(0), step, "hidden") for step in range(2)]
        >>> [regjax.dropout(jax.numpy.ones(6), 0.5, key=key).tolist() for key in keys]
        [[0.0, 2.0, 0.0, 0.0, 2.0, 0.0], [0.0, 2.0, 2.0, 2.0, 2.0, 2.0]]
    """
    check_string("site", site, "a string that names the place")
    return _key_of(root, step, site_hash(site), [site], 0)


def numbered_site_key(
    root: KeyLike, step: ArrayLike, sites: Sequence[str], number: ArrayLike
) -> KeyLike:
    """Return the key of one of several places, whose number may be traced."""
    table = jnp.asarray(np.asarray([hash_words(site) for site in sites], np.uint32))
    high, low = table[number]
    return _key_of(root, step, (high, low), sites, number)


def _key_of(
    root: KeyLike, step: ArrayLike, hashed: Words, sites: Sequence[str], number: ArrayLike
) -> KeyLike:
    """Return the key for the hash of a name; observers record the name, `sites[number]`."""
    typed = is_typed(check_key(root, "root"))
    at_step = _step_words(step)
    words = _site_words(root, hashed, at_step)
    if observers := observer():
        observers.site_key(sites, number, key_words(root), at_step, tuple(words))
    return jax.random.wrap_key_data(words, impl=_THREEFRY) if typed else words


def site_hash(site: str) -> Words:
    """Return a stable 64-bit hash of a name: the first eight bytes of its SHA-256, big-endian."""
    high, low = hash_words(site)
    return jnp.uint32(high), jnp.uint32(low)


def hash_words(site: str) -> tuple[int, int]:
    """Return `site_hash` as integers."""
    digest = hashlib.sha256(site.encode()).digest()
    return int.from_bytes(digest[:4]), int.from_bytes(digest[4:8])


@jax.jit
def _site_words(root: KeyLike, site: Words, step: Words) -> UInt32[Array, " words"]:
    # The site's block comes first: it does not depend on the step, so a loop over steps hoists it.
    return jnp.stack(threefry2x32(threefry2x32(key_words(root), site), step))


def _step_words(step: ArrayLike) -> Words:
    if np.ndim(step):
        raise ValueError(f"step must be a scalar; got shape {np.shape(step)}. Map with jax.vmap.")
    if isinstance(step, Tracer):
        if not jnp.issubdtype(step.dtype, jnp.integer):
            raise TypeError(f"step must be an integer; got {step!r}.")
        high = step >> 32 if step.dtype.itemsize == 8 else jnp.zeros((), jnp.uint32)
        return high.astype(jnp.uint32), step.astype(jnp.uint32)
    value = check_integer("step", step)
    if not 0 <= value < 2**64:
        raise ValueError(f"step must lie in [0, 2**64); got {value}.")
    return jnp.uint32(value >> 32), jnp.uint32(value & 0xFFFFFFFF)


def is_typed(key: KeyLike) -> bool:
    """Return whether a key is typed, not raw."""
    return jnp.issubdtype(key.dtype, jax.dtypes.prng_key)


def is_threefry(key: KeyLike) -> bool:
    """Return whether a key consists of the two words that masks are drawn from."""
    return str(jax.random.key_impl(key)) == _THREEFRY if is_typed(key) else key.shape == (2,)
