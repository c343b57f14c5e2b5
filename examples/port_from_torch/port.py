"""The model, its port, and the training of both; `examples/port_from_torch/__main__.py` runs them.

The PyTorch model has dropouts, parameter groups with different learning rates, and a one-cycle
schedule. Its code is unchanged: `regtorch.keyed.convert` gives each dropout a key that is named
after the path of the module, and the JAX model uses the same names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from sklearn.datasets import load_digits

import regjax
import regtorch
from parity_tests.harness import JaxSide, Leaf, TorchSide, tensors
from regjax import interop

ROOT = 0
RATES = {"1": 0.1, "4": 0.5}  # by the path of the torch.nn.Dropout in the model
LAYERS = {"hidden": "0", "middle": "2", "out": "5"}  # by the path of the torch.nn.Linear


def torch_model() -> torch.nn.Module:
    """Return the original model, which has no keys."""
    return torch.nn.Sequential(
        torch.nn.Linear(64, 64),
        torch.nn.Dropout(RATES["1"]),
        torch.nn.Linear(64, 32),
        torch.nn.SiLU(),
        torch.nn.Dropout(RATES["4"]),
        torch.nn.Linear(32, 10),
    )


def torch_side(steps: int) -> TorchSide:
    """Return the original with its optimizer and schedule; biases learn faster and do not decay.

    Args:
        steps: The number of steps of the whole run.
    """
    torch.manual_seed(0)
    model = regtorch.keyed.convert(torch_model())
    kernels = [(n, p) for n, p in model.named_parameters() if p.ndim > 1]
    biases = [(n, p) for n, p in model.named_parameters() if p.ndim == 1]
    groups = [
        {"params": kernels, "lr": 2e-3, "weight_decay": 0.05},
        {"params": biases, "lr": 4e-3, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, [2e-3, 4e-3], total_steps=steps + 1)
    root = regtorch.key(ROOT)

    def loss(model: torch.nn.Module, batch: Any, step: int) -> torch.Tensor:
        images, labels = tensors(batch)
        regtorch.keyed.set_key(model, root, step)
        return torch.nn.functional.cross_entropy(model(images), labels)

    return TorchSide(model, loss, optimizer, scheduler)


def train_in_torch(side: TorchSide, batches: Sequence[Any], on_step: Callable[[], None]) -> None:
    """Train the first half in PyTorch alone."""
    assert side.scheduler is not None
    for step, batch in enumerate(batches):
        side.optimizer.zero_grad()
        side.loss(side.model, batch, step).backward()
        side.optimizer.step()
        side.scheduler.step()
        on_step()


def jax_side(original: TorchSide, mistake: str = "none") -> tuple[JaxSide, dict[str, Leaf]]:
    """Return the port in the current state of the original, and the names of its parameters.

    Args:
        original: The original, after any number of steps.
        mistake: One of `MISTAKES` of the program.
    """
    sizes = {"hidden": (64, 64), "middle": (64, 32), "out": (32, 10)}
    template = {n: {"kernel": jnp.zeros(s), "bias": jnp.zeros(s[1])} for n, s in sizes.items()}
    weights = original.model.state_dict()
    params = interop.params_from_torch(weights, template, LAYERS)
    names = interop.leaves_from_torch(weights, template, LAYERS)
    recipe, scheduler = original.optimizer, original.scheduler
    optimizer = interop.optimizer_from_torch(recipe, names, scheduler=scheduler)
    state = interop.state_from_torch(recipe, names, params, optimizer, scheduler=scheduler)
    if mistake == "bias":
        biases = jax.tree.map(lambda p: p.ndim == 1, params)
        late = regjax.optim.add_independent_weight_decay(1e-4, mask=biases)
        optimizer, state = optax.chain(optimizer, late), (state, late.init(params))
    if mistake == "state":
        state = optimizer.init(params)
    root = jax.random.key(ROOT)

    def dense(params: Any, x: jax.Array) -> jax.Array:
        return x @ params["kernel"] + params["bias"][None]

    def drop(x: jax.Array, site: str, step: Any) -> jax.Array:
        late = int(mistake == "key" and site == "4")
        rate = RATES[site] + (0.01 if mistake == "rate" and site == "4" else 0.0)
        return regjax.dropout(x, rate, key=regjax.site_key(root, step + late, site))

    def loss(params: Any, batch: Any, step: Any) -> jax.Array:
        images, labels = batch
        x = drop(dense(params["hidden"], images), "1", step)
        x = drop(jax.nn.silu(dense(params["middle"], x)), "4", step)
        log_probs = jax.nn.log_softmax(dense(params["out"], x))
        return -jnp.take_along_axis(log_probs, labels[:, None], axis=1).mean()

    return JaxSide(params, loss, optimizer, state), names


def batches(steps: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return random batches of 64 handwritten digits, the same in every call."""
    images, labels = load_digits(return_X_y=True)
    rng = np.random.default_rng(0)
    picks = [rng.integers(0, len(labels), 64) for _ in range(steps)]
    return [((images[i] / 16).astype(np.float32), labels[i]) for i in picks]
