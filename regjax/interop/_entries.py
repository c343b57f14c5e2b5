"""The entries of a PyTorch model, and which of them feeds a leaf of a JAX model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from regjax.interop._leaves import Leaf, missing_sections, plain_name, unwrapped
from regshared.checks import describe

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

# PyTorch's name of a leaf of Linen, NNX, Equinox or Haiku. Other leaves keep their names.
TORCH_NAMES = {
    **dict.fromkeys(("kernel", "w", "scale", "embedding", "embeddings", "weight"), "weight"),
    **dict.fromkeys(("bias", "b", "offset"), "bias"),
    "mean": "running_mean",
    "var": "running_var",
}
# The parts of attention. PyTorch fuses the first three; Equinox appends `_proj` to them.
_FUSED = ("query", "key", "value")
_OUTPUTS = ("out", "output_proj", "linear")
# The fused and the output projection of torch.nn, of timm, and of GPT-2 in transformers.
_ATTENTIONS = (
    ("in_proj_{kind}", "out_proj.{kind}"),
    ("qkv.{kind}", "proj.{kind}"),
    ("c_attn.{kind}", "c_proj.{kind}"),
)
# The direction and the magnitude of a normalized weight, in the new form and in the old one.
_DIRECTIONS = ("parametrizations.weight.original1", "weight_v")
MAGNITUDES = ("parametrizations.weight.original0", "weight_g")
# The dtype names of tensors that NumPy has no type for; jax.numpy uses the same names.
_SMALL = ("bfloat16", "float8_e4m3fn", "float8_e5m2")
_STATISTICS = ("running_mean", "running_var")


@dataclasses.dataclass(frozen=True)
class Entries:
    """The tensors of a model by name, with properties that only a module shows.

    Attributes:
        arrays: The tensors, as NumPy arrays.
        transposed: The modules that are transposed convolutions.
        conv1d: The modules whose weight is (in, out), the `Conv1D` of transformers.
        buffers: The names that are no parameters.
        first: The first name of each tensor: tied ones have several.
    """

    arrays: dict[str, np.ndarray]
    transposed: frozenset[str]
    conv1d: frozenset[str]
    buffers: frozenset[str]
    first: dict[str, str]

    def section(self, name: str, part: int | None) -> Leaf:
        """Return a tensor, or a third of it, in PyTorch's layout."""
        if part is None:
            return Leaf(name)
        axis = 1 if self.is_conv1d_weight(name) else 0
        third = self.arrays[name].shape[axis] // 3
        return Leaf(name, section=(part * third, (part + 1) * third), axis=axis)

    def is_conv1d_weight(self, name: str) -> bool:
        """Return whether a weight is (in, out)."""
        owner, _, kind = name.rpartition(".")
        return kind == "weight" and owner in self.conv1d

    def not_taken(self, leaves: Collection[Leaf], *, buffers_too: bool) -> list[str]:
        """Return the tensors and sections of tensors that no leaf is."""
        of_tensor: dict[str, list[Leaf]] = {}
        for leaf in leaves:
            of_tensor.setdefault(self.first[leaf.name], []).append(leaf)
        left = []
        for name, array in self.arrays.items():
            is_ignored = not buffers_too and name in self.buffers
            # num_batches_tracked only counts: no JAX layer stores it, and nothing uses it.
            if is_ignored or name.endswith("num_batches_tracked") or self.first[name] != name:
                continue
            left += [
                f"'{name}'{part}" for part in missing_sections(of_tensor.get(name, []), array.shape)
            ]
        return left


def read_entries(state_dict: Any) -> Entries:
    """Read a module, or the dict of its tensors or arrays by name."""
    model = unwrapped(state_dict)
    tensors = model.state_dict() if callable(getattr(model, "state_dict", None)) else model
    if not isinstance(tensors, Mapping):
        raise TypeError(
            "state_dict must be a module, or a dict from names to tensors; got "
            f"{describe(state_dict)}."
        )
    tensors = {plain_name(name): tensor for name, tensor in tensors.items()}
    has_modules = hasattr(model, "named_modules")
    modules = {plain_name(n): m for n, m in model.named_modules()} if has_modules else {}
    buffers = {name for name in tensors if name.endswith(_STATISTICS)}
    if has_modules:
        buffers = {plain_name(name) for name, _ in model.named_buffers(remove_duplicate=False)}
    places: dict[Any, str] = {}
    return Entries(
        {name: _array(tensor) for name, tensor in tensors.items()},
        frozenset(name for name, module in modules.items() if getattr(module, "transposed", False)),
        frozenset(name for name, module in modules.items() if _is_conv1d(type(module))),
        frozenset(buffers),
        {name: places.setdefault(_place(name, tensor), name) for name, tensor in tensors.items()},
    )


