"""Tensors that arrive block by block, or of which only a sample is needed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from regshared.mask_audit import Segment, observed_segments


class Collected:
    """A tensor that arrives in blocks along its last dimension.

    Args:
        shape: The shape of the whole tensor.
        sample: The number of elements to keep, evenly spaced; None keeps all of them.
        segments: The segments to keep after these.
    """

    def __init__(
        self, shape: tuple[int, ...], sample: int | None, segments: Sequence[Segment] = ()
    ) -> None:
        self.segments = segments
        self.shape, self.size, self.nonzero = shape, math.prod(shape), 0
        self._rows, self._length = math.prod(shape[:-1]), shape[-1] if shape else 1
        self._sampled = sample is not None
        places = torch.arange(0, self.size, max(1, self.size // (sample or 1)))[: sample or 0]
        kept = (torch.tensor(list(segment.indices(shape))) for segment in segments)
        places = torch.cat([places, *kept])
        self._row = places // max(1, self._length)
        self._column = places % max(1, self._length)
        self._values: Tensor | None = None

    @property
    def values(self) -> Tensor:
        """Return the elements in the shape of the tensor, or a one-dimensional sample of them."""
        values = self._stored(torch.empty(0, dtype=torch.bool))
        return values if self._sampled else values.reshape(self.shape)

    def add(self, block: Tensor, first: int = 0) -> Collected:
        """Copy the block at index `first` of the last dimension."""
        block = block.reshape(self._rows, block.shape[-1] if self.shape else 1)
        end = first + block.shape[1]
        if block.dtype == torch.bool:
            self.nonzero += int(block.count_nonzero())
        values = self._stored(block)
        if self._sampled:
            here = (first <= self._column) & (self._column < end)
            row, column = (x[here].to(block.device) for x in (self._row, self._column - first))
            values[here.to(block.device)] = block[row, column]
        else:
            values[:, first:end] = block
        return self

    def normalize(self, log_total: Tensor) -> Collected:
        """Replace scores by the weights of a softmax, from the logarithm of each row's sum."""
        total = log_total.reshape(self._rows)
        total = total[self._row.to(total.device)] if self._sampled else total[:, None]
        self._stored(log_total).sub_(total).exp_()
        return self

    def _stored(self, like: Tensor) -> Tensor:
        if self._values is None:
            shape = self._row.shape if self._sampled else (self._rows, self._length)
            self._values = torch.zeros(shape, dtype=like.dtype, device=like.device)
        return self._values


class BlockwisePlan(NamedTuple):
    """The shapes of a mask that is applied block by block, and of the scores it belongs to."""

    mask: tuple[int, ...]
    scores: tuple[int, ...]


class BlockwiseDraw:
    """One blockwise draw, whose blocks arrive in order."""

    def __init__(self, plan: BlockwisePlan, sample: int | None) -> None:
        self.mask = Collected(plan.mask, sample, observed_segments(plan.mask, sample))
        self.weights = Collected(plan.scores, sample)

    def add_block(self, first: int, keep: Tensor, scores: Tensor) -> None:
        self.mask.add(keep, first)
        self.weights.add(scores, first)

    def add_end(self, log_total: Tensor) -> None:
        """Convert the scores to weights, from the logarithm of each row's sum."""
        self.weights.normalize(log_total)
