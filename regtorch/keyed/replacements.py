"""The functions of PyTorch that have keys, each with its replacement.

A replacement has the arguments of its function after `draws`, which gives the keys. It returns
NotImplemented where the function would not draw, or not as known here: PyTorch's own then runs, and
it is an error if a generator moves.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from regtorch.keyed.examples import Layout


@runtime_checkable
class Draws(Protocol):
    """The source of keys for the draws of the innermost module."""

    def key(self, device: torch.device, part: str = "", *, is_mask: bool = True) -> Tensor:
        """Return the key of the next draw in the module, which cannot be drawn by example."""
        ...

    def mask(
        self,
        shape: Sequence[int],
        device: torch.device,
        part: str = "",
        *,
        layout: Layout | None = None,
    ) -> dict[str, Any]:
        """Return the arguments of the next draw of a mask, in the module or in a part of it.

        `layout` is that of the examples, where it is known.
        """
        ...

    def place(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the key of a draw of numbers for `x`, and their indices, or None for all."""
        ...

    def idle(self) -> None:
        """Report a function that was called in training at rate 0."""
        ...

    def run(
        self,
        function: Callable[..., Any],
        args: Any,
        options: Any,
        layout: Layout | None = None,
    ) -> Any:
        """Run a function of PyTorch that is written in Python, with keys for its own calls."""
        ...


@dataclasses.dataclass(frozen=True)
class Replacement:
    """A function with keys.

    Attributes:
        function: Called with a `Draws` and the arguments of the function that it replaces.
        in_evaluation: Whether it replaces also in modules in evaluation mode.
    """

    function: Callable[..., Any]
    in_evaluation: bool = False


REPLACEMENTS: dict[Any, Replacement] = {}
_F = TypeVar("_F", bound=Callable[..., Any])


def replaces(*functions: Any, in_evaluation: bool = False) -> Callable[[_F], _F]:
    """Add a replacement, called with the argument that PyTorch names `input` by position.

    For arguments that it does not take, wrong ones or a form unknown here, it is NotImplemented.
    """

    def add(replacement: _F) -> _F:
        takes = inspect.signature(replacement).bind

        def positional(draws: Draws, *args: Any, **options: Any) -> Any:
            if "input" in options:
                args = (options.pop("input"), *args)
            try:
                return replacement(draws, *args, **options)
            except TypeError:
                try:
                    takes(draws, *args, **options)
                except TypeError:
                    return NotImplemented
                raise

        for function in functions:
            REPLACEMENTS[function] = Replacement(positional, in_evaluation)
        return replacement

    return add
