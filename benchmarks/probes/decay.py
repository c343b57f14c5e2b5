"""Weight decay: the optimizers of PyTorch, and the default choice of parameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

import regjax
from benchmarks.probes.in_jax import holds, keras

# The optimizers of torch.optim with decay, and arguments of the comparison.
DECAYING = {
    name: {"momentum": 0.9} if name in ("SGD", "RMSprop") else {}
    for name in [
        "SGD",
        "Adam",
        "AdamW",
        "NAdam",
        "RAdam",
        "Adamax",
        "Adagrad",
        "Adadelta",
        "RMSprop",
        "ASGD",
        "Adafactor",
        "Muon",
    ]
}
_START = np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3)
_GRADIENTS = [np.sin(np.arange(12, dtype=np.float32) + 7 * step).reshape(4, 3) for step in range(5)]


def _torch_steps(name: str, options: Mapping[str, Any]) -> np.ndarray:
    tensor = torch.tensor(_START, requires_grad=True)
    optimizer = getattr(torch.optim, name)([tensor], lr=0.01, weight_decay=0.1, **options)
    for gradient in _GRADIENTS:
        tensor.grad = torch.tensor(gradient)
        optimizer.step()
    return tensor.detach().numpy()


def _optax_steps(make: Callable[..., Any], options: Mapping[str, Any]) -> np.ndarray:
    optimizer = make(0.01, weight_decay=0.1, **options)
    params = jnp.asarray(_START)
    state = optimizer.init(params)
    for gradient in _GRADIENTS:
        updates, state = optimizer.update(jnp.asarray(gradient), state, params)
        params = optax.apply_updates(params, updates)
    return np.asarray(params)


def _keras_steps(make: Callable[..., Any], options: Mapping[str, Any]) -> np.ndarray:
    eps = {"epsilon": 1e-8} if "epsilon" in inspect.signature(make).parameters else {}
    optimizer = make(0.01, weight_decay=0.1, **options, **eps)
    variable = keras().Variable(_START)
    for gradient in _GRADIENTS:
        optimizer.apply([jnp.asarray(gradient)], [variable])
    return np.asarray(variable.value)


def count_optimizers(library: str) -> str:
    """Count the optimizers of torch.optim with decay that a library has, step for step.

    The function has PyTorch's name. Five steps agree to 1e-6, Muon's, which PyTorch computes in
    bfloat16, to 2e-3.
    """
    module: Any = {
        "regjax": lambda: regjax.optim,
        "Optax": lambda: optax,
        "Keras": lambda: keras().optimizers,
        "PyTorch": lambda: torch.optim,
    }[library]()
    run = _keras_steps if library == "Keras" else _optax_steps
    if library == "PyTorch":
        return f"{len(DECAYING)} of {len(DECAYING)}"
    count = sum(_follows(_named(module, name), run, name) for name in DECAYING)
    return f"{count} of {len(DECAYING)}"


def _follows(make: Callable[..., Any] | None, run: Callable[..., Any], name: str) -> bool:
    """Return whether an optimizer takes the steps of PyTorch's."""
    bound, options = 2e-3 if name == "Muon" else 1e-6, DECAYING[name]
    if make is None:
        return False
    return holds(lambda: abs(run(make, options) - _torch_steps(name, options)).max() <= bound)


def _named(module: Any, name: str) -> Callable[..., Any] | None:
    """Return the member of a module with a name, in any case, if it has weight decay."""
    for spelled in dir(module):
        if spelled.lower() == name.lower() and callable(getattr(module, spelled)):
            found = getattr(module, spelled)
            return found if "weight_decay" in inspect.signature(found).parameters else None
    return None


# A block of a stack of two layers, whose scales have two dimensions.
_STACK = {"kernel": (2, 3, 4), "bias": (2, 4), "norm": {"scale": (2, 3)}, "embedding": (5, 3)}


def regjax_rule() -> str:
    """Return how regjax chooses the parameters that decay by default."""
    params = jax.tree.map(jnp.ones, _STACK, is_leaf=lambda leaf: isinstance(leaf, tuple))
    mask = regjax.decay_mask(params)
    right = {"kernel": True, "bias": False, "norm": {"scale": False}, "embedding": False}
    return "by name" if mask == right else "by shape"


def timm_rule() -> str:
    """Return the same for timm."""
    from timm.optim import param_groups_weight_decay  # pyright: ignore[reportMissingImports]

    model = torch.nn.Module()
    model.kernel = torch.nn.Parameter(torch.ones(2, 3, 4))
    model.norm = torch.nn.Module()
    model.norm.weight = torch.nn.Parameter(torch.ones(2, 3))
    decays = [
        p for g in param_groups_weight_decay(model, 0.1) if g["weight_decay"] for p in g["params"]
    ]
    return "by shape" if any(p is model.norm.weight for p in decays) else "by name"
