"""Copy the parameters of a PyTorch model into the pytree of a JAX model.

The rules of layouts and their errors stay in one file: a new kind of layer adds to each.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from regjax._decay.paths import named_leaves, path_name
from regjax.interop._entries import MAGNITUDES, TORCH_NAMES, Entries, find_entry, read_entries
from regjax.interop._leaves import Leaf, check_names, overlap, plain_name, spelled_as_in

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from jaxtyping import PyTree

    from regjax._decay.paths import KeyPath
    from regjax.interop._leaves import Names

# These have the channels last; every other leaf has its axes in PyTorch's order.
_CHANNELS_LAST = ("kernel", "w")
# Equinox's batch norm before its state is split off: mean and variance, and the leaves that mark
# them as settled. After so many steps its correction for a start at zero vanishes.
_STATISTIC = re.compile(r"(?:ema|batch)_state_index/init/([01])$")
_SETTLED = {"ema_first_time_index/init": False, "batch_counter/init": 2**30}
_TRANSPOSED = re.compile(r"conv.*transpose", re.IGNORECASE)


def params_from_torch(
    state_dict: Any,
    params: PyTree,
    names: Mapping[str, str | Leaf] = MappingProxyType({}),
) -> PyTree:
    r"""Copy the parameters and running statistics of a PyTorch model into a JAX model.

    The name of a leaf determines its layout, never its shape: a `kernel` is transposed even if it
    is square.

    | leaf in Linen, NNX, Equinox or Haiku | entry of PyTorch |
    |---|---|
    | `kernel` or `w` (in, out) of a dense layer | `weight` (out, in) |
    | `kernel` or `w` (\*size, in, out) of a convolution | `weight` (out, in, \*size) |
    | `kernel` of several axes in or out, as of `DenseGeneral` | `weight` (out, in) |
    | `weight` of Equinox, `embedding`, `embeddings`, `scale` of any norm | `weight` as it is |
    | `bias`, `b`, `offset`; in Equinox's convolutions (out, 1, 1) | `bias` (out) |
    | `mean`, `var` of a batch norm | `running_mean`, `running_var` |
    | `query`, `key`, `value` of attention, in Equinox with `_proj` | a third of `in_proj_weight` |
    | the same, in timm and in GPT-2 of transformers | a third of `qkv.weight`, of `c_attn.weight` |
    | `out`, `output_proj`, `linear` of attention | `out_proj`, `proj` or `c_proj` beside these |
    | `kernel` (in, out) for a `Conv1D` of transformers | `weight` (in, out) as it is |
    | `kernel` or `weight` with weight normalization | `parametrizations.weight.original1` |
    | its `scale` in Linen, `g` in Equinox | `parametrizations.weight.original0` |
    | anything else | the entry of the same name, as it is |

    Tensors that PyTorch ties, such as a head and an embedding, need one leaf. The names that
    torch.compile, FSDP and DDP add to those of a module are left out.

    Args:
        state_dict: A module, or its `state_dict()`: tensors or NumPy arrays by name. Only a module
            shows that a convolution with as many inputs as outputs is transposed, that a square
            matrix belongs to a `Conv1D`, and which entries are buffers.
        params: The pytree to fill: variables or parameters of Linen, a state or module of NNX, an
            Equinox module, dicts; arrays or `jax.ShapeDtypeStruct`s. Leaves that are not arrays
            stay unchanged, and so do PRNG keys and the counts beside them. For a float64 model,
            cast Flax's statistics: they are float32 whatever `param_dtype` is.
        names: Modules of `params`, such as `"Dense_0"`, to modules of PyTorch, such as `"hidden"`;
            or single leaves, such as `"Dense_0/kernel"`, to entries (`"hidden.weight"`) or to
            `Leaf`s, which give the order of axes explicitly; an axis may unfold into that of heads
            and that of their elements. Paths are those of the pytree with
            slashes; a leading `params/` or `batch_stats/` and a trailing `/value` are optional.
            `""` is the whole. The longest path wins; identical names need no entry.

    Returns:
        A new pytree with the structure of `params`. It shares no memory with PyTorch.

    Raises:
        TypeError: `state_dict` is neither a module nor a dict, or `names` is not a mapping.
        ValueError: A leaf has no entry, or an entry no leaf (except `num_batches_tracked`, which
            only counts); they differ in shape or dtype; their layout is ambiguous, as in transposed
            convolutions and recurrent layers; or `names` contains unknown names. The message lists
            all problems, and nothing is copied.

    Note (PyTorch):
        `load_state_dict(strict=True)`. Settings are not parameters and are not copied: the `eps` of
        a norm (`LayerNorm`: 1e-5 in PyTorch, 1e-6 in Flax), the `momentum` of a batch norm (0.1 in
        PyTorch is 0.9 in JAX), the presence of biases. The kernel of a two-dimensional
        `ConvTranspose` of Flax is `Leaf(name, (2, 3, 1, 0))` if it has `transpose_kernel=True`;
        otherwise it is the mirror image of PyTorch's, like Equinox's weight, and no order of axes
        is equivalent. In Equinox, fill the module before its state is split off, with
        `equinox.nn.make_with_state(lambda: filled)()`.

    Example:
        >>> import numpy as np
        >>> state_dict = {"hidden.weight": np.array([[1.0, 2.0], [3.0, 4.0]], "float32")}
        >>> params = {"params": {"Dense_0": {"kernel": np.zeros((2, 2), "float32")}}}
        >>> params_from_torch(state_dict, params, {"Dense_0": "hidden"})
        {'params': {'Dense_0': {'kernel': Array([[1., 3.],
               [2., 4.]], dtype=float32)}}}
    """
    entries, leaves = _matched(state_dict, params, names)
    arrays = entries.arrays
    filled = [
        jnp.array(leaves[name].to_jax(arrays[leaves[name].name]))
        if name in leaves
        else _unfed(name, leaf)
        for name, leaf in named_leaves(params)
    ]
    return jax.tree.unflatten(jax.tree.structure(params), filled)


def leaves_from_torch(
    state_dict: Any,
    params: PyTree,
    names: Mapping[str, str | Leaf] = MappingProxyType({}),
) -> dict[str, Leaf]:
    """Return the name and layout in PyTorch of each parameter of a JAX model, by path.

    They are those that `params_from_torch` uses, with the same arguments; buffers may have no leaf
    in `params`, because optimizers do not have them. An optimizer's moment has the axes of its
    parameter, and so the same layout. The parts of a fused tensor have a `section`. Some of the
    `Leaf`s also unfold an axis: those of `DenseGeneral`, and biases of Equinox's convolutions.

    Raises:
        TypeError: As in `params_from_torch`.
        ValueError: As in `params_from_torch`; or two leaves are the same tensor of PyTorch, which
            one optimizer cannot train as one.

    Note (PyTorch):
        A parameter group lists tensors; their names are those of `named_parameters()`.

    Example:
        >>> import numpy as np
        >>> state_dict = {"hidden.weight": np.ones((3, 2), "float32")}
        >>> params = {"Dense_0": {"kernel": np.zeros((2, 3), "float32")}}
        >>> leaves_from_torch(state_dict, params, {"Dense_0": "hidden"})
        {'Dense_0/kernel': Leaf(name='hidden.weight', transpose=(1, 0))}
    """
    _, leaves = _matched(state_dict, params, names, buffers_too=False)
    feeds: dict[str, list[str]] = {}
    for path, leaf in leaves.items():
        feeds.setdefault(leaf.name, []).append(path)
    _refuse(
        [
            f"{', '.join(map(repr, paths))} must not share a tensor; got '{name}' for each"
            for name, paths in feeds.items()
            if overlap([leaves[path] for path in paths])
        ]
    )
    return leaves


def expand_names(names: Mapping[str, str | Leaf], params: PyTree, model: Any) -> Names:
    """Return names of modules or of some leaves as those of all leaves; complete ones unchanged."""
    check_names(names)
    paths = [path for path, _ in named_leaves(params)]
    missing = [path for path in paths if spelled_as_in(names, path) not in names]
    if not missing:
        return names
    if model is None:
        listed = ", ".join(f"'{path}'" for path in missing)
        raise ValueError(
            f"names and params must match if model is None; got no name for {listed}. Pass the "
            "model that is trained, or the result of leaves_from_torch."
        )
    return leaves_from_torch(model, params, names)


@dataclasses.dataclass(frozen=True, repr=False)
class _Unfolded(Leaf):
    """A leaf with other axes than its tensor, which has the shape `folded` with axes in order."""

    folded: tuple[int, ...] = ()
    shape: tuple[int, ...] = ()

    def to_jax(self, array: np.ndarray) -> np.ndarray:
        return super().to_jax(array).reshape(self.shape)

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        return super().to_torch(array.reshape(self.folded))


def _refuse(problems: Sequence[str]) -> None:
    if problems:
        listed = "".join(f"\n- {problem}" for problem in problems)
        raise ValueError(f"state_dict and params must match; got these differences:{listed}")


def _matched(
    state_dict: Any,
    params: PyTree,
    names: Mapping[str, str | Leaf],
    *,
    buffers_too: bool = True,
) -> tuple[Entries, dict[str, Leaf]]:
    """Return the entries of PyTorch, and the `Leaf` of each leaf that one of them feeds."""
    check_names(names)
    entries = read_entries(state_dict)
    leaves = [(path_name(path), path, leaf) for path, leaf in jax.tree.leaves_with_path(params)]
    paths = {name for name, _, _ in leaves}
    names = {_without_value(path, paths): _plain(given) for path, given in names.items()}
    counts = _counts([name for name, _, leaf in leaves if _is_key(leaf)])
    leaves = [at for at in leaves if _is_fed(at[0], at[2]) and at[0] not in counts]
    problems = _misspelt(names, [name for name, _, _ in leaves])
    found: dict[str, Leaf] = {}
    taken = []
    for name, path, leaf in leaves:
        try:
            key, entry, is_given = find_entry(name, _spellings(name), names, entries)
            taken.append(entry)
            if not is_given:
                owner = entry.name.rpartition(".")[0].removesuffix(".parametrizations.weight")
                if owner in entries.transposed or _is_transposed(name, path, params):
                    _refuse_transposed(name, entry.name, entries.arrays)
                entry = _laid_out(name, key, leaf.shape, entry, entries)
            else:
                _check_axes(name, entry, entries.arrays[entry.name])
                entry = _unfolded(entry, leaf.shape, entries.arrays[entry.name])
            found[name] = entry
            _check_form(name, leaf, entry, entries.arrays[entry.name])
        except ValueError as problem:
            problems.append(str(problem))
    if left := entries.not_taken(taken, buffers_too=buffers_too):
        problems.append(
            f"no leaf of params takes {', '.join(left)}. Map them in names, or leave them out."
        )
    _refuse(problems)
    return entries, found


def _without_value(name: str, paths: Collection[str]) -> str:
    """Return the name of an NNX variable as that of its array, if `params` has arrays."""
    shorter = name.removesuffix("/value")
    return shorter if name not in paths and shorter in paths else name


def _plain(given: str | Leaf) -> str | Leaf:
    if isinstance(given, str):
        return plain_name(given)
    return dataclasses.replace(given, name=plain_name(given.name))


def _is_fed(name: str, leaf: Any) -> bool:
    """Return whether a leaf comes from PyTorch: not a setting, a PRNG key or a mark of Equinox."""
    is_array = hasattr(leaf, "shape") and hasattr(leaf, "dtype")
    return is_array and settled(name) is None and not _is_key(leaf)


def _unfed(name: str, leaf: Any) -> Any:
    mark = settled(name)
    return leaf if mark is None else jnp.asarray(mark, leaf.dtype)


def settled(name: str) -> int | None:
    """Return the value of a mark of Equinox whose statistics are settled; None for other leaves."""
    return _SETTLED.get("/".join(name.split("/")[-2:]))


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _counts(keys: Sequence[str]) -> set[str]:
    """Return the paths of the counts of NNX's random streams, each beside a key."""
    return {re.sub(r"(^|/)key(/value)?$", r"\1count\2", name) for name in keys}


