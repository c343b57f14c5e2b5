"""Samplers and loaders of PyTorch, each with its counterpart in `regjax.torch_random`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
from torch.utils import data

from regjax import torch_random as T

DEFAULT = torch.default_generator


def dataset(size: int) -> Any:
    """Return a dataset whose elements are its indices."""
    return range(size)


def as_lists(batches):
    """Return batches as lists of integers."""
    rows = np.asarray(batches) if hasattr(batches, "ndim") else batches
    return [np.asarray(row).tolist() for row in rows]


def loader(size, batch_size, drop_last=False, is_own=False, **options):
    """Return a case: an epoch of a shuffled loader, in PyTorch and in JAX."""
    given = DEFAULT if is_own else None
    loader = data.DataLoader(
        dataset(size), batch_size, shuffle=True, drop_last=drop_last, generator=given, **options
    )
    return (
        lambda: as_lists(loader),
        lambda g: T.shuffled_batches(g, size, batch_size, drop_last=drop_last, is_own=is_own),
    )


def sampled(sampler, draw):
    """Return a case: a loader of single elements with a sampler."""
    loader = data.DataLoader(dataset(1000), batch_size=None, sampler=sampler)

    def in_jax(g):
        _, g = T.loader_seed(g)
        order, g = draw(g)
        return order, g

    return lambda: as_lists(loader), in_jax


def randomly(size, **options):
    """Return a case: a RandomSampler."""
    is_own = options.pop("is_own", False)
    sampler = data.RandomSampler(dataset(size), generator=DEFAULT if is_own else None, **options)
    return sampled(sampler, lambda g: T.random_sampler(g, size, is_own=is_own, **options))


def weighted(weights, count, replacement=True):
    """Return a case: a WeightedRandomSampler."""
    return sampled(
        data.WeightedRandomSampler(weights, count, replacement),
        lambda g: T.weighted_random_sampler(g, weights, count, replacement=replacement),
    )


def split(size, lengths):
    """Return a case: a split of a dataset."""
    return (
        lambda: [part.indices for part in data.random_split(dataset(size), lengths)],
        lambda g: T.random_split(g, size, lengths),
    )


def unshuffled(size):
    """Return a case: a loader in the order of the dataset."""
    return (
        lambda: as_lists(data.DataLoader(dataset(size))),
        lambda g: (np.arange(size)[:, None], T.loader_seed(g)[1]),
    )


SUBSET = [5, 3, 900, 7, 12]
WEIGHTS = [0.1, 0.0, 5.0, 0.3, 2.0, 2.0, 2.0]
CASES = {
    "loader": loader(17, 4),
    "loader, drop_last": loader(17, 4, drop_last=True),
    "loader, full batches": loader(16, 4, drop_last=True),
    "loader, one batch": loader(3, 5),
    "loader, no batch": loader(3, 5, drop_last=True),
    "loader, one element": loader(1, 1),
    "loader, generator": loader(17, 4, is_own=True),
    "loader, generator, drop_last": loader(17, 4, drop_last=True, is_own=True),
    "loader, generator, full batches": loader(16, 4, drop_last=True, is_own=True),
    "loader, not shuffled": unshuffled(5),
    "sampler": randomly(17),
    "sampler, fewer": randomly(17, num_samples=5),
    "sampler, more": randomly(17, num_samples=40),
    "sampler, replacement": randomly(17, replacement=True),
    "sampler, more, generator": randomly(17, num_samples=40, is_own=True),
    "sampler, twice, generator": randomly(17, num_samples=34, is_own=True),
    "sampler, replacement, generator": randomly(17, replacement=True, num_samples=70, is_own=True),
    "subset": sampled(
        data.SubsetRandomSampler(SUBSET), lambda g: T.subset_random_sampler(g, jnp.array(SUBSET))
    ),
    "weighted": weighted(WEIGHTS, 200),
    "weighted, one": weighted(WEIGHTS, 1),
    "weighted, no replacement": weighted(WEIGHTS, 6, replacement=False),
    "split": split(17, [3, 4, 10]),
    "split, fractions": split(17, [0.5, 0.25, 0.25]),
    "split, empty part": split(17, [0, 17]),
    "split, one part": split(17, [1.0]),
    **{f"split, {size}": split(size, [0.3, 0.3, 0.4]) for size in (17, 18, 19)},
}


def pairs() -> Iterator[tuple[str, Any, Any]]:
    """Yield orders and states of the generator in two epochs of all cases, in JAX and PyTorch."""
    with torch.random.fork_rng(devices=[]):
        for name, (in_torch, in_jax) in CASES.items():
            torch.manual_seed(7)
            g = T.generator(7)
            for epoch in range(2):
                batches, g = in_jax(g)
                for ours, theirs in zip(as_lists(batches), in_torch(), strict=True):
                    yield f"{name}, {epoch}", np.array(ours), np.array(theirs)
                yield f"{name}, {epoch}, state", T.to_torch(g), torch.get_rng_state().numpy()
