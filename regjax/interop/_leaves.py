"""The correspondence of JAX and PyTorch parameters, and the parameter group of each."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from regjax._decay.paths import named_leaves
from regjax.interop._registry import record_of
from regshared.checks import check_integer, check_integers, check_string, describe

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Sequence

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
        section: The first element and the end of the section along `axis` that is this parameter,
            where PyTorch fuses several in one tensor; None for the whole tensor.
        axis: The axis of the tensor in PyTorch that is divided into sections.

    Example:
        >>> import numpy as np
        >>> leaf = Leaf("fc.weight", (1, 0))
        >>> leaf.to_jax(np.zeros((3, 5))).shape
        (5, 3)
        >>> key = Leaf("attn.in_proj_weight", (1, 0), section=(8, 16))
        >>> key.to_jax(np.zeros((24, 8))).shape
        (8, 8)
    """

    name: str
    transpose: tuple[int, ...] | None = None
    section: tuple[int, int] | None = None
    axis: int = 0

    def __post_init__(self) -> None:
        """Count axes from the front; raise a TypeError or ValueError for invalid attributes."""
        check_string("name", self.name)
        check_integer("axis", self.axis, minimum=0)
        if self.section is not None:
            section = check_integers("section", self.section)
            if len(section) != 2 or not 0 <= section[0] < section[1]:
                raise ValueError(
                    f"section at '{self.name}' must be a start of at least 0 and a later end; got "
                    f"{self.section}. Pass (8, 16), for example."
                )
            object.__setattr__(self, "section", section)
        if self.transpose is not None:
            axes = check_integers("transpose", self.transpose)
            order = tuple(axis + len(axes) if axis < 0 else axis for axis in axes)
            if sorted(order) != list(range(len(axes))):
                raise ValueError(
                    f"transpose of '{self.name}' must name each axis once, such as (1, 0); got "
                    f"{self.transpose}."
                )
            object.__setattr__(self, "transpose", order)

    def __repr__(self) -> str:
        fields = [(field, getattr(self, field.name)) for field in dataclasses.fields(self)]
        given = [f"{field.name}={value!r}" for field, value in fields if value != field.default]
        return f"{type(self).__name__}({', '.join(given)})"

    @property
    def index(self) -> tuple[slice, ...]:
        """The index of the section in an array of PyTorch."""
        return () if self.section is None else (slice(None),) * self.axis + (slice(*self.section),)

    def to_jax(self, array: np.ndarray) -> np.ndarray:
        """Return the section of a PyTorch array in JAX's layout."""
        section = array[self.index]
        return section if self.transpose is None else np.transpose(section, self.transpose)

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        """Return the JAX array in PyTorch's layout, as it is in its section."""
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
    record = record_of(torch_optimizer)
    leaves = as_leaves(names)
    tensors = _named_tensors(torch_optimizer, model)
    _check_tensors(leaves, tensors, torch_optimizer.param_groups, by_model=model is not None)
    if record.depends_on_layout or record.is_factored:
        _check_whole(leaves, record)
    paths_of = _paths_by_tensor(leaves, tensors)
    parts = []
    for index, group in enumerate(torch_optimizer.param_groups):
        # PyTorch skips parameters without a gradient.
        trained = [
            (path, p) for p in group["params"] if p.requires_grad for path in paths_of[id(p)]
        ]
        located = {path: Located(leaves[path], tensor) for path, tensor in trained}
        options = record.read_options(group)
        parts += _by_layout(Part(f"group{index}", index, record, options, located))
    trained = {path for part in parts for path in part.leaves}
    return Recipe(tuple(parts), frozenset(set(leaves) - trained))


def as_leaves(names: Names) -> dict[str, Leaf]:
    """Return the names of PyTorch as `Leaf`s, without the wrappers of torch.compile and FSDP."""
    check_names(names)
    leaves = {path: leaf if isinstance(leaf, Leaf) else Leaf(leaf) for path, leaf in names.items()}
    return {
        path: dataclasses.replace(leaf, name=plain_name(leaf.name)) for path, leaf in leaves.items()
    }


def plain_name(name: str) -> str:
    """Return a PyTorch name without the parts that torch.compile, FSDP and checkpoints add.

    Example:
        >>> plain_name("encoder._orig_mod.0.weight")
        'encoder.0.weight'
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# Classes of PyTorch whose only child is the model, and its attribute.
_WRAPPING = {
    "OptimizedModule": "_orig_mod",
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "AveragedModel": "module",
}


def unwrapped(model: Any) -> Any:
    """Return the module inside of torch.compile's, DataParallel's and AveragedModel's wrappers."""
    while type(model).__module__.startswith("torch.") and type(model).__name__ in _WRAPPING:
        model = getattr(model, _WRAPPING[type(model).__name__])
    return model


