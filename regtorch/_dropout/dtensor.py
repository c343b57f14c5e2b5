"""DTensors: each rank drops in its part of the whole tensor, without communication."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from regtorch._random.bernoulli import MaskSampler, Sampler
from regtorch._random.by_example import ExampleSampler
from regtorch._random.packed import mask_sampler
from regtorch._random.threefry import Span, part_index


class Place(NamedTuple):
    """The place of a tensor in a larger one of shape `whole`: a span along each dimension."""

    whole: tuple[int, ...]
    part: tuple[Span, ...]

    def sharing(self, dims: tuple[int, ...]) -> Place:
        """Return the same place in a tensor of size 1 along some dimensions."""
        axes = enumerate(zip(self.whole, self.part, strict=True))
        axes = [(1, Span(0, 1)) if dim in dims else axis for dim, axis in axes]
        return Place(tuple(size for size, _ in axes), tuple(span for _, span in axes))

    def elements(self, device: torch.device) -> Tensor:
        """Return the row-major index in the whole of each element."""
        return part_index(self.whole, self.part, device)

    def local(self, x: Any, missing: int = 0) -> Tensor:
        """Return the part of a tensor without the last dimensions, or the local one of a DTensor.

        A tensor that has another shape is left to the caller, who rejects it.
        """
        if is_dtensor(x):
            return x.to_local()
        is_whole = isinstance(x, Tensor) and x.shape == self.whole[: len(self.whole) - missing]
        return x[_slices(self.part[: x.ndim])] if is_whole else x

    def broadcast(self, x: Any) -> Any:
        """Return the part of a tensor that broadcasts to the whole, or the local one; or None."""
        if x is None or is_dtensor(x):
            return x if x is None else x.to_local()
        spans = self.part[len(self.part) - x.ndim :]
        pairs = zip(spans, x.shape, strict=True)
        return x[_slices(span if size > 1 else Span(0, 1) for span, size in pairs)]


def is_dtensor(x: Any) -> bool:
    """Return whether `x` is a `torch.distributed.tensor.DTensor`.

    That module takes a second to import; while nobody has imported it, there is no DTensor.
    """
    return isinstance(x, getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", ()))


def on_local_part(
    function: Callable[[Tensor, Place], Tensor], x: Any, *, only_whole: str = ""
) -> Any:
    """Apply `function(local, place)` to the part of a DTensor on this rank; return a DTensor.

    The result and the gradient have the placements of `x`.

    Args:
        function: The function, whose result has the shape of the part.
        x: A DTensor.
        only_whole: The name of a function that must have the whole tensor on every rank.
    """
    place = place_of(x)
    if only_whole and any(placement.is_shard() for placement in x.placements):
        raise ValueError(
            f"x must be replicated for {only_whole}; got a DTensor with placements "
            f"{x.placements}. Redistribute it: x.redistribute(placements=[Replicate()])."
        )
    return _whole(function(x.to_local(), place), x, x.shape, x.stride())


def on_local_heads(
    function: Callable[[tuple[Any, ...], Place], Any],
    query: Any,
    key: Any,
    value: Any,
    *masks: Any,
) -> Any:
    """Apply `function((query, key, value, *masks), place)` to the rows and heads of this rank.

    The tensors have the shape (..., heads, length, features), and `place` is that of the weights
    (..., heads, queries, keys), to which the masks broadcast. The function returns a tensor of
    shape (..., heads, queries, features), or a tuple that also has one of shape (..., heads,
    queries).
    """
    for name, x in (("key", key), ("value", value)):
        found = x.placements if is_dtensor(x) else "a local tensor"
        if found != query.placements:
            raise ValueError(
                f"{name} must have the placements of query, {query.placements}; got {found}. "
                "Redistribute it first."
            )
    whole, part = place_of(query)
    if part[-2:] != tuple(Span(0, size) for size in whole[-2:]):
        raise ValueError(
            "query must be sharded along batch and heads only; got placements "
            f"{query.placements}. Redistribute it first."
        )
    if key.shape[:-3] != whole[:-3]:
        raise ValueError(
            f"key must have the batch of query, {whole[:-3]}, in a DTensor; got "
            f"{tuple(key.shape[:-3])}. Expand it."
        )
    heads, served = part[-3].size, place_of(key).part[-3].size
    if heads * key.shape[-3] != served * query.shape[-3]:
        raise ValueError(
            "query must have its heads on the ranks of the heads of key that serve them; got "
            f"{heads} of {query.shape[-3]} and {served} of {key.shape[-3]} on one rank. Use fewer "
            "ranks, or replicate them."
        )
    keys = key.shape[-2]
    place = Place((*whole[:-1], keys), (*part[:-1], Span(0, keys)))
    local = (*(x.to_local() for x in (query, key, value)), *map(place.broadcast, masks))
    found = function(local, place)

    def placed(part: Tensor) -> Any:
        shape = (*whole[:-1], *part.shape[len(whole) - 1 :])
        return _whole(part, query, shape, torch.empty(shape, device="meta").stride())

    return tuple(map(placed, found)) if isinstance(found, tuple) else placed(found)


def _whole(local: Tensor, like: Any, shape: tuple[int, ...], stride: tuple[int, ...]) -> Any:
    """Return the DTensor of a shape whose part on this rank is `local`, placed as another one."""
    from torch.distributed.tensor import DTensor

    layout = {"shape": torch.Size(shape), "stride": stride, "run_check": False}
    return DTensor.from_local(local, like.device_mesh, like.placements, **layout)


def place_of(x: Any) -> Place:
    """Return the place of this rank's part of a DTensor."""
    from torch.distributed.tensor import Replicate, Shard

    starts, sizes = [0] * x.ndim, list(x.shape)
    ranks = x.device_mesh.get_coordinate()
    if ranks is None:
        raise ValueError(f"x must be used on the ranks of its mesh only; got {x.device_mesh}.")
    for rank, count, placement in zip(ranks, x.device_mesh.shape, x.placements, strict=True):
        if type(placement) is Shard:
            # As torch.chunk: the first ranks have the same number of elements, the last the rest.
            dim = placement.dim % x.ndim
            chunk = -(-sizes[dim] // count)
            first = min(rank * chunk, sizes[dim])
            starts[dim] += first
            sizes[dim] = min(chunk, sizes[dim] - first)
        elif type(placement) is not Replicate:
            raise ValueError(
                f"x must have placements Shard and Replicate only; got {x.placements}. "
                "Redistribute it first: x.redistribute(placements=[Replicate()])."
            )
    local = tuple(x.to_local().shape)
    if local != tuple(sizes):
        raise ValueError(
            f"x must hold a part of shape {tuple(sizes)} of {tuple(x.shape)} on rank "
            f"{tuple(ranks)} of its mesh; got {local}. Pass shape= and stride= to "
            "DTensor.from_local, or use distribute_tensor."
        )
    return Place(tuple(x.shape), tuple(map(Span, starts, sizes)))


@dataclasses.dataclass(frozen=True)
class PartSampler(MaskSampler):
    """A sampler that draws a part of what another one draws.

    Attributes:
        function: The other sampler.
        whole: The shape of its mask.
        part: The part: for each dimension a span, or None for all of it.
    """

    function: MaskSampler
    whole: tuple[int, ...]
    part: tuple[Span | None, ...]

    @property
    def draws_parts(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.function.draws_parts

    def draw_part(
        self, key: Tensor, keep_prob: float | Tensor, whole: tuple[int | None, ...], part: Any
    ) -> Tensor:
        """Draw a part of the part, whose shape is `whole`."""
        inner = tuple(map(_within, self.part, part))
        return self.function.draw_part(key, keep_prob, self.whole, inner)

    def draw(self, key: Tensor, keep_prob: float | Tensor, shape: tuple[int, ...]) -> Tensor:
        try:
            return self.function.draw_part(key, keep_prob, self.whole, self.part)
        except NotImplementedError:  # a user's function draws whole masks only
            return self.function.draw(key, keep_prob, self.whole)[_slices(self.part)]

    def split(self) -> tuple[PartSampler, Tensor | None]:
        function, given = self.function.split()
        return dataclasses.replace(self, function=function), given

    def join(self, given: Tensor) -> PartSampler:
        return dataclasses.replace(self, function=self.function.join(given))

    def realized_keep_prob(self, keep_prob: float | Tensor) -> float | Tensor:
        return self.function.realized_keep_prob(keep_prob)


def sampler_at(sampler: MaskSampler, place: Place, shared: tuple[int, ...] = ()) -> PartSampler:
    """Return a sampler of a part of a mask, which is shared along some dimensions."""
    sampler.check_fit(place.whole, shared)
    whole, part = place.sharing(shared)
    if not isinstance(sampler, ExampleSampler) or sampler.is_single:
        return PartSampler(sampler, whole, part)
    # The part has some of the examples, each of which has a number.
    axis = sampler.axis % len(whole)
    start, size = part[axis]
    own = sampler.join(sampler.numbers[start : start + size])
    sizes = (*whole[:axis], size, *whole[axis + 1 :])
    return PartSampler(own, sizes, (*part[:axis], None, *part[axis + 1 :]))


def mask_for(x: Tensor, keep_prob: float | Tensor, *, key: Tensor, sampler: Sampler) -> Tensor:
    """Draw a mask for `x`, of the same type of tensor."""
    whole = mask_sampler(sampler)
    if not is_dtensor(x):
        return whole.draw(key, keep_prob, tuple(x.shape))

    def draw(local: Tensor, place: Place) -> Tensor:
        return sampler_at(whole, place).draw(key, keep_prob, tuple(local.shape))

    return on_local_part(draw, x)


def _within(outer: Span | None, inner: Span | None) -> Span | None:
    """Return a span of a span; None is all of it."""
    if outer is None or inner is None:
        return inner or outer
    return Span(outer.start + inner.start, inner.size)


def _slices(part: Iterable[Span | None]) -> tuple[slice, ...]:
    return tuple(slice(s.start, s.start + s.size) if s else slice(None) for s in part)
