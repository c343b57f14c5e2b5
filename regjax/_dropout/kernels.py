"""Limits of kernels: the platform, the mesh, and the derivatives."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jax.sharding import AxisType

if TYPE_CHECKING:
    from jaxtyping import Array

# The platform of a program is known when it is lowered, not when it is traced: a program for GPUs
# may be compiled on a machine without any.
_requires_cuda = Primitive("regjax_requires_cuda")
_requires_cuda.def_abstract_eval(lambda x: x)
_requires_cuda.def_impl(lambda x: jax.jit(_requires_cuda.bind)(x))
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


def check_mesh(implementation: str) -> None:
    """Reject a mesh with axes among which XLA divides arrays, as it cannot divide a kernel."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_types, mesh.axis_sizes, strict=True)
    if any(kind == AxisType.Auto and size > 1 for kind, size in kinds):
        raise ValueError(
            "implementation must be 'xla' on a mesh with automatic axes, among which XLA cannot "
            f"divide a kernel; got {implementation!r} on {mesh}. Use explicit axes, or "
            "jax.shard_map."
        )
