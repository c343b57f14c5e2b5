"""Rates that change: from step to step of training, and from layer to layer of a stack."""

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
# Of sin(pi z) / 2 = z * polynomial in z**2: for |z| up to 1/2, what follows is below 1e-11.
_SINE = [(-1) ** k * math.pi ** (2 * k + 1) / math.factorial(2 * k + 1) / 2 for k in range(8)]


def constant_rate(rate: float) -> Schedule:
    """The same rate at every step, as a schedule.

    Args:
        rate: in [0, 1].

    Returns:
        A function from the step to a float32 tensor of no dimension.

    Raises:
        TypeError: `rate` is not a real number.
        ValueError: it is not in [0, 1].

    Example:
        >>> import regtorch
        >>> regtorch.constant_rate(0.5)(7)
        tensor(0.5000)
    """
    rate = float(check_probability("rate", rate))
    return _between(rate, rate, 1, lambda progress: progress)


def linear_rate(start: float, end: float, steps: int) -> Schedule:
    """Return a rate that moves from `start` to `end` in equal steps, and then stays there.

    Args:
        start: the rate at step 0, and before it; in [0, 1].
        end: the rate at step `steps`, and after it; in [0, 1].
        steps: how many steps it takes, at least 1.

    Returns:
        A function from the step, an integer or an integer tensor of no dimension, to a float32
        tensor of no dimension, on the device of the step: a number would be compiled anew for
        each of its values. It is computed in float32, by operations that round alike everywhere.

    Raises:
        TypeError: `start` or `end` is not a real number, or `steps` is not an integer.
        ValueError: `start` or `end` is not in [0, 1], or `steps` is below 1.

    JAX:
        `regjax.linear_rate` gives the same bits at every step.

    Example:
        >>> import torch, regtorch
        >>> rate = regtorch.linear_rate(0.0, 0.5, steps=4)
        >>> [float(rate(step)) for step in range(6)]
        [0.0, 0.125, 0.25, 0.375, 0.5, 0.5]
        >>> regtorch.dropout(torch.ones(6), rate(3), key=regtorch.key(0))
        tensor([0.0000, 0.0000, 1.6000, 1.6000, 1.6000, 1.6000])
        >>> layer = regtorch.nn.Dropout(0.0)
        >>> layer.rate = rate(3)  # a layer takes it at any step
        >>> layer(torch.ones(6), key=regtorch.key(0))
        tensor([0.0000, 0.0000, 1.6000, 1.6000, 1.6000, 1.6000])
    """
    return _between(start, end, steps, lambda progress: progress)


def cosine_rate(start: float, end: float, steps: int) -> Schedule:
    """Return a rate that moves from `start` to `end` along half a cosine, and then stays there.

    At step t it is `start + (end - start) * (1 - cos(pi * t / steps)) / 2`: slow at both ends, and
    fastest in the middle.

    Args:
        start: the rate at step 0, and before it; in [0, 1].
        end: the rate at step `steps`, and after it; in [0, 1].
        steps: how many steps it takes, at least 1.

    Returns:
        A function from the step to a float32 tensor of no dimension; see `linear_rate`. It is
        within 1e-6 of the formula.

    Raises:
        TypeError: as `linear_rate`.
        ValueError: as `linear_rate`.

    JAX:
        `regjax.cosine_rate` gives the same bits at every step.

    Example:
        >>> import regtorch
        >>> rate = regtorch.cosine_rate(0.0, 0.5, steps=4)
        >>> [round(float(rate(step)), 6) for step in range(6)]
        [0.0, 0.073223, 0.25, 0.426777, 0.5, 0.5]

    Source: the shape of Loshchilov, Hutter, "SGDR: stochastic gradient descent with warm restarts",
    ICLR 2017.
    """
    return _between(start, end, steps, _half_wave)


def depth_rates(
    rate: float, depth: int, *, shape: Literal["linear", "constant"] = "linear"
) -> tuple[float, ...]:
    """The rates of `drop_path` for a stack of layers: 0 at the first, `rate` at the last.

    Layer l of L, counted from 0, has `rate * l / (L - 1)`: what lies nearer to the input is used by
    more layers, and so is dropped more rarely. The paper counts from 1 and divides by L, so that
    the first layer is dropped too: `depth_rates(rate, depth + 1)[1:]`. torchvision counts from 0
    and divides by L, so that the last layer stays below: `depth_rates(rate, depth + 1)[:-1]`.

    Args:
        rate: that of the last layer, in [0, 1].
        depth: how many layers there are, at least 1. A single one has rate 0, unless "constant".
        shape: "linear", or "constant" for `rate` everywhere.

    Returns:
        A number for each layer; the same in both packages.

    Raises:
        TypeError: `rate` is not a real number, or `depth` is not an integer.
        ValueError: `rate` is not in [0, 1], `depth` is below 1, or `shape` is neither of the two.

    PyTorch:
        `torch.linspace(0, rate, depth).tolist()`, as timm's models have it, rounded to float32.

    Example:
        >>> import regtorch
        >>> regtorch.depth_rates(0.5, 5)
        (0.0, 0.125, 0.25, 0.375, 0.5)

    Source: Huang, Sun, Liu, Sedra, Weinberger, "Deep networks with stochastic depth", ECCV 2016.
    """
    rate = float(check_probability("rate", rate))
    depth = _check_count("depth", depth)
    check_choice("shape", shape, ("linear", "constant"))
    # The quotient first: that of the last layer is 1, and its rate is `rate` itself.
    last = max(1, depth - 1)
    return tuple(rate * (layer / last) if shape == "linear" else rate for layer in range(depth))


def _between(start: float, end: float, steps: int, shape: Callable[[Tensor], Tensor]) -> Schedule:
    """From `start` to `end` as `shape` goes from 0 to 1, in float32 throughout."""
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
    """(1 - cos(pi * progress)) / 2, of `progress` from 0 to 1."""
    z = progress - 0.5
    square = rounded(z * z)
    first, *middle, last = _SINE
    total = last * square
    for coefficient in reversed(middle):
        total = (rounded(total) + coefficient) * square
    return 0.5 + rounded(z * (rounded(total) + first))


def _count(step: int | Tensor, steps: int) -> Tensor:
    """The step as a float32: exact below 2**24, and beyond to seven digits."""
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
