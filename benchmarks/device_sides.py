"""The two sides of a check of a device, and comparisons of their results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Arrays = Mapping[str, np.ndarray]
# Runs a function, jitted, and returns its results as NumPy arrays.
Run = Callable[..., Any]


class WrongResultError(Exception):
    """A result is wrong."""


class NotApplicableError(Exception):
    """A check does not apply, for the reason in the message."""


@dataclass(frozen=True)
class Sides:
    """The device, and the CPU that it is compared with.

    Attributes:
        device: Runs a function on the device.
        cpu: Runs a function on the CPU.
        devices: All devices of the kind.
        is_rehearsal: Whether CPUs take the place of the devices, and arrays are small.
    """

    device: Run
    cpu: Run
    devices: Sequence[Any]
    is_rehearsal: bool = False

    @property
    def platform(self) -> str:
        """The platform of the device: "gpu", "tpu" or, in a rehearsal, "cpu"."""
        return self.devices[0].platform

    @property
    def torch_device(self) -> str:
        """The device of PyTorch that corresponds."""
        return "cpu" if self.is_rehearsal else "cuda"

    @property
    def large(self) -> tuple[int, int]:
        """The shape of the largest masks."""
        return (64, 128) if self.is_rehearsal else (4096, 4096)


def runner(device: Any) -> Run:
    """Return a function that runs another, jitted, on a device."""

    def run(function: Callable[..., Any], *arguments: Any) -> Any:
        with jax.default_device(device):
            placed = jax.device_put(arguments, device)
            return jax.tree.map(np.asarray, jax.jit(function)(*placed))

    return run


def key_of(seed: int) -> Any:
    """Return the PRNG key of a seed."""
    return jax.random.wrap_key_data(jnp.asarray([0, seed], np.uint32))


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    """Return float32 numbers from a standard normal distribution."""
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def same_bits(sides: Sides, function: Callable[..., Any], *arguments: Any) -> str:
    """Run a function on both sides, and require equal bits."""
    return equal_bits(sides.device(function, *arguments), sides.cpu(function, *arguments))


def same_values(sides: Sides, function: Callable[..., Any], bound: float, *arguments: Any) -> str:
    """Run a function on both sides, and require deviations within a bound."""
    return within(sides.device(function, *arguments), sides.cpu(function, *arguments), bound)


def equal_bits(found: Arrays, expected: Arrays) -> str:
    """Require equal bits of all arrays, and return how many were compared."""
    for name, x, y in _pairs(found, expected):
        differ = int((_bits(x) != _bits(y)).sum())
        require(not differ, f"{name}: {differ:,} of {x.size:,} elements differ")
    elements = sum(x.size for x in found.values())
    return f"{len(found)} arrays, {elements:,} elements, equal bits"


def within(found: Arrays, expected: Arrays, bound: float) -> str:
    """Require deviations below a share of the largest number of each array, and return the largest.

    Single numbers may be small, because they are sums of large ones.
    """
    largest = 0.0
    for name, x, y in _pairs(found, expected):
        x, y = (z.astype(np.float64) for z in (x, y))
        scale = float(np.abs(y).max()) or 1.0
        deviation = float(np.abs(x - y).max()) / scale
        # No comparison accepts NaN.
        require(deviation <= bound, f"{name}: deviates by {deviation:.1e}, more than {bound:.0e}")
        largest = max(largest, deviation)
    return f"within {largest:.1e} of at most {bound:.0e}"


def _pairs(found: Arrays, expected: Arrays) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    for name, x in found.items():
        y = expected[name]
        kinds = f"{name}: must be {y.dtype}{y.shape}; got {x.dtype}{x.shape}"
        require((x.dtype, x.shape) == (y.dtype, y.shape), kinds)
        yield name, x, y


def _bits(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x).view(f"uint{8 * x.dtype.itemsize}")


def require(condition: bool, message: str) -> None:
    """Raise a `WrongResultError` unless a condition holds."""
    if not condition:
        raise WrongResultError(message)
