"""The key of each draw of a bound model, also inside a loop of JAX.

The body of a loop is traced once for all iterations. The name of a site inside it has the number of
the iteration, so its key is derived from a table of the hashes of all names. The number comes from
a PRNG key that is split for the iterations: `number_key` has an implementation whose `split`
records the index of each part.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import define_prng_impl

from regjax._compat import Loop, enclosing_loops, loops_of
from regjax._random.keys import numbered_site_key, site_key
from regjax.keyed.names import numbered

if TYPE_CHECKING:
    from jax.typing import ArrayLike
    from jaxtyping import Array, Key

    from regjax._random.keys import KeyLike

# The number of nested loops that a number key can record.
_DEPTH = 4


class Keys:
    """The keys of a bound model, and the number of calls of each site."""

    def __init__(self, root: KeyLike, step: ArrayLike) -> None:
        site_key(root, step, "")  # check the arguments
        self._root, self._step = root, step
        self._levels: list[_Level] = [_Level()]
        # In the other loops, all iterations would have the same keys.
        self.outside = max(loops_of(root), loops_of(step))

    def loops(self) -> list[Loop]:
        """Return the loops that are being traced inside the bound model."""
        return enclosing_loops()[self.outside :]

    def draw(self, name: str) -> KeyLike:
        """Return the key of the next call of a site."""
        return nth_key(self._root, self._step, name, self._levels[-1].count(name))

    def unused(self, name: str) -> KeyLike:
        """Return a key for a result that is discarded."""
        return nth_key(self._root, self._step, name, 0)

    def draw_numbered(self, name: str, lengths: Sequence[int], source: Key[Array, ""]) -> KeyLike:
        """Return the key of the next call of a site in an iteration, with its number key."""
        count = self._levels[-1].count(name)
        return numbered_key(self._root, self._step, name, count, lengths, source)

    @contextlib.contextmanager
    def body(self, path: str) -> Iterator[None]:
        """Count calls from 0 while the body of the innermost loop is traced.

        JAX may trace it several times for one loop, whose keys are the same.

        Raises:
            ValueError: Another loop over the same module has been traced.
        """
        if not is_first_loop(self._levels[-1].loops, path, self.loops()[-1]):
            raise ValueError(
                f"module {path!r} must be called once in each step if linen.scan repeats it; got "
                "a second call, whose masks would be those of the first. Give the second scan a "
                "name of its own, or write the repetition as a Python loop over modules."
            )
        self._levels.append(_Level())
        try:
            yield
        finally:
            self._levels.pop()


class _Level:
    """The calls of sites and loops in one trace of a loop's body, or outside of loops."""

    def __init__(self) -> None:
        self._calls: dict[str, int] = {}
        self.loops: dict[str, weakref.ref[Any]] = {}

    def count(self, name: str) -> int:
        """Return the number of earlier calls of a site."""
        self._calls[name] = count = self._calls.get(name, -1) + 1
        return count


def is_first_loop(seen: dict[str, weakref.ref[Any]], path: str, loop: Loop) -> bool:
    """Return whether no other loop over a module or site was traced; JAX may repeat a trace."""
    body = loop.body
    return body is None or seen.setdefault(path, weakref.ref(body))() is body


def nth_key(root: KeyLike, step: ArrayLike, name: str, count: int) -> KeyLike:
    """Return the key of call `count` of a site, counted from 0."""
    return site_key(root, step, _nth(name, count))


def numbered_key(
    root: KeyLike,
    step: ArrayLike,
    name: str,
    count: int,
    lengths: Sequence[int],
    source: Key[Array, ""],
) -> KeyLike:
    """Return `nth_key` for a name with numbers, which a number key has recorded."""
    names = [_nth(each, count) for each in numbered(name, lengths)]
    numbers = jax.random.key_data(source)[: len(lengths)][::-1]
    flat = jnp.ravel_multi_index(tuple(numbers), tuple(lengths), mode="clip")
    return numbered_site_key(root, step, names, flat)


def _nth(name: str, count: int) -> str:
    return f"{name}#{count}" if count else name


def number_key(shape: Sequence[int] = ()) -> Key[Array, " *shape"]:
    """Return a key without numbers, or an array of keys that have recorded their indices."""
    numbers = np.indices(tuple(shape), np.uint32)[::-1]
    unused = np.zeros((_DEPTH - len(shape), *shape), np.uint32)
    data = np.moveaxis(np.concatenate([numbers, unused]), 0, -1)
    return jax.random.wrap_key_data(jnp.asarray(data), impl=_NUMBERS)


def _split(data: Array, shape: tuple[int, ...]) -> Array:
    """Record the index of each part in front of the earlier ones."""
    count = math.prod(shape)
    first = jnp.arange(count, dtype=np.uint32)[:, None]
    rest = jnp.broadcast_to(data[:-1], (count, _DEPTH - 1))
    return jnp.concatenate([first, rest], axis=1).reshape(*shape, _DEPTH)


def _refuse(*_: Any) -> Array:
    raise RuntimeError(
        "module must draw from keyed sites; got a draw from the rngs 'dropout' of its scope. Draw "
        "from linen.Dropout, a layer of regjax.linen or self.make_rng('dropout')."
    )


_NUMBERS: Any = define_prng_impl(
    key_shape=(_DEPTH,),
    seed=_refuse,
    split=_split,
    random_bits=_refuse,
    fold_in=lambda data, _: data,  # Linen folds the path of the module into each key
    name="regjax_numbers",
    tag="numbers",
)
