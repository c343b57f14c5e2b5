"""The mode in which a function of PyTorch that draws is replaced by one with a key."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor
from torch._compile import _disable_dynamo
from torch._ops import OpOverload, OpOverloadPacket
from torch.overrides import TorchFunctionMode, resolve_name

import regtorch.keyed.dropouts
import regtorch.keyed.variates  # noqa: F401  both add to REPLACEMENTS, as composites do
from regtorch._random.bernoulli import bernoulli
from regtorch._random.events import observer
from regtorch.keyed.composites import composite
from regtorch.keyed.examples import Layout, Rows
from regtorch.keyed.generators import is_default, python_state, torch_state
from regtorch.keyed.replacements import REPLACEMENTS
from regtorch.keyed.state import Call, Keys, State

_REENTRANT = torch.utils.checkpoint.CheckpointFunction.forward.__code__
_NON_REENTRANT = inspect.unwrap(torch.utils.checkpoint.checkpoint).__code__


def active_mode(state: State) -> KeyedMode | None:
    """Return the innermost mode of this thread for a model, if there is one."""
    for place in reversed(range(torch._C._len_torch_function_stack())):
        mode = torch._C._get_function_stack_at(place)
        if isinstance(mode, KeyedMode) and mode.state is state:
            return mode
    return None


def remove_mode(mode: KeyedMode) -> None:
    """Leave a mode, wherever it is on this thread's stack of modes."""
    above = []
    while (top := torch.overrides._pop_mode()) is not mode:
        above.append(top)
    for other in reversed(above):
        torch.overrides._push_mode(other)


def discard_stale_modes() -> None:
    """Leave the modes that an interrupt (Ctrl-C) left entered."""
    for mode in torch.overrides._get_current_function_mode_stack():
        if isinstance(mode, KeyedMode) and not mode.repeats and not mode.locate():
            remove_mode(mode)


