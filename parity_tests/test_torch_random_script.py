"""An unchanged PyTorch script, reproduced by a jitted step in JAX that has only its seed."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import regjax.optim
from parity_tests.test_torch_random_init import differing, state_is_torchs
from regjax import torch_random
from regjax.torch_random import Layer

SIZE, BATCH, RATES = 100, 32, (0.5, 0.2)
LAYERS = {
    name: Layer("Linear", {"weight": (outputs, inputs), "bias": (outputs,)})
    for name, inputs, outputs in (("0", 20, 64), ("3", 64, 32), ("6", 32, 3))
}
OPTIMIZER = regjax.optim.adamw(1e-2, weight_decay=1e-2)
RNG = np.random.default_rng(0)
INPUTS, LABELS = RNG.normal(size=(SIZE, 20)).astype(np.float32), RNG.integers(0, 3, SIZE)


def in_torch(seed, epochs) -> Iterator[Any]:
    """Yield the initial parameters, then batch, masks, loss and parameters of each step."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        *(nn.Linear(20, 64), nn.Tanh(), nn.Dropout(RATES[0])),
        *(nn.Linear(64, 32), nn.Tanh(), nn.Dropout(RATES[1])),
        nn.Linear(32, 3),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    dataset = torch.utils.data.TensorDataset(
        torch.arange(SIZE), torch.from_numpy(INPUTS), torch.from_numpy(LABELS)
    )
    loader = torch.utils.data.DataLoader(dataset, BATCH, shuffle=True)
    masks = []
    for dropout in (model[2], model[5]):
        dropout.register_forward_hook(lambda module, inputs, output: masks.append(output != 0))
    yield {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for _ in range(epochs):
        for indices, inputs, labels in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs), labels)
            loss.backward()
            optimizer.step()
            yield indices, masks[-2:], loss.detach(), model.state_dict()


def forward(params, inputs, labels, g):
    x, masks = inputs, []
    for name, rate in zip(("0", "3"), RATES, strict=True):
        x = jnp.tanh(x @ params[f"{name}.weight"].T + params[f"{name}.bias"][None])
        x, g = torch_random.dropout(x, rate, g)
        masks.append(x != 0)
    logits = x @ params["6.weight"].T + params["6.bias"][None]
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1)
    return -picked.mean(), (masks, g)


@jax.jit
def step(params, state, g, indices):
    inputs, labels = (jnp.asarray(array)[indices] for array in (INPUTS, LABELS))
    loss = functools.partial(forward, inputs=inputs, labels=labels, g=g)
    (value, (masks, g)), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    updates, state = OPTIMIZER.update(gradient, state, params)
    return jax.tree.map(jnp.add, params, updates), state, g, masks, value


def in_jax(seed, epochs, draw_batches=torch_random.shuffled_batches) -> Iterator[Any]:
    """Yield the same as `in_torch`, and the state of the generator."""
    params, g = torch_random.init_like(LAYERS, torch_random.generator(seed))
    yield params, g
    state = OPTIMIZER.init(params)
    for _ in range(epochs):
        batches, g = draw_batches(g, SIZE, BATCH)
        for indices in batches:
            params, state, g, masks, loss = step(params, state, g, indices)
            yield indices, masks, loss, params, g


def first_difference(seed, epochs, **options):
    """Return the first thing that differs, or an empty string."""
    theirs, ours = in_torch(seed, epochs), in_jax(seed, epochs, **options)
    initial, (params, g) = next(theirs), next(ours)
    if any(differing(params[name], initial[name]) for name in initial):
        return "initial parameters"
    for (order, masks, loss, expected), found in zip(theirs, ours, strict=True):
        indices, our_masks, value, params, g = found
        if indices.tolist() != order.tolist():
            return "order"
        if any((np.asarray(a) != b.numpy()).any() for a, b in zip(our_masks, masks, strict=True)):
            return "mask"
        if abs(float(value) - float(loss)) > 1e-6:
            return "loss"
        if any(differing(params[name], expected[name], 1e-6) for name in expected):
            return "parameters"
    return "" if state_is_torchs(g) else "state"


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.sample(2)
def test_a_script_is_reproduced_from_its_seed(seed):
    with torch.random.fork_rng(devices=[]):
        assert first_difference(seed, epochs=5) == ""


def _without_seed(g, size, batch_size):
    return torch_random.shuffled_batches(g, size, batch_size, is_own=True)


def test_a_missing_draw_is_found():
    with torch.random.fork_rng(devices=[]):
        assert first_difference(0, epochs=1, draw_batches=_without_seed) == "order"
