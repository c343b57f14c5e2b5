"""Cases that the tests of several functions share, and how each compares both frameworks.

There is one table for each topic: dtypes in `FLOATS`, dropout rates in `RATES`, keep probabilities
in `KEEP_PROBS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from parity_tests.frameworks import FRAMEWORKS, Framework

both_frameworks = pytest.mark.parametrize("framework", FRAMEWORKS, ids=str)

FLOATS = [np.dtype(dtype) for dtype in (np.float32, np.float64, ml_dtypes.bfloat16, np.float16)]
# No rate but 0.5 is exact, and 1 - 0.123 rounds to another float32 than in double.
RATES = (0.1, 0.123, 0.5, 0.9)
# Both ends, the smallest normal float32 and its neighbor, and both sides of the grid of 2**-23.
SMALLEST = 2.0**-126
KEEP_PROBS = [0.0, 1e-45, float(np.nextafter(np.float32(SMALLEST), np.float32(0))), SMALLEST]
KEEP_PROBS += [1e-9, 2.0**-24, 2.0**-23, 0.123, 0.5, 0.9, 1 - 2.0**-24, 1.0]


def inputs(shape: tuple[int, ...], dtype: Any = np.float32) -> tuple[np.ndarray, np.ndarray]:
    """Return an array and a cotangent, normally distributed.

    Example:
        >>> x, cotangent = inputs((2, 3), np.float64)
        >>> x.shape, cotangent.dtype
        ((2, 3), dtype('float64'))
    """
    rng = np.random.default_rng(0)
    x, cotangent = (rng.normal(size=shape).astype(dtype) for _ in range(2))
    return x, cotangent


def vjp(
    framework: Framework,
    function: Callable[[Any, Any], Any],
    rate: Any,
    x: np.ndarray,
    cotangent: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Return `function(x, rate)` and its gradient, from NumPy to NumPy.

    A NumPy scalar as the rate is traced.

    Example:
        >>> from parity_tests.frameworks import JAX
        >>> _, gradient = vjp(JAX, lambda x, rate: x * rate, 3.0, *inputs((2,)))
        >>> gradient.shape
        (2,)
    """

    def at(rate: Any) -> Any:
        return framework.vjp(
            lambda x: function(x, rate), framework.array(x), framework.array(cotangent)
        )

    y, gradient = framework.traced(at)(rate) if isinstance(rate, np.generic) else at(rate)
    return framework.numpy(y), framework.numpy(gradient)


def words(array: np.ndarray) -> np.ndarray:
    """Return the bits of an array as unsigned integers; of a complex number, both parts.

    Example:
        >>> hex(words(np.array([1.0]))[0])
        '0x3ff0000000000000'
    """
    parts = 2 if array.dtype.kind == "c" else 1
    return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize // parts}")


def assert_same_bits(
    dtype: np.dtype, actual: Iterable[np.ndarray], expected: Iterable[np.ndarray]
) -> None:
    """Assert that arrays of a dtype are bitwise identical, pair by pair.

    Example:
        >>> assert_same_bits(np.dtype(float), [np.zeros(2)], [np.zeros(2)])
    """
    for array, twin in zip(actual, expected, strict=True):
        assert array.dtype == twin.dtype == dtype
        np.testing.assert_array_equal(words(array), words(twin), strict=True)
