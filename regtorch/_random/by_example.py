"""Masks by the number of the example: a part of a batch has the masks of the whole batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from regshared.checks import check_integer, describe
from regshared.examples import check_attention_axis, check_reach, check_rows
from regtorch._checks import has_negative, highest_word
from regtorch._random.bernoulli import MaskSampler, Sampler, bernoulli
from regtorch._random.packed import PackedSampler, mask_sampler

_INDEX_BITS = {False: 64, True: 60}  # with and without a `PackedSampler`


def by_example(
    examples: Tensor | Sequence[int] | int, sampler: Sampler = bernoulli, *, axis: int = 0
) -> ExampleSampler:
    """Return a sampler that draws the mask of each example from its number in the data.

    Pass it as `sampler`. An example then has the mask that it has in a batch of all examples,

        dropout(batch, rate, key=key)[examples]

    bit for bit, however the batch is split into micro-batches, ranks or pipeline stages, shuffled
    or padded, with the **same key** in each part: fold in neither the number of the micro-batch nor
    that of the rank.

    The mask of example i begins at the row-major index `i * size`, where `size` is the number of
    elements of one example; so the number of examples does not matter. `i * size` must be below
    2**64, or 2**60 with `packed_bernoulli`.

    Args:
        examples: The numbers of the examples in `x` along `axis`, as integers of at least 0 of
            shape (n,); or one number, for `x` without such an axis, as under `torch.func.vmap`.
        sampler: The sampler of the whole batch. `packed_bernoulli` chooses the axis that packs from
            the shape of one example, and equals `dropout(batch, ...)[examples]` where the shape of
            the batch leads to the same axis. Any other function draws each example separately, with
            the key `regtorch.fold_in(key, i)` for an example i below 2**32.
        axis: The dimension of the examples in `x`. If it is not the first, the mask is that of `x`
            with this dimension moved to the front.

    Returns:
        A function like `bernoulli`. `dropout` stores the numbers, and the key, for the backward
        pass.

    Raises:
        TypeError: `examples` are not integers, or `sampler` is not a function.
        ValueError: `examples` has more than one dimension, or one is negative (on a CPU; elsewhere,
            and under `torch.compile`, this is not checked); `sampler` is itself by example. On use:
            the length of `examples` is not that of `x` along `axis`, one is above the limit (on a
            CPU), or the function shares one mask along that dimension.

    Note (JAX):
        `regjax.by_example` draws the same masks.

    Example:
        >>> import torch, regtorch
        >>> key, x = regtorch.key(0), torch.ones(6, 4)
        >>> whole = regtorch.dropout(x, 0.5, key=key)
        >>> rows = torch.tensor([4, 1])
        >>> y = regtorch.dropout(x[rows], 0.5, key=key, sampler=regtorch.by_example(rows))
        >>> torch.equal(y, whole[rows])
        True
    """
    inner = mask_sampler(sampler)
    if isinstance(inner, ExampleSampler):
        raise ValueError(f"sampler must not be by_example itself; got {sampler!r}.")
    return ExampleSampler(inner, _check_examples(examples), check_integer("axis", axis))


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class ExampleSampler(MaskSampler):
    """The sampler that `by_example` returns.

    Attributes:
        function: The sampler of the whole batch.
        examples: The numbers of the examples, int64 of shape (n,), or () for a single one; None in
            a kind of dropout, which receives them separately.
        axis: The dimension of the examples.
    """

    function: MaskSampler
    examples: Tensor | None
    axis: int

    # Tensors have no equality that is a bool.
    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return f"by_example({describe(self.examples)}, axis={self.axis})"

    @property
    def draws_parts(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.function.draws_parts

    @property
    def is_single(self) -> bool:
        """Whether `x` is one example, without a dimension for examples."""
        return not self.numbers.ndim

    @property
    def numbers(self) -> Tensor:
        assert self.examples is not None
        return self.examples

    def split(self) -> tuple[ExampleSampler, Tensor | None]:
        return dataclasses.replace(self, examples=None), self.examples

    def join(self, given: Tensor) -> ExampleSampler:
        return dataclasses.replace(self, examples=given)

    def draw(self, key: Tensor, keep_prob: float | Tensor, shape: tuple[int, ...]) -> Tensor:
        return self.draw_part(key, keep_prob, shape, (None,) * len(shape))

    def draw_part(
        self, key: Tensor, keep_prob: float | Tensor, whole: tuple[Any, ...], part: Any
    ) -> Tensor:
        """Draw part of a mask of shape `whole`, which is whole along the axis of the examples."""
        if self.is_single:
            one = (self.numbers[None], *part)
            return self.function.draw_part(key, keep_prob, (None, *whole), one).squeeze(0)
        self.check_fit(tuple(whole), ())
        axis = self.axis % len(whole)

        def front(entries: Sequence[Any], first: Any) -> tuple[Any, ...]:
            return (first, *entries[:axis], *entries[axis + 1 :])

        mask = self.function.draw_part(
            key, keep_prob, front(whole, None), front(part, self.numbers)
        )
        return mask.movedim(0, axis)

    def realized_keep_prob(self, keep_prob: float | Tensor) -> float | Tensor:
        return self.function.realized_keep_prob(keep_prob)

    def check_fit(self, shape: tuple[int, ...], shared: tuple[int, ...]) -> None:
        """Raise a ValueError if there is not one example for each row of x, below the limit."""
        if not self.is_single:
            check_rows(self.axis, self.numbers.shape[0], shape, shared)
            shared = (*shared, self.axis)
        if self.draws_parts and (highest := highest_word(self.numbers)):
            check_reach(
                highest, shape, shared, _INDEX_BITS[isinstance(self.function, PackedSampler)]
            )


def check_batch_axis(sampler: MaskSampler, ndim: int) -> None:
    """Reject examples along another than the first `ndim` dimensions of attention."""
    if isinstance(sampler, ExampleSampler) and not sampler.is_single:
        check_attention_axis(sampler.axis, ndim)


def check_one_mask(sampler: MaskSampler) -> MaskSampler:
    """Return a sampler that draws one mask for all rows of x."""
    if isinstance(sampler, ExampleSampler) and not sampler.is_single:
        raise ValueError(
            "sampler must draw one mask for all rows of x; got by_example with examples of shape "
            f"{tuple(sampler.numbers.shape)}. Map over single examples with torch.func.vmap."
        )
    return sampler


def _check_examples(examples: Any) -> Tensor:
    if not isinstance(examples, Tensor):
        try:
            found = None if examples is None else torch.as_tensor(examples)
        except (TypeError, ValueError, RuntimeError):
            found = None
        if found is None:
            raise TypeError(f"examples must be a tensor of integers; got {describe(examples)}.")
        examples = found if found.numel() else found.to(torch.int64)
    if examples.is_floating_point() or examples.is_complex() or examples.dtype == torch.bool:
        raise TypeError(f"examples must be integers; got dtype {examples.dtype}.")
    if examples.ndim > 1:
        raise ValueError(
            "examples must be one number for each row, of shape (n,); got shape "
            f"{tuple(examples.shape)}."
        )
    if has_negative(examples):
        raise ValueError(
            f"examples must not be negative; got {int(examples.min())}. Count them from the start "
            "of the data."
        )
    return examples.to(torch.int64)
