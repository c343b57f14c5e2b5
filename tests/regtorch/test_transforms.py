"""Dropout under PyTorch's transforms: the same masks, and only the key is stored."""

from __future__ import annotations

import functools
import shutil

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import regtorch
from regtorch._random import threefry as _threefry

X = torch.linspace(-2.0, 3.0, 48).reshape(6, 8)
KEYS = regtorch.split(regtorch.key(3), 6)
SAMPLERS = {"exact": regtorch.bernoulli, "packed": regtorch.packed_bernoulli}
each_sampler = pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)

apply = functools.partial(regtorch.dropout, rate=0.3)


def test_vmap_over_keys_draws_a_mask_each():
    rows = torch.func.vmap(lambda x, key: apply(x, key=key))(X, KEYS)
    expected = torch.stack([apply(x, key=key) for x, key in zip(X, KEYS, strict=True)])
    assert torch.equal(rows, expected)


def test_vmap_over_inputs_shares_the_mask():
    rows = torch.func.vmap(lambda x: apply(x, key=KEYS[0]))(X)
    assert torch.equal(rows, torch.stack([apply(x, key=KEYS[0]) for x in X]))


def test_vmap_over_keys_alone():
    rows = torch.func.vmap(lambda key: apply(X, key=key))(KEYS)
    assert torch.equal(rows, torch.stack([apply(X, key=key) for key in KEYS]))


def test_vmap_over_rates():
    rates = torch.tensor([0.0, 0.3, 1.0, 2.0])
    rows = torch.func.vmap(lambda rate: apply(X, rate=rate, key=KEYS[0]))(rates)
    expected = torch.stack([apply(X, rate=rate, key=KEYS[0]) for rate in rates])
    assert torch.equal(rows.nan_to_num(7), expected.nan_to_num(7))


def test_per_example_gradients():
    loss = lambda x, key: (apply(x, key=key) ** 2).sum()
    rows = torch.func.vmap(torch.func.grad(loss))(X, KEYS)
    expected = torch.stack([torch.func.grad(loss)(*row) for row in zip(X, KEYS, strict=True)])
    assert torch.equal(rows, expected)
    assert torch.equal(
        rows == 0, torch.stack([apply(x, key=k) == 0 for x, k in zip(X, KEYS, strict=True)])
    )


@pytest.mark.parametrize("rate", [0.3, torch.tensor(0.3)], ids=["number", "tensor"])
def test_forward_mode_and_jacobians(rate):
    f = lambda x: apply(x, rate=rate, key=KEYS[0])
    _, tangent = torch.func.jvp(f, (X,), (X,))
    assert torch.equal(tangent, f(X))
    scales = torch.diag(apply(torch.ones(8), rate=rate, key=KEYS[1]))
    g = lambda x: apply(x, rate=rate, key=KEYS[1])
    assert torch.equal(torch.func.jacfwd(g)(X[0]), scales)
    assert torch.equal(torch.func.jacrev(g)(X[0]), scales)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128])
@pytest.mark.sample(2)
def test_gradients_of_every_order_agree_with_differences(dtype):
    x = X.to(torch.complex128 if dtype.is_complex else torch.float64).requires_grad_()
    f = lambda x: apply(x, key=KEYS[0])
    assert torch.autograd.gradcheck(f, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(f, x)


@each_sampler
@pytest.mark.parametrize("rate", [0.3, torch.tensor(0.3)], ids=["number", "tensor"])
def test_nothing_but_the_key_is_saved_for_the_backward_pass(sampler, rate):
    saved = []
    x = torch.ones(64, 128, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        apply(x, rate=rate, key=KEYS[0], sampler=sampler)
    assert saved
    assert all(tensor.numel() <= 2 for tensor in saved)


def test_a_saved_mask_is_seen():
    """Test of the test: PyTorch's own dropout stores its mask."""
    saved = []
    x = torch.ones(64, 128, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        torch.nn.functional.dropout(x, 0.3)
    assert any(tensor.numel() > 2 for tensor in saved)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_makes_the_same_mask_again(reentrant):
    def loss(x):
        return (apply(torch.tanh(x), key=KEYS[0]) ** 2).sum()

    gradients = []
    for run in (loss, lambda x: checkpoint(loss, x, use_reentrant=reentrant)):
        x = X.clone().requires_grad_()
        run(x).backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


def test_autocast_changes_nothing():
    for dtype in (torch.float32, torch.bfloat16):
        x = X.to(dtype)
        with torch.autocast("cpu", torch.bfloat16):
            y = apply(x, key=KEYS[0])
        assert y.dtype == dtype
        assert torch.equal(y, apply(x, key=KEYS[0]))


@each_sampler
def test_pieces_of_any_length_make_the_same_mask(sampler, monkeypatch):
    shape = (65, 31)  # not packed, so that both samplers draw an element at a time
    whole = sampler(KEYS[0], 0.7, shape), regtorch.bits(KEYS[0], shape)
    monkeypatch.setattr(_threefry, "_PIECE", 100)
    monkeypatch.setattr(_threefry, "_LONGEST", 512)
    assert torch.equal(sampler(KEYS[0], 0.7, shape), whole[0])
    assert torch.equal(regtorch.bits(KEYS[0], shape).view(torch.int32), whole[1].view(torch.int32))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
@each_sampler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_dropout_is_the_same_bit_for_bit(sampler, dtype):
    x = torch.linspace(-2.0, 3.0, 64 * 160).reshape(64, 160).to(dtype).requires_grad_()
    f = lambda x, key: apply(x, key=key, sampler=sampler)
    compiled = torch.compile(f, fullgraph=True)
    for key in KEYS[:2]:
        results = []
        for run in (f, compiled):
            y = run(x, key)
            results.append((y, *torch.autograd.grad(y, x, torch.ones_like(y))))
        assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
