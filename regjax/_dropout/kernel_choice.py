"""The implementation of attention that is chosen without an argument.

On a TPU these are the kernels, where they apply and where a small problem has the result of the
blockwise form on the device itself. The problem is solved once for each kind of call.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AxisType

from regjax._dropout.blockwise import Blocks, blockwise
from regjax._dropout.pallas_attention import (
    LARGEST_TILE,
    check_supported,
    interpreted_tile,
    kernel_attention,
)
from regjax._dropout.scores import Allowed, Scores
from regjax._random.by_example import ExampleSampler
from regshared.checks import describe

if TYPE_CHECKING:
    from jaxtyping import Array

    from regjax._random.bernoulli import MaskSampler

_HEADS, _RATE = 2, 0.5
# Relative to the largest number. The products of both forms are in bfloat16 by default on a TPU,
# whose rounding adds up to a few hundredths; another mask deviates by about 1.
_TOLERANCE = 0.1


def default_implementation(
    sampler: Any, scores: Scores, inputs: Any, module: Any, with_residual: bool
) -> str:
    """Return "pallas" or "xla"; a warning says if the kernels failed on the problem."""
    query, _, value, *_ = inputs
    if _platform(query) != "tpu" or not _is_one_part():
        return "xla"
    try:
        check_supported("pallas", sampler, scores, inputs, module, with_residual)
    except (TypeError, ValueError):
        return "xla"
    drawn_by = sampler.function if isinstance(sampler, ExampleSampler) else sampler
    shape = query.shape[-1], value.shape[-1], str(query.dtype)
    failure = _failure(drawn_by, scores.precision, *shape, interpreted_tile.value)
    return "xla" if failure else "pallas"


def _platform(query: Array) -> str:
    """Return the platform on which a computation with an array runs, as far as tracing can tell."""
    if not isinstance(query, Tracer):
        return next(iter(query.devices())).platform
    device = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    return jax.default_backend() if device is None else getattr(device, "platform", device)


def _is_one_part() -> bool:
    """Return whether no array is divided by XLA, which cannot divide a kernel.

    Under `jax.jit` without a mesh, only the number of devices excludes it.
    """
    kinds = jax.sharding.get_abstract_mesh().axis_types
    return jax.device_count() == 1 or (bool(kinds) and AxisType.Auto not in kinds)


@functools.cache
def _failure(
    sampler: MaskSampler, precision: Any, depth: int, features: int, dtype: str, tile: Any
) -> str:
    """Return how the kernels fail on a small problem, after a warning; empty if they do not."""
    # Another thread has no trace, mesh or context of the caller.
    with ThreadPoolExecutor(1) as pool:
        solved = pool.submit(_deviation, sampler, precision, depth, features, dtype, tile)
        try:
            deviation = solved.result()
        except Exception as error:  # of any part of the compiler
            first = str(error).partition("\n")[0]
            failure = f"they raise {type(error).__name__}: {first}"
        else:
            far = f"their results deviate by {deviation:.2g} of the largest number"
            failure = "" if deviation <= _TOLERANCE else far
    if failure:
        device = jax.local_devices()[0].device_kind
        warnings.warn(
            f"dot_product_attention uses implementation='xla' on {device}: its kernels must have "
            f"the results of blocks, but {failure}. Pass implementation='xla' to omit the check, "
            f"and report {describe(sampler)}, depth {depth}, {dtype}.",
            stacklevel=2,
        )
    return failure


def _deviation(
    sampler: MaskSampler, precision: Any, depth: int, features: int, dtype: str, tile: Any
) -> float:
    """Return the largest deviation of results and gradients, relative to the largest number."""
    with interpreted_tile(tile), jax.default_device(jax.local_devices()[0]):
        solutions = problem(sampler, precision, depth, features, dtype, tile or LARGEST_TILE)
        found, expected = (jax.jit(solve)() for solve in solutions)
        return max(_relative(*pair) for pair in zip(found, expected, strict=True))


def problem(
    sampler: MaskSampler,
    precision: Any,
    depth: int,
    features: int,
    dtype: str,
    tile: tuple[int, int] = LARGEST_TILE,
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Return functions that compute a result and three gradients, in kernels and in blocks."""
    scores = Scores(depth**-0.5, is_causal=True, window=None, precision=precision, dot_general=None)
    queries, keys = (2 * size for size in tile)  # two tiles of each
    rng, root = jax.random.key(0, impl="threefry2x32"), jax.random.key(1)
    shapes = (queries, depth), (keys, depth), (keys, features), (queries, features)

    def in_kernels(*operands: Array) -> Array:
        return kernel_attention("pallas", scores, operands, None, sampler, rng, _RATE)

    def in_blocks(query: Array, key: Array, value: Array) -> Array:
        blocks = Blocks(scores, keys // 2, keys, broadcast_dropout=False)
        none = Allowed(None, None, None)
        return blockwise(blocks, sampler, query, key, value, None, none, rng, _RATE)[0]

    def solve(attend: Callable[..., Array]) -> tuple[Array, ...]:
        parts = zip(jax.random.split(root, 4), shapes, strict=True)
        normal = [jax.random.normal(k, (1, n, _HEADS, m), dtype) for k, (n, m) in parts]
        *operands, changes = normal
        result, pull_back = jax.vjp(attend, *operands)
        return result, *pull_back(changes)

    return functools.partial(solve, in_kernels), functools.partial(solve, in_blocks)


def _relative(found: Array, expected: Array) -> float:
    one, other = (np.asarray(x.astype(jnp.float32)) for x in (found, expected))
    difference = np.abs(one - other).max() / np.abs(other).max()
    return float(difference) if np.isfinite(difference) else float("inf")