def _spellings(name: str) -> list[str]:
    """Return the accepted names of a leaf, from its path to the shortest."""
    keys = name.split("/")
    starts = (0, 1) if len(keys) > 1 and keys[0] in ("params", "batch_stats") else (0,)
    ends = (0, 1) if len(keys) > 1 and keys[-1] == "value" else (0,)
    spelt = ["/".join(keys[start : len(keys) - end]) for start in starts for end in ends]
    statistic = _STATISTIC.sub(lambda found: ("mean", "var")[int(found[1])], name)
    return spelt if statistic == name else [*spelt, statistic]


def _misspelt(names: Mapping[str, str | Leaf], leaves: Collection[str]) -> list[str]:
    spelt = [spelling.split("/") for name in leaves for spelling in _spellings(name)]
    whole = {"/".join(keys) for keys in spelt}
    modules = {"/".join(keys[:end]) for keys in spelt for end in range(len(keys))}
    problems = []
    for name, given in names.items():
        if name not in whole | modules:
            problems.append(f"names must have leaves or modules of params; got '{name}'.")
        elif name not in whole and not isinstance(given, str):
            problems.append(
                f"names must have a Leaf for single leaves; got one for '{name}', a module of "
                "params. Name each of its leaves."
            )
    return problems


def _laid_out(name: str, key: str, shape: tuple[int, ...], entry: Leaf, entries: Entries) -> Leaf:
    """Return the order of a tensor's axes in JAX from the leaf's key; shapes only confirm it."""
    array = entries.arrays[entry.name][entry.index]
    same_name = key == entry.name.rpartition(".")[2]
    channels_last = key in _CHANNELS_LAST and not same_name
    is_magnitude = entry.name.endswith(MAGNITUDES)
    known = same_name or key in TORCH_NAMES or array.ndim < 2 or is_magnitude
    if channels_last:
        known = array.ndim == 2 or array.ndim == len(shape) > 2
    if not known:
        raise ValueError(
            f"'{name}' of shape {shape} has no known layout for '{entry.name}' of shape "
            f"{array.shape}. Pass Leaf(name, transpose)."
        )
    order = (*range(2, array.ndim), 1, 0) if channels_last else None
    if entries.is_conv1d_weight(entry.name):  # (in, out) in PyTorch
        order = None if channels_last else (1, 0)
    leaf = dataclasses.replace(entry, transpose=order)
    may_unfold = array.ndim == 1 or channels_last or is_magnitude
    return _unfolded(leaf, shape, entries.arrays[entry.name]) if may_unfold else leaf


