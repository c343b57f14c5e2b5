"""Everything that depends on the version of JAX.

No other file of regjax compares versions, imports from `jax._src`, or looks for a name that only
some versions of JAX have. `docs/supported_versions.md` lists the tested versions.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import FrameType
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.core import Tracer

try:
    from jax.errors import InconclusiveDimensionOperation
except ImportError:  # before JAX 0.10
    # The stubs of the installed JAX lack the older name.
    from jax.core import (  # pyright: ignore[reportAttributeAccessIssue]
        InconclusiveDimensionOperation,
    )

__all__ = [
    "InconclusiveDimensionOperation",
    "Loop",
    "enclosing_loops",
    "loops_of",
    "make_user_context",
    "scan_linear",
    "type_like",
    "vary_together",
]

# `fori_loop` and `map` call one of these, too.
_LOOPS = {inspect.unwrap(loop).__code__ for loop in (lax.scan, lax.while_loop)}

# Transposing a scan inside a `custom_jvp` rule requires knowing which captured arrays are linear.
# Before 0.10, JAX treated all of them as constants and failed with "ValAccum is not a valid JAX
# type"; only the carry was always treated as linear.
_CAPTURED_ARRAYS_MAY_BE_LINEAR = jax.__version_info__ >= (0, 10)


def make_user_context(default: Any = None) -> Any:
    """Return a context variable that is part of the key of every trace cache.

    A function traced under one value is traced again under another. `context.value` is the current
    value, and `with context(value):` changes it in the current thread. JAX 0.7.2 and newer have
    this function; it is wrapped here because JAX may still change it.
    """
    return jax.make_user_context(default)


class Loop(NamedTuple):
    """A loop of JAX whose body is being traced.

    Attributes:
        length: The number of iterations; None for a `while_loop`.
        body: The function that a `scan` repeats.
    """

    length: int | None
    body: Any


def enclosing_loops() -> list[Loop]:
    """Return the loops of JAX around the running code, outermost first.

    Traced code cannot see the loops around it in any other way. A `scan` has inferred its length
    before it traces its body.
    """
    return [
        Loop(frame.f_locals.get("length"), frame.f_locals.get("f"))
        for frame in _frames()
        if frame.f_code in _LOOPS
    ]


def loops_of(value: Any) -> int:
    """Return the number of enclosing loops whose iterations may have different values of `value`.

    These are the outermost ones. Concrete values, and values traced outside a loop, are constants
    in it. In a function that is traced inside a loop, such as by `jit`, an argument may vary.
    """
    if not isinstance(value, Tracer):
        return 0
    count, trace = 0, value._trace
    for frame in _frames()[:-1]:  # without this one, which has the trace, too
        # The outermost frame with the trace is that of the function of JAX that created it.
        if any(local is trace for local in frame.f_locals.values()):
            return count
        count += frame.f_code in _LOOPS
    return 0


def _frames() -> list[FrameType]:
    """Return the frames of the running code, outermost first, up to that of the caller."""
    frames, frame = [], inspect.currentframe()
    while frame := frame and frame.f_back:
        frames.append(frame)
    return frames[::-1]


def scan_linear(
    step: Callable[[Any, Any, Any], tuple[Any, Any]], linear: Any, init: Any, xs: Any
) -> tuple[Any, Any]:
    """Scan a step that is linear in arrays shared by all iterations, so that it can be transposed.

    The result is `lax.scan(functools.partial(step, linear), init, xs)`. Before JAX 0.10 the arrays
    pass through the carry unchanged; a second derivative then keeps a copy of them per iteration.
    """
    if _CAPTURED_ARRAYS_MAY_BE_LINEAR:
        return lax.scan(functools.partial(step, linear), init, xs)

    def through_the_carry(carry: Any, x: Any) -> tuple[Any, Any]:
        linear, inner = carry
        inner, y = step(linear, inner, x)
        # JAX would capture an unchanged carry instead of carrying it; XLA removes the factor.
        return (jax.tree.map(lambda array: array * array.dtype.type(1), linear), inner), y

    (_, final), ys = lax.scan(through_the_carry, (linear, init), xs)
    return final, ys


def type_like(shape: tuple[int, ...], dtype: Any, array: jax.Array) -> jax.ShapeDtypeStruct:
    """Return the type of an array that varies over the axes of a `shard_map` as another does."""
    name = "vma" if hasattr(jax.typeof(array), "vma") else "manual_axis_type"
    return jax.ShapeDtypeStruct(shape, dtype, **{name: getattr(jax.typeof(array), name)})


def vary_together(tree: Any) -> Any:
    """Return arrays that all vary over the axes of `shard_map` over which any of them varies."""
    varying = jax.tree.map(_varying_axes, tree)
    every = frozenset().union(*jax.tree.leaves(varying, is_leaf=lambda x: isinstance(x, frozenset)))

    def vary(array: jax.Array) -> jax.Array:
        missing = tuple(sorted(every - _varying_axes(array)))
        if not missing:
            return array
        if hasattr(lax, "pcast"):  # since JAX 0.9
            return lax.pcast(array, missing, to="varying")
        return lax.pvary(array, missing)  # pyright: ignore[reportAttributeAccessIssue]

    return jax.tree.map(vary, tree)


def _varying_axes(array: jax.Array) -> frozenset[Any]:
    kind = jax.typeof(array)
    return kind.vma if hasattr(kind, "vma") else kind.manual_axis_type.varying