def named_tensors(model: Any) -> dict[str, Any]:
    """Return the parameters of a module by their plain names, tied ones under each of theirs."""
    named = unwrapped(model).named_parameters(remove_duplicate=False)
    return {plain_name(name): tensor for name, tensor in named}


def missing_sections(leaves: Sequence[Leaf], shape: tuple[int, ...]) -> list[str]:
    """Return the sections of a tensor that no leaf is, such as "[8:16]"; "" is the whole tensor."""
    if not leaves or any(leaf.section is None for leaf in leaves):
        return [] if leaves else [""]
    size = shape[leaves[0].axis] if leaves[0].axis < len(shape) else 0
    end, found = 0, []
    for start, stop in (*sorted(leaf.section for leaf in leaves if leaf.section), (size, size)):
        found += [f"[{end}:{start}]"] if end < start else []
        end = max(end, stop)
    return found


def overlap(leaves: Sequence[Leaf]) -> bool:
    """Return whether an element of a tensor is in several leaves."""
    sections = sorted(leaf.section or (0, math.inf) for leaf in leaves)
    one_axis = len({leaf.axis for leaf in leaves}) == 1
    return not one_axis or any(stop > start for (_, stop), (start, _) in pairwise(sections))


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
        return named_tensors(model)
    named: dict[str, Any] = {}
    for index, group in enumerate(torch_optimizer.param_groups):
        if "param_names" not in group:
            raise ValueError(
                f"model must be given if group {index} has no names of parameters; got None. Pass "
                "the model, or create the optimizer with model.named_parameters()."
            )
        names = map(plain_name, group["param_names"])
        named.update(zip(names, group["params"], strict=True))
    return named


def _check_whole(leaves: Mapping[str, Leaf], record: Record) -> None:
    for path, leaf in leaves.items():
        if leaf.section is not None:
            raise ValueError(
                f"names['{path}'] must be a whole tensor for {record.torch_name}, whose step "
                f"depends on the whole matrix; got {leaf}. Keep the fused tensor in JAX, too."
            )


def _check_tensors(
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
    trained = {known[id(p)]: p for group in groups for p in group["params"]}
    where = "in the model" if by_model else "in the optimizer (see model=)"
    report(tensor_problems(leaves, tensors, trained, f"that are not {where}"))


def _paths_by_tensor(
    leaves: Mapping[str, Leaf], tensors: Mapping[str, Any]
) -> dict[int, list[str]]:
    """Return the paths of the leaves of each tensor, by its identity."""
    paths: dict[int, list[str]] = {}
    for path, leaf in leaves.items():
        if leaf.name in tensors:
            paths.setdefault(id(tensors[leaf.name]), []).append(path)
    return paths


def tensor_problems(
    leaves: Mapping[str, Leaf],
    tensors: Mapping[str, Any],
    required: Mapping[str, Any],
    where: str,
) -> dict[str, set[str]]:
    """Return the problems of leaves with the tensors of PyTorch, for `report`.

    Each of the `required` tensors needs leaves; `where` describes names that are not in `tensors`.
    """
    paths = _paths_by_tensor(leaves, tensors)
    of_tensor = {key: [leaves[path] for path in shared] for key, shared in paths.items()}
    return {
        "PyTorch parameters that no JAX parameter is": {
            name + section
            for name, tensor in required.items()
            for section in missing_sections(of_tensor.get(id(tensor), ()), tensor.shape)
        },
        f"names of PyTorch parameters {where}": {
            leaf.name for leaf in leaves.values() if leaf.name not in tensors
        },
        "JAX parameters that are the same PyTorch parameter": {
            path
            for tensor, shared in paths.items()
            if overlap(of_tensor[tensor])
            for path in shared
        },
    }


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
    paths = {spelled_as_in(labels, path) for path, _ in named_leaves(params)}
    report(path_problems(labels, paths))


def spelled_as_in(known: Collection[str], path: str) -> str:
    """Return a path as it is in `known`, with or without the `/value` of an NNX variable.

    `nnx.Optimizer` passes variables to `init`, and their arrays to `update`.
    """
    spellings = (path, f"{path}/value", path.removesuffix("/value"))
    return next((spelling for spelling in spellings if spelling in known), path)


def path_problems(named: Iterable[str], paths: Iterable[str]) -> dict[str, set[str]]:
    """Return the differences of the named paths from those of the parameters, for `report`."""
    return {
        "JAX parameters without a name in PyTorch": set(paths) - set(named),
        "names of JAX parameters that do not exist": set(named) - set(paths),
    }


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
