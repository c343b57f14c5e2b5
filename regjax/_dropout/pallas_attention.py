"""Where attention runs as Pallas kernels: what they support, and their operands.

The kernels themselves are in `flash`, which is imported on the first use.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from regjax._compat import make_user_context
from regjax._dropout.core import inverse_keep_prob, keep_prob_of
from regjax._dropout.kernels import check_mesh
from regjax._random.bernoulli import ExactSampler, MaskSampler
from regjax._random.by_example import ExampleSampler
from regjax._random.events import observer
from regjax._random.keys import consume, key_words
from regjax._random.packed import LANES, PackedSampler, packed_axis
from regjax._random.threefry import Places, Span, part_index, spec_of
from regjax._random.tiles import TileMask
from regjax._random.xla import rounded

if TYPE_CHECKING:
    from jaxtyping import Array, Float

    from regjax._dropout.scores import Scores
    from regjax._random.keys import KeyLike

_DEPTHS = (64, 256)
_DTYPES = ("float32", "bfloat16")
_PRECISIONS = (None, lax.Precision.DEFAULT, lax.Precision.HIGHEST)
_WAY_OUT = "Omit implementation, or pass implementation='xla'."
LARGEST_TILE = (256, 512)  # numbers of queries and keys, on a TPU
_LARGEST = 2**31  # Triton counts the elements of an array in 32 bits

# The tiles of the tests, which run in Pallas's interpreter on any platform; None on a device.
interpreted_tile = make_user_context()


def check_supported(
    implementation: str,
    sampler: Any,
    scores: Scores,
    inputs: Any,
    module: Any,
    with_residual: bool,
) -> None:
    """Raise a ValueError or TypeError that names what the kernels support; without, return None."""
    query, key, value, bias, allowed = inputs
    chosen = f"implementation={implementation!r}"
    *batch, queries, heads, depth = query.shape
    if str(query.dtype) not in _DTYPES:
        raise TypeError(
            f"query must be {' or '.join(_DTYPES)} with {chosen}; got {query.dtype}. {_WAY_OUT}"
        )
    for name, size in (("query", depth), ("value", value.shape[-1])):
        if not _DEPTHS[0] <= size <= _DEPTHS[1] or size % 8:
            raise ValueError(
                f"{name} must have a depth from {_DEPTHS[0]} to {_DEPTHS[1]}, a multiple of 8, "
                f"with {chosen}; got {size}. {_WAY_OUT}"
            )
    if 0 in (*batch, queries, heads, key.shape[-3]):
        raise ValueError(
            f"query and key must not be empty with {chosen}; got shapes "
            f"{query.shape} and {key.shape}. {_WAY_OUT}"
        )
    if implementation == "triton" and max(x.size for x in inputs[:3]) >= _LARGEST:
        raise ValueError(
            f"query, key and value must have fewer than 2**31 elements with {chosen}; got shapes "
            f"{query.shape}, {key.shape} and {value.shape}. {_WAY_OUT}"
        )
    of_keys = f"Pass a mask of shape {(*batch, 1, 1, key.shape[-3])}, or omit implementation."
    for name, given, fix in (
        ("bias", bias, "Pass booleans as mask, or omit implementation."),
        ("module", module, _WAY_OUT),
        ("query_seq_lengths", allowed.queries, _WAY_OUT),
        ("key_value_seq_lengths", allowed.keys, of_keys),
        ("local_window_size", scores.window, _WAY_OUT),
        ("einsum_dot_general", scores.dot_general, _WAY_OUT),
    ):
        if given is not None:
            raise ValueError(f"{name} must be None with {chosen}; got one. {fix}")
    if with_residual:
        raise ValueError(
            f"return_residual must be False with {chosen}, whose kernels return no "
            f"residual; got True. {_WAY_OUT}"
        )
    if scores.precision not in _PRECISIONS:
        raise ValueError(
            f"precision must be None, DEFAULT or HIGHEST with {chosen}; got "
            f"{scores.precision}. {_WAY_OUT}"
        )
    whole = (*batch, heads, queries, key.shape[-3])
    if observer():
        raise ValueError(
            "implementation must be 'xla' while masks are observed: the kernels never store one; "
            f"got {implementation!r}. {_WAY_OUT}"
        )
    check_mesh(implementation)
    _tile_mask(chosen, sampler, 0.5, whole, is_shared=False)


def _tile_mask(
    chosen: str, sampler: MaskSampler, keep_prob: Any, whole: tuple[int, ...], *, is_shared: bool
) -> tuple[TileMask, Any, Any]:
    """Return how a mask of a whole shape is drawn, its threshold, and whether all is kept."""
    ndim = len(whole)
    is_by_example = isinstance(sampler, ExampleSampler)
    inner = sampler.function if is_by_example else sampler
    if not isinstance(inner, ExactSampler | PackedSampler):
        raise ValueError(
            "sampler must be bernoulli, packed_bernoulli, or by_example of one of the two, with "
            f"{chosen}; got {getattr(inner, 'function', inner)!r}. {_WAY_OUT}"
        )
    if is_by_example:
        sampler.check_fit(whole, tuple(range(ndim - 2)) if is_shared else ())
        if ndim != (3 if sampler.is_single else 4) or (sampler.axis % ndim and ndim == 4):
            raise ValueError(
                "sampler must number the examples of the only batch dimension with "
                f"{chosen}; got {sampler!r} for weights of shape {whole}. {_WAY_OUT}"
            )
    if is_shared:
        whole = (*[1] * (ndim - 2), *whole[-2:])
    packed = None
    if isinstance(inner, PackedSampler):
        own = whole[1:] if is_by_example and ndim == 4 else whole
        axis = packed_axis(own)
        packed = None if axis is None else axis - len(own) + 4
        if packed is not None and packed < 0:
            raise ValueError(
                "sampler must not pack the mask along the first of several batch dimensions with "
                f"{chosen}, as packed_bernoulli does for weights of shape {whole}. "
                f"Pass sampler=regjax.bernoulli, or omit implementation."
            )
    threshold = inner.threshold(keep_prob)
    is_traced = isinstance(threshold, jax.Array)
    tiles = TileMask(
        shape=(None if is_by_example else math.prod(whole[:-3]), whole[-3], whole[-2], whole[-1]),
        bits=inner.bits,
        threshold=None if is_traced else int(threshold),
        is_exact=isinstance(inner, ExactSampler),
        packed=packed,
    )
    if not is_traced:
        return tiles, np.uint32(0), np.uint32(0)
    everything = threshold.astype(np.float32) >= 2.0**inner.bits
    return tiles, threshold.astype(np.uint32), everything.astype(np.uint32)


def kernel_attention(
    implementation: str,
    scores: Scores,
    arrays: Sequence[Array],
    mask: Any,
    sampler: MaskSampler | None = None,
    dropout_rng: KeyLike | None = None,
    rate: float | Float[Array, ""] = 0.0,
    *,
    is_shared: bool = False,
) -> Array:
    """Return attention, computed by the kernels; without a sampler, without dropout."""
    from regjax._dropout.flash_tiles import Flash

    if implementation == "triton":
        from regjax._dropout.flash_triton import run, tile_of
    else:
        from regjax._dropout.flash import run

        tile_of = _tile_of_tpus
    query, key, value = arrays
    *batch, queries, heads, _ = query.shape
    keys = key.shape[-3]
    whole = (*batch, heads, queries, keys)
    words = jnp.zeros(2, np.uint32)
    tiles, threshold, everything = None, np.uint32(0), np.uint32(0)
    inverse = np.float32(1)
    numbers = None
    if sampler is not None and dropout_rng is not None:
        rate = rounded(rate) if isinstance(rate, jax.Array) else rate
        keep_prob = keep_prob_of(rate, query.dtype)
        chosen = f"implementation={implementation!r}"
        tiles, threshold, everything = _tile_mask(
            chosen, sampler, keep_prob, whole, is_shared=is_shared
        )
        inverse = inverse_keep_prob(sampler.realized_keep_prob(keep_prob), query.dtype)
        if isinstance(rate, jax.Array):
            inverse = jnp.where((rate >= 0) & (rate <= 1), inverse, jnp.nan)
        consume(dropout_rng)
        words = jnp.stack(key_words(dropout_rng))
        if isinstance(sampler, ExampleSampler):
            numbers = _numbers(sampler.examples, tuple(batch))
    tile = interpreted_tile.value
    flash = Flash(
        scale=scores.scale,
        is_causal=scores.is_causal,
        precision=scores.precision,
        mask=tiles,
        is_shared=is_shared,
        tile=tile or tile_of(query, keys),
        interpret=tile is not None,
    )
    first = (*words, threshold, everything)
    constants = jnp.stack([jnp.asarray(x).astype(np.uint32) for x in first])
    inverse = jnp.full((1, 1), inverse, np.float32)
    operands = {"query": query, "key": key, "value": value, "constants": constants}
    operands |= {"inverse": inverse}
    operands |= {} if mask is None else {"allowed": mask.astype(np.int8)}
    operands |= {} if numbers is None else {"numbers": numbers}
    return _on_shards(functools.partial(_run, run, flash), flash, tuple(batch), operands)


def _tile_of(size: int, limit: int, whole: int = 128) -> int:
    """Return the length of tiles: a multiple of 128, or the size if that is one of `whole`."""
    return min(limit, size if size % whole == 0 else -(-size // 128) * 128)


def _numbers(examples: Places, batch: tuple[int, ...]) -> Places:
    """Return the words of the numbers of the examples, in the shape of the batch."""
    low = examples.low
    high = jnp.zeros_like(low) if examples.high is None else examples.high
    return Places(*(jnp.reshape(x, batch) for x in (high, low)))


def _tile_of_tpus(query: Array, keys: int) -> tuple[int, int]:
    """Return the numbers of queries and keys of a tile."""
    most_queries, most_keys = LARGEST_TILE
    return _tile_of(query.shape[-3], most_queries, whole=LANES), _tile_of(keys, most_keys)


def _on_shards(
    run: Callable[..., Array], flash: Any, batch: tuple[int, ...], operands: dict[str, Any]
) -> Array:
    """Run the kernels on each device's part of explicitly sharded operands."""
    query, kv_heads = operands["query"], operands["key"].shape[-2]
    mesh = jax.typeof(query).sharding.mesh
    if AxisType.Explicit not in mesh.axis_types:
        return run(batch, None, **operands)
    *of_batch, of_queries, of_heads, of_depth = spec_of(jax.typeof(query).sharding, query.ndim)
    if of_depth is not None or (kv_heads > 1 and kv_heads % _devices(mesh, of_heads)):
        raise ValueError(
            "query must not be sharded along its depth, nor along more devices than key has "
            f"heads, with kernels; got {jax.typeof(query)} and {kv_heads} heads of "
            f"key. {_WAY_OUT}"
        )
    is_packed = flash.mask is not None and flash.mask.packed == 2
    if is_packed and query.shape[-3] // LANES % _devices(mesh, of_queries):
        raise ValueError(
            "query must have a multiple of 32 queries per device with kernels and "
            f"sampler=packed_bernoulli; got {query.shape[-3]} queries on "
            f"{_devices(mesh, of_queries)} devices. {_WAY_OUT}"
        )
    of_query = PartitionSpec(*of_batch, of_queries, of_heads, None)
    of_keys = PartitionSpec(*of_batch, None, of_heads if kv_heads > 1 else None, None)
    specs: dict[str, Any] = {"query": of_query, "key": of_keys, "value": of_keys}
    specs |= {"constants": PartitionSpec(), "inverse": PartitionSpec()}
    if "allowed" in operands:
        shape = operands["allowed"].shape
        own = zip((*of_batch, of_heads, of_queries, None), shape, strict=True)
        specs["allowed"] = PartitionSpec(*[axes if size > 1 else None for axes, size in own])
    if "numbers" in operands:
        of_examples: Any = PartitionSpec(*of_batch)
        specs["numbers"] = Places(of_examples, of_examples)
    axes = tuple(of_batch), of_heads, of_queries
    sharded = jax.shard_map(
        lambda operands: run(batch, axes, **operands),
        in_specs=(specs,),
        out_specs=of_query,
        check_vma=False,  # Pallas's interpreter does not pass the check
    )
    return sharded(jax.tree.map(jax.sharding.reshard, operands, specs))


