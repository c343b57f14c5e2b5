"""Copy the parameters of a PyTorch model into the pytree of a JAX model.

The rules of names and layouts and their errors stay in one file: a new kind of layer adds to each.
"""

from __future__ import annotations

import collections
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
from regjax.interop._leaves import Leaf, check_names
from regshared.checks import describe

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from jaxtyping import PyTree

    from regjax._decay.paths import KeyPath

# PyTorch's name of a leaf of Linen, NNX, Equinox or Haiku. Other leaves keep their names.
_TORCH_NAMES = {
    **dict.fromkeys(("kernel", "w", "scale", "embedding", "embeddings", "weight"), "weight"),
    **dict.fromkeys(("bias", "b", "offset"), "bias"),
    "mean": "running_mean",
    "var": "running_var",
}
# These have the channels last; every other leaf has its axes in PyTorch's order.
_CHANNELS_LAST = ("kernel", "w")
# The parts of attention. PyTorch stacks the first three; Equinox appends `_proj` to them.
_STACKED = ("query", "key", "value")
_OUTPUTS = ("out", "output_proj", "linear")
# The dtype names of tensors that NumPy has no type for; jax.numpy uses the same names.
_SMALL = ("bfloat16", "float8_e4m3fn", "float8_e5m2")
# Equinox's batch norm before its state is split off: mean and variance, and the leaves that mark
# them as settled. After so many steps its correction for a start at zero vanishes.
_STATISTIC = re.compile(r"(?:ema|batch)_state_index/init/([01])$")
_SETTLED = {"ema_first_time_index/init": False, "batch_counter/init": 2**30}
_TRANSPOSED = re.compile(r"conv.*transpose", re.IGNORECASE)
_BUFFERS = ("running_mean", "running_var")


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
    | `out`, `output_proj`, `linear` of attention | `out_proj` |
    | anything else | the entry of the same name, as it is |

    Args:
        state_dict: A module, or its `state_dict()`: tensors or NumPy arrays by name. Only a module
            shows that a convolution with as many inputs as outputs is transposed.
        params: The pytree to fill: variables or parameters of Linen, a state or module of NNX, an
            Equinox module, dicts; arrays or `jax.ShapeDtypeStruct`s. Leaves that are not arrays
            stay unchanged, and so do PRNG keys and the counts beside them. For a float64 model,
            cast Flax's statistics: they are float32 whatever `param_dtype` is.
        names: Modules of `params`, such as `"Dense_0"`, to modules of PyTorch, such as `"hidden"`;
            or single leaves, such as `"Dense_0/kernel"`, to entries (`"hidden.weight"`) or to
            `Leaf`s, which give the order of axes explicitly. Paths are those of the pytree with
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
    entries, sources = _matched(state_dict, params, names)
    filled = [
        jnp.array(sources[name].take(entries)) if name in sources else _unfed(name, leaf)
        for name, leaf in named_leaves(params)
    ]
    return jax.tree.unflatten(jax.tree.structure(params), filled)


def leaves_from_torch(
    state_dict: Any,
    params: PyTree,
    names: Mapping[str, str | Leaf] = MappingProxyType({}),
) -> dict[str, Leaf]:
    """Return the name and layout in PyTorch of each parameter of a JAX model, by path.

    They are those that `params_from_torch` uses, with the same arguments; running statistics may
    have no leaf in `params`, because optimizers do not have them. An optimizer's moment has the
    axes of its parameter, and so the same layout. Some of the `Leaf`s also unfold an axis: those of
    `DenseGeneral`, and biases of Equinox's convolutions.

    Raises:
        TypeError: As in `params_from_torch`.
        ValueError: As in `params_from_torch`; or one tensor of PyTorch feeds several leaves, like
            `in_proj_weight` of `torch.nn.MultiheadAttention`. Those have no `Leaf`, which stands
            for a whole tensor.

    Note (PyTorch):
        A parameter group lists tensors; their names are those of `named_parameters()`.

    Example:
        >>> import numpy as np
        >>> state_dict = {"hidden.weight": np.ones((3, 2), "float32")}
        >>> params = {"Dense_0": {"kernel": np.zeros((2, 3), "float32")}}
        >>> leaves_from_torch(state_dict, params, {"Dense_0": "hidden"})
        {'Dense_0/kernel': Leaf(name='hidden.weight', transpose=(1, 0))}
    """
    _, sources = _matched(state_dict, params, names, optional=_BUFFERS)
    feeds = collections.Counter(source.leaf.name for source in sources.values())
    _refuse(
        [
            f"'{name}' has no Leaf: it is {source}, which feeds other leaves too"
            for name, source in sources.items()
            if feeds[source.leaf.name] > 1
        ]
    )
    return {name: source.leaf for name, source in sources.items()}


