"""An untouched PyTorch script that runs as `__main__`, observed from outside.

Global hooks of modules and optimizers, a mode that sees every operation, and wrappers of
`backward` and of the iterators of loaders record what the script does. It is ended after enough
steps.

The parameters after a step are read when anything else begins, such as the next batch: a script may
change them after `optimizer.step()`, for example clip them.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import random
import runpy
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.data.dataloader import _BaseDataLoaderIter

from parity_tests import seeded
from parity_tests.certify.errors import InputError, ProgramError
from parity_tests.certify.modules import Modules
from parity_tests.frameworks import from_torch
from parity_tests.recording import Drawn, masks_of, once
from parity_tests.seeded import SeededDraw
from parity_tests.sides import copied, named_buffers
from regjax.interop._leaves import named_tensors

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class ScriptStep:
    """A step of the optimizer.

    Attributes:
        losses: The values on which `backward` was called since the step before.
        batches: The indices of the batches that were taken with gradients enabled.
        draws: The draws from the default generator since the step before.
        state: The bytes of this generator's state when the optimizer had made its step.
        buffers: The buffers at that time.
        params: The parameters, after what else the script does to them.
    """

    losses: np.ndarray
    batches: Sequence[Any]
    draws: Sequence[SeededDraw]
    state: np.ndarray
    buffers: Arrays
    params: Arrays = dataclasses.field(default_factory=dict)

    @property
    def masks(self) -> list[Drawn]:
        """The masks, in the order of drawing."""
        return masks_of(self.draws)


@dataclasses.dataclass(frozen=True)
class ScriptRun:
    """A run of a script.

    Attributes:
        model: The module with the parameters.
        optimizer: The name of the optimizer's class.
        seed: The seed of the default generator at the first step.
        initial: The parameters before the first step.
        steps: The steps.
        has_loader: Whether batches came from a DataLoader.
        ended: Whether the script ended by itself.
        notes: Limits of the comparison, one sentence each.
    """

    model: torch.nn.Module
    optimizer: str
    seed: int
    initial: Arrays
    steps: Sequence[ScriptStep]
    has_loader: bool
    ended: bool
    notes: Sequence[str]


class _Stop(BaseException):
    """Ends a script; `except Exception` does not catch it."""


def run_script(
    path: Path,
    args: Sequence[str] = (),
    *,
    steps: int,
    seed: int | None = None,
    progress: Callable[[int], object] = lambda step: None,
) -> ScriptRun:
    """Run a script for some steps of its optimizer, and return what it did.

    Args:
        path: The file.
        args: Its command line.
        steps: The largest number of steps.
        seed: The seed of PyTorch's default generator, for a script that does not set it.
        progress: Called with the number of each completed step.

    Raises:
        InputError: The script raises an error, makes no step, or does what cannot be compared.
    """
    path = path.resolve()
    generators = _states_of_other_generators()
    unseeded = torch.seed()
    if seed is not None:
        torch.manual_seed(seed)
    observer = _Observer(path, steps, progress, unseeded, seed)
    with observer.observing(), _as_main(path, args):
        try:
            runpy.run_path(str(path), run_name="__main__")
            observer.settle()
        except _Stop:
            pass
        except SystemExit as end:
            if end.code not in (None, 0):
                # The code of argparse for a wrong command line.
                fix = "Pass the options of the script after --." if end.code == 2 else ""
                raise ProgramError(path, end, fix) from None
            with contextlib.suppress(_Stop):
                observer.settle()
        except Exception as error:
            raise ProgramError(path, error) from None
    notes = [
        f"The script uses {name}, whose numbers are not compared."
        for name, state in _states_of_other_generators().items()
        if state != generators[name]
    ]
    return observer.run(notes)


class _Observer:
    """What a script has done so far."""

    def __init__(
        self,
        path: Path,
        limit: int,
        progress: Callable[[int], object],
        unseeded: int,
        seed: int | None,
    ) -> None:
        self._path, self._limit, self._progress = path, limit, progress
        self._unseeded, self._seed = unseeded, seed
        self._modules = Modules()
        self._optimizer: Any = None
        self._model: Any = None
        self._initial: Arrays = {}
        self._steps: list[ScriptStep] = []
        self._open: ScriptStep | None = None
        self._problem = self._early = ""
        self._depth = 0
        self._losses: list[np.ndarray] = []
        self._draws: list[SeededDraw] = []
        self._batches: list[list[Any]] = []  # pairs of iterator and indices
        self._has_loader = False

    @contextlib.contextmanager
    def observing(self) -> Iterator[None]:
        """Observe what runs inside."""
        hooks = (
            register_optimizer_step_pre_hook(self._before_step),
            register_optimizer_step_post_hook(self._after_step),
        )
        queues: Any = weakref.WeakKeyDictionary()
        loaders = _BaseDataLoaderIter
        try:
            with (
                _wrapped(torch, "compile", lambda _: self._refuse_compilation),
                _wrapped(torch.autograd, "backward", self._backward),
                _wrapped(loaders, "_next_index", lambda next_: _queued(next_, queues)),
                _wrapped(loaders, "_reset", lambda reset: _emptied(reset, queues)),
                _wrapped(loaders, "__next__", lambda next_: self._taken(next_, queues)),
                seeded.observing(self._enter, torch.default_generator, self._draws_one),
            ):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def settle(self) -> None:
        """Complete the last step, as anything else begins; raise if the script is to end."""
        if self._open is not None:
            params = _copies(named_tensors(self._model))
            self._steps.append(dataclasses.replace(self._open, params=params))
            self._open = None
            self._progress(len(self._steps))
        if self._problem or len(self._steps) >= self._limit:
            raise _Stop

    def run(self, notes: Sequence[str]) -> ScriptRun:
        """Return the run after its end.

        Raises:
            InputError: The script did what cannot be compared, or made no step.
        """
        if self._problem:
            raise InputError(f"{self._path} must {self._problem}")
        if not self._steps:
            raise InputError(
                f"{self._path} must call the step of an optimizer of torch.optim when it runs as "
                "__main__; got no call. Pass the script's own options after --."
            )
        early = [f"The script draws before it sets a seed: {self._early}."] if self._early else []
        return ScriptRun(
            self._model,
            type(self._optimizer).__name__,
            seeded.seed_of(self._steps[0].state),
            self._initial,
            self._steps,
            self._has_loader,
            len(self._steps) < self._limit,
            [*notes, *early],
        )

    def _refuse(self, problem: str) -> NoReturn:
        self._problem = self._problem or problem
        raise _Stop

    def _refuse_compilation(self, *args: Any, **kwargs: Any) -> NoReturn:
        del args, kwargs
        self._refuse(
            "not call torch.compile, whose programs draw other masks, and are not compiled while "
            "they are observed; got a call."
        )

    def _enter(self, module: torch.nn.Module) -> str | None:
        self.settle()
        return self._modules.path(module)

    def _draws_one(self, draw: SeededDraw) -> None:
        if self._seed is None and not self._early and torch.initial_seed() == self._unseeded:
            self._early = str(draw)
        self._draws.append(draw)

    def _backward(self, backward: Callable[..., Any]) -> Callable[..., Any]:
        def observed(tensors: Any, *args: Any, **kwargs: Any) -> Any:
            if not self._depth:  # a checkpoint calls it inside
                self.settle()
                found = [tensors] if isinstance(tensors, torch.Tensor) else tensors
                self._losses += [from_torch(tensor).astype(np.float64).ravel() for tensor in found]
                for pair in self._batches:
                    pair[0] = None  # it has been used, even if its iterator is exhausted next
            self._depth += 1
            try:
                return backward(tensors, *args, **kwargs)
            finally:
                self._depth -= 1

        return observed

    def _taken(self, next_: Callable[[Any], Any], queues: Any) -> Callable[[Any], Any]:
        def observed(iterator: Any) -> Any:
            self.settle()
            try:
                data = next_(iterator)
            except StopIteration:
                # Batches without a backward pass, such as those of a test set.
                self._batches = [pair for pair in self._batches if pair[0] is not iterator]
                raise
            indices = queues[iterator].popleft()
            if torch.is_grad_enabled():
                self._has_loader = True
                self._batches.append([iterator, indices])
            return data

        return observed

    def _before_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self.settle()
        if kwargs.get("closure") is not None or any(each is not None for each in args[1:]):
            self._refuse(
                f"call step() without a closure; got one in {type(optimizer).__name__}. An "
                "optimizer that computes several losses in a step cannot be certified."
            )
        if self._optimizer is None:
            self._begin(optimizer)
        elif optimizer is not self._optimizer:
            names = ", ".join(type(each).__name__ for each in (self._optimizer, optimizer))
            self._refuse(f"train with one optimizer; got two: {names}.")

    def _begin(self, optimizer: Any) -> None:
        """Read the parameters before the first step."""
        tensors = [p for group in optimizer.param_groups for p in group["params"]]
        if devices := sorted({str(p.device) for p in tensors} - {"cpu"}):
            self._refuse(
                f"train on the CPU; got parameters on {', '.join(devices)}. Hide the others, as "
                "CUDA_VISIBLE_DEVICES= does."
            )
        is_unseeded = torch.initial_seed() == self._unseeded
        if self._seed is None and is_unseeded:
            self._refuse("call torch.manual_seed; got no call. Pass --seed.")
        if self._seed is not None and torch.initial_seed() != self._seed:
            self._refuse(
                f"not set a seed with --seed {self._seed}; got torch.manual_seed("
                f"{torch.initial_seed()}). Leave --seed out."
            )
        self._model = self._modules.owner(tensors)
        if self._model is None:
            self._refuse(
                "train parameters of one module; got an optimizer whose parameters no "
                "torch.nn.Module has all."
            )
        self._optimizer, self._initial = optimizer, _copies(named_tensors(self._model))

    def _after_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        del optimizer, args, kwargs
        self._open = ScriptStep(
            np.concatenate([np.zeros(0), *self._losses]),
            [indices for _, indices in self._batches],
            once(self._draws),
            seeded.state_of(torch.default_generator),
            _copies(named_buffers(self._model)),
        )
        self._losses, self._draws, self._batches = [], [], []


def _copies(tensors: dict[str, torch.Tensor]) -> Arrays:
    return {name: copied(tensor) for name, tensor in tensors.items()}


def _queued(next_index: Callable[[Any], Any], queues: Any) -> Callable[[Any], Any]:
    """Remember the indices of each batch: a loader with workers reads them ahead."""

    def observed(iterator: Any) -> Any:
        indices = next_index(iterator)
        queues.setdefault(iterator, collections.deque()).append(indices)
        return indices

    return observed


def _emptied(reset: Callable[..., Any], queues: Any) -> Callable[..., Any]:
    """Forget the indices of an iterator that begins again."""

    def observed(iterator: Any, *args: Any, **kwargs: Any) -> Any:
        queues.pop(iterator, None)
        return reset(iterator, *args, **kwargs)

    return observed


@contextlib.contextmanager
def _wrapped(owner: Any, name: str, wrap: Callable[[Any], Any]) -> Iterator[None]:
    """Replace a function by a wrapper of it."""
    original = getattr(owner, name)
    setattr(owner, name, wrap(original))
    try:
        yield
    finally:
        setattr(owner, name, original)


@contextlib.contextmanager
def _as_main(path: Path, args: Sequence[str]) -> Iterator[None]:
    """Use the command line and the first folder of imports of `python path args`."""
    before = sys.argv, sys.path
    sys.argv, sys.path = [str(path), *args], [str(path.parent), *sys.path]
    try:
        yield
    finally:
        sys.argv, sys.path = before


def _states_of_other_generators() -> dict[str, str]:
    # The legacy generator of NumPy is the one that scripts seed with numpy.random.seed.
    return {
        "the module random": str(random.getstate()),
        "NumPy's global generator": str(np.random.get_state(legacy=False)),  # noqa: NPY002
    }
