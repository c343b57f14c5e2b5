"""The state of a converted model: its keys, and its running calls."""

from __future__ import annotations

import dataclasses
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from regtorch._random.keys import site_words

if TYPE_CHECKING:
    from regtorch.keyed.examples import Examples


@dataclasses.dataclass
class Keys:
    """The state from which the next keys are derived.

    Attributes:
        root: The two words of the root key; None before the first `set_key`.
        step: The step of training.
        examples: The examples of the batch; None if draws are for the whole batch.
        counts: The number of draws of each name since `set_key`.
        repeats: Whether the draws of a forward pass are repeated, from the counts before it.
    """

    root: tuple[int, int] | None = None
    step: int = 0
    examples: Examples | None = None
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
            raise error_of_graph(f"site {name!r}")
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
        batch_first: The sites that were seen to draw with the batch in the first dimension.
        number: The number of the model among those whose roots must be the same on all ranks.
        method: The running method of a module, the generator's state after its latest call of
            another module, and the name of that one; None if no first call was made by a method.
        classes: The classes of the modules.
    """

    keys: Keys = dataclasses.field(default_factory=Keys)
    drawn: dict[str, str] = dataclasses.field(default_factory=dict)
    checked: set[str] = dataclasses.field(default_factory=set)
    suspended: list[tuple[Call, TorchFunctionMode]] = dataclasses.field(default_factory=list)
    allowed: set[str] = dataclasses.field(default_factory=set)
    compared: int = 0
    batch_first: set[str] = dataclasses.field(default_factory=set)
    number: int | None = None
    method: tuple[FrameType, Any, str] | None = None
    classes: frozenset[type[nn.Module]] = frozenset()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what cannot be copied, and what the next `set_key` adds."""
        return vars(self) | {"method": None, "classes": frozenset(), "number": None}


@runtime_checkable
class Named(Protocol):
    """A site, of which its calls know the name only."""

    name: str


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

    site: Named
    module: nn.Module
    frame: FrameType | None
    enters: bool = False
    is_first: bool = False
    method: FrameType | None = None
    draws: dict[str, int] = dataclasses.field(default_factory=dict)


def error_of_graph(place: str) -> RuntimeError:
    """Return the error of a draw whose mask a graph would keep."""
    return RuntimeError(
        f"{place} must not draw while a graph is traced or exported, which would keep the mask as "
        "a constant; got training. Call model.eval() or regtorch.keyed.revert(model) first."
    )