def _names(axes: Any) -> tuple[Any, ...]:
    return () if axes is None else axes if isinstance(axes, tuple) else (axes,)


def _devices(mesh: Any, axes: Any) -> int:
    return math.prod(mesh.shape[name] for name in _names(axes))


def _start(axes: Any, size: int) -> Any:
    """Return the first index of this device's part of a dimension sharded along `axes`."""
    return lax.axis_index(_names(axes)) * size if _names(axes) else 0


def _run(
    run: Callable[..., Array],
    flash: Any,
    whole_batch: tuple[int, ...],
    axes: Any,
    query: Array,
    key: Array,
    value: Array,
    constants: Array,
    inverse: Array,
    allowed: Any = None,
    numbers: Any = None,
) -> Array:
    """Run the kernels on one device's part, whose dimensions are sharded along `axes`."""
    from regjax._dropout.flash_tiles import Operands

    *batch, queries, heads, _ = query.shape
    of_batch, of_heads, of_queries = axes or ((None,) * len(batch), None, None)
    if numbers is None:
        part = [Span(_start(n, size), size) for n, size in zip(of_batch, batch, strict=True)]
        high, low = part_index(whole_batch, part)
        numbers = Places(jnp.broadcast_to(high, batch), jnp.broadcast_to(low, batch))
    starts = _start(of_heads, heads), _start(of_queries, queries)
    parts = [constants, jnp.stack([jnp.asarray(x).astype(np.uint32) for x in starts])]
    scalars = jnp.concatenate([*parts, *(jnp.reshape(x, (-1,)) for x in numbers)])[None]

    def merged(x: Array) -> Array:
        """Merge the batch dimensions, and move heads before lengths."""
        return jnp.swapaxes(jnp.reshape(x, (-1, *x.shape[len(batch) :])), 1, 2)

    if allowed is not None:
        lead, rest = allowed.shape[: len(batch)], allowed.shape[len(batch) :]
        if 1 < math.prod(lead) < math.prod(batch):  # some of several batch dimensions share it
            allowed = jnp.broadcast_to(allowed, (*batch, *rest))
        allowed = jnp.reshape(allowed, (-1, *rest))
    flash = dataclasses.replace(flash, is_part=bool(_names(of_queries)))
    operands = Operands(merged(query), merged(key), merged(value), allowed, scalars, inverse)
    out = run(flash, operands)
    return jnp.reshape(jnp.swapaxes(out, 1, 2), (*batch, queries, heads, value.shape[-1]))
