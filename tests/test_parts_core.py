"""Unit tests of parts of masks: bitwise those of the whole mask, in both packages."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from parity_tests import reference
from parity_tests.frameworks import JAX, TORCH, Framework
from parity_tests.tables import both_frameworks
from regjax._random import packed as jax_packed
from regjax._random import threefry as jax_threefry
from regtorch._random import packed as torch_packed
from regtorch._random import threefry as torch_threefry

# An axis of a part: None for all of it, (start, size) for a slice, a list of indices.
Axis = None | tuple[int, int] | list[int]
PARTS: list[tuple[tuple[int, ...], tuple[Axis, ...]]] = [
    ((7,), ((2, 4),)),
    ((5, 6), ([4, 0, 0, 3], None)),
    ((5, 6), (None, (1, 3))),
    ((3, 4, 5), ([2, 1], (1, 2), (0, 5))),
    ((3, 4, 5), (None, [3, 3, 1], None)),
    ((1, 4, 5), ([0, 0], None, (4, 1))),
    ((2, 64, 40), (None, None, (7, 20))),  # the second axis packs
    ((3, 64, 40), ([2, 0], None, None)),
    ((2, 96, 40), (None, (32, 64), (1, 3))),  # whole words
    ((2, 96, 40), (None, (31, 40), None)),  # words that the part cuts
    ((2, 96, 40), ([1], [95, 0, 33, 32], None)),
    ((64, 3, 40), ([5, 40, 63], None, (0, 3))),
]


def sampler_of(framework: Framework, bits: int | None) -> Any:
    """Return the exact sampler, or the packed one with some bits."""
    packed = jax_packed if framework is JAX else torch_packed
    library = framework.library
    if bits is None:
        return packed.mask_sampler(library.bernoulli)
    return packed.mask_sampler(functools.partial(library.packed_bernoulli, bits=bits))


def draw_part(
    framework: Framework, sampler: Any, keep_prob: Any, whole: Any, part: Any, traced: bool = False
) -> np.ndarray:
    """Return a part of the mask of key 9; `traced` hides the starts of slices from the trace."""
    key = framework.key(9)
    if framework is not JAX:
        entries: list[Any] = [
            torch_threefry.Span(*e) if isinstance(e, tuple) else e and torch.tensor(e) for e in part
        ]
        return sampler.draw_part(key, keep_prob, whole, entries).numpy()
    words = lambda e: jax_threefry.Places(None, jnp.asarray(e, np.uint32))

    def draw(starts):
        entries = []
        for entry, start in zip(part, starts, strict=True):
            span = isinstance(entry, tuple) and jax_threefry.Span(start, entry[1])
            entries.append(span or (words(entry) if isinstance(entry, list) else None))
        return sampler.draw_part(key, keep_prob, whole, entries, None)

    starts = [entry[0] if isinstance(entry, tuple) else 0 for entry in part]
    return np.asarray(jax.jit(draw)(starts) if traced else jax.jit(lambda: draw(starts))())


@both_frameworks
@pytest.mark.parametrize("bits", [None, 5])
@pytest.mark.parametrize(("whole", "part"), PARTS, ids=str)
@pytest.mark.sample(9)
def test_a_part_is_that_of_the_whole_mask(framework: Framework, whole, part, bits):
    sampler = sampler_of(framework, bits)
    places = [
        range(size) if e is None else range(e[0], sum(e)) if isinstance(e, tuple) else e
        for e, size in zip(part, whole, strict=True)
    ]
    mask = framework.numpy(sampler(framework.key(9), 0.3, whole))
    starts_may_change = framework is JAX and any(isinstance(entry, tuple) for entry in part)
    for traced in (False, True)[: 1 + starts_may_change]:
        found = draw_part(framework, sampler, 0.3, whole, part, traced)
        np.testing.assert_array_equal(found, mask[np.ix_(*places)])


@both_frameworks
@pytest.mark.parametrize("bits", [None, 16])
@pytest.mark.sample(2)
def test_parts_of_an_unknown_number_of_examples(framework: Framework, bits):
    """The packed axis is then chosen from one example."""
    sampler = sampler_of(framework, bits)
    for example in ((5,), (), (64, 65), (2, 64, 40)):
        whole = framework.numpy(sampler(framework.key(9), 0.3, (3, *example)))
        part = ([2, 0], *[None] * len(example))
        found = draw_part(framework, sampler, 0.3, (None, *example), part)
        np.testing.assert_array_equal(found, whole[[2, 0]])


FAR = [(2**40 + 3, (5, 7)), (2**31, (2**20, 2**11)), (2**33 - 1, (2**30, 3))]


@both_frameworks
@pytest.mark.parametrize(("example", "shape"), FAR, ids=str)
def test_examples_beyond_32_bits(framework: Framework, example, shape):
    """The index of an element takes both words, with carries between them."""
    size = shape[0] * shape[1]
    starts, sizes = (shape[0] - 3, shape[1] - 2), (3, 2)
    if framework is JAX:
        high, low = (np.array([word], np.uint32) for word in divmod(example, 2**32))
        rows: Any = jax_threefry.Places(jnp.asarray(high), jnp.asarray(low))
        spans = [jax_threefry.Span(*span) for span in zip(starts, sizes, strict=True)]
        draw = lambda: sampler_of(JAX, None).draw_part(
            JAX.key(9), 0.5, (None, *shape), (rows, *spans), None
        )
        found = np.asarray(jax.jit(draw)())
    else:
        spans = [torch_threefry.Span(*span) for span in zip(starts, sizes, strict=True)]
        part = [torch.tensor([example]), *spans]
        sampler = sampler_of(framework, None)
        found = sampler.draw_part(framework.key(9), 0.5, (None, *shape), part).numpy()
    index = [
        example * size + (starts[0] + i) * shape[1] + starts[1] + j
        for i in range(3)
        for j in range(2)
    ]
    expected = reference.bernoulli_at((0, 9), 0.5, index).reshape(1, 3, 2)
    np.testing.assert_array_equal(found, expected)


def test_torch_draws_large_parts_in_pieces(monkeypatch):
    """Rows of a piece fit the cache; the pieces are parts of the whole mask, too."""
    sampler = sampler_of(JAX, None)
    whole, part = (40, 6), (list(range(39, -1, -3)), (2, 4))
    expected = draw_part(JAX, sampler, 0.3, whole, part)
    for piece in (1, 5, 8, 10**6):
        monkeypatch.setattr(torch_threefry, "_PIECE", piece)
        found = draw_part(TORCH, sampler_of(TORCH, None), 0.3, whole, part)
        np.testing.assert_array_equal(found, expected)


def test_a_slice_along_the_packed_axis_shares_words():
    """The number of words is that of the range; for scattered elements, one each."""
    for entry, expected in (
        (jax_threefry.Span(32, 64), 2),
        (jax_threefry.Span(31, 64), 3),
        (jax_threefry.Places(None, jnp.uint32([0, 1, 2])), 3),
    ):
        group = jax_packed.Group((2, 96, 40), 1, None, (None, entry, None))
        assert group.words_shape == (2, expected, 40)
