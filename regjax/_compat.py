"""Everything that depends on the version of JAX.

No other file of regjax compares versions, imports from `jax._src`, or looks for a name that only
some versions of JAX have. `docs/supported_versions.md` lists the versions that are tested.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax import lax

try:
    from jax.errors import InconclusiveDimensionOperation
except ImportError:  # before JAX 0.10
    from jax.core import (  # pyright: ignore[reportAttributeAccessIssue]
        InconclusiveDimensionOperation,
    )

__all__ = ["InconclusiveDimensionOperation", "make_user_context", "scan_linear"]

# Transposing a scan inside the rule of a `custom_jvp` needs to know which captured arrays are
# linear. Before 0.10 JAX took all of them for constants and failed with "ValAccum is not a valid
# JAX type"; only the carry was always taken for linear.
_CAPTURED_ARRAYS_MAY_BE_LINEAR = jax.__version_info__ >= (0, 10)


def make_user_context(default: Any = None) -> Any:
    """Return a context variable that is part of the key of every cache of traces.

    A function that was traced under one value is traced again under another. `context.value` is
    the current value, and `with context(value):` changes it in the current thread. JAX 0.7.2 and
    newer have this function; it is named here because JAX may still change it.

    Args:
        default: the value outside of every `with context(...)`.
    """
    return jax.make_user_context(default)


def scan_linear(
    step: Callable[[Any, Any, Any], tuple[Any, Any]], linear: Any, init: Any, xs: Any
) -> tuple[Any, Any]:
    """Scan a step that is linear in some arrays that every turn uses, and allow the transposition.

    The result is `lax.scan(functools.partial(step, linear), init, xs)`. Before JAX 0.10 the arrays
    pass through the carry, unchanged; then a second derivative keeps a copy of them for each turn.

    Args:
        step: maps `linear`, the carry and an element of `xs` to the next carry and an output.
        linear: the arrays in which `step` is linear.
        init: the first carry.
        xs: the arrays that are scanned over.
    """
    if _CAPTURED_ARRAYS_MAY_BE_LINEAR:
        return lax.scan(functools.partial(step, linear), init, xs)

    def through_the_carry(carry: Any, x: Any) -> tuple[Any, Any]:
        linear, inner = carry
        inner, y = step(linear, inner, x)
        # An unchanged carry would be captured after all; XLA removes the factor.
        return (jax.tree.map(lambda array: array * array.dtype.type(1), linear), inner), y

    (_, final), ys = lax.scan(through_the_carry, (linear, init), xs)
    return final, ys
