"""Explicit keys for the dropout of an existing, unmodified PyTorch model.

    model = regtorch.keyed.convert(model)
    for step, batch in enumerate(batches):
        regtorch.keyed.set_key(model, root, step)
        loss(model(batch)).backward()

**Names.** A site is named after its module's dotted path in the model that was passed to `convert`:
`"encoder.layers.0.dropout1"`. A module that the model holds in several places has the first of its
names. The dropout of `torch.nn.MultiheadAttention` has the path of the attention; the one after
layer 0 of a `torch.nn.LSTM`, `GRU` or `RNN` its path and `.0`, and so on.

**Keys.** The first call of a site after `set_key(model, root, step)` draws from
`regtorch.site_key(root, step, name)`, the n-th call after it from `regtorch.site_key(root, step,
f"{name}#{n}")`, n = 1, 2, …: a module that is called twice in a forward pass draws different masks,
and so does each micro-batch of a step that accumulates gradients. A JAX model gets the same masks
from `regjax.site_key`.

**Checkpoints.** `torch.utils.checkpoint` runs a forward again in the backward pass. A site that was
called once since `set_key` draws the same mask again. A site that was called more often cannot know
which call is repeated, and raises an error; use `replay` there.

**Limitations.** `F.dropout` in the forward of a user's module is not converted: use
`torch.nn.Dropout`, or `regtorch.dropout` with a key. Under `torch.func.vmap` the mapped rows share
a mask, and under `torch.compile` each step's key is a constant that causes a recompilation: pass
keys to the functions there.
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
    """List the public names, for `dir` and completion."""
    return __all__


_M = TypeVar("_M", bound=nn.Module)
# Classes with a dropout of their own, whose subclasses cannot be converted.
_FAMILY = (*KEYED, nn.RNNBase)


def convert(model: _M) -> _M:
    """Make every dropout of a model draw its masks from explicit keys, in place.

    This converts the modules of PyTorch's dropout family, and `torch.nn.MultiheadAttention`,
    `LSTM`, `GRU` and `RNN` where they drop, also inside `torch.nn.Transformer` and its layers. Only
    the class of a module changes: its parameters, hooks, attributes and state dict, every reference
    to it, and evaluation stay the same. A second call changes nothing.

    Args:
        model: Any module; it may itself be a dropout layer.

    Returns:
        The same model.

    Raises:
        TypeError: A module is of a subclass of one of these, whose forward is unknown; the message
            has its path. No module is converted then.
        ValueError: A module was converted as part of another model, under another name. No module
            is converted then.

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
        _check_class(path, module)
        _check_names(path, module)
        keyed = KEYED.get(type(module))
        names = keyed.site_names(module, path) if keyed else []
        if names:
            found.append((module, keyed, names))
    for module, keyed, names in found:
        module.sites = tuple(map(Site, names))
        module.__class__ = keyed
    return model


def revert(model: _M) -> _M:
    """Undo `convert` in a converted model, or in a part of one, and return it.

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
    """Return the names of a converted model's sites, for `regtorch.site_key`, in module order.

    In a part of a converted model the names stay those of the whole.

    Example:
        >>> import torch, regtorch
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16)
        >>> regtorch.keyed.sites(regtorch.keyed.convert(layer))
        ['self_attn', 'dropout', 'dropout1', 'dropout2']
    """
    return [site.name for site in _sites(model)]


def set_key(model: nn.Module, root: Tensor, step: int) -> None:
    """Give every site of a converted model its key for one step, and count its calls from 0.

    The root key is read once here; the keys of the calls are then derived on the CPU. Call this
    before each forward pass, and not between a forward pass and its backward.

    Args:
        model: A converted model.
        root: One key; it may be used again, as with `site_key`.
        step: The step of training, an integer of at least 0, or a 0-d integer tensor.

    Raises:
        TypeError: `root` is not a key, or `step` is not an integer.
        ValueError: `root` is a batch of keys; `step` is negative or not below 2**64; or a module of
            the model drops and is not converted.

    Note (JAX):
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
                f"module {path!r} must be converted; got a {type(module).__name__}, which draws "
                "from PyTorch's generator. Call regtorch.keyed.convert(model) first."
            )
    for site in _sites(model):
        site.root, site.step, site.calls = (high, low), step, 0


def replay(
    model: nn.Module,
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return contexts for `torch.utils.checkpoint`, if a site is called repeatedly after `set_key`.

    Pass `context_fn=lambda: regtorch.keyed.replay(model)`, with `use_reentrant=False`: the repeated
    forward pass then draws the same masks as the first one. `model` is a converted model, or the
    part of one that is checkpointed. The contexts are those of the forward pass and of its
    repetition.

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


def _check_class(path: str, module: nn.Module) -> None:
    known = type(module) in KEYED or isinstance(module, Keyed)
    drops = getattr(module, "p", 0) or getattr(module, "dropout", 0)
    if isinstance(module, _FAMILY) and drops and not known:
        base = next(kind for kind in type(module).__mro__ if kind in _FAMILY)
        raise TypeError(
            f"module {path!r} must be of a class whose forward is known; got "
            f"{type(module).__name__}, a subclass of torch.nn.{base.__name__}. Use a "
            f"torch.nn.{base.__name__} instead, or call regtorch.dropout in its forward, or set "
            "its dropout to 0."
        )


def _check_names(path: str, module: nn.Module) -> None:
    if isinstance(module, Keyed):
        names = [site.name for site in module.sites]
        if names != module.site_names(module, path):
            raise ValueError(
                f"module {path!r} must not be converted as part of another model; got the name "
                f"{', '.join(map(repr, names))}. Call regtorch.keyed.revert(model), then convert "
                "the "
                "whole model."
            )
