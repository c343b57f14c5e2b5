"""The settings under which the code of a page runs, shared by the tests of all pages."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax
import torch


@contextlib.contextmanager
def as_a_reader() -> Iterator[None]:
    """Use the settings of a fresh interpreter, and restore PyTorch's generator afterwards."""
    with (
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        torch.random.fork_rng(),
    ):
        yield