def _unfolded(leaf: Leaf, shape: tuple[int, ...], array: np.ndarray) -> Leaf:
    """Return a leaf that also unfolds axes, such as that of several heads, if `shape` has them."""
    folded = leaf.to_jax(array).shape
    if folded == shape or not _unfolds(folded, shape):
        return leaf
    return _Unfolded(leaf.name, leaf.transpose, leaf.section, leaf.axis, folded, shape)


def _unfolds(folded: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Return whether one or two axes unfold into consecutive axes each, or axes of 1 disappear."""
    if len(folded) == 1 or tuple(size for size in folded if size != 1) == shape:
        return math.prod(shape) == math.prod(folded)
    cuts = ((math.prod(shape[:cut]), math.prod(shape[cut:])) for cut in range(1, len(shape)))
    return len(folded) == 2 and folded in cuts


def _check_axes(name: str, entry: Leaf, array: np.ndarray) -> None:
    order, section = entry.transpose, entry.section
    if order is not None and sorted(order) != list(range(array.ndim)):
        raise ValueError(f"'{name}': {entry} must order the axes of shape {array.shape}.")
    if section is not None and (*array.shape, *[0] * 9)[entry.axis] < section[1]:
        raise ValueError(f"'{name}': {entry} must lie within the shape {array.shape}.")


def _check_form(name: str, leaf: Any, entry: Leaf, array: np.ndarray) -> None:
    arrived = entry.to_jax(array)
    if arrived.shape != leaf.shape:
        section_of = "" if entry.section is None else f"the section {list(entry.section)} of "
        fix = ""
        if arrived.shape == leaf.shape[::-1] and len(leaf.shape) == 2:
            other = dataclasses.replace(entry, transpose=None if entry.transpose else (1, 0))
            # As in the Flax GPT-2 of transformers; a square matrix does not show it.
            fix = f" If its axes are exchanged, pass {other} for it and for square ones like it."
        raise ValueError(
            f"'{name}' must have shape {arrived.shape}, like {section_of}'{entry.name}' of shape "
            f"{array.shape} in JAX's layout; got {leaf.shape} in params.{fix}"
        )
    if arrived.dtype != leaf.dtype:
        raise ValueError(
            f"'{name}' must be {arrived.dtype}, like '{entry.name}'; got {leaf.dtype} in params. "
            "Cast one of them."
        )
    if jax.dtypes.canonicalize_dtype(arrived.dtype) != arrived.dtype:
        raise ValueError(
            f"'{name}' must not be {arrived.dtype} in 32-bit mode. Call "
            "jax.config.update('jax_enable_x64', True)."
        )


def _is_transposed(name: str, path: KeyPath, params: PyTree) -> bool:
    """Return whether a leaf is in a transposed convolution, by names or types of its modules."""
    node, kinds = params, [type(params).__name__]
    for key in path[:-1]:
        attribute = getattr(key, "name", None)
        node = getattr(node, attribute, None) if attribute else _item(node, key)
        kinds.append(type(node).__name__)
    modules = _spellings(name)[-1].split("/")[:-1]
    return any(map(_TRANSPOSED.search, [*kinds[-2:], *modules[-1:]]))


def _item(node: Any, key: Any) -> Any:
    if isinstance(key, jax.tree_util.DictKey):
        return node[key.key] if hasattr(node, "__getitem__") else getattr(node, str(key.key), None)
    return node[key.idx] if isinstance(key, jax.tree_util.SequenceKey) else None


def _refuse_transposed(name: str, entry: str, entries: Mapping[str, np.ndarray]) -> None:
    """Reject a kernel of a transposed convolution, mirrored unless transpose_kernel=True."""
    ndim = entries[entry].ndim
    if ndim > 2:
        leaf = Leaf(entry, (*range(2, ndim), 1, 0))
        raise ValueError(
            f"'{name}' belongs to a transposed convolution, whose layout is ambiguous: in Flax "
            f"with transpose_kernel=True it is {leaf}; otherwise the kernel is also mirrored."
        )
