"""Draws of a PyTorch model from PyTorch's own generator, seen from outside.

The model stays as it is. A mode that sees every operation of PyTorch compares the state of the
generator before and after those that may draw, and hooks on all modules give their paths.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode

from parity_tests.frameworks import from_torch
from regjax.interop._leaves import plain_name, unwrapped
from regjax.torch_random.mt19937 import SIZE
from regjax.torch_random.state import read_fields
from regshared.checks import describe

_MASK = torch.ops.aten.bernoulli_.float
_PRODUCTS = (torch.ops.aten.mul.Tensor, torch.ops.aten.mul_.Tensor)
OUTSIDE = "(outside the model)"


@dataclasses.dataclass
class SeededDraw:
    """An operation that drew from the generator, or a dropout that could have and did not.

    Attributes:
        site: The path of the innermost module.
        function: The operation of PyTorch, such as `"bernoulli_"`.
        shape: The shape of its result.
        key: The two words of the stream that came next.
        memory_order: The axes of the result from the outermost to the innermost in memory.
        rate: The dropout rate, if it drew a mask.
        mask: The mask, True where kept; None if it drew numbers.
        entering: The values that the mask multiplied, if it did.
        idle: Whether it drew nothing: a dropout of rate 0 or 1.
    """

    site: str
    function: str
    shape: tuple[int, ...]
    key: tuple[int, int]
    memory_order: tuple[int, ...] = ()
    rate: float | None = None
    mask: np.ndarray | None = None
    entering: np.ndarray | None = None
    idle: bool = False

    def __str__(self) -> str:
        """Return the operation and its place."""
        return f"{self.function} of shape {list(self.shape)} in '{self.site}'"


def check_generator(generator: Any) -> torch.Generator:
    """Return a generator of PyTorch, for CPUs, whose state can be read."""
    if not isinstance(generator, torch.Generator):
        raise TypeError(
            f"generator must be a torch.Generator; got {describe(generator)}. Pass "
            "torch.default_generator, which torch.manual_seed seeds."
        )
    if generator.device.type != "cpu":
        raise ValueError(
            f"generator must be on the CPU; got one on {generator.device}. Compare on the CPU: "
            "numbers of other devices are not replayed."
        )
    return generator


def state_of(generator: torch.Generator) -> np.ndarray:
    """Return the bytes of the state."""
    return generator.get_state().numpy()


def state_of_seed(seed: int) -> np.ndarray:
    """Return the bytes of the state after `torch.manual_seed(seed)`."""
    return state_of(torch.Generator().manual_seed(seed))


def seed_of(state: np.ndarray) -> int:
    """Return the seed that the bytes of a state contain."""
    return int(read_fields(state)["seed"])


def words(state: np.ndarray, count: int) -> np.ndarray:
    """Return the next words of the stream from a state, which stays as it is."""
    fields, stream = read_fields(state), np.random.MT19937(0)
    # 0 is the position of a generator that was just seeded, whose first block is used up.
    place: Any = {"key": fields["words"].astype(np.uint32), "pos": int(fields["next"]) or SIZE}
    state_now: Any = {"bit_generator": "MT19937", "state": place}
    stream.state = state_now
    return stream.random_raw(count).astype(np.uint32)


def key_of(state: np.ndarray) -> tuple[int, int]:
    """Return the next two words, by which `regjax.observing` identifies a draw."""
    high, low = words(state, 2).tolist()
    return high, low


def paths_of(model: torch.nn.Module) -> dict[int, str]:
    """Return the path of each module of a model, by identity; that of the root is empty."""
    return {id(m): plain_name(name) for name, m in unwrapped(model).named_modules()}


@contextlib.contextmanager
def observing(
    path: Callable[[torch.nn.Module], str | None],
    generator: torch.Generator,
    record: Callable[[SeededDraw], None],
) -> Iterator[None]:
    """Pass `record` every draw from a generator, in order.

    Args:
        path: Return the path of a module that is entered. The root has none, and neither has a
            module that is not a part of the model.
        generator: The generator.
        record: Called with each draw.
    """
    stack: list[str] = []

    def enter(module: torch.nn.Module, args: Any) -> None:
        stack.append(path(module) or type(module).__name__)
        if isinstance(module, _DropoutNd) and module.training and module.p in (0, 1):
            shapes = [tuple(x.shape) for x in args if isinstance(x, torch.Tensor)]
            key = key_of(state_of(generator))
            record(
                SeededDraw(
                    stack[-1], "dropout", (*shapes, ())[0], key, rate=float(module.p), idle=True
                )
            )

    def leave(module: torch.nn.Module, args: Any, output: Any) -> None:
        del module, args, output
        stack.pop()

    hooks = (
        register_module_forward_pre_hook(enter),
        register_module_forward_hook(leave, always_call=True),
    )
    try:
        with _Mode(generator, record, lambda: stack[-1] if stack else OUTSIDE):
            yield
    finally:
        for hook in hooks:
            hook.remove()


class _Mode(TorchDispatchMode):
    """A mode that records the operations after which the generator has another state."""

    def __init__(
        self,
        generator: torch.Generator,
        record: Callable[[SeededDraw], None],
        site: Callable[[], str],
    ) -> None:
        super().__init__()
        self._generator, self._record, self._site = generator, record, site
        self._last: tuple[torch.Tensor, SeededDraw] | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _PRODUCTS and self._last and args[1] is self._last[0]:
            # Before the product, which may be in place.
            self._last[1].entering = from_torch(args[0]).copy()
            self._last = None
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **(kwargs or {}))
        before = state_of(self._generator)
        result = func(*args, **(kwargs or {}))
        if not np.array_equal(before, state_of(self._generator)):
            first = result[0] if isinstance(result, tuple) else result
            draw = _drawn(self._site(), func, first, key_of(before))
            if func is _MASK:
                keep_prob = args[1] if len(args) > 1 else 0.5
                draw.rate, draw.mask = 1 - keep_prob, from_torch(first) != 0
                self._last = first, draw
            self._record(draw)
        return result


def _drawn(site: str, func: Any, result: Any, key: tuple[int, int]) -> SeededDraw:
    function = func.overloadpacket.__name__
    if not isinstance(result, torch.Tensor):
        return SeededDraw(site, function, (), key)
    order = memory_order(result)
    return SeededDraw(site, function, tuple(result.shape), key, order)


def memory_order(tensor: torch.Tensor) -> tuple[int, ...]:
    """Return the axes from the outermost to the innermost; axes of size 1 stay in place.

    Example:
        >>> memory_order(torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last))
        (0, 2, 3, 1)
    """
    axes = range(tensor.ndim)
    if tensor.is_contiguous():
        return tuple(axes)
    return tuple(sorted(axes, key=lambda axis: -tensor.stride(axis)))
