"""Dropout rates that vary with the training step or with the layer.

Step schedules map an integer or a 0-d integer tensor to a float32 0-d tensor on its device. They
compute in float32 by operations that round alike everywhere: `regjax` returns the same bits.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from regshared.checks import check_choice, check_integer
from regtorch._random.bernoulli import check_probability
from regtorch._random.rounding import rounded

Schedule: TypeAlias = Callable[[int | Tensor], Tensor]

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
# sin(pi z) / 2 = z * polynomial in z**2 with these coefficients; for |z| up to 1/2, the remainder
# is below 1e-11.
_SINE = [(-1) ** k * math.pi ** (2 * k + 1) / math.factorial(2 * k + 1) / 2 for k in range(8)]


def constant_rate(rate: float) -> Schedule:
    """Return a schedule with the same rate, in [0, 1], at every step; see `linear_rate`.

    Example:
        >>> import regtorch
        >>> regtorch.constant_rate(0.5)(7)
        tensor(0.5000)
    """
    rate = float(check_probability("rate", rate))
    return _between(rate, rate, 1, lambda progress: progress)


def linear_rate(start: float, end: float, steps: int) -> Schedule:
    """Return a schedule that moves from `start` to `end` in equal steps, then stays at `end`.

    Args:
        start: The rate at step 0 and before; in [0, 1].
        end: The rate at step `steps` and after; in [0, 1].
        steps: The number of steps of the transition, at least 1.

    Returns:
        A function from the step, an integer or a 0-d integer tensor, to a float32 0-d tensor.

    Raises:
        TypeError: `start` or `end` is not a real number, or `steps` is not an integer.
        ValueError: `start` or `end` is not in [0, 1], or `steps` is below 1.

    Example:
        >>> import torch, regtorch
        >>> rate = regtorch.linear_rate(0.0, 0.5, steps=4)
        >>> [float(rate(step)) for step in range(6)]
        [0.0, 0.125, 0.25, 0.375, 0.5, 0.5]
        >>> regtorch.dropout(torch.ones(6), rate(3), key=regtorch.key(0))
        tensor([0.0000, 0.0000, 1.6000, 1.6000, 1.6000, 1.6000])
    """
    return _between(start, end, steps, lambda progress: progress)


def cosine_rate(start: float, end: float, steps: int) -> Schedule:
    """Return a schedule that moves from `start` to `end` along half a cosine, then stays at `end`.

    At step t it is `start + (end - start) * (1 - cos(pi * t / steps)) / 2`, within 1e-6. For the
    arguments, result and errors see `linear_rate`.

    Example:
        >>> import regtorch
        >>> rate = regtorch.cosine_rate(0.0, 0.5, steps=4)
        >>> [round(float(rate(step)), 6) for step in range(6)]
        [0.0, 0.073223, 0.25, 0.426777, 0.5, 0.5]

    References:
        Loshchilov and Hutter, "SGDR", ICLR 2017.
    """
    return _between(start, end, steps, _half_wave)


def depth_rates(
    rate: float, depth: int, *, shape: Literal["linear", "constant"] = "linear"
) -> tuple[float, ...]:
    """Return the rates of `drop_path` for a stack of layers: 0 at the first, `rate` at the last.

    Layer l of L, counted from 0, has `rate * l / (L - 1)`: more layers use a layer nearer to the
    input, so it is dropped more rarely. In the paper the first layer is dropped too:
    `depth_rates(rate, depth + 1)[1:]`. In torchvision the last layer stays below `rate`:
    `depth_rates(rate, depth + 1)[:-1]`.

    Args:
        rate: The rate of the last layer, in [0, 1].
        depth: The number of layers, at least 1. A single layer has rate 0, unless "constant".
        shape: "linear", or "constant" for `rate` at every layer.

    Raises:
        TypeError: `rate` is not a real number, or `depth` is not an integer.
        ValueError: `rate` is not in [0, 1], `depth` is below 1, or `shape` is neither of the two.

    Note (PyTorch):
        timm's models use `torch.linspace(0, rate, depth).tolist()`, rounded to float32.

    Example:
        >>> import regtorch
        >>> regtorch.depth_rates(0.5, 5)
        (0.0, 0.125, 0.25, 0.375, 0.5)

    References:
        Huang et al., "Deep networks with stochastic depth", ECCV 2016.
    """
    rate = float(check_probability("rate", rate))
    depth = _check_count("depth", depth)
    check_choice("shape", shape, ("linear", "constant"))
    # Divide first: the last quotient is 1, so that the rate of the last layer is exactly `rate`.
    last = max(1, depth - 1)
    return tuple(rate * (layer / last) if shape == "linear" else rate for layer in range(depth))


def _between(start: float, end: float, steps: int, shape: Callable[[Tensor], Tensor]) -> Schedule:
    """Return a schedule from `start` to `end` as `shape` moves from 0 to 1, all in float32."""
    start = float(check_probability("start", start))
    end = float(check_probability("end", end))
    steps = _check_count("steps", steps)

    def schedule(step: int | Tensor) -> Tensor:
        count = _count(step, steps)
        first, last, difference = count.new_tensor([start, end, end - start])
        rate = first + rounded(difference * shape(rounded(count * (1 / steps))))
        rate = torch.clamp(rate, torch.minimum(first, last), torch.maximum(first, last))
        rate = torch.where(count > 0, rate, first)
        return torch.where(count < count.new_tensor(steps), rate, last)

    return schedule


def _half_wave(progress: Tensor) -> Tensor:
    """Return (1 - cos(pi * progress)) / 2, for `progress` from 0 to 1."""
    z = progress - 0.5
    square = rounded(z * z)
    first, *middle, last = _SINE
    total = last * square
    for coefficient in reversed(middle):
        total = (rounded(total) + coefficient) * square
    return 0.5 + rounded(z * (rounded(total) + first))


def _count(step: int | Tensor, steps: int) -> Tensor:
    """Return the step in float32: exact below 2**24, to seven digits beyond."""
    if isinstance(step, numbers.Integral) and not isinstance(step, bool):
        step = torch.tensor(min(max(int(step), 0), steps))
    if not isinstance(step, Tensor) or step.dtype not in _INTEGERS:
        raise TypeError(f"step must be an integer; got {step!r}.")
    if step.ndim:
        raise ValueError(
            f"step must be a scalar; got shape {tuple(step.shape)}. Map with torch.func.vmap."
        )
    return step.to(torch.float32)


def _check_count(name: str, count: int) -> int:
    return check_integer(name, count, minimum=1, maximum=2**31 - 1)
