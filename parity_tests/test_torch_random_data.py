"""PyTorch's order of data in JAX: indices and the state of the generator after every epoch."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.utils import data
from torch.utils.data.distributed import DistributedSampler

from parity_tests.torch_loaders import CASES, as_lists, dataset, loader
from regjax import torch_random

T: Any = torch_random  # untyped, for wrong calls


@pytest.fixture(autouse=True)
def _forked():
    with torch.random.fork_rng(devices=[]):
        yield


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
@pytest.mark.sample(11)
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
    next(iter(data.DataLoader(dataset(17), 4, shuffle=True)))
    _, g = T.shuffled_batches(T.generator(3), 17, 4)
    assert (T.to_torch(g) == torch.get_rng_state().numpy()).all()


def test_seeds_of_workers():
    torch.manual_seed(3)
    expected = iter(data.DataLoader(dataset(17)))._base_seed
    high, low = (int(word) for word in T.loader_seed(T.generator(3))[0])
    assert (high << 32) + low == expected


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize(("size", "replicas"), [(17, 4), (16, 4), (3, 8), (1, 5)])
def test_distributed_orders_equal_torchs(size, replicas, drop_last):
    for rank in range(replicas):
        for epoch, shuffle in ((0, True), (2, True), (2, False)):
            options = {"shuffle": shuffle, "seed": 7, "drop_last": drop_last}
            sampler = DistributedSampler(dataset(size), replicas, rank, **options)
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
    "no generator of its own": ("loader", "_seeded", lambda g: (g, T.loader_seed(g)[1])),
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
