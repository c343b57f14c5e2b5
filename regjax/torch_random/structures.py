"""The structure of a PyTorch model, read as the steps of its initialization.

Modules are recognized by the names of their classes. Nothing is drawn here.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from regjax.torch_random.initializers import xavier_bound
from regjax.torch_random.layers import RULES, Draw, Layer, draws_of
from regjax.torch_random.state import TorchGenerator, check_generator
from regshared.checks import describe

if TYPE_CHECKING:
    from jax.typing import ArrayLike
    from jaxtyping import Array

    Structure = Any  # a torch.nn.Module, a Layer, or a mapping from names to structures
    Initializer = Callable[
        [TorchGenerator, dict[str, Array]], tuple[Mapping[str, ArrayLike], TorchGenerator]
    ]

# Methods by which classes initialize parameters otherwise than the layers that they consist of.
_INITIALIZERS = frozenset(
    prefix + name
    for prefix in ("", "_")
    for name in (
        *("reset_parameters", "init_weights", "init_parameters", "initialize_weights"),
        *("weights_init", "reset_weights", "initialize_parameters"),
    )
)
# These consist of deep copies of one layer.
_STACKS = ("TransformerEncoder", "TransformerDecoder")


@dataclasses.dataclass(frozen=True)
class Copies:
    """Tensors that are copies of others."""

    sources: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Call:
    """An initializer of the user."""

    path: str
    function: Initializer
    missing: tuple[str, ...]  # the parameters that it has to add

    def apply(
        self,
        g: TorchGenerator,
        values: dict[str, Array],
        shapes: Mapping[str, tuple[int, ...]],
    ) -> TorchGenerator:
        """Change `values`, and return the next state of the generator."""
        prefix = f"{self.path}." if self.path else ""
        params = {n.removeprefix(prefix): v for n, v in values.items() if n.startswith(prefix)}
        argument = f"initializers[{self.path!r}]"
        result = self.function(g, params)
        if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], Mapping)):
            raise TypeError(f"{argument} must return a dict and g; got {describe(result)}.")
        changed = {prefix + name: jnp.asarray(value) for name, value in result[0].items()}
        for name, value in changed.items():
            if name not in shapes:
                raise ValueError(f"{argument} must return names of parameters; got {name!r}.")
            if value.shape != shapes[name]:
                raise ValueError(
                    f"{argument} must return {name!r} of shape {shapes[name]}; got {value.shape}."
                )
        if left := [name for name in self.missing if name not in changed]:
            raise ValueError(f"{argument} must return {', '.join(left)}; got none.")
        values |= changed
        return check_generator(result[1])


class Reader:
    """Reads a structure into steps.

    Attributes:
        initializers: Those of the user, by path.
        copies: The paths of originals, by path.
        steps: Draws, copies and calls, in PyTorch's order.
        names: The names of all tensors, in the order of `state_dict()`.
        shapes: Their shapes.
        shared: Tensors of a module that has several paths, with the names of the first.
        ties: Parameters that several modules have, with their first names.
    """

    def __init__(
        self, initializers: Mapping[str, Initializer], copies: Mapping[str, str | None]
    ) -> None:
        self.initializers = initializers
        self.copies = copies
        self.steps: list[Draw | Copies | Call] = []
        self.names: list[str] = []
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.shared: dict[str, str] = {}
        self.ties: dict[str, str] = {}
        self._problems: list[str] = []
        self._paths: set[str] = set()
        self._modules: dict[int, str] = {}
        self._tensors: dict[int, str] = {}

    def read(self, path: str, structure: Structure) -> None:
        """Append the steps of a structure."""
        start, original = len(self.steps), self.copies.get(path)
        known = set(self.shapes)
        self._read(path, structure)
        self._paths.add(path)
        if original is not None:
            del self.steps[start:]
            names = self._names_in(path)
            sources = {name: original + name.removeprefix(path) for name in names}
            if original not in self._paths or not set(sources.values()) <= known:
                raise ValueError(
                    f"copies[{path!r}] must be an earlier module with the same names of parameters;"
                    f" got {original!r}."
                )
            self.steps.append(Copies(sources))

    def _read(self, path: str, structure: Structure) -> None:
        if isinstance(structure, Layer):
            self._read_layer(path, structure)
        elif isinstance(structure, Mapping):
            for name, part in structure.items():
                self.read(_joined(path, name), part)
        elif hasattr(structure, "_parameters") and hasattr(structure, "_modules"):
            self._read_module(path, structure)
        else:
            raise TypeError(
                "structure must be a torch.nn.Module, a Layer, or a mapping to these; got "
                f"{describe(structure)}{f' at {path}' if path else ''}."
            )

    def grouped(self) -> list[list[Draw] | Copies | Call]:
        """Return the steps, with consecutive draws in one list."""
        groups: list[Any] = []
        for step in self.steps:
            if not isinstance(step, Draw):
                groups.append(step)
            elif groups and isinstance(groups[-1], list):
                groups[-1].append(step)
            else:
                groups.append([step])
        return groups

    def raise_problems(self) -> None:
        """Raise an error that lists all modules that cannot be replayed."""
        for argument in ("initializers", "copies"):
            if unknown := [path for path in getattr(self, argument) if path not in self._paths]:
                raise ValueError(
                    f"{argument} must have paths of modules; got {', '.join(map(repr, unknown))}."
                )
        if self._problems:
            listed = "".join(f"\n- {problem}" for problem in self._problems)
            raise ValueError(
                "structure must consist of modules that can be replayed; got others. Replay each "
                f"by a function in initializers, or its parts one by one:{listed}"
            )

    def _names_in(self, path: str) -> list[str]:
        return [name for name in self.names if not path or name.startswith(f"{path}.")]

    def _add_name(self, name: str, shape: tuple[int, ...]) -> None:
        if name in self.shapes:
            raise ValueError(f"structure must have different names; got {name!r} twice.")
        self.names.append(name)
        self.shapes[name] = shape

    def _read_layer(self, path: str, layer: Layer) -> None:
        for name, shape in layer.shapes.items():
            self._add_name(_joined(path, name), tuple(shape))
        self._draw(path, layer)

    def _draw(self, path: str, layer: Layer) -> None:
        self.steps += [
            dataclasses.replace(draw, name=_joined(path, draw.name)) for draw in draws_of(layer)
        ]

    def _read_module(self, path: str, module: Any) -> None:
        if id(module) in self._modules:
            first = self._modules[id(module)]
            for name in self._names_in(first):
                again = path + name.removeprefix(first)
                self._add_name(again, self.shapes[name])
                self.shared[again] = self.shared.get(name, name)
            return
        self._modules[id(module)] = path
        base, overridden = _base_of_torch(type(module))
        is_layer = _is_layer(base)
        own = _named_tensors(module) if is_layer else _own_parameters(module)
        for name, tensor in own.items():
            self._add_name(_joined(path, name), _shape(tensor))
            self._note_tie(_joined(path, name), tensor)
        is_drawn = is_layer and not overridden & _INITIALIZERS
        if is_drawn:
            is_drawn = self._draw_module(path, module, base.__name__, own)
        elif not is_layer:
            self._read_children(path, module, base)
        missing = () if is_drawn else tuple(_joined(path, name) for name in own)
        if not (is_layer or base.__name__ == "Transformer"):
            overridden -= {"__init__"}  # a constructor of submodules
        if path in self.initializers:
            self.steps.append(Call(path, self.initializers[path], missing))
        elif missing or overridden:
            reasons = [f"parameters {', '.join(own)}"] if missing else []
            reasons += [f"method {name}" for name in sorted(overridden)]
            self._problems.append(f"{_named(path, module)}: {'; '.join(reasons)}")

    def _draw_module(self, path: str, module: Any, kind: str, own: Mapping[str, Any]) -> bool:
        """Append the draws of a layer, and return whether it has the parameters of its class."""
        try:
            layer = Layer(
                kind,
                {name: _shape(tensor) for name, tensor in own.items()},
                dtype=next((_dtype(tensor) for tensor in own.values()), np.float32),
                padding_idx=getattr(module, "padding_idx", None),
                init=getattr(module, "init", 0.25),
            )
        except (TypeError, ValueError) as problem:
            if path not in self.initializers:
                self._problems.append(f"{_named(path, module)}: {problem}")
            return False
        self._draw(path, layer)
        return True

    def _read_children(self, path: str, module: Any, base: type) -> None:
        children = {name: part for name, part in module._modules.items() if part is not None}
        self._check_stacks({_joined(path, name): part for name, part in children.items()})
        for name, part in children.items():
            if base.__name__ in _STACKS and name == "layers":
                self._read_stack(_joined(path, name), part)
            else:
                self.read(_joined(path, name), part)
        if base.__name__ == "Transformer":
            self._draw_matrices(path)

    def _check_stacks(self, children: Mapping[str, Any]) -> None:
        """Note stacks whose layers may be copies of a registered one, which alone is drawn."""
        order = list(children)
        for stack, layer in itertools.product(order, order):
            if type(children[layer]) in map(type, _layers_of_stack(children[stack])[:1]):
                first = f"{stack}.layers.0"
                is_later = order.index(stack) > order.index(layer)
                copy, original = (first, layer) if is_later else (layer, first)
                if copy not in self.copies:
                    self._problems.append(
                        f"{_named(stack, children[stack])}: its layers may be copies of '{layer}'. "
                        f"Pass copies={{'{copy}': '{original}'}}, or None instead if they are not"
                    )

    def _read_stack(self, path: str, layers: Any) -> None:
        """Read a list of deep copies, of which PyTorch constructed the first."""
        self._paths.add(path)
        parts = {_joined(path, name): part for name, part in layers._modules.items()}
        for first in list(parts)[:1]:
            self.copies = {**dict.fromkeys(list(parts)[1:], first), **self.copies}
        for name, part in parts.items():
            self.read(name, part)

    def _draw_matrices(self, path: str) -> None:
        """Draw the parameters of several axes again, as `torch.nn.Transformer` does."""
        dtypes = [step.dtype for step in self.steps if isinstance(step, Draw)]
        for name in self._names_in(path):
            shape = self.shapes[name]
            if name not in {*self.shared, *self.ties} and len(shape) > 1:
                bound = xavier_bound(shape)
                self.steps.append(Draw(name, shape, dtypes[-1], "uniform", (-bound, bound)))

    def _note_tie(self, name: str, tensor: Any) -> None:
        first = self._tensors.setdefault(id(tensor), name)
        if first != name:
            self.ties[name] = first


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _named(path: str, module: Any) -> str:
    return f"{repr(path) if path else 'the whole'} ({type(module).__name__})"


def _dtype(tensor: Any) -> Any:
    return getattr(jnp, str(tensor.dtype).removeprefix("torch."))


def _layers_of_stack(module: Any) -> list[Any]:
    is_stack = any(base.__name__ in _STACKS for base in type(module).__mro__)
    layers = getattr(module, "_modules", {}).get("layers") if is_stack else None
    return [] if layers is None else list(layers._modules.values())


def _shape(tensor: Any) -> tuple[int, ...]:
    # A lazy parameter has no shape yet.
    return () if type(tensor).__name__.startswith("Uninitialized") else tuple(tensor.shape)


def _base_of_torch(cls: type) -> tuple[type, set[str]]:
    """Return the class of PyTorch that a class derives from, and the methods that it overrides."""
    overridden: set[str] = set()
    for base in cls.__mro__:
        if base.__module__.partition(".")[0] == "torch":
            return base, overridden
        overridden |= vars(base).keys() & (_INITIALIZERS | {"__init__"})
    raise TypeError(f"structure must consist of torch.nn.Modules; got a {cls.__name__}.")


def _is_layer(base: type) -> bool:
    return base.__name__ in RULES and base.__module__.startswith("torch.nn.modules.")


def _own_parameters(module: Any) -> dict[str, Any]:
    return {name: p for name, p in module._parameters.items() if p is not None}


def _named_tensors(module: Any) -> dict[str, Any]:
    parameters = dict(module.named_parameters(remove_duplicate=False))
    return parameters | dict(module.named_buffers(remove_duplicate=False))
