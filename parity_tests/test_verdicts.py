"""Verdicts of the harness: noise is excused, bounds have sizes, and defects have a place."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import regjax
from parity_tests import verdicts
from parity_tests.compare import BITWISE, FLOAT32, FLOAT64
from parity_tests.frameworks import to_torch
from parity_tests.harness import JaxSide, TorchSide, compare_training
from parity_tests.train_steps import batches

RATE = 1e-2


class Attention(torch.nn.Module):
    """Attention with a bias of the keys, a norm, and a bias whose gradient is small but real."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = torch.nn.Linear(6, 6), torch.nn.Linear(6, 6)
        self.norm, self.out = torch.nn.LayerNorm(6), torch.nn.Linear(6, 3)
        self.small = torch.nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = self.query(x) @ self.key(x).T
        x = self.norm(torch.softmax(scores, -1) @ x)
        return self.out(x) + 1e-6 * self.small


def attention(params, x, eps=1e-5, key_scale=1.0):
    dense = lambda name, x: x @ params[name]["kernel"] + params[name]["bias"][None]
    scores = dense("query", x) @ dense("key", x).T
    x = jax.nn.softmax(scores * key_scale, -1) @ x
    x = jax.nn.standardize(x, axis=-1, epsilon=eps)
    x = x * params["norm"]["scale"][None] + params["norm"]["bias"][None]
    return dense("out", x) + 1e-6 * params["small"][None]


def template(dtype):
    zeros = lambda *shape: jnp.zeros(shape, dtype)
    dense = lambda *shape: {"kernel": zeros(*shape), "bias": zeros(shape[-1])}
    return {
        "query": dense(6, 6),
        "key": dense(6, 6),
        "out": dense(6, 3),
        "small": zeros(3),
        "norm": {"scale": zeros(6), "bias": zeros(6)},
    }


def adamw(params, **options):
    return torch.optim.AdamW(params, RATE, weight_decay=0.1, **options)


def only(place):
    """Return a mask of the parameter at one path."""
    return lambda params: jax.tree.map_with_path(
        lambda path, _: jax.tree_util.keystr(path, simple=True, separator="/") == place, params
    )


def at(place, defect, otherwise):
    """Return an optimizer that has a defect at one path."""
    labels = lambda params: jax.tree.map(lambda found: "ab"[found], only(place)(params))
    return optax.multi_transform({"a": otherwise, "b": defect}, labels)


def compare(dtype="float32", steps=4, optimizer=None, loss_factor=1.0, **options):
    torch.manual_seed(0)
    model = Attention().to(getattr(torch, dtype))
    scale = lambda dtype: jnp.asarray(loss_factor, dtype)

    def jax_loss(params, batch, step):
        y = attention(params, batch[0], **options)
        return ((y - batch[1]) ** 2).mean() * scale(dtype)

    def torch_loss(model, batch, step):
        return ((model(to_torch(batch[0])) - to_torch(batch[1])) ** 2).mean()

    optimizer = ADAMW if optimizer is None else optimizer
    return compare_training(
        JaxSide(template(dtype), jax_loss, optimizer),
        TorchSide(model, torch_loss, adamw(model.parameters())),
        batches(steps, dtype),
        tier={"float32": FLOAT32, "float64": FLOAT64}[dtype],
        record=False,
    )


ADAMW = regjax.optim.adamw(RATE, weight_decay=0.1)


def test_the_bias_of_keys_is_noise_and_the_small_gradient_is_not():
    found = compare(steps=20)
    found.raise_if_different()
    assert found.notes == (
        "Noise: 1 parameter has a gradient of zero up to rounding, and no verdict: key/bias.",
    )


def test_a_note_lists_whole_parameters_and_a_few_of_the_others():
    noise = verdicts.Noise(1e-7)
    gradient = {f"kernel{i}": np.array([1e-8, 1.0]) for i in range(5)} | {"bias": np.full(2, 1e-8)}
    noise.update(gradient, {name: g - 2e-8 for name, g in gradient.items()})
    assert noise.note.startswith("Noise: 6 parameters have a gradient of zero up to rounding, and")
    assert noise.note.endswith(
        "no verdict: bias, kernel0 (1 of 2 elements), kernel1 (1 of 2 elements), kernel2 (1 of 2 "
        "elements), 2 elements of 2 others."
    )


def test_without_the_rule_the_bias_of_keys_differs(monkeypatch):
    monkeypatch.setattr(verdicts, "NOISE", 0.0)
    first = compare().first
    assert first is not None
    assert (first.quantity, first.name) == ("update", "key/bias")


WRONG = {
    "learning rate, 2 %": ("float32", regjax.optim.adamw(1.02 * RATE, weight_decay=0.1), {}),
    "decay missing on one bias": (
        "float32",
        at("out/bias", regjax.optim.adamw(RATE, weight_decay=0.0), ADAMW),
        {},
    ),
    "learning rate of a small gradient, 2 %": (
        "float32",
        at("small", regjax.optim.adamw(1.02 * RATE, weight_decay=0.1), ADAMW),
        {},
    ),
    "eps of Adam": ("float64", regjax.optim.adamw(RATE, weight_decay=0.1, eps=1e-9), {}),
    "eps of a norm": ("float64", ADAMW, {"eps": 1e-6}),
    "scale of attention": ("float32", ADAMW, {"key_scale": 1.01}),
    "loss": ("float32", ADAMW, {"loss_factor": 1 + 1e-4}),
}
PLACES = {
    "learning rate, 2 %": ("update", ""),
    "decay missing on one bias": ("update", "out/bias"),
    "learning rate of a small gradient, 2 %": ("update", "small"),
    "eps of Adam": ("update", ""),
    "eps of a norm": ("loss", "loss"),
    "scale of attention": ("loss", "loss"),
    "loss": ("loss", "loss"),
}


