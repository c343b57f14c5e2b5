"""DTensors: each rank drops in its part of the whole tensor, without communication."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from regtorch._random.bernoulli import MaskSampler, Sampler
from regtorch._random.packed import mask_sampler


class Part(NamedTuple):
    """The part of a tensor of shape `whole` that a rank holds: a slice for each dimension."""

    whole: tuple[int, ...]
    slices: tuple[slice, ...]

    def sharing(self, dims: tuple[int, ...]) -> Part:
        """Return the same part of a tensor of size 1 along some dimensions."""
        axes = enumerate(zip(self.whole, self.slices, strict=True))
        axes = [(1, slice(0, 1)) if dim in dims else axis for dim, axis in axes]
        return Part(tuple(n for n, _ in axes), tuple(entry for _, entry in axes))


def is_dtensor(x: object) -> bool:
    """Return whether `x` is a `torch.distributed.tensor.DTensor`.

    That module takes a second to import; while nobody has imported it, there is no DTensor.
    """
    return isinstance(x, getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", ()))


def on_local_part(
    function: Callable[[Tensor, Part], Tensor], x: Any, *, only_whole: str = ""
) -> Any:
    """Apply `function(local, part)` to the part of a DTensor on this rank; return a DTensor.

    The result and the gradient have the placements of `x`.

    Args:
        function: The function, whose result has the shape of the part.
        x: A DTensor.
        only_whole: The name of a function that must have the whole tensor on every rank.
    """
    from torch.distributed.tensor import DTensor

    part = part_of(x)
    if only_whole and any(placement.is_shard() for placement in x.placements):
        raise ValueError(
            f"x must be replicated for {only_whole}; got a DTensor with placements "
            f"{x.placements}. Redistribute it: x.redistribute(placements=[Replicate()])."
        )
    y = function(x.to_local(), part)
    layout = {"shape": x.shape, "stride": x.stride(), "run_check": False}
    return DTensor.from_local(y, x.device_mesh, x.placements, **layout)


def part_of(x: Any) -> Part:
    """Return the part of a DTensor that this rank holds."""
    from torch.distributed.tensor import Replicate, Shard

    starts, sizes = [0] * x.ndim, list(x.shape)
    ranks = x.device_mesh.get_coordinate()
    if ranks is None:
        raise ValueError(f"x must be used on the ranks of its mesh; got {x.device_mesh}.")
    for rank, count, placement in zip(ranks, x.device_mesh.shape, x.placements, strict=True):
        if type(placement) is Shard:
            # As torch.chunk: the first ranks have the same number of elements, the last the rest.
            chunk = -(-sizes[placement.dim] // count)
            first = min(rank * chunk, sizes[placement.dim])
            starts[placement.dim] += first
            sizes[placement.dim] = min(chunk, sizes[placement.dim] - first)
        elif type(placement) is not Replicate:
            raise ValueError(
                f"x must have placements Shard and Replicate only; got {x.placements}. Redistribute "
                "it first, for a Partial: x.redistribute(placements=[Replicate()])."
            )
    if tuple(x.to_local().shape) != tuple(sizes):
        raise ValueError(
            f"x must hold {tuple(sizes)} of its {tuple(x.shape)} elements on rank {tuple(ranks)} "
            f"of the mesh; got {tuple(x.to_local().shape)}. Pass shape= and stride= to "
            "DTensor.from_local, or use distribute_tensor."
        )
    ends = (start + size for start, size in zip(starts, sizes, strict=True))
    return Part(tuple(x.shape), tuple(map(slice, starts, ends)))


@dataclasses.dataclass(frozen=True)
class PartOfMask(MaskSampler):
    """A sampler that draws a part of the mask of another.

    Attributes:
        sampler: The other sampler.
        part: The part.
    """

    sampler: MaskSampler
    part: Part

    def draw(self, key: Tensor, keep_prob: float | Tensor, shape: tuple[int, ...]) -> Tensor:
        return draw_part(self.sampler, key, keep_prob, self.part)

    def realized_keep_prob(self, keep_prob: float | Tensor) -> float | Tensor:
        return self.sampler.realized_keep_prob(keep_prob)


def mask_for(x: Tensor, keep_prob: float | Tensor, *, key: Tensor, sampler: Sampler) -> Tensor:
    """Draw a mask for `x`, of the same type of tensor."""
    whole = mask_sampler(sampler)
    if not is_dtensor(x):
        return whole.draw(key, keep_prob, tuple(x.shape))

    def draw(local: Tensor, part: Part) -> Tensor:
        return PartOfMask(sampler, whole, part).draw(key, keep_prob, tuple(local.shape))

    return on_local_part(draw, x)


def draw_part(sampler: MaskSampler, key: Tensor, keep_prob: float | Tensor, part: Part) -> Tensor:
    """Draw a part of a mask; of a user's sampler, which cannot, the whole."""
    return sampler.draw(key, keep_prob, part.whole)[part.slices]
