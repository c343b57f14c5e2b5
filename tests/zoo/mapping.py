"""How many parameters of a model `regjax.interop` maps to a JAX model, and whether correctly.

`map_by_layer` needs no JAX model: it lays out the parameters as a port to Flax does that keeps the
names of the modules. `map_to_flax` fills the model that transformers has for Flax.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
from torch import nn

import regjax
import regtorch
from regjax._decay.paths import named_leaves
from regjax.interop import Leaf, leaves_from_torch, params_from_torch
from tests.zoo.models import Case

KERNELS = (nn.Linear, nn.modules.conv._ConvNd)
TABLES = (nn.Embedding, nn.EmbeddingBag)
NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
PARTS = ("query", "key", "value")


class Mapped(NamedTuple):
    """Numbers of elements of a model's parameters.

    Attributes:
        parameters: All.
        by_layer: Those that need a rule: their layer decides their name or layout in JAX.
        as_they_are: Those of a model's own, which have the same name and layout.
        refused: The rest, such as those of recurrent layers; an error names each.
        reasons: The reasons of these errors.
    """

    parameters: int
    by_layer: int
    as_they_are: int
    refused: int
    reasons: tuple[str, ...]


class Port(NamedTuple):
    """A parameter in JAX: the value expected, and the name and the section in PyTorch."""

    value: np.ndarray
    name: str
    section: tuple[int, int] | None
    has_rule: bool


def map_by_layer(model: nn.Module) -> Mapped:
    """Map a model to a tree of Flax's names and layouts, and compare all values, both ways.

    Raises:
        AssertionError: A mapped value is not the expected one, or does not map back.
    """
    arrays = {name: p.detach().numpy() for name, p in model.named_parameters()}
    ports = {path: port for name in arrays for path, port in _ports(model, name, arrays[name])}
    tree: dict[str, Any] = {}
    for path, port in ports.items():
        *parents, key = path.split("/")
        functools.reduce(lambda node, name: node.setdefault(name, {}), parents, tree)[key] = (
            port.value
        )
    refused: dict[str, str] = {}
    try:
        leaves = leaves_from_torch(model, tree)
    except ValueError as error:
        refused = dict(re.findall(r"^- '(.*?)' (.*)$", str(error), re.MULTILINE))
        if not refused.keys() <= ports.keys():
            raise
        leaves = leaves_from_torch(
            model, tree, {path: _leaf(path, ports[path]) for path in refused}
        )
    assert leaves.keys() == ports.keys()
    for path, port in ports.items():
        leaf, array = leaves[path], arrays[port.name]
        assert (leaf.name, leaf.section) == (port.name, port.section), path
        np.testing.assert_array_equal(leaf.to_jax(array), port.value, err_msg=path)
        np.testing.assert_array_equal(leaf.to_torch(port.value), array[leaf.index], err_msg=path)
    given = {path: port for path, port in ports.items() if path not in refused}
    by_layer = sum(port.value.size for port in given.values() if port.has_rule)
    total = sum(port.value.size for port in ports.values())
    rest = total - sum(port.value.size for port in given.values())
    reasons = sorted({text.partition(":")[0].partition(",")[0] for text in refused.values()})
    return Mapped(total, by_layer, total - by_layer - rest, rest, tuple(reasons))


def _ports(model: nn.Module, name: str, array: np.ndarray) -> Iterator[tuple[str, Port]]:
    """Yield the paths in Flax of a parameter of PyTorch, with their values."""
    *parents, key = name.split(".")
    owner = model.get_submodule(".".join(parents))
    is_conv1d = type(owner).__name__ == "Conv1D"  # of transformers: (in, out), as in Flax
    has_kernel = isinstance(owner, KERNELS) or is_conv1d
    if isinstance(owner, nn.MultiheadAttention) and key.startswith("in_proj_"):
        kind = key.removeprefix("in_proj_")
    elif parents and parents[-1] in ("qkv", "c_attn") and has_kernel and array.shape[-1] % 3 == 0:
        kind, parents = key, parents[:-1]
    else:
        kind = ""
    if isinstance(owner, nn.RNNBase):  # the gates are separate in Flax, and have one bias
        yield "/".join((*parents, "cell", key)), Port(array, name, None, False)
        return
    if kind:
        axis = array.ndim - 1 if is_conv1d else 0
        third = array.shape[axis] // 3
        for part, value in zip(PARTS, np.split(array, 3, axis), strict=True):
            start = PARTS.index(part) * third
            leaf = "kernel" if kind == "weight" else kind
            value = value if is_conv1d or kind == "bias" else _transpose(value)
            yield "/".join((*parents, part, leaf)), Port(value, name, (start, start + third), True)
        return
    value = array
    if parents[-2:] == ["parametrizations", "weight"]:  # the layout of Equinox
        parents, key = parents[:-2], {"original0": "g", "original1": "weight"}[key]
        yield "/".join((*parents, key)), Port(value, name, None, True)
        return
    if key == "weight" and has_kernel:
        key, value = "kernel", array if is_conv1d else _transpose(array)
    elif key == "weight" and isinstance(owner, TABLES):
        key = "embedding"
    elif key == "weight" and isinstance(owner, NORMS):
        key = "scale"
    has_rule = key != name.rpartition(".")[2] or (key == "bias" and has_kernel)
    has_rule |= key == "bias" and isinstance(owner, NORMS)
    yield "/".join((*parents, key)), Port(value, name, None, has_rule)


def _transpose(array: np.ndarray) -> np.ndarray:
    return np.transpose(array, (*range(2, array.ndim), 1, 0))


def _leaf(path: str, port: Port) -> Leaf:
    """Return the layout of a parameter as a user gives it."""
    order = (*range(2, port.value.ndim), 1, 0) if path.endswith("/kernel") else None
    return Leaf(port.name, order, port.section)


class Filled(NamedTuple):
    """The leaves of the model for Flax that were filled with the values of transformers' own.

    Attributes:
        leaves: All.
        filled: Those that are filled, and equal.
        names: The number of names given.
        left_out: The elements of PyTorch that the model for Flax has no leaf for.
        decays_unlike: The leaves that a rule of decay decides differently than in PyTorch, by rule.
    """

    leaves: int
    filled: int
    names: int
    left_out: int
    decays_unlike: dict[str, int]


def flax_class(case: Case) -> type | None:
    """Return the class of transformers for Flax, if there is one."""
    import transformers

    if case.config is None or not hasattr(transformers, "FlaxBertModel"):  # transformers 5
        return None
    from transformers.models.auto.modeling_flax_auto import FLAX_MODEL_MAPPING_NAMES

    kind = case.config().model_type
    clip = {"clip_text_model": "FlaxCLIPTextModel", "clip_vision_model": "FlaxCLIPVisionModel"}
    name = {**FLAX_MODEL_MAPPING_NAMES, **clip}.get(kind)
    has_flax = kind != "wav2vec2" or case.config().do_stable_layer_norm
    return getattr(transformers, name) if name and has_flax else None


def map_to_flax(case: Case, model: nn.Module, flax: Any) -> Filled:
    """Fill a model for Flax, and compare with the conversion of transformers, bit for bit.

    Raises:
        AssertionError: A leaf differs.
        ValueError: The models do not match.
    """
    import jax
    from transformers.modeling_flax_pytorch_utils import convert_pytorch_state_dict_to_flax

    with (
        mock.patch.object(jax.numpy, "clip", _clip(jax.numpy.clip)),  # T5's needs the old names
        jax.numpy_rank_promotion("allow"),
        jax.numpy_dtype_promotion("standard"),
    ):
        port = flax(case.config(), _do_init=False)
    shapes = port.params_shape_tree
    tensors = model.state_dict()
    # Sinusoids that do not train; some models for Flax compute them.
    known = {path.rpartition("/")[0].replace("/", ".") for path, _ in named_leaves(shapes)}
    left = {n for n, p in model.named_parameters() if not p.requires_grad}
    left = {name for name in left if name.rpartition(".")[0] not in known}
    source: Any = {k: v for k, v in tensors.items() if k not in left} if left else model
    names = names_for(model)
    filled = params_from_torch(source, shapes, names)
    theirs = convert_pytorch_state_dict_to_flax(
        dict(tensors), SimpleNamespace(params=shapes, base_model_prefix=port.base_model_prefix)
    )
    pairs = zip(jax.tree.leaves(filled), jax.tree.leaves(_like(theirs, filled)), strict=True)
    equal = sum(np.array_equal(ours, other) for ours, other in pairs)
    left_out = sum(tensors[name].numel() for name in left)
    params = shapes.get("params", shapes)
    leaves = leaves_from_torch(source, params, names)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    unlike = {}
    for rule in ("default", "huggingface", "timm"):
        here, there = regtorch.decay_mask(model, rule), regjax.decay_mask(params, rule)
        unlike[rule] = sum(
            decision != here[leaves[path].name]
            for path, decision in named_leaves(there)
            if leaves[path].name in trained
        )
    return Filled(len(jax.tree.leaves(shapes)), equal, len(names), left_out, unlike)


def names_for(model: nn.Module) -> dict[str, str | Leaf]:
    """Return the names that a model for Flax needs."""
    names: dict[str, str | Leaf] = {}
    for name, module in model.named_modules():
        path = name.replace(".", "/")
        if type(module).__name__ == "Conv1D":  # FlaxConv1D stores (out, in)
            names[f"{path}/kernel"] = Leaf(f"{name}.weight", (1, 0))
        if hasattr(module, "parametrizations"):
            for old, new in (("weight_g", "original0"), ("weight_v", "original1")):
                names[f"{path}/{old}"] = Leaf(f"{name}.parametrizations.weight.{new}")
    return names


def _like(tree: Any, other: Any) -> Any:
    """Return the part of a tree of dicts that another has."""
    return {k: _like(tree[k], v) for k, v in other.items()} if isinstance(other, dict) else tree


def _clip(clip: Callable[..., Any]) -> Callable[..., Any]:
    """Return `jax.numpy.clip` with the names of bounds that transformers 4 uses."""

    def clip_by_old_names(x: Any, *bounds: Any, **named: Any) -> Any:
        return clip(x, *bounds, **{name.removeprefix("a_"): v for name, v in named.items()})

    return clip_by_old_names