@pytest.mark.parametrize("defect", WRONG)
def test_a_defect_is_found_at_the_first_step_and_its_place(defect):
    dtype, optimizer, options = WRONG[defect]
    quantity, name = PLACES[defect]
    with jax.enable_x64(dtype == "float64"):
        first = compare(dtype, 2, optimizer, **options).first
    assert first is not None
    assert (first.step, first.quantity) == (1, quantity)
    assert name in first.name


BIG, SMALL = np.array([108.137, 1.0]), np.array([1e-6, 1e-4])
# Quantity, values in JAX by name, values in PyTorch, whether they agree in float32.
SIZES = {
    "loss, relative": ("loss", {"loss": BIG * (1 + 2e-7)}, {"loss": BIG}, True),
    "loss, too far": ("loss", {"loss": BIG * (1 + 2e-5)}, {"loss": BIG}, False),
    "loss, absolute below 1": ("loss", {"loss": SMALL + 5e-6}, {"loss": SMALL}, True),
    "gradient, relative": ("gradient", {"w": SMALL * 1.01}, {"w": SMALL}, False),
    "gradient, beside a large one": (
        "gradient",
        {"w": SMALL * 1.01, "v": BIG},
        {"w": SMALL, "v": BIG},
        True,
    ),
    "moments of different kinds": (
        "state",
        {"m of w": BIG, "v of w": SMALL * 1.01},
        {"m of w": BIG, "v of w": SMALL},
        False,
    ),
    "parameter, relative": ("parameter", {"w": BIG * (1 + 5e-6)}, {"w": BIG}, True),
    "buffer, relative": ("buffer", {"w": BIG * (1 + 2e-5)}, {"w": BIG}, False),
    "NaN": ("update", {"w": np.array([np.nan])}, {"w": np.array([1.0])}, False),
    "infinite on both sides": ("loss", {"w": np.array([np.inf])}, {"w": np.array([np.inf])}, False),
}


@pytest.mark.parametrize(("quantity", "left", "right", "agrees"), SIZES.values(), ids=SIZES)
def test_a_deviation_is_relative_to_the_size(quantity, left, right, agrees):
    bound = verdicts.bound_of(quantity, FLOAT32)
    noise = verdicts.Noise(FLOAT32.eps)
    found = verdicts.deviations(quantity, left, right, FLOAT32, bound, noise)
    assert all(value <= bound for value in found.values()) == agrees


def test_an_update_is_compared_up_to_the_rounding_of_its_parameter():
    left, right, params = {"w": np.array([1.1e-7])}, {"w": np.array([1e-7])}, {"w": np.ones(1)}
    options = FLOAT32, 1e-3, verdicts.Noise(FLOAT32.eps)
    assert verdicts.deviations("update", left, right, *options, params)["w"] < 1e-3
    assert verdicts.deviations("update", left, right, *options)["w"] > 1e-3


def test_in_norm_the_largest_parameter_is_the_size_of_all():
    left = {"a": np.array([1.5]), "b": np.array([4.0])}
    right = {"a": np.array([1.0]), "b": np.array([4.0])}
    found = verdicts.deviations("parameter", left, right, FLOAT64, 1e-12, verdicts.Noise(0))
    assert found == {"a": 0.125, "b": 0.0}


def test_bitwise_runs_have_no_size():
    noise = verdicts.Noise(FLOAT32.eps)
    assert verdicts.bound_of("update", BITWISE) == 0
    left = {"w": np.ones(1, "float32")}
    right = {"w": np.nextafter(left["w"], np.float32(2))}
    assert verdicts.deviations("update", left, right, BITWISE, 0.0, noise) == {"w": 1.0}


# Gradients in JAX and PyTorch beside one of size 1, for each of two steps; whether it is noise.
GRADIENTS = {
    "noise": ([(1e-7, -2e-7), (3e-7, 1e-7)], True),
    "small and equal": ([(1e-7, 1.0001e-7)] * 2, False),
    "zero": ([(0.0, 0.0)] * 2, False),
    "zero on one side": ([(0.0, 1e-8)] * 2, True),
    "large on one side": ([(1e-7, 1e-3)] * 2, False),
    "large at first": ([(1e-3, 1e-3), (1e-7, -1e-7)], False),
    "noise at first": ([(1e-7, -1e-7), (1e-3, 1e-3)], True),
}


@pytest.mark.parametrize(("steps", "is_noise"), GRADIENTS.values(), ids=GRADIENTS)
def test_noise_is_small_on_both_sides_and_differs(steps, is_noise):
    noise, one = verdicts.Noise(FLOAT32.eps), np.ones(1)
    for left, right in steps:
        noise.update({"w": one, "b": np.array([left])}, {"w": one, "b": np.array([right])})
    assert (noise.mask("b") is not None) == is_noise
    assert ("no verdict: b." in noise.note) == is_noise
