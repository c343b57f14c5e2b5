"""The calls of a converted model's modules, and the keys of the draws within them.

Each module has a `Site`, whose hooks record when its forward begins and ends. The outermost module
enters a mode, in which a function of PyTorch that draws is replaced by one with a key.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import sys
from collections import OrderedDict
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch._guards import TracingContext
from torch._ops import OpOverload, OpOverloadPacket
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_leaves

from regtorch._random.events import observer
from regtorch._random.keys import site_words
from regtorch.keyed.functions import REPLACEMENTS, composite
from regtorch.keyed.generators import is_default, python_state, torch_state

# Modules that can run as one fused kernel in evaluation, but not while a mode is active.
_FUSED = (nn.MultiheadAttention, nn.TransformerEncoder, nn.TransformerEncoderLayer)
_CALL_PARTS = [c for c in nn.Module._call_impl.__code__.co_consts if isinstance(c, CodeType)]
_REENTRANT = torch.utils.checkpoint.CheckpointFunction.forward.__code__
_NON_REENTRANT = inspect.unwrap(torch.utils.checkpoint.checkpoint).__code__


@dataclasses.dataclass
class Keys:
    """The state from which the next keys are derived.

    Attributes:
        root: The two words of the root key; None before the first `set_key`.
        step: The step of training.
        counts: The number of draws of each name since `set_key`.
        repeats: Whether the draws of a forward pass are repeated, from the counts before it.
    """

    root: tuple[int, int] | None = None
    step: int = 0
    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    repeats: bool = False

    def repeat(self) -> Keys:
        """Return a copy that repeats the draws from here on."""
        return dataclasses.replace(self, counts=dict(self.counts), repeats=True)

    def draw(self, name: str, device: torch.device) -> Tensor:
        """Return the key of the next draw of a name: of `name`, then of `name#1`, `name#2`, ….

        It is an error if no key was set, or if an unknown checkpoint repeats one of several draws.
        """
        if self.root is None:
            raise ValueError(
                f"site {name!r} must have a key in training; got None. Call "
                "regtorch.keyed.set_key(model, root, step) before each step, or model.eval() to "
                "evaluate."
            )
        if torch._C._is_tracing():
            raise _error_of_graph(f"site {name!r}")
        count = self.counts.get(name, 0)
        # A forward inside a backward pass (id other than -1) is a checkpoint's, run again.
        if torch._C._current_graph_task_id() != -1 and not self.repeats:
            if count != 1:
                raise RuntimeError(
                    f"site {name!r} must be called once after set_key, so that a checkpoint "
                    f"can repeat the call; got {count} calls. Pass context_fn=lambda: "
                    "regtorch.keyed.replay(model) and use_reentrant=False to "
                    "torch.utils.checkpoint.checkpoint, and call set_key after the backward pass."
                )
            count = 0
        else:
            self.counts[name] = count + 1
        words = site_words(self.root, self.step, f"{name}#{count}" if count else name)
        return torch.tensor(words, dtype=torch.uint32, device=device)


@dataclasses.dataclass
class State:
    """The state that all sites of a converted model share.

    Attributes:
        keys: The keys of the current step.
        drawn: The names that drew since `convert`, in order, each with the name of its site.
        checked: The sites whose call in training was observed function by function.
        suspended: The calls of fused modules, with the mode that they suspend.
        allowed: The generators, other than PyTorch's, whose draws are no error.
        compared: How often the root was compared with that of another rank.
        method: The running method of a module, the generator's state after its latest call of
            another module, and the name of that one; None if no first call was made by a method.
        classes: The classes of the modules.
    """

    keys: Keys = dataclasses.field(default_factory=Keys)
    drawn: dict[str, str] = dataclasses.field(default_factory=dict)
    checked: set[str] = dataclasses.field(default_factory=set)
    suspended: list[tuple[Call, KeyedMode]] = dataclasses.field(default_factory=list)
    allowed: set[str] = dataclasses.field(default_factory=set)
    compared: int = 0
    method: tuple[FrameType, Any, str] | None = None
    classes: frozenset[type[nn.Module]] = frozenset()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what cannot be copied, and what the next `set_key` adds."""
        return vars(self) | {"method": None, "classes": frozenset()}


