"""Properties of dropout in PyTorch and timm, whose functions have no keys."""

from __future__ import annotations

import torch

from benchmarks.probes.in_jax import X, has_mean


def _dropout(x: torch.Tensor, rate: float) -> torch.Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return torch.nn.functional.dropout(x, rate)


def torch_stores_no_mask() -> bool:
    """Return whether the backward pass stores less than one byte for each element."""
    saved: list[torch.Tensor] = []
    x = torch.tensor(X, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        _dropout(x, 0.5)
    return sum(tensor.nbytes for tensor in saved) < X.size


def torch_drops_nan() -> bool:
    """Return whether a dropped NaN is 0."""
    return bool((_dropout(torch.full(X.shape, torch.nan), 0.5) == 0).any())


def torch_is_zero_at_one() -> bool:
    """Return whether rate 1 gives zeros, with gradients of zero."""
    x = torch.tensor(X, requires_grad=True)
    y = _dropout(x, 1.0)
    y.sum().backward()
    assert x.grad is not None
    return bool((y == 0).all() and (x.grad == 0).all())


def torch_is_unbiased() -> bool:
    """Return whether kept elements in bfloat16 have the right scale on average."""
    x = torch.tensor(X, dtype=torch.bfloat16)
    return has_mean(x.double(), _dropout(x, 0.1).double())


def timm_drops_nan() -> bool:
    """Return whether `drop_path` turns a dropped NaN into 0."""
    from timm.layers import drop_path  # pyright: ignore[reportMissingImports]

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return bool((drop_path(torch.full(X.shape, torch.nan), 0.5, True) == 0).any())


def timm_is_unbiased() -> bool:
    """Return whether kept rows in bfloat16 have the right scale on average."""
    from timm.layers import drop_path  # pyright: ignore[reportMissingImports]

    x = torch.tensor(X, dtype=torch.bfloat16)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return has_mean(x.double(), drop_path(x, 0.1, True).double())


def timm_is_zero_at_one() -> bool:
    """Return whether rate 1 gives zeros, with gradients of zero."""
    from timm.layers import drop_path  # pyright: ignore[reportMissingImports]

    x = torch.tensor(X, requires_grad=True)
    y = drop_path(x, 1.0, True)
    y.sum().backward()
    assert x.grad is not None
    return bool((y == 0).all() and (x.grad == 0).all())
