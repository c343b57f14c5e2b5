"""What XLA and PyTorch use of the CPU in this process. PyTorch is imported only where it is asked.

oneDNN is left out: it names its instruction set only in the log of `ONEDNN_VERBOSE`.
"""

from __future__ import annotations

import functools
import platform

import jax
import numpy as np


@functools.cache
def float16_error() -> str:
    """Return how XLA's error begins where it compiles no float16, as under SSE4.2; else nothing.

    The names that follow in the message are those of the one program.
    """
    try:
        jax.jit(lambda x: x.astype("float16"))(np.ones(8, np.float32))
    except jax.errors.JaxRuntimeError as error:
        return str(error).partition("{")[0]
    return ""


def levels() -> dict[str, str]:
    """Return the instruction set of each framework as PyTorch calls it, where it can be read.

    Nothing where the CPU is not an x86, and not that of XLA before JAX 0.10, where programs cannot
    be serialized.
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


def require(asked: dict[str, str]) -> None:
    """Check the instruction sets of this process, where they can be read.

    Raises:
        RuntimeError: PyTorch or XLA uses another one.
    """
    for name, level in levels().items():
        if level != asked[name]:
            raise RuntimeError(
                f"{name} must use {asked[name]}; got {level}. Its environment variable had no "
                "effect: check that this version still reads it."
            )
