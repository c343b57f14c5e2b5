"""Explicit keys for the dropout of an existing, unmodified PyTorch model.

    model = regtorch.keyed.convert(model)
    for step, batch in enumerate(batches):
        regtorch.keyed.set_key(model, root, step)
        loss(model(batch)).backward()

**Names.** A site has the dotted path of its module in the model passed to `convert`, such as
`"encoder.layers.0.dropout1"`; a shared module has its first path. `torch.nn.MultiheadAttention` is
one site. In `torch.nn.LSTM`, `GRU` and `RNN`, the dropout after layer 0 has the path of the module
and `.0`, and so on.

**Keys.** The first call of a site after `set_key(model, root, step)` draws from
`regtorch.site_key(root, step, name)`, and call n after it from `regtorch.site_key(root, step,
f"{name}#{n}")`, n = 1, 2, …: repeated calls in a forward pass, and micro-batches of a step, draw
different masks. `regjax.site_key` returns the same keys.

**Checkpoints.** `torch.utils.checkpoint` runs a forward again in the backward pass. A site called
once since `set_key` draws the same mask again; a site called more often raises an error, since the
repeated call is unknown: use `replay`.

**Limitations.** `F.dropout` in the forward of a user's module is not converted: use
`torch.nn.Dropout`, or `regtorch.dropout` with a key. Pass keys to the functions under
`torch.func.vmap`, where the mapped rows would share a mask, and under `torch.compile`, which would
recompile at every step.
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
    """Make every dropout of a model draw its masks from explicit keys, in place; return the model.

    It converts PyTorch's dropout modules, and `torch.nn.MultiheadAttention`, `LSTM`, `GRU` and
    `RNN` where they drop, also inside `torch.nn.Transformer`. Only the class of a module changes,
    not its parameters, hooks, attributes, state dict, references to it, or evaluation. A second
    call changes nothing.

    Args:
        model: Any module; it may itself be a dropout layer.

    Raises:
        TypeError: A module is of a subclass of one of these, whose forward is unknown; the message
            has its path. No module is converted then.
        ValueError: A module was converted as part of another model, under another name. No module
            is converted then.

    Example:
        >>> import torch, regtorch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.5))
        >>> regtorch.keyed.sites(regtorch.keyed.convert(model))
        ['1']
        >>> regtorch.keyed.set_key(model, regtorch.key(0), step=3)
        >>> x, key = torch.ones(2, 4), regtorch.site_key(regtorch.key(0), 3, "1")
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
        >>> regtorch.keyed.revert(regtorch.keyed.convert(torch.nn.Dropout(0.5)))
        Dropout(p=0.5, inplace=False)
    """
    for module in _keyed_modules(model):
        del module.sites
        module.__class__ = ORIGINAL[type(module)]
    return model


def sites(model: nn.Module) -> list[str]:
    """Return the names of a converted model's sites, for `regtorch.site_key`, in module order.

    In a part of a converted model they are the names in the whole.

    Example:
        >>> import torch, regtorch
        >>> regtorch.keyed.sites(regtorch.keyed.convert(torch.nn.TransformerEncoderLayer(8, 2, 16)))
        ['self_attn', 'dropout', 'dropout1', 'dropout2']
    """
    return [site.name for site in _sites(model)]


def set_key(model: nn.Module, root: Tensor, step: int | Tensor) -> None:
    """Set the key of every site of a converted model for one step, and count its calls from 0.

    Call this before each forward pass, and not between a forward pass and its backward.

    Args:
        model: A converted model.
        root: One key; it may be used again, as with `site_key`.
        step: The step of training, an integer of at least 0, or a 0-d integer tensor.

    Raises:
        TypeError: `root` is not a key, or `step` is not an integer.
        ValueError: `root` is a batch of keys; `step` is negative or not below 2**64; or a module of
            the model drops and is not converted.

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

    They are for the forward pass of `model`, a converted model or the part that is checkpointed,
    and for its repetition, which draws the same masks. Pass them with `use_reentrant=False`.

    Example:
        >>> import torch, regtorch
        >>> from torch.utils.checkpoint import checkpoint
        >>> model = regtorch.keyed.convert(torch.nn.Sequential(torch.nn.Dropout(0.5)))
        >>> regtorch.keyed.set_key(model, regtorch.key(0), step=0)
        >>> x, contexts = torch.ones(6, requires_grad=True), lambda: regtorch.keyed.replay(model)
        >>> for _ in range(2):
        ...     y = checkpoint(model, x, use_reentrant=False, context_fn=contexts)
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
