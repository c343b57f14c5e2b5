"""PRNG keys: the input of every mask, and their derivation for each training step.

A key is a tensor of two 32-bit words, uint32 of shape (2,), equal to the words of JAX's raw
threefry key. It is made once, from a seed; `site_key` derives a key from it, without state, for
each place in a model and each step of training, so that no RNG state is saved. The functions raise
a TypeError for a `key` that is not a key, and a ValueError for a batch of keys.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from regshared.checks import check_integer, check_string, describe
from regtorch._checks import check_shape
from regtorch._random.events import observer
from regtorch._random.threefry import Words, counter_bits, encrypt, threefry2x32


def key(seed: int, *, device: torch.device | str | None = None) -> Tensor:
    """Return a key with the words of `jax.random.key(seed)` under JAX's default settings.

    Args:
        seed: An integer of 32 bits, from -2**31 to 2**32 - 1.
        device: The device of the key.

    Raises:
        TypeError: `seed` is not an integer, or `device` is not a device.
        ValueError: `seed` has more than 32 bits, or `device` is a string that names no device.

    Example:
        >>> import regtorch
        >>> regtorch.key(7)
        tensor([0, 7], dtype=torch.uint32)
    """
    seed = check_integer("seed", seed)
    if not -(2**31) <= seed < 2**32:
        raise ValueError(f"seed must lie in [-2**31, 2**32); got {seed}.")
    try:
        device = None if device is None else torch.device(device)
    except (TypeError, RuntimeError):
        error = ValueError if isinstance(device, str) else TypeError
        raise error(
            f"device must be a torch device, such as 'cpu'; got {describe(device)}."
        ) from None
    return torch.tensor([0, seed % 2**32], dtype=torch.uint32, device=device)


def split(key: Tensor, num: int | Sequence[int] = 2) -> Tensor:
    """Return independent keys, the words of `jax.random.split(key, num)`, of shape `(*num, 2)`.

    `num` is the number of keys, or the shape of a batch of keys.

    Example:
        >>> import regtorch
        >>> regtorch.split(regtorch.key(0)).shape
        torch.Size([2, 2])
    """
    is_shape = isinstance(num, Sequence) and not isinstance(num, str)
    shape = check_shape("num", num if is_shape else (check_integer("num", num),))
    words = key_words(check_key(key))
    low = torch.arange(math.prod(shape), dtype=torch.int32, device=key.device)
    return _key_of(threefry2x32(words, (torch.zeros_like(low), low))).reshape(*shape, 2)


def fold_in(key: Tensor, data: int) -> Tensor:
    """Derive a key from a key and an integer, with the words of `jax.random.fold_in(key, data)`.

    `data` that is not an integer is a TypeError, and outside [-2**31, 2**32) a ValueError.

    Example:
        >>> import regtorch
        >>> regtorch.fold_in(regtorch.key(0), 1)
        tensor([ 928981903, 3453687069], dtype=torch.uint32)
    """
    data = check_integer("data", data)
    if not -(2**31) <= data < 2**32:
        raise ValueError(f"data must lie in [-2**31, 2**32); got {data}.")
    return _key_of(threefry2x32(key_words(check_key(key)), _words(data % 2**32, key.device)))


def bits(key: Tensor, shape: Sequence[int]) -> Tensor:
    """Return random 32-bit integers (uint32), those of `jax.random.bits(key, shape, "uint32")`.

    Example:
        >>> import regtorch
        >>> regtorch.bits(regtorch.key(0), (2,))
        tensor([4070199207, 4202968722], dtype=torch.uint32)
    """
    return counter_bits(key_words(check_key(key)), check_shape("shape", shape)).view(torch.uint32)


def site_key(root: Tensor, step: int | Tensor, site: str) -> Tensor:
    """Return the key of one place in a model at one step of training, derived without state.

    The root key encrypts a 64-bit hash of the site's name in one block of threefry, and the result
    encrypts the step. Equal arguments give equal keys in every process, on every device, and in
    `regjax`; different sites or steps give independent ones.

    Args:
        root: One key; it may be used again, as with `fold_in`.
        step: The step of training, an integer of at least 0, or a 0-d integer tensor.
        site: The name of the place, such as `"encoder/3/attention"`.

    Returns:
        A key, uint32 of shape (2,).

    Raises:
        TypeError: `step` is not an integer, `site` is not a string, or `root` is not a key.
        ValueError: `step` is negative or not below 2**64, or `root` is a batch of keys.

    Example:
        >>> import regtorch
        >>> regtorch.site_key(regtorch.key(0), 0, "hidden")
        tensor([ 944907536, 2436547292], dtype=torch.uint32)
    """
    root, step = check_key(root, "root"), check_step(step)
    check_string("site", site, "a string that names the place")
    words = _host_words(root)
    if words:
        return torch.tensor(site_words(words, step, site), dtype=torch.uint32)
    at_site = threefry2x32(key_words(root), _words(site_hash(site), root.device))
    return _key_of(threefry2x32(at_site, _words(step, root.device)))


def _host_words(root: Tensor) -> tuple[int, int] | None:
    """Return a key's words as integers, or None where reading them waits for a device."""
    if root.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    try:
        high, low = root.tolist()
    except RuntimeError:  # under torch.func.vmap there is no single value
        return None
    return high, low


def site_words(root: tuple[int, int], step: int, site: str) -> tuple[int, int]:
    """Return the words of `site_key` by Python integers, much faster than by 0-d tensors."""
    at_site = encrypt(root, divmod(site_hash(site), 2**32))
    words = encrypt(at_site, divmod(step, 2**32))
    if observers := observer():
        observers.site_key(site, root, step, words)
    return words


def site_hash(site: str) -> int:
    """Return a stable 64-bit hash: the first eight bytes of the name's SHA-256, big-endian."""
    return int.from_bytes(hashlib.sha256(site.encode()).digest()[:8])


def check_step(step: int | Tensor) -> int:
    """Return the step as a Python integer; raise if it is not an integer in [0, 2**64)."""
    step = check_integer("step", step)
    if not 0 <= step < 2**64:
        raise ValueError(f"step must lie in [0, 2**64); got {step}.")
    return step


def generator_key(generator: torch.Generator) -> Tensor:
    """Draw a key from a generator, on its device; this advances the generator by two words."""
    words = torch.randint(0, 2**32, (2,), generator=generator, device=generator.device)
    return words.to(torch.uint32)


def check_key(key: Tensor, name: str = "key") -> Tensor:
    """Return the key if it is a single key."""
    if not isinstance(key, Tensor) or key.dtype != torch.uint32 or key.shape[-1:] != (2,):
        raise TypeError(
            f"{name} must be a key, such as regtorch.key(seed), uint32 of shape (2,); got "
            f"{describe(key)}."
        )
    if key.ndim != 1:
        raise ValueError(
            f"{name} must be a single key; got a batch of keys, {describe(key)}. Map over keys and "
            "rows with torch.func.vmap, or select one key by its index."
        )
    return key


def key_words(key: Tensor) -> Words:
    """Return the two words of a checked key, as 0-d int32 tensors."""
    words = key.view(torch.int32)
    return words[0], words[1]


def _key_of(words: Words) -> Tensor:
    return torch.stack(words, dim=-1).view(torch.uint32)


def _words(value: int, device: torch.device) -> Words:
    """Return a 64-bit integer as two words, high and low."""
    halves = torch.tensor([value >> 32, value & 0xFFFFFFFF], dtype=torch.int64, device=device)
    high, low = halves.to(torch.int32)  # keeps the lower 32 bits
    return high, low
