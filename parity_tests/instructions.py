"""The instruction sets that XLA and PyTorch use in this process.

oneDNN is not included, since it reports its instruction set only in the log of `ONEDNN_VERBOSE`.
"""

from __future__ import annotations

import functools
import platform

import jax
import numpy as np


@functools.cache
def float16_error() -> str:
    """Return the beginning of XLA's error if it cannot compile float16, as under SSE4.2.

    The rest of the message depends on the program. An empty string if there is no error.
    """
    try:
        jax.jit(lambda x: x.astype("float16"))(np.ones(8, np.float32))
    except jax.errors.JaxRuntimeError as error:
        return str(error).partition("{")[0]
    return ""


# The product of this number with itself is not a float32, and has other bits fused with a sum.
_ROUGH = np.float32(1 + 2**-12)


@functools.cache
def xla_fuses() -> bool:
    """Return whether XLA contracts a product and a sum, which it does if the CPU has FMA."""
    return bool(jax.jit(lambda x: x * x - x)(_ROUGH) != _ROUGH * _ROUGH - _ROUGH)


@functools.cache
def fuse_alike() -> bool:
    """Return whether both frameworks fuse products with sums, or neither does.

    SGD and Rprop promise equal bits only then.
    """
    import torch

    x = torch.full((64,), float(_ROUGH))
    sums = torch.add(-x, x, alpha=float(_ROUGH)).numpy()
    return bool((sums != _ROUGH * _ROUGH - _ROUGH).any()) == xla_fuses()


def levels() -> dict[str, str]:
    """Return the instruction set of each framework, in PyTorch's names, where it can be read.

    Empty on CPUs other than x86, and without XLA before JAX 0.10, whose programs cannot be
    serialized.
    """
    import torch

    if platform.machine() not in ("x86_64", "AMD64"):
        return {}
    found = {"torch": torch.backends.cpu.get_cpu_capability().lower()}
    # A compiled program contains the features of the CPU that it was compiled for.
    program = jax.jit(lambda x: x + 1).lower(np.float32(0)).compile().runtime_executable()
    if serialize := getattr(program, "serialize", None):
        features, names = serialize(), {"avx512": b"+avx512f", "avx2": b"+avx2"}
        found["xla"] = next((name for name, it in names.items() if it in features), "default")
    return found


def require(expected: dict[str, str]) -> None:
    """Check the instruction sets of this process, where they can be read.

    Raises:
        RuntimeError: PyTorch or XLA uses another one.
    """
    for name, level in levels().items():
        if level != expected[name]:
            raise RuntimeError(
                f"{name} must use {expected[name]}; got {level}. Check that this version reads its "
                "environment variable."
            )
