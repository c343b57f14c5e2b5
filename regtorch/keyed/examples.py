"""Draws by example: a rank, or a micro-batch, draws what belongs to its rows of the whole batch."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from regshared.checks import check_integer, check_string
from regshared.globs import matches
from regtorch._random.by_example import by_example
from regtorch._random.threefry import part_index

if TYPE_CHECKING:
    from regtorch._random.bernoulli import Sampler


@dataclasses.dataclass(frozen=True)
class Rows:
    """The rows of one draw: those at `numbers` along `axis` of a draw for all examples."""

    numbers: Tensor
    axis: int

    def sampler(self) -> Sampler:
        """Return the sampler of these rows."""
        return by_example(self.numbers, axis=self.axis)

    def index(self, shape: Sequence[int], device: torch.device) -> Tensor:
        """Return the index of each element in the draw for all examples, with `axis` in front."""
        rest = [size for dim, size in enumerate(shape) if dim != self.axis]
        index = part_index((None, *rest), (self.numbers, *[None] * len(rest)), device)
        return index.movedim(0, self.axis)


class Layout(NamedTuple):
    """The place of the examples in a draw.

    Attributes:
        axis: Their dimension; None if they share the draw.
        repeats: The number of consecutive rows of each example; None for any.
    """

    axis: int | None
    repeats: int | None = None


@dataclasses.dataclass(frozen=True)
class Examples:
    """The examples of a batch, and the dimension of the batch in the draws of a model.

    Attributes:
        numbers: The number of each example, int64.
        axis: The dimension; or one for each glob of sites, None if the examples share a draw; or
            None to require that the first one has the length of `numbers`, and, in the first draw
            of a site, no other one.
    """

    numbers: Tensor
    axis: int | Mapping[str, int | None] | None = None

    def rows(
        self, site: str, shape: Sequence[int], known: Layout | None, batch_first: set[str]
    ) -> Rows | None:
        """Return the rows that a site draws in a shape; None if the examples share the draw.

        Args:
            site: The name of the site.
            shape: The shape of the draw.
            known: The layout that the function has which draws; only a glob overrides it.
            batch_first: The sites that were seen to have the batch first; this adds to them.
        """
        shape, count = tuple(shape), len(self.numbers)
        layout = self._layout(site, known)
        is_single = known is None and math.prod(shape) == 1 and (count != 1 or not shape)
        if is_single or (layout and layout.axis is None):
            return None
        if layout is None or layout.axis is None:
            if shape[:1] == (count,) and count not in shape[1:]:
                batch_first.add(site)
            if shape[:1] == (count,) and site in batch_first:
                return Rows(self.numbers, 0)
            raise _error_of_shape(site, f"for {count} examples; got shape {shape}")
        axis, repeats = layout.axis, layout.repeats
        if -len(shape) <= axis < len(shape):
            size = shape[axis]
            found = size // count if count else 1
            if found and size == found * count and repeats in (None, found):
                return Rows(_repeated(self.numbers, found), axis % len(shape))
        where = f"for {count} examples along dimension {axis}"
        raise _error_of_shape(site, f"{where}; got shape {shape}")

    def is_shared(self, site: str) -> bool:
        """Return whether the examples are stated to share the draws of a site."""
        return self._layout(site, None) == Layout(None)

    def _layout(self, site: str, known: Layout | None) -> Layout | None:
        """Return the layout that is stated for a site, or known; None if neither is."""
        if isinstance(self.axis, Mapping):
            for glob, axis in self.axis.items():
                if matches(glob, site):
                    return Layout(axis)
            return known
        return known or (None if self.axis is None else Layout(self.axis))


def _repeated(numbers: Tensor, times: int) -> Tensor:
    """Return the numbers of rows, of which each example has several, one after the other."""
    if times == 1:
        return numbers
    return (numbers[:, None] * times + torch.arange(times, device=numbers.device)).flatten()


def _error_of_shape(site: str, problem: str) -> ValueError:
    return ValueError(
        f"site {site!r} must draw {problem}. Pass axis={{{site!r}: n}} to "
        "regtorch.keyed.set_key, where n is the dimension of the batch, in which the elements of "
        "an example follow each other, or None if the examples share the draw."
    )


def check_examples(examples: Any, axis: Any) -> Examples | None:
    """Return the examples of `set_key`, or None."""
    if examples is None:
        if axis is not None:
            raise ValueError(f"axis must be None without examples; got {axis!r}. Pass examples.")
        return None
    numbers = by_example(examples).numbers
    if numbers.ndim != 1:
        raise ValueError("examples must be one number for each row, of shape (n,); got one number.")
    if not isinstance(axis, Mapping):
        return Examples(numbers, None if axis is None else check_integer("axis", axis))
    axes = {
        glob: None if n is None else check_integer(f"axis[{glob!r}]", n) for glob, n in axis.items()
    }
    return Examples(numbers, axes)


def check_globs(globs: Collection[str], names: Collection[str]) -> None:
    """Raise if a glob matches none of the names of modules and sites."""
    for glob in globs:
        stem = re.sub(r":\d+$", "", check_string("axis", glob, "a dict from globs of sites"))
        if not any(matches(stem, name) for name in names):
            raise ValueError(
                f"axis must have globs of sites; got {glob!r}, which matches none. "
                "regtorch.keyed.sites(model) lists them."
            )