@dataclasses.dataclass
class Call:
    """A running call of a module.

    Attributes:
        site: The site of the module.
        module: The module.
        frame: Its Python frame.
        enters: Whether it entered the mode itself, as the outermost call.
        is_first: Whether it is in training, and no call around it is.
        method: The frame of a converted module's method that runs it, outside of any forward.
        draws: The number of draws of each name in this call.
    """

    site: Site
    module: nn.Module
    frame: FrameType | None
    enters: bool = False
    is_first: bool = False
    method: FrameType | None = None
    draws: dict[str, int] = dataclasses.field(default_factory=dict)


class Site:
    """A module of a converted model: the name of its draws, and the hooks around its forward.

    Attributes:
        name: The path of the module in the model, for `regtorch.site_key`.
        state: The state that all sites of the model share.
    """

    def __init__(self, name: str, state: Any) -> None:
        self.name = name
        self.state: State = state

    def __repr__(self) -> str:
        return f"Site({self.name!r})"

    def attach(self, module: nn.Module) -> None:
        """Add the hooks to a module."""
        if not module._forward_hooks and not module._forward_pre_hooks:
            module._forward_hooks, module._forward_pre_hooks = _Hooks(), _Hooks()
        module.register_forward_pre_hook(self._begin)
        module.register_forward_hook(self._end, always_call=True)
        self.enclose(module)

    def enclose(self, module: nn.Module) -> None:
        """Move the hooks around those of the user, whose draws then belong to the module."""
        hooks: Any
        for hooks, last in ((module._forward_pre_hooks, False), (module._forward_hooks, True)):
            order = reversed(hooks) if last else iter(hooks)
            if _site_of_hook(hooks[next(order)]) is not self:
                own = next(n for n, hook in hooks.items() if _site_of_hook(hook) is self)
                hooks.move_to_end(own, last=last)

    def detach(self, module: Any) -> None:
        """Remove the hooks from a module."""
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for number in [n for n, hook in hooks.items() if _site_of_hook(hook) is self]:
                del hooks[number]
                module._forward_hooks_always_called.pop(number, None)
        if not module._forward_hooks and not module._forward_pre_hooks:
            module._forward_hooks, module._forward_pre_hooks = OrderedDict(), OrderedDict()

    @_disable_dynamo
    def _begin(self, module: nn.Module, args: Any) -> None:
        if "_is_replica" in vars(module):
            raise RuntimeError(
                f"module {self.name!r} must not be a replica of torch.nn.DataParallel, whose "
                "devices would share the masks; got one. Use "
                "torch.nn.parallel.DistributedDataParallel."
            )
        call = Call(self, module, _module_frame()[0])
        mode = active_mode(self.state)
        if isinstance(module, _FUSED) and not module.training:
            if mode is None:
                return
            if mode is torch.overrides._get_current_function_mode():
                self.state.suspended.append((call, mode))
                torch.overrides._pop_mode()
                return
        if mode is None and torch.compiler.is_exporting():
            # Without a mode: the exporter leaves out the hook that would remove it after an error.
            if any(part.training for part in module.modules()):
                raise _error_of_graph(f"module {self.name!r}")
            return
        if mode is None:
            if module.training and self.name not in self.state.checked:
                call.method = self._method(call.frame)
            mode = KeyedMode(self.state)
            call.enters = True
            mode.__enter__()
        elif mode.watches and mode.calls and mode.calls[-1].module.training:
            mode.check(mode.calls[-1].site.name)
        if module.training and not any(outer.module.training for outer in mode.calls):
            call.is_first = True
            mode.watches = self.name not in self.state.checked
            if not call.enters:
                mode.remember()
        mode.calls.append(call)

    def _method(self, frame: FrameType | None) -> FrameType | None:
        """Return the method of a converted module that runs a call, or None.

        A method such as `encode`, called without a forward around it, draws without a key. It is an
        error if a generator moved since the method's latest call of a module.
        """
        classes = {base for kind in self.state.classes for base in kind.__mro__} - {nn.Module}
        while frame := frame.f_back if frame else None:
            code = frame.f_code
            functions = (vars(kind).get(code.co_name) for kind in classes)
            if all(getattr(function, "__code__", None) is not code for function in functions):
                continue
            method, before, latest = self.state.method or (None, None, "")
            if method is frame and torch_state() != before:
                self.state.checked.discard(latest)
                raise RuntimeError(
                    f"{code.co_qualname} must draw within a forward; got a draw from PyTorch's "
                    f"generator between modules {latest!r} and {self.name!r}, outside of one. "
                    "Convert a module whose forward calls the method, or pass a generator of your "
                    "own."
                )
            return frame
        return None

    @_disable_dynamo
    def _end(self, module: nn.Module, args: Any, result: Any) -> None:
        frame, failed = _module_frame()
        suspended = self.state.suspended
        if suspended and suspended[-1][0].frame is frame:
            torch.overrides._push_mode(suspended.pop()[1])
            return
        mode = active_mode(self.state)
        # Without its call, a hook before `_begin` failed, or the mode was discarded.
        if mode is None or frame not in [call.frame for call in mode.calls]:
            return
        while (call := mode.calls.pop()).frame is not frame:
            pass
        if call.enters:
            remove_mode(mode)
        if module.training and not failed and (call.is_first or mode.watches):
            mode.check(self.name)
            if call.is_first:
                self.state.checked.add(self.name)
                self._watch_backward(result)
            if call.method:
                self.state.method = call.method, torch_state(), self.name

    def _watch_backward(self, result: Any) -> None:
        """Make it an error if a generator moves in the backward pass from a result."""
        nodes = {x.grad_fn for x in tree_leaves(result) if isinstance(x, Tensor) and x.grad_fn}
        running: set[int] = set()

        def begin(*grads: Any) -> None:
            task = torch._C._current_graph_task_id()
            if task not in running:
                running.add(task)
                callback = functools.partial(end, task, torch_state())
                torch.autograd.Variable._execution_engine.queue_callback(callback)

        def end(task: int, before: Any) -> None:
            running.discard(task)
            if torch_state() != before:
                raise RuntimeError(
                    f"module {self.name!r} must draw in its forward; got a draw from PyTorch's "
                    "generator in the backward pass, as by a torch.autograd.Function or a hook of "
                    "a gradient. Draw in the forward and keep the values, or pass a generator of "
                    "your own."
                )

        for node in nodes:
            node.register_prehook(begin)


