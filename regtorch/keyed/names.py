"""The names of a model's modules, and of the draws of PyTorch's own dropout layers."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from regtorch.keyed.calls import site_of

_WRAPPERS = (DataParallel, DistributedDataParallel, AveragedModel)
_WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def module_paths(
    module: nn.Module, path: str = "", found: dict[nn.Module, str] | None = None
) -> dict[nn.Module, str]:
    """Return all modules but wrappers, each with its first path, without the wrappers' parts.

    Those of TorchScript are missing.
    """
    found = {} if found is None else found
    if isinstance(module, torch.jit.ScriptModule):  # does not run in Python
        return found
    is_wrapper = isinstance(module, _WRAPPERS)
    if not is_wrapper and not any(name in module._modules for name in _WRAPPED):
        found[module] = path
    for name, child in module._modules.items():
        if child is not None and child not in found:
            wrapped = name in _WRAPPED or (is_wrapper and name == "module")
            module_paths(child, path if wrapped else join(path, name), found)
    return found


def join(*parts: str) -> str:
    """Return a dotted path of the parts that are not empty."""
    return ".".join(filter(None, parts))


def layer_names(module: Any, path: str) -> list[str]:
    """Return the names of the draws of a dropout layer of PyTorch; none for other modules."""
    if isinstance(module, _DropoutNd):
        return [path]
    if isinstance(module, nn.MultiheadAttention):
        return [path] if module.dropout else []
    between = module.num_layers - 1 if isinstance(module, nn.RNNBase) and module.dropout else 0
    return [join(path, str(layer)) for layer in range(between)]


def check_layers(model: nn.Module) -> None:
    """Raise if a dropout layer in a model, or the model around a converted part, is not converted.

    Raise also if parameters have no values yet, which a forward would draw.
    """
    paths = module_paths(model)
    whole = next(iter(paths), None)
    if whole is not None and site_of(whole) is None and any(map(site_of, paths)):
        raise ValueError(
            f"model must be converted as a whole; got a {type(whole).__name__} of which only parts "
            "are, and whose own draws would have no keys. Pass the part that is converted, or call "
            "regtorch.keyed.revert(model) and convert the whole."
        )
    for module, path in paths.items():
        if isinstance(module, LazyModuleMixin) and cast("Any", module).has_uninitialized_params():
            raise ValueError(
                f"module {path!r} must have its parameters; got a {type(module).__name__} that was "
                "never called. Call model.eval()(batch) once, before set_key."
            )
        if site_of(module) is None and layer_names(module, path):
            raise ValueError(
                f"module {path!r} must be converted; got a {type(module).__name__}, which draws "
                "from PyTorch's generator. Call regtorch.keyed.convert(model) first."
            )
