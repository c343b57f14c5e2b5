"""Both packages behind one interface, so that one table of cases and one test body serve both.

A `Framework` takes and returns NumPy arrays, so that tests compare the values that a user would
see. `traced` hides the one real difference: JAX passes a changing value as a tracer, PyTorch as a
tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

import regjax
from regshared.extras import needs

with needs("parity_tests", extra="torch", package="torch"):
    import torch
with needs("parity_tests", extra="torch", package="regtorch"):
    import regtorch

_EIGHT_BIT = {
    np.dtype(ml_dtypes.float8_e4m3fn): torch.float8_e4m3fn,
    np.dtype(ml_dtypes.float8_e5m2): torch.float8_e5m2,
}
_SIXTEEN_BIT = {np.dtype(ml_dtypes.bfloat16): torch.bfloat16}


@dataclass(frozen=True)
class Framework:
    """A framework and its package.

    Attributes:
        name: `"jax"` or `"torch"`.
        library: The package, `regjax` or `regtorch`.
        key: Makes a key from a seed.
        words: Returns a key's two words, as integers.
        array: Converts a NumPy array to the framework's own, of the same dtype.
        numpy: Converts it back.
        traced: `traced(f)(value)` calls `f` with a tracer in JAX and a tensor in PyTorch.
        vjp: `vjp(f, x, cotangent)` is `(f(x), gradient)` on the framework's own arrays.
    """

    name: str
    library: ModuleType
    key: Callable[[int], Any]
    words: Callable[[Any], tuple[int, ...]]
    array: Callable[[np.ndarray], Any]
    numpy: Callable[[Any], np.ndarray]
    traced: Callable[[Callable[[Any], Any]], Callable[[Any], Any]]
    vjp: Callable[[Callable[[Any], Any], Any, Any], tuple[Any, Any]]

    def dropout(self, x: np.ndarray, rate: Any, *, seed: int = 0, **options: Any) -> np.ndarray:
        """Apply the package's dropout, from NumPy to NumPy, with the key of a seed."""
        options.setdefault("key", self.key(seed))
        return self.numpy(self.library.dropout(self.array(x), rate, **options))

    def bernoulli(self, seed: int, keep_prob: Any, shape: tuple[int, ...]) -> np.ndarray:
        """Return the package's keep mask for the key of a seed."""
        return self.numpy(self.library.bernoulli(self.key(seed), keep_prob, shape))

    def __str__(self) -> str:
        return self.name


def to_torch(array: np.ndarray) -> torch.Tensor:
    """Convert a NumPy array to a tensor of the same dtype, including the small floating types."""
    array = np.array(array)  # a copy, since torch needs writable memory
    for types, words in ((_EIGHT_BIT, np.uint8), (_SIXTEEN_BIT, np.uint16)):
        if array.dtype in types:
            return torch.from_numpy(array.view(words)).view(types[array.dtype])
    return torch.from_numpy(array)


def from_torch(tensor: torch.Tensor) -> np.ndarray:
    """Convert a tensor to a NumPy array of the same dtype, including the small floating types."""
    tensor = tensor.detach().cpu().contiguous()
    for types, words in ((_EIGHT_BIT, torch.uint8), (_SIXTEEN_BIT, torch.uint16)):
        for small, dtype in types.items():
            if tensor.dtype == dtype:
                return tensor.view(words).numpy().view(small)
    return tensor.numpy()


def _jax_traced(f: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: jax.jit(f)(jnp.asarray(value))


def _jax_vjp(f: Callable[[Any], Any], x: Any, cotangent: Any) -> tuple[Any, Any]:
    y, pull_back = jax.vjp(f, x)
    return y, pull_back(cotangent)[0]


def _torch_traced(f: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: f(torch.tensor(value))


def _torch_vjp(f: Callable[[Any], Any], x: Any, cotangent: Any) -> tuple[Any, Any]:
    x = x.detach().requires_grad_()
    y = f(x)
    return y, torch.autograd.grad(y, x, cotangent)[0]


JAX = Framework(
    name="jax",
    library=regjax,
    key=jax.random.key,
    words=lambda key: tuple(int(word) for word in jax.random.key_data(key)),
    array=jnp.asarray,
    numpy=np.asarray,
    traced=_jax_traced,
    vjp=_jax_vjp,
)
TORCH = Framework(
    name="torch",
    library=regtorch,
    key=regtorch.key,
    words=lambda key: tuple(key.tolist()),
    array=to_torch,
    numpy=from_torch,
    traced=_torch_traced,
    vjp=_torch_vjp,
)
FRAMEWORKS = (JAX, TORCH)