def _error_of_graph(place: str) -> RuntimeError:
    return RuntimeError(
        f"{place} must not draw while a graph is traced or exported, which would keep the mask as "
        "a constant; got training. Call model.eval() or regtorch.keyed.revert(model) first."
    )


def _module_frame() -> tuple[FrameType, bool]:
    """Return the frame of `Module._call_impl` that runs a hook, and whether its forward failed.

    It calls hooks directly after an error, and otherwise from a nested function.
    """
    inside: FrameType | None = None
    frame: Any = sys._getframe(1)
    while frame.f_code is not nn.Module._call_impl.__code__:
        inside, frame = frame, frame.f_back
    return frame, inside is None or inside.f_code not in _CALL_PARTS


class _Hooks(OrderedDict[int, Callable[..., Any]]):
    """The hooks of a module, with a length that excludes those of its site.

    `TransformerEncoderLayer` counts hooks: with any, it does not run as one fused kernel. A
    compiler counts them too, and must not overlook any.
    """

    def __len__(self) -> int:
        if TracingContext.try_get() is not None:
            return super().__len__()
        return sum(_site_of_hook(hook) is None for hook in self.values())

    def __bool__(self) -> bool:
        return super().__len__() > 0


def _site_of_hook(hook: Any) -> Site | None:
    owner = getattr(hook, "__self__", None)
    return owner if isinstance(owner, Site) else None


def site_of(module: nn.Module) -> Site | None:
    """Return the site of a module, or None if it is not converted."""
    return next(filter(None, map(_site_of_hook, module._forward_pre_hooks.values())), None)


def states_of(model: nn.Module) -> list[State]:
    """Return the states of a model's sites: one, unless its parts were converted separately."""
    found = {id(site.state): site.state for site in map(site_of, model.modules()) if site}
    return list(found.values())


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
        self.remember()

    def remember(self) -> None:
        """Note the states of the generators, which must not change until the next check."""
        self._torch, self._python = torch_state(), python_state()

    def key(self, device: torch.device, part: str = "", *, is_mask: bool = True) -> Tensor:
        """Return the key of the next draw in the innermost call, or in a part of its module.

        With `is_mask=False` it is not the key of a mask, and observers expect none.
        """
        call, name = self.calls[-1], self._name(part)
        number = call.draws.get(name, 0)
        call.draws[name] = number + 1
        name = f"{name}:{number}" if number else name
        key = (self._keys or self.state.keys).draw(name, device)
        self.state.drawn.setdefault(name, call.site.name)
        if not is_mask and (observers := observer()):
            observers.idle(name)
        return key

    def idle(self) -> None:
        """Report a function that was called in training at rate 0."""
        if observers := observer():
            observers.idle(self._name(""))

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a function of PyTorch that is written in Python, with its own calls in the mode."""
        with self:
            return composite(function)(*args, **kwargs)

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
