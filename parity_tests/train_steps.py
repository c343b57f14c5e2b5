"""Small train steps in both frameworks, each with one feature of a real recipe.

The tests of the harness plant defects with other arguments of the JAX side than of the original.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

from parity_tests.frameworks import to_torch
from parity_tests.harness import JaxStep, TorchStep

SIZES = {"hidden": (6, 8), "out": (8, 3)}
RATE = 0.05


def batches(steps: int, dtype: str = "float32", rows: int = 8) -> list[Any]:
    """Return random inputs and targets, the same in every call."""
    rng = np.random.default_rng(0)
    return [
        ((rng.normal(size=(rows, 6)) + 1).astype(dtype), rng.normal(size=(rows, 3)).astype(dtype))
        for _ in range(steps)
    ]


def module(dtype: str = "float32") -> torch.nn.Module:
    """Return the PyTorch model, with random parameters."""
    torch.manual_seed(0)
    layers = {n: torch.nn.Linear(*size) for n, size in SIZES.items()}
    model = torch.nn.Sequential(layers["hidden"], torch.nn.Tanh(), layers["out"])
    return model.to(getattr(torch, dtype))


NAMES = {"hidden": "0", "out": "2"}


def forward(params: Any, x: jax.Array) -> jax.Array:
    """Apply the model in JAX."""
    hidden, out = params["hidden"], params["out"]
    x = jnp.tanh(x @ hidden["kernel"] + hidden["bias"][None])
    return x @ out["kernel"] + out["bias"][None]


def template(dtype: str = "float32") -> Any:
    """Return zeros with the shapes of the parameters."""
    return {
        n: {"kernel": jnp.zeros(size, dtype), "bias": jnp.zeros(size[1], dtype)}
        for n, size in SIZES.items()
    }


def jax_step(
    optimizer: optax.GradientTransformation,
    *,
    dtype: str = "float32",
    compute: str | None = None,
    parts: int = 1,
    decay: float = 0.0,
    scale: float = 1.0,
    unscale: bool = True,
) -> JaxStep:
    """Return a step of an optimizer, with accumulation and an EMA of the parameters.

    Args:
        optimizer: Any optax transformation.
        dtype: The dtype of the parameters.
        compute: The dtype of the forward pass.
        parts: The number of micro-batches whose gradients are averaged.
        decay: The decay of the EMA.
        scale: The factor of the loss, by which the gradients are divided.
        unscale: Whether they are.
    """

    def cast(x: jax.Array) -> jax.Array:
        return x.astype(compute or dtype)

    def loss(params: Any, batch: Any) -> jax.Array:
        y = forward(jax.tree.map(cast, params), cast(batch[0])).astype(dtype)
        return scale * ((y - batch[1]) ** 2).mean()

    @jax.jit
    def step(state: Any, batch: Any, i: Any) -> Any:
        micro = [[x[part::parts] for x in batch] for part in range(parts)]
        values = [jax.value_and_grad(loss)(state["params"], each) for each in micro]
        value, gradient = jax.tree.map(lambda *each: sum(each) / (parts * scale), *values)
        gradient = gradient if unscale else jax.tree.map(lambda g: g * scale, gradient)
        updates, moments = optimizer.update(gradient, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        ema = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, state["ema"], params)
        return {"params": params, "opt_state": moments, "ema": ema}, value

    params = template(dtype)
    state = {"params": params, "opt_state": optimizer.init(params), "ema": params}
    return JaxStep(state, step, averages=(lambda state: state["ema"]) if decay else None)


def torch_step(
    make_optimizer: Any,
    *,
    dtype: str = "float32",
    compute: str | None = None,
    parts: int = 1,
    decay: float = 0.0,
    clip: float = 0.0,
    schedule: Any = None,
    scale: float = 1.0,
    model: torch.nn.Module | None = None,
) -> TorchStep:
    """Return the same step as PyTorch users write it, with clipping, a schedule and a scaler."""
    model = module(dtype) if model is None else model
    optimizer = make_optimizer(model.parameters())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule) if schedule else None
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(decay)
    )
    average.update_parameters(model)  # the first update copies
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale != 1)

    def step(model: torch.nn.Module, batch: Any, i: int) -> torch.Tensor:
        optimizer.zero_grad()
        total = torch.zeros((), dtype=getattr(torch, dtype))
        for part in range(parts):
            x, y = (to_torch(array)[part::parts] for array in batch)
            with torch.autocast("cpu", torch.bfloat16, enabled=compute is not None):
                predicted = model(x)
            loss = ((predicted.to(y.dtype) - y) ** 2).mean() / parts
            scaler.scale(loss).backward()
            total += loss.detach()
        scaler.unscale_(optimizer)
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        scaler.step(optimizer)
        scaler.update()
        if scheduler is not None:
            scheduler.step()
        if decay:
            average.update_parameters(model)
        return total

    return TorchStep(model, step, optimizer, average if decay else None)