@dataclasses.dataclass(frozen=True)
class _Unfolded(Leaf):
    """A leaf with more axes than its tensor, whose shape is `folded` once its axes are in order."""

    folded: tuple[int, ...] = ()
    shape: tuple[int, ...] = ()

    def to_jax(self, array: np.ndarray) -> np.ndarray:
        return super().to_jax(array).reshape(self.shape)

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        return super().to_torch(array.reshape(self.folded))


@dataclasses.dataclass(frozen=True)
class _Source:
    """The source of a leaf: a tensor, or one of three equal parts along its first axis."""

    leaf: Leaf
    part: int | None = None

    def take(self, entries: Mapping[str, np.ndarray]) -> np.ndarray:
        return self.leaf.to_jax(_piece(entries[self.leaf.name], self.part))

    def __str__(self) -> str:
        return _described(self.leaf.name, self.part)


def _piece(array: np.ndarray, part: int | None) -> np.ndarray:
    if part is None:
        return array
    third = len(array) // 3
    return array[part * third : (part + 1) * third]


def _described(entry: str, part: int | None) -> str:
    return f"'{entry}'" if part is None else f"the {_STACKED[part]} third of '{entry}'"


def _refuse(problems: Sequence[str]) -> None:
    if problems:
        listed = "".join(f"\n- {problem}" for problem in problems)
        raise ValueError(f"state_dict must match params; got these differences:{listed}")


def _matched(
    state_dict: Any,
    params: PyTree,
    names: Mapping[str, str | Leaf],
    optional: Collection[str] = (),
) -> tuple[dict[str, np.ndarray], dict[str, _Source]]:
    """Return the entries of PyTorch, and the source of each leaf."""
    check_names(names)
    entries, transposed = _entries(state_dict), _transposed_in_torch(state_dict)
    leaves = [(path_name(path), path, leaf) for path, leaf in jax.tree.leaves_with_path(params)]
    counts = _counts([name for name, _, leaf in leaves if _is_key(leaf)])
    leaves = [at for at in leaves if _is_fed(at[0], at[2]) and at[0] not in counts]
    problems = _misspelt(names, [name for name, _, _ in leaves])
    sources: dict[str, _Source] = {}
    taken: dict[str, set[int | None]] = {}
    for name, path, leaf in leaves:
        try:
            key, given, part = _find(name, names, entries)
            entry = given if isinstance(given, str) else given.name
            taken.setdefault(entry, set()).add(part)
            if isinstance(given, str):
                if entry.rpartition(".")[0] in transposed or _is_transposed(name, path, params):
                    _refuse_transposed(name, entry, entries)
                given = _laid_out(name, key, leaf.shape, entry, _piece(entries[entry], part))
            sources[name] = _Source(given, part)
            _check_form(name, leaf, sources[name], entries)
        except ValueError as problem:
            problems.append(str(problem))
    _refuse(problems + _left_over(entries, taken, optional))
    return entries, sources


def _entries(state_dict: Any) -> dict[str, np.ndarray]:
    if callable(getattr(state_dict, "state_dict", None)):
        state_dict = state_dict.state_dict()
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            "state_dict must be a module, or a dict from names to tensors; got "
            f"{describe(state_dict)}."
        )
    return {name: _array(value) for name, value in state_dict.items()}


def _array(value: Any) -> np.ndarray:
    if not hasattr(value, "detach"):
        return np.asarray(value)
    value = value.detach().cpu()
    dtype = str(value.dtype).removeprefix("torch.")
    if dtype in _SMALL:
        return value.float().numpy().astype(getattr(jnp, dtype))
    return value.numpy()


def _is_fed(name: str, leaf: Any) -> bool:
    """Return whether a leaf comes from PyTorch: not a setting, a PRNG key or a mark of Equinox."""
    is_array = hasattr(leaf, "shape") and hasattr(leaf, "dtype")
    return is_array and _settled(name) is None and not _is_key(leaf)


def _unfed(name: str, leaf: Any) -> Any:
    settled = _settled(name)
    return leaf if settled is None else jnp.asarray(settled, leaf.dtype)


def _settled(name: str) -> int | None:
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


