"""Attention in PyTorch: derivatives, memory, inputs without gradients, compilation."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import regtorch

KEY = regtorch.key(3)
both_forms = pytest.mark.parametrize("block_size", [None, 3], ids=["whole", "blocks"])


def attend(q, k, v, bias=None, **how):
    how = {"dropout_rng": KEY, "dropout_rate": 0.3} | how
    return regtorch.dot_product_attention(q, k, v, bias, **how)


def inputs(dtype=torch.float64, *, requires_grad=True) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    shapes = [(2, 4, 4, 3), (2, 5, 2, 3), (2, 5, 2, 2)]
    made = [torch.randn(shape, generator=rng, dtype=dtype) for shape in shapes]
    return [x.requires_grad_(requires_grad) for x in made]


@pytest.mark.parametrize("bias", [(4, 4, 5), (2, 1, 1, 5), (4, 1)], ids=str)
def test_derivatives_in_blocks_agree_with_differences(bias):
    arrays = [*inputs(), torch.randn(bias, dtype=torch.float64, requires_grad=True)]

    def blockwise(*arrays):
        return attend(*arrays, is_causal=True, block_size=3)

    assert torch.autograd.gradcheck(blockwise, arrays, fast_mode=True)
    assert torch.autograd.gradgradcheck(blockwise, arrays, fast_mode=True)


class _Largest(TorchDispatchMode):
    """Return the size of the largest tensor that an operation creates."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result


def largest_and_saved(length: int, block_size: int | None) -> tuple[int, int]:
    saved: list[int] = []
    q, k, v = (torch.randn(1, length, 2, 8, requires_grad=True) for _ in range(3))
    mask = torch.ones(1, 1, 1, length, dtype=torch.bool)
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda x: saved.append(x.numel()) or x, lambda x: x
    )
    with _Largest() as largest, hooks:
        attend(q, k, v, mask=mask, is_causal=True, block_size=block_size).sum().backward()
    return largest.elements, sum(saved)


def test_memory_in_blocks_grows_with_the_length_and_not_with_its_square():
    """Return the largest size of a tensor of both passes, and the size of all saved tensors."""
    short, long = (largest_and_saved(length, 8) for length in (32, 128))
    assert all(more <= 4 * few for few, more in zip(short, long, strict=True))
    assert all(size >= 2 * 128**2 for size in largest_and_saved(128, None))  # test of the test


@both_forms
def test_only_what_asks_for_a_gradient_gets_one(block_size):
    q, k, v = inputs()
    expected = torch.autograd.grad(attend(q, k, v).square().sum(), k)
    y = attend(q.detach(), k, v.detach(), block_size=block_size)
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), k), expected)
    assert not attend(q.detach(), k.detach(), v.detach(), block_size=block_size).requires_grad
    with torch.no_grad():
        assert not attend(q, k, v, block_size=block_size).requires_grad


@both_forms
def test_layout_in_memory_changes_nothing(block_size):
    plain = inputs(requires_grad=False)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in plain]
    both = [[x.requires_grad_() for x in arrays] for arrays in (plain, strided)]
    y, z = (attend(*arrays, block_size=block_size) for arrays in both)
    torch.testing.assert_close(y, z)
    gradients = (torch.autograd.grad(y.sum(), x) for y, x in zip((y, z), both, strict=True))
    torch.testing.assert_close(*gradients)


@both_forms
def test_functional_gradients(block_size):
    arrays = inputs()
    loss = lambda *arrays: attend(*arrays, block_size=block_size).square().sum()
    found = torch.func.grad(loss, (0, 1, 2))(*(x.detach() for x in arrays))
    torch.testing.assert_close(found, torch.autograd.grad(loss(*arrays), arrays))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
# From the compiler, which instantiates every autograd.Function that it traces.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@both_forms
def test_compiled_in_one_graph(block_size):
    arrays = inputs(torch.float32)
    loss = lambda *arrays: attend(*arrays, block_size=block_size).square().sum()
    found, expected = (
        torch.autograd.grad(f(*arrays), arrays) for f in (torch.compile(loss, fullgraph=True), loss)
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("block_size", [None, 3])
def test_at_rate_1_a_tensor_as_a_flag_still_decides(block_size):
    query, key, value = inputs(requires_grad=False)
    call = lambda flag, rate=1.0: regtorch.dot_product_attention(
        query,
        key,
        value,
        dropout_rng=KEY,
        dropout_rate=rate,
        deterministic=flag,
        block_size=block_size,
    )
    torch.testing.assert_close(call(torch.tensor(True)), call(True))
    assert not call(torch.tensor(False)).any()
    if block_size:  # the whole matrix has zeros, which multiply the values
        value[0] = torch.inf
        assert not call(False).any()
