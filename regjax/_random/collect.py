"""Arrays of a compiled program that arrive on the host block by block, or as samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from regshared.mask_audit import Segment, observed_segments


class Collected:
    """An array that arrives in blocks along its last axis.

    Args:
        shape: The shape of the whole array.
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
        places = np.arange(0, self.size, max(1, self.size // (sample or 1)))[: sample or 0]
        kept = (np.fromiter(segment.indices(shape), int) for segment in segments)
        places = np.concatenate([places, *kept])
        self._row, self._column = np.divmod(places, max(1, self._length))
        self._values: np.ndarray | None = None

    @property
    def values(self) -> np.ndarray:
        """The elements in the shape of the array, or as a 1-D array if they are a sample."""
        values = self._stored(np.dtype(bool))
        return values if self._sampled else values.reshape(self.shape)

    def add(self, block: np.ndarray, first: int = 0) -> Collected:
        """Store the block at index `first` of the last axis; its end may be padding."""
        block = block.reshape(self._rows, block.shape[-1] if self.shape else 1)
        block = block[:, : self._length - first]
        end = first + block.shape[1]
        if block.dtype == bool:
            self.nonzero += int(np.count_nonzero(block))
        values = self._stored(block.dtype)
        if self._sampled:
            here = (first <= self._column) & (self._column < end)
            values[here] = block[self._row[here], self._column[here] - first]
        else:
            values[:, first:end] = block
        return self

    def normalize(self, log_total: np.ndarray) -> Collected:
        """Replace scores by softmax weights, given the logarithm of each row's sum."""
        total = log_total.reshape(self._rows)
        total = total[self._row] if self._sampled else total[:, None]
        values = self._stored(log_total.dtype)
        with np.errstate(all="ignore"):  # the program may have computed infinities
            np.exp(np.subtract(values, total, out=values), out=values)
        return self

    def _stored(self, dtype: np.dtype) -> np.ndarray:
        if self._values is None:
            shape = self._row.shape if self._sampled else (self._rows, self._length)
            self._values = np.zeros(shape, dtype)
        return self._values


class BlockwisePlan(NamedTuple):
    """The shapes, number of blocks and untraced rate of a blockwise mask, known in advance."""

    mask: tuple[int, ...]
    scores: tuple[int, ...]
    blocks: int
    rate: float | None  # None if traced


class BlockwiseDraw:
    """The pieces of one blockwise draw, which arrive in any order."""

    def __init__(self, plan: BlockwisePlan, sample: int | None) -> None:
        self.mask = Collected(plan.mask, sample, observed_segments(plan.mask, sample))
        self.weights = Collected(plan.scores, sample)
        self.rate: float | None = None
        self.examples: tuple[int, ...] | None = None
        self._plan = plan
        self._firsts: set[int] = set()

    def add_block(self, first: int, keep: np.ndarray, scores: np.ndarray) -> bool:
        """Store a block, unless it is already stored; return whether it was stored."""
        if first in self._firsts:
            return False
        self._firsts.add(first)
        self.mask.add(keep, first)
        self.weights.add(scores, first)
        self._finish()
        return True

    def add_end(self, rate: float, log_total: np.ndarray, examples: tuple[int, ...] | None) -> bool:
        """Store what belongs to all blocks unless already stored; return whether this call did."""
        if self.rate is not None:
            return False
        self.rate = rate if self._plan.rate is None else self._plan.rate
        self._log_total, self.examples = log_total, examples
        self._finish()
        return True

    def is_complete(self) -> bool:
        """Return whether all pieces have arrived."""
        return self.rate is not None and len(self._firsts) == self._plan.blocks

    def _finish(self) -> None:
        if self.is_complete():
            self.weights.normalize(self._log_total)
