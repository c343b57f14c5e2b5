"""Explicit keys for the dropout of an existing, unmodified PyTorch model.

    model = regtorch.keyed.convert(model)
    for step, batch in enumerate(batches):
        regtorch.keyed.set_key(model, root, step)
        loss(model(batch)).backward()

**Names.** A site is named after its module's dotted path in the model that was given to `convert`:
`"encoder.layers.0.dropout1"`. A module that the model holds in several places has the name of the
first. The dropout of `torch.nn.MultiheadAttention` has the path of the attention; the one after
layer 0 of a `torch.nn.LSTM`, `GRU` or `RNN` its path and `.0`, and so on.

**Keys.** The first call of a site after `set_key(model, root, step)` draws from
`regtorch.site_key(root, step, name)`, the n-th call after it from
`regtorch.site_key(root, step, f"{name}#{n}")`, n = 1, 2, …: a module that is called twice in a
forward pass, and each micro-batch of a step that accumulates gradients, has masks of its own. A JAX
model gets the same masks from `regjax.site_key`.

**Checkpoints.** `torch.utils.checkpoint` runs a forward again in the backward pass. A site that was
called once since `set_key` draws the same mask again by itself. One that was called more often
cannot know which call it is and says so; there `replay` tells it.

**What is not seen.** `F.dropout` in the forward of a model's own module: use `torch.nn.Dropout`, or
`regtorch.dropout` with a key. Under `torch.func.vmap` the mapped rows share a mask, and under
`torch.compile` each step's key is a constant that compiles again: pass keys to the functions there.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from torch import Tensor, nn

from regtorch._checks import check_module
from regtorch._random.keys import check_key, check_step
from regtorch.keyed.layers import KEYED, ORIGINAL, Keyed, Site

__all__ = [
    "Site",
    "convert",
    "replay",
    "revert",
    "set_key",
    "sites",
]


def __dir__() -> list[str]:
    """List what is public, for `dir` and completion."""
    return __all__


_M = TypeVar("_M", bound=nn.Module)
# What has a dropout of its own: by these a subclass is known that cannot be converted.
_FAMILY = (*KEYED, nn.RNNBase)


def convert(model: _M) -> _M:
    """Makes every dropout of a model draw its masks from explicit keys, in place.

    The modules of PyTorch's dropout family, and `torch.nn.MultiheadAttention`, `LSTM`, `GRU` and
    `RNN` where they drop, also inside `torch.nn.Transformer` and its layers. Each stays the same
    object with the same parameters, hooks and attributes, and changes its class: the state dict,
    every reference to a module, and evaluation are what they were. A second call changes nothing.

    Args:
        model: any module; it may itself be a dropout layer.

    Returns:
        The same model.

    Raises:
        TypeError: a module is of a subclass of one of these, whose forward is not known; named by
            its path. Nothing is converted then.
        ValueError: a module was converted as part of another model, under another name. Nothing is
            converted then.

    Example:
        >>> import torch, regtorch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.5))
        >>> model = regtorch.keyed.convert(model)
        >>> regtorch.keyed.sites(model)
        ['1']
        >>> regtorch.keyed.set_key(model, regtorch.key(0), step=3)
        >>> x = torch.ones(2, 4)
        >>> key = regtorch.site_key(regtorch.key(0), 3, "1")
        >>> torch.equal(model(x), regtorch.dropout(model[0](x), 0.5, key=key))
        True
    """
    found = []
    for path, module in check_module("model", model).named_modules():
        _refuse_unknown(path, module)
        _refuse_renamed(path, module)
        keyed = KEYED.get(type(module))
        names = keyed.site_names(module, path) if keyed else []
        if names:
            found.append((module, keyed, names))
    for module, keyed, names in found:
        module.sites = tuple(map(Site, names))
        module.__class__ = keyed
    return model


def revert(model: _M) -> _M:
    """Undoes `convert`: the same modules are PyTorch's own again.

    Args:
        model: a converted model, or a part of one.

    Returns:
        The same model.

    Example:
        >>> import torch, regtorch
        >>> model = regtorch.keyed.convert(torch.nn.Sequential(torch.nn.Dropout(0.5)))
        >>> regtorch.keyed.revert(model)
        Sequential(
          (0): Dropout(p=0.5, inplace=False)
        )
    """
    for module in _keyed_modules(model):
        del module.sites
        module.__class__ = ORIGINAL[type(module)]
    return model


def sites(model: nn.Module) -> list[str]:
    """The names of a converted model's sites, in the order of its modules.

    Args:
        model: a converted model, or a part of one, whose names stay those of the whole.

    Returns:
        The names that `regtorch.site_key` takes.

    Example:
        >>> import torch, regtorch
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16)
        >>> regtorch.keyed.sites(regtorch.keyed.convert(layer))
        ['self_attn', 'dropout', 'dropout1', 'dropout2']
    """
    return [site.name for site in _sites(model)]


def set_key(model: nn.Module, root: Tensor, step: int) -> None:
    """Gives every site of a converted model its key for one step, and counts its calls from 0.

    The root key is read once here; the keys of the calls are then derived on the CPU. Call it
    before each forward pass, and not between a forward pass and its backward.

    Args:
        model: a converted model.
        root: one key. As with `site_key`, it is not used up.
        step: the step of training, an integer of at least 0, or a 0-d integer tensor.

    Raises:
        TypeError: `root` is not a key, or `step` is not an integer.
        ValueError: `root` is a batch of keys; `step` is negative or not below 2**64; or a module of
            the model drops and is not converted.

    JAX:
        `regjax.site_key(root, step, name)` is the key of the site `name`.

    Example:
        >>> import torch, regtorch
        >>> model = regtorch.keyed.convert(torch.nn.Sequential(torch.nn.Dropout(0.5)))
        >>> regtorch.keyed.set_key(model, regtorch.key(0), step=0)
        >>> model(torch.ones(6))
        tensor([0., 2., 2., 2., 0., 2.])
    """
    check_module("model", model)
    high, low = check_key(root, "root").tolist()
    step = check_step(step)
    for path, module in model.named_modules():
        keyed = KEYED.get(type(module))
        if keyed and keyed.site_names(module, path):
            raise ValueError(
                f"module {path!r} ({type(module).__name__}) is not converted, and would draw from "
                "PyTorch's generator: call regtorch.keyed.convert(model) first."
            )
    for site in _sites(model):
        site.root, site.step, site.calls = (high, low), step, 0


def replay(
    model: nn.Module,
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For `torch.utils.checkpoint`, where a site is called more than once since `set_key`.

    Pass `context_fn=lambda: regtorch.keyed.replay(model)`, with `use_reentrant=False`: the forward
    pass that is made again then draws what the first one drew.

    Args:
        model: a converted model, or the part of one that is checkpointed.

    Returns:
        The contexts of the forward pass and of its repetition.

    Example:
        >>> import torch, regtorch
        >>> from torch.utils.checkpoint import checkpoint
        >>> model = regtorch.keyed.convert(torch.nn.Sequential(torch.nn.Dropout(0.5)))
        >>> regtorch.keyed.set_key(model, regtorch.key(0), step=0)
        >>> x = torch.ones(6, requires_grad=True)
        >>> for _ in range(2):
        ...     y = checkpoint(
        ...         model, x, use_reentrant=False, context_fn=lambda: regtorch.keyed.replay(model)
        ...     )
        >>> y.sum().backward()
        >>> torch.equal(x.grad, y)
        True
    """
    check_module("model", model)
    begun: list[Site] = []

    @contextlib.contextmanager
    def first() -> Iterator[None]:
        begun[:] = [dataclasses.replace(site, replayed=True) for site in _sites(model)]
        yield

    @contextlib.contextmanager
    def again() -> Iterator[None]:
        places = list(_sites(model))
        now = [dataclasses.replace(site) for site in places]
        _write(places, begun)
        try:
            yield
        finally:
            _write(places, now)

    return first(), again()


