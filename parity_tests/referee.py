"""A single step of both sides in float64, which separates rounding in float32 from a defect."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from parity_tests.frameworks import to_torch
from parity_tests.sides import JaxSide, TorchSide, copied, named_buffers
from regjax._decay.paths import named_leaves
from regjax.interop._leaves import named_tensors

if TYPE_CHECKING:
    Arrays = Mapping[str, np.ndarray]
    Gradient = tuple[dict[str, Any], dict[str, Any]]


def jax_gradient(
    side: JaxSide, params: Arrays, statistics: Arrays, g: Any, batch: Any, step: int
) -> Gradient:
    """Return the loss and the gradients by path, in float64."""
    with jax.enable_x64(True):
        trees = _filled(side.params, params), _filled(side.statistics, statistics)
        gradient_of = side.value_and_grad()
        (loss, _), gradient = gradient_of(*trees, g, jax.tree.map(_wide, batch), step)
        return {"loss": np.asarray(loss)}, {p: np.asarray(g) for p, g in named_leaves(gradient)}


def torch_gradient(
    side: TorchSide, arrays: Arrays, start: np.ndarray | None, batch: Any, step: int
) -> Gradient:
    """Return the same from other parameters and buffers, by name; the model stays as it is."""
    with _double(side.model), _restarted(side.generator, start):
        tensors = named_tensors(side.model)
        with torch.no_grad():
            for name, tensor in (named_buffers(side.model) | tensors).items():
                tensor.copy_(to_torch(arrays[name]))
        loss = side.loss(side.model, jax.tree.map(_wide, batch), step)
        loss.backward()
        return {"loss": copied(loss)}, {
            name: copied(torch.zeros_like(p) if p.grad is None else p.grad)
            for name, p in tensors.items()
        }


@contextlib.contextmanager
def _restarted(generator: torch.Generator | None, start: np.ndarray | None) -> Iterator[None]:
    """Draw from another state of a generator; then restore its own."""
    if generator is None or start is None:
        yield
        return
    end = generator.get_state()
    generator.set_state(torch.from_numpy(start.copy()))
    try:
        yield
    finally:
        generator.set_state(end)


@contextlib.contextmanager
def _double(model: torch.nn.Module) -> Iterator[None]:
    """Make a model float64 in place, since a loss may refer to it, or to parts; then undo this."""
    params = [(p, p.data, p.grad) for p in model.parameters()]
    buffers = [(module, dict(module._buffers)) for module in model.modules()]
    for p, _, _ in params:
        p.grad = None
    for module, own in buffers:
        module._buffers.update({n: b if b is None else b.clone() for n, b in own.items()})
    try:
        model.double()
        yield
    finally:
        for p, data, gradient in params:
            p.grad = None  # of another dtype than the data
            p.data = data
            p.grad = gradient
        for module, own in buffers:
            module._buffers.update(own)


def _filled(tree: Any, arrays: Arrays) -> Any:
    leaves = [jnp.asarray(_wide(arrays[path])) for path, _ in named_leaves(tree)]
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def _wide(array: Any) -> np.ndarray:
    array = np.asarray(array)
    return array.astype(np.float64) if jnp.issubdtype(array.dtype, jnp.floating) else array
