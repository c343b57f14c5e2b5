"""Arithmetic that rounds as written, whatever a compiler does."""

from __future__ import annotations

import torch
from torch import Tensor


def rounded(x: Tensor) -> Tensor:
    """Return `x`, and prevent a compiler from contracting the product `x` with a later sum.

    PyTorch runs operation by operation and rounds each. A compiler may contract `a * b + c` into
    one operation that rounds once, unless there is another operation between the two. This one is
    the identity for every value, and so is its derivative.
    """
    if not torch.compiler.is_compiling():
        return x
    return torch.where(x < 1, x, x.clamp(min=1))


def exact_sqrt(x: Tensor) -> Tensor:
    """Return the correctly rounded square root, also where the backend's own is off by one ulp.

    `torch.sqrt` on a CPU misrounds one float32 in five, whatever the instruction set. The error of
    the backend's root is computed exactly, and a nearer neighbor replaces it.

    `x` is float32 or float64, zero or in [2**-60, 2**60]. Outside of that range, and for infinity
    and NaN, the result is the backend's, or one of its neighbors.
    """
    # A product must not be contracted with the first difference below; all others are exact.
    x = rounded(x)
    integer, mantissa = (torch.int64, 52) if x.dtype == torch.float64 else (torch.int32, 23)
    near = torch.sqrt(x)
    bits = near.view(integer)
    # Rounded to half of its digits, so that each of the three products below is exact.
    tail = 1 << (mantissa + 2) // 2
    high = ((bits + tail // 2) & -tail).view(x.dtype)
    low = near - high
    excess = x - high * high - 2 * high * low - low * low
    ulp = (bits & -(1 << mantissa)).view(x.dtype) * 2.0**-mantissa
    # (near + ulp / 2)**2 exceeds near**2 by near * ulp and less than the last digit of excess.
    limit = near * ulp
    return torch.where(excess > limit, near + ulp, torch.where(excess <= -limit, near - ulp, near))
