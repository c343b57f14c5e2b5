"""Masks by example in PyTorch: transforms, compilation, checkpoints, and observers."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch.utils.checkpoint import checkpoint

import regtorch
from tests.shared import found

KEY = regtorch.key(5)
X = torch.randn(12, 64, 72, generator=torch.Generator().manual_seed(0))
ROWS = torch.tensor([7, 0, 11, 3])
SAMPLERS = {
    "exact": regtorch.bernoulli,
    "packed": functools.partial(regtorch.packed_bernoulli, bits=5),
}
samplers = pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)


def drop(x: Any, rows: Any, key: Any = KEY, sampler: Any = regtorch.bernoulli) -> torch.Tensor:
    return regtorch.dropout(x, 0.5, key=key, sampler=regtorch.by_example(rows, sampler))


@samplers
def test_transforms(sampler):
    drop_ = functools.partial(drop, sampler=sampler)
    whole = regtorch.dropout(X, 0.5, key=KEY, sampler=sampler)[ROWS]
    x = X[ROWS].requires_grad_()
    gradient = torch.where(whole != 0, 2.0, 0.0)
    for y in (drop_(x, ROWS), checkpoint(drop_, x, ROWS, use_reentrant=False)):
        assert torch.equal(y, whole)
        assert torch.equal(torch.autograd.grad(y.sum(), x)[0], gradient)
    x = x.detach()
    assert torch.equal(torch.func.vmap(drop_)(x, ROWS), whole)
    of_row = torch.func.grad(lambda x, row: drop_(x, row).sum())
    assert torch.equal(torch.func.vmap(of_row)(x, ROWS), gradient)
    tangent = torch.func.jvp(lambda x: drop_(x, ROWS), (x,), (torch.ones_like(x),))[1]
    assert torch.equal(tangent, gradient)


def test_the_backward_pass_stores_key_and_numbers_only():
    stored = []
    x = X[ROWS].requires_grad_()

    def store(tensor):
        stored.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(store, lambda tensor: tensor):
        drop(x, ROWS)
    assert sum(stored) == 2 + len(ROWS)


@pytest.mark.slow  # 20 s
def test_under_compile_new_numbers_need_no_new_program():
    counter: Any = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(drop, backend=counter, fullgraph=True)
    for rows in (ROWS, ROWS.flip(0), ROWS - ROWS):
        assert torch.equal(compiled(X[ROWS], rows, KEY), drop(X[ROWS], rows))
    assert counter.frame_count == 1


@pytest.mark.parametrize("in_attention", [False, True])
def test_the_guard_knows_parts_of_one_batch(in_attention):
    """One key for all parts is no repeated mask; the same examples twice are one."""
    x = X[:6, :40].reshape(6, 5, 2, -1)[..., :4]

    def part(x, rows, key):
        if not in_attention:
            return drop(x, rows, key).sum()
        how: Any = {"dropout_rng": key, "dropout_rate": 0.5, "block_size": 2}
        sampler = regtorch.by_example(rows)
        return regtorch.dot_product_attention(x, x, x, sampler=sampler, **how).sum()

    def step(numbers, step):
        key = regtorch.site_key(KEY, step, "hidden")
        for i in (0, 2, 4):
            part(x[i : i + 2], numbers[i : i + 2], key)

    reports = [
        regtorch.check_dropout(functools.partial(step, numbers))
        for numbers in ([0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 0, 1])
    ]
    assert found(reports[0]) == []
    assert [problem.name for problem, _ in found(reports[1])] == ["REPEATED_MASK"]


@pytest.mark.parametrize(
    ("sampler", "bits"), [(regtorch.bernoulli, 64), (regtorch.packed_bernoulli, 60)]
)
def test_indices_that_wrap_are_an_error(sampler, bits):
    """Otherwise two examples would have the same mask."""

    def drop(example):
        rows = regtorch.by_example(torch.tensor([3, example]), sampler)
        return regtorch.dropout(torch.ones((2, 64, 32)), 0.5, key=regtorch.key(0), sampler=rows)

    drop(2 ** (bits - 11) - 1)
    with pytest.raises(
        ValueError, match=rf"examples must be below 2\*\*{bits} / 2048, .* got \d+\. C"
    ):
        drop(2 ** (bits - 11))
