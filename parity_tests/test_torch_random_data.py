"""PyTorch's order of data in JAX: indices and the state of the generator after every epoch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.utils import data
from torch.utils.data.distributed import DistributedSampler

from regjax import torch_random as T

DEFAULT = torch.default_generator


@pytest.fixture(autouse=True)
def _forked():
    with torch.random.fork_rng(devices=[]):
        yield


def as_lists(batches):
    return [
        np.asarray(b).tolist()
        for b in (np.asarray(batches) if hasattr(batches, "ndim") else batches)
    ]


def loader(size, batch_size, drop_last=False, is_own=False, **options):
    """Return a case: an epoch of a shuffled loader, in PyTorch and in JAX."""
    given = DEFAULT if is_own else None
    loader = data.DataLoader(
        range(size), batch_size, shuffle=True, drop_last=drop_last, generator=given, **options
    )
    return (
        lambda: as_lists(loader),
        lambda g: T.shuffled_batches(g, size, batch_size, drop_last=drop_last, is_own=is_own),
    )


def sampled(sampler, draw):
    """Return a case: a loader of single elements with a sampler."""
    loader = data.DataLoader(range(1000), batch_size=None, sampler=sampler)

    def in_jax(g):
        _, g = T.loader_seed(g)
        order, g = draw(g)
        return order, g

    return lambda: as_lists(loader), in_jax


def randomly(size, **options):
    is_own = options.pop("is_own", False)
    sampler = data.RandomSampler(range(size), generator=DEFAULT if is_own else None, **options)
    return sampled(sampler, lambda g: T.random_sampler(g, size, is_own=is_own, **options))


def weighted(weights, count, replacement=True):
    return sampled(
        data.WeightedRandomSampler(weights, count, replacement),
        lambda g: T.weighted_random_sampler(g, weights, count, replacement=replacement),
    )


def split(size, lengths):
    return (
        lambda: [part.indices for part in data.random_split(range(size), lengths)],
        lambda g: T.random_split(g, size, lengths),
    )


def unshuffled(size):
    return (
        lambda: as_lists(data.DataLoader(range(size))),
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


def disagreements(case, seed, epochs=3):
    in_torch, in_jax = case
    torch.manual_seed(seed)
    g, found = T.generator(seed), []
    for epoch in range(epochs):
        expected = in_torch()
        batches, g = in_jax(g)
        if as_lists(batches) != expected:
            found.append(f"epoch {epoch}: order")
        if not (T.to_torch(g) == torch.get_rng_state().numpy()).all():
            found.append(f"epoch {epoch}: state")
        torch.rand(3)  # the model's dropout
        _, g = T.uniform(g, (3,))
    return found


@pytest.mark.parametrize("name", CASES)
def test_order_and_state_equal_torchs(name):
    for seed in (0, 1, 2**40 + 3):
        assert disagreements(CASES[name], seed) == []


@pytest.mark.slow
def test_order_and_state_equal_torchs_for_many_seeds_and_sizes():
    for seed, size in enumerate((2, 31, 33, 100, 625, 5000)):
        for more in range(30):
            assert disagreements(loader(size, 7), 100 * seed + more, epochs=2) == []


@pytest.mark.slow
def test_workers_do_not_change_the_order():
    for options in ({}, {"is_own": True}):
        case = loader(17, 4, num_workers=1, multiprocessing_context="forkserver", **options)
        assert disagreements(case, 5) == []


def test_an_unfinished_epoch():
    torch.manual_seed(3)
    next(iter(data.DataLoader(range(17), 4, shuffle=True)))
    _, g = T.shuffled_batches(T.generator(3), 17, 4)
    assert (T.to_torch(g) == torch.get_rng_state().numpy()).all()


def test_seeds_of_workers():
    torch.manual_seed(3)
    expected = iter(data.DataLoader(range(17)))._base_seed
    high, low = (int(word) for word in T.loader_seed(T.generator(3))[0])
    assert (high << 32) + low == expected


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize(("size", "replicas"), [(17, 4), (16, 4), (3, 8), (1, 5)])
def test_distributed_orders_equal_torchs(size, replicas, drop_last):
    for rank in range(replicas):
        for epoch, shuffle in ((0, True), (2, True), (2, False)):
            options = {"shuffle": shuffle, "seed": 7, "drop_last": drop_last}
            sampler = DistributedSampler(range(size), replicas, rank, **options)
            sampler.set_epoch(epoch)
            order = T.distributed_sampler(size, replicas, rank, epoch=epoch, **options)
            assert order.tolist() == list(sampler)


def test_an_epoch_under_jit():
    draw = lambda g: T.shuffled_batches(g, 17, 4)
    (batches, g), (expected, after) = jax.jit(draw)(T.generator(4)), draw(T.generator(4))
    assert as_lists(batches) == as_lists(expected)
    assert (T.to_torch(g) == T.to_torch(after)).all()


DEFECTS = {
    "no seed of the loader": ("loader", "loader_seed", lambda g: (jnp.zeros(2, np.uint32), g)),
    "seed of the wrong word": ("loader", "seeded", lambda seed: T.generator(int(seed[0]))),
    "no last permutation": ("loader, generator", "permutation", None),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_is_found(monkeypatch, defect):
    name, function, replacement = DEFECTS[defect]
    if replacement is None:
        calls = iter(range(100))
        permutation = T.permutation
        replacement = lambda g, n: permutation(g, n) if next(calls) % 2 == 0 else (jnp.arange(n), g)
    monkeypatch.setattr(T.data, function, replacement)
    assert disagreements(CASES[name], 1) != []


G = T.generator(0)
ERRORS = {
    "size": (lambda: T.shuffled_batches(G, 0, 4), "size must be at least 1; got 0"),
    "batch_size": (lambda: T.shuffled_batches(G, 4, 0), "batch_size must be at least 1"),
    "drop_last": (lambda: T.shuffled_batches(G, 4, 2, drop_last=1), "drop_last must be True"),
    "is_own": (lambda: T.random_sampler(G, 4, is_own=None), "is_own must be True or False"),
    "generator": (lambda: T.loader_seed(0), "g must be a TorchGenerator"),
    "num_samples": (lambda: T.random_sampler(G, 4, num_samples=0), "num_samples must be at least"),
    "indices": (lambda: T.subset_random_sampler(G, jnp.ones((2, 2))), "indices must have one axis"),
    "weights": (lambda: T.weighted_random_sampler(G, [1, -1], 2), "weights must be finite and not"),
    "zeros": (lambda: T.weighted_random_sampler(G, [0, 0], 2), "weights must be finite and not"),
    "matrix": (lambda: T.weighted_random_sampler(G, np.ones((2, 2)), 2), "weights must have one"),
    "text": (lambda: T.weighted_random_sampler(G, "abc", 2), "weights must be an array of numbers"),
    "traced": (
        lambda: jax.jit(lambda w: T.weighted_random_sampler(G, w, 2))(np.ones(3)),
        "weights must be known before tracing",
    ),
    "too many": (
        lambda: T.weighted_random_sampler(G, [1, 0, 1], 3, replacement=False),
        "num_samples must be at most the number of positive weights",
    ),
    "lengths": (lambda: T.random_split(G, 5, [2, 4]), "lengths must be integers with the sum 5"),
    "fractions": (lambda: T.random_split(G, 5, [0.5, 0.6]), "lengths must be integers"),
    "negative": (lambda: T.random_split(G, 5, [-1, 6]), "lengths must be integers"),
    "names": (lambda: T.random_split(G, 5, ["a"]), "lengths must be numbers"),
    "rank": (lambda: T.distributed_sampler(5, 2, 2), "rank must be at most 1; got 2"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_bad_input_is_refused(name):
    call, message = ERRORS[name]
    with pytest.raises((TypeError, ValueError), match=message):
        call()
