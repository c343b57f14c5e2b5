"""The calls of a converted model's modules.

Each module has a `Site`, whose hooks record when its forward begins and ends. The outermost module
enters the mode in which draws have keys.
"""

from __future__ import annotations

import functools
import sys
from collections import OrderedDict
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch._guards import TracingContext
from torch.utils._pytree import tree_leaves

from regtorch.keyed.generators import torch_state
from regtorch.keyed.mode import KeyedMode, active_mode, remove_mode
from regtorch.keyed.state import Call, State, error_of_graph

# Modules that can run as one fused kernel in evaluation, but not while a mode is active.
_FUSED = (nn.MultiheadAttention, nn.TransformerEncoder, nn.TransformerEncoderLayer)
_CALL_PARTS = [c for c in nn.Module._call_impl.__code__.co_consts if isinstance(c, CodeType)]


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
                raise error_of_graph(f"module {self.name!r}")
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