def _place(name: str, tensor: Any) -> Any:
    """Return a key that two tensors share only if they are the same view of one memory."""
    if not hasattr(tensor, "data_ptr") or not tensor.numel() or not tensor.data_ptr():
        return name
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def _is_conv1d(cls: type) -> bool:
    return any(
        b.__name__ == "Conv1D" and b.__module__.startswith("transformers.") for b in cls.__mro__
    )


def _array(value: Any) -> np.ndarray:
    if not hasattr(value, "detach"):
        return np.asarray(value)
    value = value.detach().cpu()
    dtype = str(value.dtype).removeprefix("torch.")
    if dtype in _SMALL:
        return value.float().numpy().astype(getattr(jnp, dtype))
    return value.numpy()


def find_entry(
    name: str, spellings: Sequence[str], names: Mapping[str, str | Leaf], entries: Entries
) -> tuple[str, Leaf, bool]:
    """Return the key that determines a leaf's layout, its entry, and whether the layout is given.

    `spellings` are the accepted names of the leaf, the one of its key last.
    """
    arrays = entries.arrays
    key = spellings[-1].rpartition("/")[2]
    for spelling in spellings:
        if spelling in names:
            given = names[spelling]
            leaf = given if isinstance(given, Leaf) else Leaf(given)
            if leaf.name not in arrays:
                raise ValueError(f"'{name}' has no entry: '{leaf.name}' is not in state_dict.")
            return key, leaf, isinstance(given, Leaf)
    sought, recurrent = "", False
    for spelling in spellings:
        target, keys = _in_module(spelling, names)
        candidates = list(_candidates(target, keys, arrays))
        for entry, part in candidates:
            if entry in arrays:
                return keys[-1], entries.section(entry, part), False
        sought = candidates[0][0]
        owners = [_joined(target, *keys[:end], "weight_ih") for end in range(len(keys))]
        recurrent |= any(entry.startswith(owner) for owner in owners for entry in arrays)
    if recurrent:
        raise ValueError(
            f"'{name}' belongs to a recurrent layer, which cannot be converted: PyTorch stacks the "
            "gates and has two biases."
        )
    raise ValueError(f"'{name}' has no entry: '{sought}' is not in state_dict. Map it in names.")


def _in_module(spelling: str, names: Mapping[str, str | Leaf]) -> tuple[str, list[str]]:
    """Return the PyTorch module of the longest path in `names`, and the rest of the path."""
    keys = spelling.split("/")
    for end in reversed(range(len(keys))):
        module = names.get("/".join(keys[:end]))
        if isinstance(module, str):
            return module, keys[end:]
    return "", keys


def _candidates(
    target: str, keys: Sequence[str], entries: Collection[str]
) -> Iterator[tuple[str, int | None]]:
    """Yield the entries that may feed a leaf, and the third of each, the likeliest first."""
    *modules, leaf = keys
    kind = TORCH_NAMES.get(leaf, leaf)
    yield _joined(target, *modules, kind), None
    yield _joined(target, *modules, leaf), None
    if leaf in ("kernel", "weight", "w"):
        yield from ((_joined(target, *modules, name), None) for name in _DIRECTIONS)
    if leaf == "g" or (leaf == "scale" and modules[-1:] == ["kernel"]):  # of Equinox, of Linen
        owner = modules if leaf == "g" else modules[:-1]
        yield from ((_joined(target, *owner, name), None) for name in MAGNITUDES)
    if not modules:
        return
    *owners, role = modules
    owner, projection = _joined(target, *owners), role.removesuffix("_proj")
    for fused, output in _ATTENTIONS:
        is_torch = _joined(owner, "q_proj_weight") in entries and fused.startswith("in_proj")
        if is_torch or _joined(owner, fused.format(kind="weight")) in entries:
            if projection in _FUSED:
                yield _joined(owner, fused.format(kind=kind)), _FUSED.index(projection)
                yield _joined(owner, f"{projection[0]}_proj_{kind}"), None
            elif role in _OUTPUTS:
                yield _joined(owner, output.format(kind=kind)), None


def _joined(*names: str) -> str:
    return ".".join(name for name in names if name)