def _write(places: list[Site], states: list[Site]) -> None:
    for site, state in zip(places, states, strict=True):
        vars(site).update(vars(state))


def _keyed_modules(model: nn.Module) -> list[Any]:
    return [
        module for module in check_module("model", model).modules() if isinstance(module, Keyed)
    ]


def _sites(model: nn.Module) -> Iterator[Site]:
    return (site for module in _keyed_modules(model) for site in module.sites)


def _refuse_unknown(path: str, module: nn.Module) -> None:
    known = type(module) in KEYED or isinstance(module, Keyed)
    drops = getattr(module, "p", 0) or getattr(module, "dropout", 0)
    if isinstance(module, _FAMILY) and drops and not known:
        base = next(kind for kind in type(module).__mro__ if kind in _FAMILY)
        raise TypeError(
            f"module {path!r} is a {type(module).__name__}, a subclass of torch.nn."
            f"{base.__name__} whose forward may differ, and cannot be converted. Put a torch.nn."
            f"{base.__name__} in its place, or write its forward with regtorch.dropout, or set its "
            "dropout to 0."
        )


def _refuse_renamed(path: str, module: nn.Module) -> None:
    if isinstance(module, Keyed):
        names = [site.name for site in module.sites]
        if names != module.site_names(module, path):
            raise ValueError(
                f"module {path!r} was converted as part of another model, under the name "
                f"{', '.join(map(repr, names))}. Call regtorch.keyed.revert(model) first, then "
                "convert the whole."
            )
