"""Limits of the kernels for NVIDIA GPUs: the platform, and the derivatives."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

if TYPE_CHECKING:
    from jaxtyping import Array

# The platform of a program is known when it is lowered, not when it is traced: a program for GPUs
# may be compiled on a machine without any.
_requires_cuda = Primitive("regjax_requires_cuda")
_requires_cuda.def_abstract_eval(lambda x: x)
_requires_cuda.def_impl(lambda x: jax.jit(_requires_cuda.bind)(x))
ad.deflinear2(_requires_cuda, lambda cotangent, _: [cotangent])
batching.defvectorized(_requires_cuda)


def _reject(context: Any, x: Any) -> Any:
    raise NotImplementedError(
        "implementation must be 'xla' or None on this platform; got 'triton', whose kernels run on "
        "NVIDIA GPUs only. Omit implementation."
    )


mlir.register_lowering(_requires_cuda, _reject)
mlir.register_lowering(_requires_cuda, lambda context, x: [x], platform="cuda")


def requires_cuda(x: Array) -> Array:
    """Return `x`; where a program with it is compiled for another platform, raise an error.

    Raises:
        NotImplementedError: When the program is lowered.
    """
    return _requires_cuda.bind(x)


@contextlib.contextmanager
def reverse_mode_only() -> Iterator[None]:
    """Replace JAX's error about forward-mode derivatives of a `custom_vjp`."""
    try:
        yield
    except TypeError as error:
        if "forward-mode" not in str(error):
            raise
        raise TypeError(
            "implementation must be 'xla' for forward-mode derivatives; got 'triton', whose "
            "kernels have reverse-mode derivatives only."
        ) from error