def _find(
    name: str, names: Mapping[str, str | Leaf], entries: Collection[str]
) -> tuple[str, str | Leaf, int | None]:
    """Return the key that determines a leaf's layout, the entry that feeds it, and its part."""
    spellings = _spellings(name)
    key = spellings[-1].rpartition("/")[2]
    for spelling in spellings:
        if spelling in names:
            given = names[spelling]
            entry = given if isinstance(given, str) else given.name
            if entry not in entries:
                raise ValueError(f"'{name}' has no entry: '{entry}' is not in state_dict.")
            return key, given, None
    sought, recurrent = "", False
    for spelling in spellings:
        target, keys = _in_module(spelling, names)
        candidates = list(_candidates(target, keys, entries))
        for entry, part in candidates:
            if entry in entries:
                return keys[-1], entry, part
        sought = candidates[0][0]
        owners = [_joined(target, *keys[:end], "weight_ih") for end in range(len(keys))]
        recurrent |= any(entry.startswith(owner) for owner in owners for entry in entries)
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
    """Yield the entries that may feed a leaf, and the part of each, the likeliest first."""
    *modules, leaf = keys
    kind = _TORCH_NAMES.get(leaf, leaf)
    yield _joined(target, *modules, kind), None
    yield _joined(target, *modules, leaf), None
    if not modules:
        return
    *owners, role = modules
    owner = _joined(target, *owners)
    if not any(_joined(owner, name) in entries for name in ("in_proj_weight", "q_proj_weight")):
        return
    projection = role.removesuffix("_proj")
    if projection in _STACKED:
        yield _joined(owner, f"in_proj_{kind}"), _STACKED.index(projection)
        yield _joined(owner, f"{projection[0]}_proj_{kind}"), None
    elif role in _OUTPUTS:
        yield _joined(owner, "out_proj", kind), None


def _joined(*names: str) -> str:
    return ".".join(name for name in names if name)


def _laid_out(name: str, key: str, shape: tuple[int, ...], entry: str, array: np.ndarray) -> Leaf:
    """Return the order of a tensor's axes in JAX from the leaf's key; shapes only confirm it."""
    same_name = key == entry.rpartition(".")[2]
    channels_last = key in _CHANNELS_LAST and not same_name
    known = same_name or key in _TORCH_NAMES or array.ndim < 2
    if channels_last:
        known = array.ndim == 2 or array.ndim == len(shape) > 2
    if not known:
        raise ValueError(
            f"'{name}' of shape {shape} has no known layout for '{entry}' of shape {array.shape}. "
            "Pass Leaf(name, transpose)."
        )
    order = (*range(2, array.ndim), 1, 0) if channels_last else None
    leaf = Leaf(entry, order)
    folded = leaf.to_jax(array).shape
    if folded != shape and (array.ndim == 1 or channels_last) and _unfolds(folded, shape):
        return _Unfolded(entry, order, folded, shape)
    return leaf


def _unfolds(folded: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Return whether one or two axes can each be unfolded into consecutive axes."""
    if len(folded) == 1:
        return math.prod(shape) == folded[0]
    cuts = ((math.prod(shape[:cut]), math.prod(shape[cut:])) for cut in range(1, len(shape)))
    return len(folded) == 2 and folded in cuts


def _check_form(name: str, leaf: Any, source: _Source, entries: Mapping[str, np.ndarray]) -> None:
    entry, order = entries[source.leaf.name], source.leaf.transpose
    if order is not None and sorted(order) != list(range(entry.ndim)):
        raise ValueError(f"'{name}': {source.leaf} must order the axes of shape {entry.shape}.")
    arrived = source.take(entries)
    if arrived.shape != leaf.shape:
        raise ValueError(
            f"'{name}' must have shape {arrived.shape}, like {source} of shape {entry.shape} in "
            f"JAX's layout; got {leaf.shape} in params."
        )
    if arrived.dtype != leaf.dtype:
        raise ValueError(
            f"'{name}' must be {arrived.dtype}, like {source}; got {leaf.dtype} in params. Cast "
            "one of them."
        )
    if jax.dtypes.canonicalize_dtype(arrived.dtype) != arrived.dtype:
        raise ValueError(
            f"'{name}' must not be {arrived.dtype} in 32-bit mode. Call "
            "jax.config.update('jax_enable_x64', True)."
        )


def _transposed_in_torch(state_dict: Any) -> set[str]:
    """Return the transposed convolutions of a module; a dict of tensors shows none."""
    modules = state_dict.named_modules() if hasattr(state_dict, "named_modules") else ()
    return {name for name, module in modules if getattr(module, "transposed", False)}


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


def _left_over(
    entries: Mapping[str, np.ndarray],
    taken: Mapping[str, Collection[int | None]],
    optional: Collection[str],
) -> list[str]:
    # num_batches_tracked only counts: no JAX layer stores it, and nothing is computed from it.
    ignored = {"num_batches_tracked", *optional}
    left = []
    for entry in entries:
        parts = taken.get(entry, ())
        if entry.rpartition(".")[2] in ignored or None in parts:
            continue
        missing = [part for part in range(3) if part not in parts] if parts else [None]
        left += [_described(entry, part) for part in missing]
    if not left:
        return []
    return [f"no leaf of params takes {', '.join(left)}. Map them in names, or leave them out."]
