"""The initial parameters of a PyTorch model from the seed, replayed from its structure.

A structure is first read as a list of steps, without a draw; then the steps are replayed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from regjax.torch_random.generator import TorchGenerator, check_generator
from regjax.torch_random.initializers import xavier_bound
from regjax.torch_random.layers import RULES, Draw, Layer
from regjax.torch_random.replay import replay
from regshared.checks import check_callable, describe

if TYPE_CHECKING:
    from jaxtyping import Array

    Structure = Any  # a torch.nn.Module, a Layer, or a mapping from names to structures
    Initializer = Callable[
        [TorchGenerator, dict[str, Array]], tuple[dict[str, Array], TorchGenerator]
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


def init_like(
    structure: Structure,
    g: TorchGenerator,
    *,
    initializers: Mapping[str, Initializer] = MappingProxyType({}),
    copies: Mapping[str, str | None] = MappingProxyType({}),
) -> tuple[dict[str, Array], TorchGenerator]:
    """Return the initial parameters of a PyTorch model, from the state of the generator alone.

    The default initializers of the layers of `torch.nn` are replayed in the order in which PyTorch
    constructs them. Of a module, only classes, shapes and dtypes are read, never values; it may be
    constructed under `torch.device("meta")`, which draws nothing.

    PyTorch draws while it constructs. Submodules are assumed to be constructed in the order in
    which they are registered, and a module to draw nothing beside its submodules, unless its class
    shows it. If a constructor does otherwise, construct the model in PyTorch under the same seed:
    then `to_torch(g)` differs from `torch.get_rng_state()`, or the parameters do.

    Args:
        structure: A `torch.nn.Module`; a `Layer`; or a mapping from names to structures, in the
            order in which they are constructed.
        g: The generator as it is before the construction.
        initializers: By path of a module (`""` is the whole), a function for its own initializer:
            `(g, params)` to `(changed, g)`. `params` are the parameters of the module and its
            submodules that are drawn so far, by name; `changed` are those to replace or to add. It
            is called after the submodules, as the last part of the construction. For a subclass
            of a layer it is called after the layer's initializer, and instead of it if the class
            overrides `reset_parameters`.
        copies: Paths of modules that are made by `copy.deepcopy`, with the paths of the originals:
            `{"encoder.layers.0": "encoder_layer"}`; None for one that is no copy.

    Returns:
        The parameters and running statistics by name, in PyTorch's shapes, as a state dict for
        `regjax.interop.params_from_torch`; and the next state of the generator. Buffers of other
        modules are left out.

    Raises:
        TypeError: `structure` or an initializer has a wrong type, or `g` is not a generator.
        ValueError: A module has an unknown initializer: parameters of its own, a method such as
            `reset_parameters` or `_init_weights`, or a layer as base whose constructor it
            overrides. A `TransformerEncoder` may be copies of a registered layer. The message lists
            all of these. Or parameters are tied and initialized differently, or a path is unknown.

    Note (PyTorch):
        Bitwise identical where `uniform` is, and layers with normal numbers (Embedding, `bias_k`)
        where `normal` is. The layers of `TransformerEncoder(layer, n)` are equal, as copies of
        `layer`; `Transformer` draws all matrices again.

    Example:
        >>> import torch
        >>> from regjax import torch_random
        >>> with torch.device("meta"):
        ...     structure = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
        >>> params, g = torch_random.init_like(structure, torch_random.generator(0))
        >>> params["1.weight"], params["1.bias"]
        (Array([[ 0.54775   , -0.26385054]], dtype=float32), Array([0.19067667], dtype=float32))
        >>> _ = torch.manual_seed(0)
        >>> torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))[1].weight
        Parameter containing:
        tensor([[ 0.5477, -0.2639]], requires_grad=True)
    """
    g = check_generator(g)
    for argument, given in (("initializers", initializers), ("copies", copies)):
        if not isinstance(given, Mapping):
            raise TypeError(f"{argument} must be a mapping from paths; got {describe(given)}.")
    reader = _Reader({path: _checked(path, f) for path, f in initializers.items()}, copies)
    reader.read("", structure)
    reader.raise_problems()
    values: dict[str, Array] = {}
    for step in reader.grouped():
        if isinstance(step, list):
            drawn, g = replay(g, step)
            values |= drawn
        elif isinstance(step, _Copies):
            values |= {name: values[source] for name, source in step.sources.items()}
        else:
            g = step.apply(g, values, reader.shapes)
    values |= {name: values[first] for name, first in reader.shared.items()}
    _check_ties(values, reader.ties)
    return {name: values[name] for name in reader.names}, g


def _checked(path: Any, function: Any) -> Initializer:
    return check_callable(f"initializers[{path!r}]", function, "of g and params")


@dataclasses.dataclass(frozen=True)
class _Copies:
    """Tensors that are copies of others."""

    sources: dict[str, str]


@dataclasses.dataclass(frozen=True)
class _Call:
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


class _Reader:
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
        self.steps: list[Draw | _Copies | _Call] = []
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
        self._paths.add(path)
        self._read(path, structure)
        if original is not None:
            del self.steps[start:]
            names = self._names_in(path)
            sources = {name: original + name.removeprefix(path) for name in names}
            if original not in self._paths or not set(sources.values()) <= self.shapes.keys():
                raise ValueError(
                    f"copies[{path!r}] must be an earlier module with the same names of parameters;"
                    f" got {original!r}."
                )
            self.steps.append(_Copies(sources))

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

    def grouped(self) -> list[list[Draw] | _Copies | _Call]:
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
                "structure must consist of modules that can be replayed; got others. Replay each by "
                f"a function in initializers, or its parts one by one:{listed}"
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
            dataclasses.replace(draw, name=_joined(path, draw.name)) for draw in layer.draws()
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
            self._draw_module(path, module, base.__name__, own)
        elif not is_layer:
            self._read_children(path, module, base)
        missing = () if is_drawn else tuple(_joined(path, name) for name in own)
        if not (is_layer or base.__name__ == "Transformer"):
            overridden -= {"__init__"}  # a constructor of submodules
        if path in self.initializers:
            self.steps.append(_Call(path, self.initializers[path], missing))
        elif missing or overridden:
            reasons = [f"parameters {', '.join(own)}"] if missing else []
            reasons += [f"method {name}" for name in sorted(overridden)]
            self._problems.append(f"{_named(path, module)}: {'; '.join(reasons)}")

    def _draw_module(self, path: str, module: Any, kind: str, own: Mapping[str, Any]) -> None:
        try:
            layer = Layer(
                kind,
                {name: _shape(tensor) for name, tensor in own.items()},
                dtype=next((_dtype(tensor) for tensor in own.values()), np.float32),
                padding_idx=getattr(module, "padding_idx", None),
                init=getattr(module, "init", 0.25),
            )
        except (TypeError, ValueError) as problem:
            self._problems.append(f"{_named(path, module)}: {problem}")
        else:
            self._draw(path, layer)

    def _read_children(self, path: str, module: Any, base: type) -> None:
        children = {name: part for name, part in module._modules.items() if part is not None}
        earlier: dict[type, str] = {}
        for name, part in children.items():
            if base.__name__ in _STACKS and name == "layers":
                self._read_stack(_joined(path, name), part)
            else:
                self._check_stack(_joined(path, name), part, earlier)
                self.read(_joined(path, name), part)
            earlier.setdefault(type(part), _joined(path, name))
        if base.__name__ == "Transformer":
            self._draw_matrices(path)

    def _check_stack(self, path: str, module: Any, earlier: Mapping[type, str]) -> None:
        """Note a stack whose layers may be copies of a registered one, which alone is drawn."""
        for layer in _layers_of_stack(module)[:1]:
            first = f"{path}.layers.0"
            if type(layer) in earlier and first not in self.copies:
                self._problems.append(
                    f"{_named(path, module)}: its layers may be copies of "
                    f"'{earlier[type(layer)]}'. Pass copies={{'{first}': "
                    f"'{earlier[type(layer)]}'}}, or None instead if they are not"
                )

    def _read_stack(self, path: str, layers: Any) -> None:
        """Read a list of deep copies, of which PyTorch constructed the first."""
        self._paths.add(path)
        first, *others = (_joined(path, name) for name in layers._modules)
        self.copies = {**self.copies, **dict.fromkeys(others, first)}
        for name, part in layers._modules.items():
            self.read(_joined(path, name), part)

    def _draw_matrices(self, path: str) -> None:
        """Draw the parameters of several axes again, as `torch.nn.Transformer` does."""
        dtypes = [step.dtype for step in self.steps if isinstance(step, Draw)]
        for name in self._names_in(path):
            shape = self.shapes[name]
            if name not in self.shared and len(shape) > 1:
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


def _check_ties(values: Mapping[str, Array], ties: Mapping[str, str]) -> None:
    apart = [
        f"{first!r} and {name!r}"
        for name, first in ties.items()
        if values[name] is not values[first]
    ]
    if apart:
        raise ValueError(
            f"structure must have tied parameters with one value; got two draws of "
            f"{'; '.join(apart)}, since each module draws its own before they are tied. Replace one "
            "by the other in initializers: {'': lambda g, params: ({name: params[other]}, g)}."
        )
