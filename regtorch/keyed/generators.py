"""Detect draws from hidden generators: PyTorch's on the CPU and on CUDA, NumPy's and Python's."""

from __future__ import annotations

import ctypes
import random
import sys
from typing import Any

import torch


def torch_state() -> tuple[Any, ...]:
    """Return a value that changes when anything draws from PyTorch's default generators."""
    state = torch.default_generator.get_state()
    # A hundred times faster than a comparison of tensors, and no torch function is called.
    return ctypes.string_at(state.data_ptr(), state.nbytes), _cuda_offsets()


def is_default(generator: torch.Generator) -> bool:
    """Return whether a generator is one of PyTorch's default generators."""
    defaults = (torch.default_generator, *torch.cuda.default_generators)
    return any(generator is default for default in defaults)


def _cuda_offsets() -> tuple[int, ...]:
    if not torch.cuda.is_initialized() or torch.cuda.is_current_stream_capturing():
        return ()
    generators = torch.cuda.default_generators
    return tuple([x for g in generators for x in (g.initial_seed(), g.get_offset())])


def python_state() -> dict[str, Any]:
    """Return a value for each module whose global generator's draws change it."""
    states: dict[str, Any] = {"random": random.getstate()}
    if numpy := sys.modules.get("numpy.random.mtrand"):
        generator = numpy._rand._bit_generator
        name = type(generator).__name__
        # The state's own memory: reading it as a dict would take longer than a small layer.
        states["numpy.random"] = (
            ctypes.string_at(generator.ctypes.state_address, 2500)
            if name == "MT19937"
            else repr(generator.state)
        )
    return states
