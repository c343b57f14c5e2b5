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


def _requirement(implementation: str, platform: str, devices: str) -> Primitive:
    """Return an identity that is an error where a program with it is lowered for another platform.

    The platform is known then, not when the program is traced: it may be compiled on a machine
    without the device.
    """
    requires = Primitive(f"regjax_requires_{platform}")
    requires.def_abstract_eval(lambda x: x)
    requires.def_impl(lambda x: jax.jit(requires.bind)(x))
    batching.defvectorized(requires)

    def reject(context: Any, x: Any) -> Any:
        raise NotImplementedError(
            f"implementation must be 'xla' on this platform; got {implementation!r}, whose kernels "
            f"run on {devices} only. Pass implementation='xla'."
        )

    mlir.register_lowering(requires, reject)
    mlir.register_lowering(requires, lambda context, x: [x], platform=platform)
    return requires


_REQUIREMENTS = {
    "pallas": _requirement("pallas", "tpu", "TPUs"),
    "triton": _requirement("triton", "cuda", "NVIDIA GPUs"),
}


def require_platform(implementation: str, x: Array) -> Array:
    """Return `x`; where a program with it is compiled for another platform, raise an error.

    Raises:
        NotImplementedError: When the program is lowered.
    """
    return _REQUIREMENTS[implementation].bind(x)


@contextlib.contextmanager
def reverse_mode_only(implementation: str) -> Iterator[None]:
    """Replace JAX's error about forward-mode derivatives of a `custom_vjp`."""
    try:
        yield
    except TypeError as error:
        if "forward-mode" not in str(error):
            raise
        raise TypeError(
            "implementation must be 'xla' for forward-mode derivatives; got "
            f"{implementation!r}, whose kernels have reverse-mode derivatives only."
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
