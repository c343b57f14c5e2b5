"""Arithmetic that rounds where it is written, whatever a compiler makes of it."""

from __future__ import annotations

import torch
from torch import Tensor


def rounded(x: Tensor) -> Tensor:
    """Returns `x`, and keeps a product that `x` is from being joined with a sum that it goes into.

    PyTorch runs operation by operation and rounds each. A compiler may contract `a * b + c` to one
    operation that rounds once, unless there is another one between the two. This one is the
    identity for every value, and so is its derivative.

    Example:
        >>> import torch
        >>> x = torch.tensor(1 + 2**-12)
        >>> rounded(x * x) - x == x * x - x
        tensor(True)
    """
    if not torch.compiler.is_compiling():
        return x
    return torch.where(x < 1, x, x.clamp(min=1))