class KeyedMode(TorchFunctionMode):
    """The mode that gives keys to functions that draw, for the calls that run within it.

    Args:
        state: The state of the model.
        keys: The keys to use instead of the model's.
    """

    def __init__(self, state: State, keys: Keys | None = None) -> None:
        super().__init__()
        self.state = state
        self.calls: list[Call] = []
        self.watches = False
        self.repeats = keys is not None
        self._keys = keys
        self._layout: Layout | None = None
        self.remember()

    def remember(self) -> None:
        """Note the states of the generators, which must not change until the next check."""
        self._torch, self._python = torch_state(), python_state()

    def key(self, device: torch.device, part: str = "", *, is_mask: bool = True) -> Tensor:
        """Return the key of the next draw in the innermost call, or in a part of its module.

        It is an error if the draw must be by example. With `is_mask=False` it is not the key of a
        mask, and observers expect none.
        """
        key, name = self._next(device, part, is_mask=is_mask)
        examples = (self._keys or self.state.keys).examples
        if examples and not examples.is_shared(name):
            raise NotImplementedError(
                f"site {name!r} must draw by example; got a draw without a dimension of examples: "
                "a permutation, a packed sequence, or a function of regtorch.keyed.register. Pass "
                f"axis={{{name!r}: None}} to regtorch.keyed.set_key if the examples share the draw."
            )
        return key

    def mask(
        self,
        shape: Sequence[int],
        device: torch.device,
        part: str = "",
        *,
        layout: Layout | None = None,
    ) -> dict[str, Any]:
        """Return the arguments `key` and `sampler` of the next draw, a mask.

        `layout` is that of the examples, where it is known.
        """
        key, name = self._next(device, part)
        rows = self._rows(name, shape, layout)
        return {"key": key, "sampler": rows.sampler() if rows else bernoulli}

    def place(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the key of a draw of numbers for `x`, and their indices, or None for all.

        Observers expect no mask.
        """
        key, name = self._next(x.device, is_mask=False)
        rows = self._rows(name, x.shape, None)
        return key, rows.index(x.shape, x.device) if rows else None

    def _next(
        self, device: torch.device, part: str = "", *, is_mask: bool = True
    ) -> tuple[Tensor, str]:
        """Return the key and the name of the next draw."""
        call, name = self.calls[-1], self._name(part)
        number = call.draws.get(name, 0)
        call.draws[name] = number + 1
        name = f"{name}:{number}" if number else name
        key = (self._keys or self.state.keys).draw(name, device)
        self.state.drawn.setdefault(name, call.site.name)
        if not is_mask and (observers := observer()):
            observers.idle(name)
        return key, name

    def _rows(self, name: str, shape: Sequence[int], layout: Layout | None) -> Rows | None:
        examples = (self._keys or self.state.keys).examples
        if examples is None:
            return None
        return examples.rows(name, shape, layout or self._layout, self.state.batch_first)

    def idle(self) -> None:
        """Report a function that was called in training at rate 0."""
        if observers := observer():
            observers.idle(self._name(""))

    def run(
        self,
        function: Callable[..., Any],
        args: Any,
        options: Any,
        layout: Layout | None = None,
    ) -> Any:
        """Run a function of PyTorch that is written in Python, with its own calls in the mode.

        `layout` is that of the examples in its draws, where it is known.
        """
        before, self._layout = self._layout, layout
        try:
            with self:
                return composite(function)(*args, **options)
        finally:
            self._layout = before

    @_disable_dynamo
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        replacement = REPLACEMENTS.get(func)
        if replacement is None and not self.watches:
            return func(*args, **kwargs)
        if replacement is not None:
            if not self.locate():
                return func(*args, **kwargs)
            generator = kwargs.get("generator")
            if generator is not None and not is_default(generator):
                return func(*args, **kwargs)
            if self.calls[-1].module.training or replacement.in_evaluation:
                options = {n: v for n, v in kwargs.items() if n != "generator"}
                result = replacement.function(self, *args, **options)
                if result is not NotImplemented:
                    return result
        before = torch_state()
        result = func(*args, **kwargs)
        if before != (after := torch_state()) and self.locate():
            if self.calls[-1].module.training:
                self._raise_unkeyed(func)
            if before == self._torch:
                self._torch = after
        return result

    def check(self, name: str) -> None:
        """Raise if a global generator was used in the mode, while module `name` runs."""
        now = python_state()
        if torch_state() != self._torch:
            self.state.checked.discard(name)
            raise RuntimeError(
                f"module {name!r} must draw from keys; got a draw from PyTorch's generator, "
                + (
                    "not by a function of torch in its thread, but as in TorchScript, an "
                    "extension, another thread, or by torch.manual_seed. Turn its dropout off, or "
                    "replace the module."
                    if self.watches
                    else "which its first call did not make. Call it again: the next error names "
                    "the function."
                )
            )
        for source, state in self._python.items():
            if state != now.get(source) and source not in self.state.allowed:
                raise RuntimeError(
                    f"module {name!r} must draw from keys; got a draw from the global generator of "
                    f"{source}. Draw by torch.rand in its forward, turn off what draws, such as "
                    "layerdrop or SpecAugment, or convert with "
                    f"regtorch.keyed.convert(model, allow=[{source!r}]) if it does not matter."
                )

    def locate(self) -> bool:
        """Drop the calls that have ended; return whether any is running. Note its checkpoints."""
        frames: dict[FrameType | None, list[Call]] = {}
        for call in self.calls:
            frames.setdefault(call.frame, []).append(call)
        running: list[Call] = []
        checkpoints: list[tuple[FrameType, int]] = []
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            if frame in frames:
                running[:0] = frames[frame]
            elif frame.f_code is _REENTRANT or frame.f_code is _NON_REENTRANT:
                checkpoints.append((frame, len(running)))
            frame = frame.f_back
        self.calls[:] = running
        for frame, inside in checkpoints:
            self._note(frame, running[: len(running) - inside])
        return bool(running)

    def _note(self, frame: FrameType, outside: list[Call]) -> None:
        """Make a checkpoint repeat its function with the current keys, unless it already does."""
        if frame.f_code is _REENTRANT:
            holder, attribute = frame.f_locals["ctx"], "run_function"
        else:
            generator = frame.f_locals.get("gen")  # missing in the reentrant form
            suspended = generator and generator.gi_frame
            if not suspended or "new_frame" not in suspended.f_locals:
                return
            holder, attribute = suspended.f_locals["new_frame"], "recompute_fn"
        function = inner = getattr(holder, attribute)
        while isinstance(inner, _Repeated):
            if inner.state is self.state:
                return
            inner = inner.function
        keys = (self._keys or self.state.keys).repeat()
        setattr(holder, attribute, _Repeated(function, self.state, keys, _copied(outside)))

    def _name(self, part: str) -> str:
        return ".".join(filter(None, (self.calls[-1].site.name, part)))

    def _raise_unkeyed(self, func: Any) -> None:
        name = resolve_name(func) or getattr(func, "__qualname__", repr(func))
        # The names under which the function can be passed to `register`.
        name = name.replace("_VariableFunctionsClass.", "torch.")
        if isinstance(func, (OpOverload, OpOverloadPacket)):
            name = f"torch.ops.{name}"
        raise RuntimeError(
            f"module {self.calls[-1].site.name!r} must draw from keys; got a call of {name}, which "
            "draws from PyTorch's generator. Register a function with a key, "
            f"regtorch.keyed.register({name}, replacement), or pass a generator of your own."
        )


def _copied(calls: list[Call], frame: FrameType | None = None) -> list[Call]:
    """Return copies of calls; a frame that they kept would keep its tensors."""
    return [dataclasses.replace(call, frame=frame, draws=dict(call.draws)) for call in calls]


class _Repeated:
    """The function of a checkpoint, which draws the same keys whenever it runs again."""

    def __init__(
        self, function: Callable[..., Any], state: State, keys: Keys, calls: list[Call]
    ) -> None:
        self.function, self.state = function, state
        self._keys, self._calls = keys, calls

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        mode = KeyedMode(self.state, self._keys.repeat())
        mode.calls = _copied(self._calls, sys._getframe())
        try:
            with mode:
                return self.function(*args, **kwargs)
        finally:
            mode.calls.clear()  # this frame refers to the mode: a cycle that keeps tensors
