"""Masks that a module draws by `jax.random.bernoulli` from a key that it requested itself.

JAX has no hook for its random functions. While a bound model is applied, `jax.random.bernoulli` is
therefore replaced; in other threads, and for other keys, the replacement calls the original.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Iterator
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from regjax._compat import enclosing_loops
from regjax._dropout.core import keep_mask
from regjax._random.bernoulli import EXACT, check_probability
from regjax._random.events import observer
from regjax._random.keys import key_words
from regjax.keyed.draws import keep_of_batch, without_vmap

if TYPE_CHECKING:
    from regjax._random.keys import KeyLike

_bernoulli = jax.random.bernoulli
_lock = threading.Lock()
_local = threading.local()
_number_active = 0


class _Owned(NamedTuple):
    """The key of a module, kept so that no other object has its id, and its origin."""

    key: KeyLike
    module: str
    inputs: Any
    loops: int


class Masks:
    """The masks that the modules of a bound model draw in one `apply`.

    Args:
        attention: The code of the function of the framework that applies dropout to attention
            weights, which it holds in a variable `attn_weights`. Its caller, in any package, may
            have imported it by name, so that the function itself cannot be replaced.
        broadcast: Whether it shares one mask among batch and heads; None leaves it as it is.
    """

    def __init__(self, attention: CodeType, broadcast: bool | None) -> None:
        self._attention, self._broadcast = attention, broadcast
        self._keys: dict[int, _Owned] = {}

    def own(self, key: KeyLike, module: str, inputs: Any) -> KeyLike:
        """Return the key of a module, from which `jax.random.bernoulli` draws a mask of regjax.

        Args:
            key: The key.
            module: The kind of the module, for errors.
            inputs: The arrays that the module was called with.
        """
        self._keys[id(key)] = _Owned(key, module, inputs, len(enclosing_loops()))
        return key

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Replace `jax.random.bernoulli` in this thread."""
        global _number_active
        with _lock:
            _number_active += 1
            jax.random.bernoulli = _draw
        outer, _local.masks = getattr(_local, "masks", None), self
        try:
            yield
        finally:
            _local.masks = outer
            with _lock:
                _number_active -= 1
                if not _number_active:
                    jax.random.bernoulli = _bernoulli

    def draw(self, caller: FrameType, key: Any, p: Any, shape: Any, options: Any) -> Any:
        """Return the mask of `jax.random.bernoulli`, which the code of `caller` calls."""
        weights = None
        if caller.f_code is self._attention:
            weights = caller.f_locals["attn_weights"]
            if self._broadcast is not None:
                shared = weights.ndim - 2 if self._broadcast else 0
                shape = (1,) * shared + weights.shape[shared:]
        owned = self._keys.get(id(key))
        if owned and len(enclosing_loops()) > owned.loops:
            raise ValueError(
                "jax.random.bernoulli must not be called inside jax.lax.scan, map or while_loop "
                f"with a key of {owned.module} from outside, which would give all iterations one "
                "mask; got such a call. Split the key outside, and pass the parts to the loop."
            )
        if owned is None or np.ndim(p) or options.keys() - {"out_sharding"}:
            return _bernoulli(key, p, shape, **options)
        keep_prob = check_probability("p", p)
        if weights is not None:
            dims = tuple(dim for dim, size in enumerate(shape) if size != weights.shape[dim])
            # Under `vmap`, each row has its part of a mask that is not shared.
            if dims:
                keep = keep_mask(weights, key, keep_prob, dims, EXACT)
            else:
                keep = keep_of_batch(weights, key, keep_prob)
        else:
            shape = () if shape is None else tuple(shape)
            key = without_vmap(key, owned.inputs, owned.module)
            keep = EXACT.draw(key, keep_prob, shape, options.get("out_sharding"))
        if observers := observer():
            name = "bernoulli" if weights is None else "dot_product_attention"
            entering = keep.astype(jnp.float32) if weights is None else weights
            observers.draw(name, key_words(key), 1 - keep_prob, keep, entering)
        return keep


@functools.wraps(_bernoulli)
def _draw(
    key: Any, p: Any = 0.5, shape: Any = None, mode: str = "low", **options: Any
) -> jax.Array:
    options |= {"mode": mode} if mode != "low" else {}
    masks = getattr(_local, "masks", None)
    if masks is None:
        return _bernoulli(key, p, shape, **options)
    return masks.draw(sys._getframe(1), key, p, shape, options)
