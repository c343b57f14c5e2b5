"""A JAX program that defines `train(seed)`, observed step by step.

`train` yields dictionaries, first one before the first step and then one after each step:

| key | value |
|---|---|
| `"params"` | the parameters: by PyTorch's names, or any pytree if the program has `names` |
| `"generator"` | the `TorchGenerator` at that time |
| `"loss"` | the loss of the step, or a list with that of each backward pass |
| `"batch"` | the indices of the batch, or a list with those of each batch |

Only `"params"` is required; whatever else is missing is not compared. Buffers are among the
parameters, as `regjax.torch_random.init_like` returns them. `names`, a mapping as for
`regjax.interop.params_from_torch`, is a global variable of the program. Masks need no entry:
`regjax.observing` reports them.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np

from parity_tests.certify.errors import InputError, ProgramError
from parity_tests.certify.script import Arrays, ScriptRun
from parity_tests.recording import Drawn, Recorder
from parity_tests.sides import named_buffers
from regjax._decay.paths import named_leaves
from regjax.interop import Leaf, leaves_from_torch
from regjax.interop._leaves import as_leaves, check_names, named_tensors
from regjax.torch_random import TorchGenerator, to_torch
from regshared.checks import describe

_KEYS = ("params", "generator", "loss", "batch")
_HELP = "See the page on certificates in the documentation."


@dataclasses.dataclass(frozen=True)
class PortStep:
    """A step of a port, or its beginning.

    Attributes:
        params: The parameters and buffers by path in JAX.
        state: The bytes of the state of the generator; None if unknown.
        losses: The values of the loss; None if unknown.
        batch: The indices; None if unknown.
        masks: The masks.
    """

    params: Arrays
    state: np.ndarray | None
    losses: np.ndarray | None
    batch: np.ndarray | None
    masks: Sequence[Drawn]


@dataclasses.dataclass(frozen=True)
class Names:
    """The correspondence of a port's arrays to those of a script.

    Attributes:
        leaves: The name and layout in PyTorch of each array, by path in JAX.
        params: The paths of parameters.
        buffers: The paths of buffers.
    """

    leaves: Mapping[str, Leaf]
    params: Sequence[str]
    buffers: Sequence[str]

    def laid_out(self, paths: Sequence[str], in_torch: Arrays) -> Arrays:
        """Return arrays of PyTorch by path in JAX, in the layout of JAX."""
        return {path: self.leaves[path].to_jax(in_torch[self.leaves[path].name]) for path in paths}


def run_port(path: Path, script: ScriptRun) -> Generator[tuple[Names, PortStep]]:
    """Yield the state of a port before the first step, and after each step.

    Args:
        path: The file of the program.
        script: The run of the script, whose seed the port receives.

    Raises:
        InputError: The program raises an error, or yields what cannot be compared.
    """
    path = path.resolve()
    recorder = Recorder()
    with recorder.watching():
        module = _load(path)
        train = getattr(module, "train", None)
        if not callable(train):
            raise InputError(
                f"{path} must define train(seed), which yields dictionaries; got no such function. "
                f"{_HELP}"
            )
        names = None
        for number, values in enumerate(_iterated(path, train, script.seed)):
            _check(path, number, values)
            params = _arrays(path, values["params"])
            if names is None:
                names = _names(path, values["params"], params, module, script)
            elif params.keys() != names.leaves.keys():
                odd = ", ".join(sorted(params.keys() ^ names.leaves.keys()))
                raise InputError(
                    f"{path} must yield the same parameters at every step; got a change of {odd}"
                )
            # Masks before the first step belong to it.
            masks = recorder.taken()[0] if number else []
            yield names, _step(values, params, masks)


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise InputError(f"{path} must be a Python program; got a file without the suffix .py")
    module = importlib.util.module_from_spec(spec)
    before = sys.path
    sys.path = [str(path.parent), *before]
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ProgramError(path, error) from None
    finally:
        sys.path = before
    return module


def _iterated(path: Path, train: Any, seed: int) -> Iterator[Any]:
    try:
        steps = train(seed)
        if not isinstance(steps, Iterator):
            raise InputError(
                f"{path} must define train(seed) as a generator; got {describe(steps)}. Yield a "
                f"dictionary before the first step and after each step. {_HELP}"
            )
        yield from steps
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        raise ProgramError(path, error) from None


def _check(path: Path, number: int, values: Any) -> None:
    what = f"{path} must yield dictionaries with 'params'"
    if not isinstance(values, Mapping) or "params" not in values:
        kind = f"a value of type {type(values).__name__}"
        got = f"the keys {[*values]}" if isinstance(values, Mapping) else kind
        raise InputError(f"{what}; got {got} for step {number}. {_HELP}")
    if unknown := [key for key in values if key not in _KEYS]:
        raise InputError(
            f"{path} must yield the keys {', '.join(_KEYS)}; got {unknown[0]!r} for step {number}. "
            "Remove it."
        )
    generator = values.get("generator")
    if generator is not None and not isinstance(generator, TorchGenerator):
        raise InputError(
            f"{path} must yield a TorchGenerator as 'generator'; got {describe(generator)} for "
            f"step {number}."
        )


def _step(values: Mapping[str, Any], params: Arrays, masks: Sequence[Drawn]) -> PortStep:
    generator = values.get("generator")
    return PortStep(
        params,
        None if generator is None else to_torch(generator),
        _flat(values.get("loss"), np.float64),
        _flat(values.get("batch"), np.int64),
        masks,
    )


def _flat(value: Any, dtype: Any) -> np.ndarray | None:
    if value is None:
        return None
    parts = [np.asarray(leaf).astype(dtype).ravel() for leaf in jax.tree.leaves(value)]
    return np.concatenate([np.zeros(0, dtype), *parts])


def _arrays(path: Path, params: Any) -> Arrays:
    # Copies, since a step may donate its arrays to the next.
    found = {name: np.array(leaf) for name, leaf in named_leaves(params)}
    if not found:
        raise InputError(f"{path} must yield parameters; got an empty tree.")
    return found


def _names(path: Path, tree: Any, params: Arrays, module: ModuleType, script: ScriptRun) -> Names:
    """Return the names of all arrays, after a check of their shapes."""
    tensors = named_tensors(script.model)
    known: dict[str, Any] = {**named_buffers(script.model), **tensors}
    leaves = {name: Leaf(name) for name in params}
    if hasattr(module, "names") or not params.keys() <= known.keys():
        try:
            leaves = _leaves(tree, params, getattr(module, "names", {}), script)
        except (TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"{path} must yield the parameters of the script: {reason}") from None
    taken = {id(known[leaf.name]) for leaf in leaves.values() if leaf.name in known}
    if missing := [name for name, tensor in tensors.items() if id(tensor) not in taken]:
        raise InputError(
            f"{path} must yield every parameter of the script; got none for {', '.join(missing)}."
        )
    for name in params:
        leaf = leaves.get(name)
        if leaf is None or leaf.name not in known:
            raise InputError(
                f"{path} must yield parameters of the script; got '{name}', which is none of "
                f"{', '.join(known)}. Define names."
            )
        shape = leaf.to_jax(np.empty(tuple(known[leaf.name].shape), bool)).shape
        if params[name].shape != shape:
            raise InputError(
                f"{path} must yield '{name}' of shape {list(shape)}, as '{leaf.name}' of the "
                f"script; got {list(params[name].shape)}."
            )
    buffers = [name for name in params if leaves[name].name not in tensors]
    return Names(leaves, [name for name in params if name not in buffers], buffers)


def _leaves(tree: Any, params: Arrays, names: Any, script: ScriptRun) -> Mapping[str, Leaf]:
    check_names(names)
    if params.keys() <= names.keys():
        return as_leaves(names)
    return leaves_from_torch(script.model, tree, names)
