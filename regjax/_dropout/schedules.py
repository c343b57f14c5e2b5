"""Dropout rates that vary with the training step or with the layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, TypeAlias

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from regjax._checks import as_number
from regjax._random.bernoulli import check_probability
from regjax._random.xla import rounded
from regshared.checks import check_choice, check_integer

if TYPE_CHECKING:
    from jax.typing import ArrayLike
    from jaxtyping import Array, Float

    Schedule: TypeAlias = Callable[[ArrayLike], Float[Array, ""]]

# sin(pi z) / 2 = z * polynomial in z**2; for |z| up to 1/2 the truncated terms are below 1e-11.
_SINE = [(-1) ** k * math.pi ** (2 * k + 1) / math.factorial(2 * k + 1) / 2 for k in range(8)]


def constant_rate(rate: float) -> Schedule:
    """Return a schedule with the same rate, in [0, 1], at every step; see `linear_rate`.

    Example:
        >>> import regjax
        >>> regjax.constant_rate(0.5)(7)
        Array(0.5, dtype=float32)
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
        A function from the step, an integer that may be traced, to a float32 scalar, so that the
        rate changes without recompiling.

    Raises:
        TypeError: `start` or `end` is not a real number, or `steps` is not an integer.
        ValueError: `start` or `end` is not in [0, 1], or `steps` is below 1.

    Note (PyTorch):
        `regtorch.linear_rate` returns the same bits at every step: both compute in float32, by
        operations that round alike everywhere. A schedule of optax also works as a rate, but may
        differ from PyTorch's in the last bit.

    Example:
        >>> import jax, jax.numpy as jnp, regjax
        >>> rate = regjax.linear_rate(0.0, 0.5, steps=4)
        >>> [float(rate(step)) for step in range(6)]
        [0.0, 0.125, 0.25, 0.375, 0.5, 0.5]
        >>> @jax.jit
        ... def layer(x, key, step):
        ...     return regjax.dropout(x, rate(step), key=key)
        >>> layer(jnp.ones(6), jax.random.key(0), 3)
        Array([0. , 0. , 1.6, 1.6, 1.6, 1.6], dtype=float32)
    """
    return _between(start, end, steps, lambda progress: progress)


def cosine_rate(start: float, end: float, steps: int) -> Schedule:
    """Return a schedule that moves from `start` to `end` along half a cosine, then stays at `end`.

    At step t it is `start + (end - start) * (1 - cos(pi * t / steps)) / 2`, within 1e-6. For the
    arguments, result, errors and relation to PyTorch see `linear_rate`.

    Example:
        >>> import regjax
        >>> rate = regjax.cosine_rate(0.0, 0.5, steps=4)
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
        >>> import regjax
        >>> regjax.depth_rates(0.5, 5)
        (0.0, 0.125, 0.25, 0.375, 0.5)

    References:
        Huang et al., "Deep networks with stochastic depth", ECCV 2016.
    """
    rate = float(check_probability("rate", rate))
    depth = _check_count("depth", depth)
    check_choice("shape", shape, ("linear", "constant"))
    # Divide first: the quotient of the last layer is 1, so its rate is exactly `rate`.
    last = max(1, depth - 1)
    return tuple(rate * (layer / last) if shape == "linear" else rate for layer in range(depth))


def _between(
    start: float,
    end: float,
    steps: int,
    shape: Callable[[Float[Array, ""]], Float[Array, ""]],
) -> Schedule:
    """Return a schedule from `start` to `end` as `shape` moves from 0 to 1, all in float32."""
    start = float(check_probability("start", start))
    end = float(check_probability("end", end))
    steps = _check_count("steps", steps)
    first, last, difference = (np.float32(number) for number in (start, end, end - start))

    def schedule(step: ArrayLike) -> Float[Array, ""]:
        count = _count(step, steps)
        rate = first + rounded(difference * shape(rounded(count * np.float32(1 / steps))))
        rate = jnp.clip(rate, min(first, last), max(first, last))
        rate = jnp.where(count > 0, rate, first)
        return jnp.where(count < np.float32(steps), rate, last)

    return schedule


def _half_wave(progress: Float[Array, ""]) -> Float[Array, ""]:
    """Return (1 - cos(pi * progress)) / 2, for `progress` from 0 to 1."""
    z = progress - np.float32(0.5)
    square = rounded(z * z)
    first, *middle, last = (np.float32(number) for number in _SINE)
    total = last * square
    for coefficient in reversed(middle):
        total = (rounded(total) + coefficient) * square
    return np.float32(0.5) + rounded(z * (rounded(total) + first))


def _count(step: ArrayLike, steps: int) -> Float[Array, ""]:
    """Return the step as a float32: exact below 2**24, to seven digits beyond."""
    number = as_number("step", step)
    if not jnp.issubdtype(number.dtype, jnp.integer):
        raise TypeError(f"step must be an integer; got {step!r}.")
    if number.ndim:
        raise ValueError(f"step must be a scalar; got shape {number.shape}. Map with jax.vmap.")
    if not isinstance(number, Tracer):
        number = jnp.int32(min(max(int(number), 0), steps))
    return number.astype(jnp.float32)


def _check_count(name: str, count: int) -> int:
    return check_integer(name, count, minimum=1, maximum=2**31 - 1)
