"""Errors for arguments that have another name in PyTorch, Optax, Equinox, Keras or timm.

A function of either package accepts its own names only. A call such as `sgd(lr=0.1)` raises a
TypeError that names the argument to pass.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
Class = TypeVar("Class", bound=type)

# For each foreign name: its counterparts, and how to pass each. The error names the first that the
# function has.
RENAMED: Mapping[str, Mapping[str, str]] = {
    "attn_mask": {"mask": "mask=attn_mask"},
    "b1": {"betas": "betas=(b1, b2)"},
    "b2": {"betas": "betas=(b1, b2)"},
    "decay": {"alpha": "alpha=decay"},
    "deterministic": {"inference": "inference=deterministic"},
    "drop_prob": {"rate": "rate=drop_prob", "p": "p=drop_prob"},
    "dropout_p": {"dropout_rate": "dropout_rate=dropout_p"},
    "generator": {"key": "key=key", "rng": "rng=key"},
    "inference": {"deterministic": "deterministic=inference"},
    "input": {"x": "x=input"},
    "key": {"rng": "rng=key"},
    "lr": {"learning_rate": "learning_rate=lr"},
    "p": {"rate": "rate=p"},
    "rate": {"p": "p=rate"},
    "rng": {"key": "key=rng"},
    "seed": {"key": "key=key", "rng": "rng=key"},
    "train": {
        "deterministic": "deterministic=not train",
        "inference": "inference=not train",
    },
    "training": {
        "deterministic": "deterministic=not training",
        "inference": "inference=not training",
    },
    "weight_decay_mask": {"mask": "mask=weight_decay_mask"},
}
_COMPILED = "The function has one implementation, which XLA compiles."
# Arguments that have no counterpart.
SUPERFLUOUS: Mapping[str, str] = {
    "capturable": _COMPILED,
    "differentiable": "Updates are always differentiable.",
    "enable_gqa": "Fewer heads of keys than of queries are shared without it.",
    "foreach": _COMPILED,
    "fused": _COMPILED,
    "inplace": "The input is never overwritten.",
    "params": "Pass the parameters to `init` and `update` of the result.",
}


def explain_names(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function: a keyword of another library is a TypeError that names its own.

    Other unknown keywords raise Python's own error. The signature and the types stay as they are.

    Example:
        >>> @explain_names
        ... def dropout(x, rate): ...
        >>> dropout(1.0, p=0.5)
        Traceback (most recent call last):
        ...
        TypeError: rate must be passed to dropout by this name; got p. Pass rate=p.
    """
    return _explained(function, function.__name__)


def explain_names_of(layer: Class) -> Class:
    """Do the same for the constructor of a class, in place."""
    layer.__init__ = _explained(layer.__init__, layer.__name__)
    return layer


def _explained(function: Callable[..., Any], owner: str) -> Callable[..., Any]:
    names = frozenset(inspect.signature(function).parameters)

    @functools.wraps(function)
    def explained(*args: Any, **kwargs: Any) -> Any:
        if not names.issuperset(kwargs):
            _explain(owner, names, kwargs)
        return function(*args, **kwargs)

    return explained


def _explain(owner: str, names: frozenset[str], given: Mapping[str, Any]) -> None:
    for name in given:
        if name in names:
            continue
        for own, fix in RENAMED.get(name, {}).items():
            if own in names:
                raise TypeError(
                    f"{own} must be passed to {owner} by this name; got {name}. Pass {fix}."
                )
        if name in SUPERFLUOUS:
            raise TypeError(
                f"{name} must not be passed to {owner}; got {given[name]!r}. {SUPERFLUOUS[name]}"
            )
