"""The correspondence of JAX and PyTorch parameters, and the parameter group of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from regjax._decay.paths import named_leaves
from regjax.optim._records import RECORDS
from regshared.checks import check_integers, check_string, describe

if TYPE_CHECKING:
    from collections.abc import Iterator

    from jaxtyping import PyTree

    from regjax.optim._records import Record

    Names = Mapping[str, "str | Leaf"]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """The name and layout of a JAX parameter in PyTorch.

    Attributes:
        name: The PyTorch parameter's name.
        transpose: The order of its axes in JAX, as for `numpy.transpose`; None if it is the same.
            It is `(1, 0)` for a Flax kernel of a Linear weight, `(2, 3, 1, 0)` for that of a Conv2d
            weight.

    Example:
        >>> import numpy as np
        >>> leaf = Leaf("fc.weight", (1, 0))
        >>> leaf.to_jax(np.zeros((3, 5))).shape
        (5, 3)
    """

    name: str
    transpose: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Count axes from the front; raise a TypeError or ValueError for invalid attributes."""
        check_string("name", self.name)
        if self.transpose is not None:
            axes = check_integers("transpose", self.transpose)
            order = tuple(axis + len(axes) if axis < 0 else axis for axis in axes)
            if sorted(order) != list(range(len(axes))):
                raise ValueError(
                    f"transpose of '{self.name}' must name each axis once, such as (1, 0); got "
                    f"{self.transpose}."
                )
            object.__setattr__(self, "transpose", order)

    def to_jax(self, array: np.ndarray) -> np.ndarray:
        """Return the PyTorch array in JAX's layout."""
        return array if self.transpose is None else np.transpose(array, self.transpose)

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        """Return the JAX array in PyTorch's layout."""
        if self.transpose is None:
            return array
        return np.transpose(array, np.argsort(self.transpose))


@dataclasses.dataclass(frozen=True)
class Located:
    """The counterpart of a JAX parameter: its `Leaf` and its tensor."""

    leaf: Leaf
    tensor: Any


@dataclasses.dataclass(frozen=True)
class Part:
    """Parameters that one optimizer trains: a group, or those of a group that share a layout."""

    label: str  # its name in the state
    index: int  # of the group
    record: Record  # the optimizer
    group: dict[str, Any]  # the options
    leaves: dict[str, Located]  # by path in JAX
    transposed: bool = False  # for Muon: whether JAX holds the matrices transposed

    @property
    def shares_count(self) -> bool:
        """True if one count is both PyTorch's `step` and the step of the schedule."""
        return self.record.shares_count(self.group)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The groups of a PyTorch optimizer with their JAX parameters; `frozen` are untrained paths."""

    parts: tuple[Part, ...]
    frozen: frozenset[str]

    @property
    def labels(self) -> dict[str, str]:
        """The label of each parameter's part, by path in JAX."""
        trained = {path: part.label for part in self.parts for path in part.leaves}
        return trained | dict.fromkeys(self.frozen, FROZEN)

    @property
    def is_single(self) -> bool:
        """True if one optimizer trains everything."""
        return len(self.parts) == 1 and not self.frozen


FROZEN = "frozen"


def read_recipe(torch_optimizer: Any, names: Names, model: Any = None) -> Recipe:
    """Check the optimizer, and find the PyTorch counterpart of each JAX parameter and its group.

    `names` maps paths in JAX to names in PyTorch or to `Leaf`s. `model`, the module that is
    trained, is not needed if the optimizer has parameter names.
    """
    record = RECORDS[check_class("torch_optimizer", torch_optimizer, "torch.optim", RECORDS)]
    check_names(names)
    leaves = {path: leaf if isinstance(leaf, Leaf) else Leaf(leaf) for path, leaf in names.items()}
    tensors = _named_tensors(torch_optimizer, model)
    _check_names(leaves, tensors, torch_optimizer.param_groups, by_model=model is not None)
    path_of = {id(tensors[leaf.name]): path for path, leaf in leaves.items()}
    parts = []
    for index, group in enumerate(torch_optimizer.param_groups):
        # PyTorch skips what has no gradient.
        trained = {path_of[id(p)]: p for p in group["params"] if p.requires_grad}
        located = {path: Located(leaves[path], tensor) for path, tensor in trained.items()}
        parts += _by_layout(Part(f"group{index}", index, record, group, located))
    trained = {path for part in parts for path in part.leaves}
    return Recipe(tuple(parts), frozenset(set(leaves) - trained))


