"""Bounds of the harness: the size a difference is relative to, and gradients of rounding noise.

| quantity | deviation | size |
|---|---|---|
| loss | largest | absolute value, at least 1 |
| buffer | largest | largest element of the array, at least 1 |
| gradient, state | largest | largest element, at least 1 % of that of all arrays of the kind |
| update | root mean square | that of the update, at least 1 % of the largest of all arrays |
| parameter, average | largest | largest element, at least 1; in norm, that of all arrays |

The tier's tolerance is the bound of losses, buffers, parameters and averages. Gradients, updates
and states have a wider one, `Tier.relative`: they are relative to sizes that can be far below 1,
and a difference of the parameters within the tolerance changes them more.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from parity_tests import compare

if TYPE_CHECKING:
    from parity_tests.compare import Tier

    Arrays = Mapping[str, np.ndarray]

RELATIVE = ("gradient", "state", "update")
# Arrays below this share of the largest of their kind are compared on its scale: rounding errors of
# a gradient have the size of the terms of its sums, not of the result.
SHARE = 0.01
# Rounding errors of a difference of two parameters, and of sums, in units of eps.
ROUNDINGS = 16.0
# A gradient is noise below this multiple of eps, relative to the largest root mean square of the
# gradients of all parameters, if the sides disagree about it by more than DISAGREEMENT. A small
# gradient that is more than rounding errors agrees much better.
NOISE = 64.0
DISAGREEMENT = 0.01
# A few elements of a large model are noise in nearly every kernel, too many to list.
LISTED = 3


def bound_of(quantity: str, tier: Tier) -> float:
    """Return the largest deviation that passes.

    Example:
        >>> bound_of("loss", compare.FLOAT32), bound_of("update", compare.FLOAT32)
        (1e-05, 0.001)
    """
    if tier.tolerance is None:
        return 0.0
    return tier.relative_tolerance if quantity in RELATIVE else tier.tolerance


class Noise:
    """Elements of parameters whose gradient has been rounding noise since the first step.

    The gradient of a key's bias in attention, or of a bias before a batch norm, is zero: computed,
    it is a sum of rounding errors, and Adam divides it by its own size. The steps then have full
    size and a random sign, on each side another one. An element is noise from the first step at
    which its gradient is small on both sides and differs between them, if it was small at every
    step before. It stays noise, because its value keeps the random steps.

    Example:
        >>> import numpy as np
        >>> noise = Noise(eps=1e-7)
        >>> kernel = np.ones(2)
        >>> noise.update({"kernel": kernel, "bias": np.array([1e-8, 0.5])},
        ...              {"kernel": kernel, "bias": np.array([-1e-8, 0.5])})
        >>> noise.mask("bias")
        array([ True, False])
    """

    def __init__(self, eps: float) -> None:
        self._eps = eps
        self._small: dict[str, np.ndarray] = {}
        self._noise: dict[str, np.ndarray] = {}
        self.drift = 0.0

    def update(self, in_jax: Arrays, in_torch: Arrays) -> None:
        """Include the gradients of a step, or the first moments, which are averages of them."""
        largest = [max(map(_rms, arrays.values()), default=0.0) for arrays in (in_jax, in_torch)]
        limits = [NOISE * self._eps * size for size in largest]
        for name, left in in_jax.items():
            left, right = left.astype(np.float64), in_torch[name].astype(np.float64)
            sizes = np.abs(left), np.abs(right)
            small = (sizes[0] <= limits[0]) & (sizes[1] <= limits[1])
            small &= self._small.get(name, True)
            differs = np.abs(left - right) > DISAGREEMENT * np.maximum(*sizes)
            self._small[name] = small
            self._noise[name] = self._noise.get(name, False) | (small & differs)

    def follow(self, in_jax: Arrays, in_torch: Arrays) -> None:
        """Include the parameters: `drift` is the largest difference that noise has caused."""
        for name, noise in self._noise.items():
            apart = in_jax[name].astype(np.float64) - in_torch[name].astype(np.float64)
            self.drift = max(self.drift, _largest(apart[noise]))

    def covers(self, name: str) -> bool:
        """Return whether all elements of an array, such as `"exp_avg of bias"`, are noise."""
        mask = self.mask(name.rpartition(" of ")[2])
        return mask is not None and bool(mask.all())

    def mask(self, name: str) -> np.ndarray | None:
        """Return True for each element of a parameter that is noise; None if there is none."""
        noise = self._noise.get(name)
        return noise if noise is not None and noise.any() else None

    @property
    def note(self) -> str:
        """Return a sentence with the parameters that are noise; an empty string for none.

        Those without a verdict on any element are listed first, and a few of the others.
        """
        found = {name: noise for name, noise in self._noise.items() if noise.any()}
        if not found:
            return ""
        parts = [name for name, noise in found.items() if noise.all()]
        some = {n: np.count_nonzero(noise) for n, noise in found.items() if not noise.all()}
        for name in [*some][:LISTED]:
            parts.append(f"{name} ({some.pop(name)} of {found[name].size} elements)")
        if some:
            parts.append(f"{sum(some.values())} elements of {len(some)} others")
        return (
            f"Noise: {len(found)} {'parameter has' if len(found) == 1 else 'parameters have'} a "
            f"gradient of zero up to rounding, and no verdict: {', '.join(parts)}."
        )


def deviations(
    quantity: str,
    in_jax: Arrays,
    in_torch: Arrays,
    tier: Tier,
    bound: float,
    noise: Noise,
    params: Arrays = MappingProxyType({}),
) -> dict[str, float]:
    """Return the deviation of each array, relative to its size; 1.0 or 0.0 if bitwise.

    An update is the difference of two values of a parameter; `params` are its values, whose
    rounding is no deviation.
    """
    if tier.tolerance is None:
        return compare.deviations(in_jax, in_torch, tier)
    pairs = {
        name: _without_noise(array, in_torch[name], noise.mask(name.rpartition(" of ")[2]))
        for name, array in in_jax.items()
    }
    measure = _rms if quantity == "update" else _largest
    sizes = _sizes(quantity, {n: measure(right) for n, (_, right) in pairs.items()}, tier, bound)
    rounding = {name: ROUNDINGS * tier.stored_eps * _rms(p) for name, p in params.items()}
    with np.errstate(invalid="ignore", over="ignore"):
        return {
            name: measure(left - right) / (sizes[name] + _share(rounding.get(name, 0.0), bound))
            for name, (left, right) in pairs.items()
        }


def _sizes(
    quantity: str, measured: Mapping[str, float], tier: Tier, bound: float
) -> dict[str, float]:
    """Return the size that the deviation of each array is relative to."""
    if quantity in RELATIVE:
        alike: dict[str, list[float]] = {}
        for name, size in measured.items():
            alike.setdefault(name.rpartition(" of ")[0], []).append(size)
        share = max(SHARE, _share(ROUNDINGS * tier.eps, bound))
        least = {kind: share * max(sizes) for kind, sizes in alike.items()}
        return {n: max(size, least[n.rpartition(" of ")[0]]) or 1.0 for n, size in measured.items()}
    if tier.in_norm and quantity in ("parameter", "average"):
        return dict.fromkeys(measured, max(measured.values(), default=0.0) or 1.0)
    return {name: max(1.0, size) for name, size in measured.items()}


def _share(rounding: float, bound: float) -> float:
    """Return the size of which `bound` is the rounding."""
    return rounding / bound if bound else 0.0


def _without_noise(
    left: np.ndarray, right: np.ndarray, noise: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    left, right = left.astype(np.float64), right.astype(np.float64)
    if noise is None or noise.shape != left.shape:
        return left, right
    return left[~noise], right[~noise]


def _largest(array: np.ndarray) -> float:
    return float(np.abs(array).max(initial=0.0))


def _rms(array: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(array, dtype=np.float64)))) if array.size else 0.0