def _by_layout(part: Part) -> Iterator[Part]:
    """Split a group into one part per layout, if the step depends on it."""
    split: dict[bool, dict[str, Located]] = {}
    for path, located in part.leaves.items():
        transposed = part.record.depends_on_layout and located.leaf.transpose == (1, 0)
        split.setdefault(transposed, {})[path] = located
    for transposed, leaves in sorted(split.items()):
        label = f"{part.label}_transposed" if transposed and len(split) > 1 else part.label
        yield dataclasses.replace(part, label=label, leaves=leaves, transposed=transposed)


def _named_tensors(torch_optimizer: Any, model: Any) -> dict[str, Any]:
    if model is not None:
        if not callable(getattr(model, "named_parameters", None)):
            raise TypeError(f"model must be a torch.nn.Module or None; got {describe(model)}.")
        # A tensor that the model has under two names may be given either one.
        return dict(model.named_parameters(remove_duplicate=False))
    named: dict[str, Any] = {}
    for index, group in enumerate(torch_optimizer.param_groups):
        if "param_names" not in group:
            raise ValueError(
                f"model must be given if group {index} has no names of parameters; got None. Pass "
                "the model, or create the optimizer with model.named_parameters()."
            )
        named.update(zip(group["param_names"], group["params"], strict=True))
    return named


def _check_names(
    leaves: Mapping[str, Leaf],
    tensors: Mapping[str, Any],
    groups: list[dict[str, Any]],
    *,
    by_model: bool,
) -> None:
    known = {id(tensor): name for name, tensor in tensors.items()}
    grouped = [id(p) for group in groups for p in group["params"]]
    if not set(grouped) <= set(known):
        raise ValueError(
            f"model must have all parameters of torch_optimizer; got one without "
            f"{len(set(grouped) - set(known))} of them. Pass the model that the optimizer trains."
        )
    strangers = {leaf.name for leaf in leaves.values()} - set(tensors)
    paths: dict[int, list[str]] = {}
    for path, leaf in leaves.items():
        if leaf.name in tensors:
            paths.setdefault(id(tensors[leaf.name]), []).append(path)
    twice = {path for shared in paths.values() if len(shared) > 1 for path in shared}
    where = "in the model" if by_model else "in the optimizer (see model=)"
    report(
        {
            "PyTorch parameters that no JAX parameter is": {
                known[p] for p in grouped if p not in paths
            },
            f"names of PyTorch parameters that are not {where}": strangers,
            "JAX parameters that are the same PyTorch parameter": twice,
        }
    )


def check_names(names: Any) -> None:
    """Reject names that are not a mapping to strings and `Leaf`s with a TypeError."""
    if not isinstance(names, Mapping):
        raise TypeError(
            "names must be a mapping from names in JAX to names in PyTorch or Leafs; got "
            f"{describe(names)}."
        )
    for path, name in names.items():
        if not isinstance(name, str | Leaf):
            raise TypeError(f"names['{path}'] must be a string or a Leaf; got {describe(name)}.")


def check_paths(labels: Mapping[str, str], params: PyTree) -> None:
    """Reject parameters whose paths differ from `names`; the ValueError lists both sides."""
    paths = {path for path, _ in named_leaves(params)}
    report(
        {
            "JAX parameters without a name in PyTorch": paths - set(labels),
            "names of JAX parameters that do not exist": set(labels) - paths,
        }
    )


def report(problems: Mapping[str, set[str]]) -> None:
    """Raise a ValueError that lists all problems with `names`, if there are any."""
    found = [f"{what}: {', '.join(sorted(names))}" for what, names in problems.items() if names]
    if found:
        raise ValueError("names and params must match; got " + "; ".join(found))


def number(option: str, value: Any) -> float:
    """Return a number that PyTorch stores as such, or as a tensor of one element."""
    if isinstance(value, int | float):
        return value
    if not hasattr(value, "item"):
        raise ValueError(f"{option} must be a number; got {value!r}.")
    if getattr(value, "requires_grad", False):
        raise ValueError(
            f"{option} must not require a gradient, which has no counterpart in JAX; got "
            f"{describe(value)}. Pass a number."
        )
    return value.item()


def check_class(argument: str, thing: Any, home: str, known: Any) -> str:
    """Return the name of a PyTorch object's class; a class that is not in `known` is an error."""
    name, module = type(thing).__name__, type(thing).__module__
    is_of_torch = module.partition(".")[0] == "torch"
    if not is_of_torch or name not in known:
        is_derived = any(base.__module__.startswith(home) for base in type(thing).__mro__)
        error = ValueError if is_of_torch or is_derived else TypeError
        raise error(
            f"{argument} must be one of {home}: {', '.join(sorted(known))}; got {module}.{name}."
        )
    return name
