"""Verdicts of the harness: noise is excused, bounds have sizes, and defects have a place."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import regjax
from parity_tests import referee, verdicts
from parity_tests.compare import BFLOAT16, BITWISE, FLOAT32, FLOAT64
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


def compare(dtype="float32", steps=4, optimizer=None, loss_factor=1.0, compute=None, **options):
    torch.manual_seed(0)
    model = Attention().to(getattr(torch, dtype))

    def jax_loss(params, batch, step):
        x, targets = batch
        params, x = jax.tree.map(lambda x: x.astype(compute or x.dtype), (params, x))
        y = attention(params, x, **options).astype(targets.dtype)
        return ((y - targets) ** 2).mean() * jnp.asarray(loss_factor, y.dtype)

    def torch_loss(model, batch, step):
        with torch.autocast("cpu", torch.bfloat16, enabled=compute is not None):
            y = model(to_torch(batch[0]))
        return ((y.to(to_torch(batch[1]).dtype) - to_torch(batch[1])) ** 2).mean()

    optimizer = ADAMW if optimizer is None else optimizer
    return compare_training(
        JaxSide(template(dtype), jax_loss, optimizer),
        TorchSide(model, torch_loss, adamw(model.parameters())),
        batches(steps, dtype),
        tier=BFLOAT16 if compute else {"float32": FLOAT32, "float64": FLOAT64}[dtype],
        record=False,
    )


ADAMW = regjax.optim.adamw(RATE, weight_decay=0.1)


def test_the_bias_of_keys_is_noise_and_the_small_gradient_is_not():
    found = compare(steps=20)
    found.raise_if_different()
    assert found.notes == (
        "Noise: 1 parameter has a gradient of zero up to rounding, and no verdict: key/bias.",
    )


def test_products_in_bfloat16_agree_with_the_updates_of_float32():
    found = compare(compute="bfloat16", steps=5)
    found.raise_if_different()
    assert max(found.deviations["gradient"]) > 1e-3
    assert max(found.deviations["update"]) < found.bounds["update"] == 1e-3


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
# The quantity, the end of the name, and words of the report.
ALL, SOME = (
    "; look at the learning rate, its schedule",
    "; look at the decay, the learning rate or the",
)
PLACES = {
    "learning rate, 2 %": ("update", "", r"8 of 8 arrays differ; JAX has 1\.02 times .*" + ALL),
    "decay missing on one bias": (
        "update",
        "out/bias",
        r"in PyTorch 'out\.bias' of Linear; bound 1e-03; 1 of 8 arrays differ" + SOME,
    ),
    "learning rate of a small gradient, 2 %": (
        "update",
        "small",
        r"'small' of Attention; .* 1 of 8 arrays differ; JAX has 1\.02 times .*" + SOME,
    ),
    "eps of Adam": ("update", "", "arrays differ"),
    "eps of a norm": ("loss", "loss", "bound 1e-12"),
    "scale of attention": ("loss", "loss", r"in float64 too \(loss 1e-03, gradient .*more than"),
    "loss": ("loss", "loss", r"JAX has 1\.0001 times .* too \(loss 1e-04, gradient 1e-04\)"),
}


@pytest.mark.parametrize("defect", WRONG)
@pytest.mark.sample(3)
def test_a_defect_is_found_at_the_first_step_and_its_place(defect):
    dtype, optimizer, options = WRONG[defect]
    quantity, name, words = PLACES[defect]
    for compute in (None, "bfloat16") if quantity == "update" and dtype == "float32" else (None,):
        with jax.enable_x64(dtype == "float64"):
            first = compare(dtype, 2, optimizer, compute=compute, **options).first
        assert first is not None
        assert (first.step, first.quantity) == (1, quantity)
        assert first.name.endswith(name)
        assert re.search(words, first.detail)


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


def ends_in_relu(factor=1.0, torch_dtype=None):
    """Return the sides of a model whose ReLU has an input of zero in JAX, positive in PyTorch."""
    model = torch.nn.Linear(3, 2)
    with torch.no_grad():
        model.weight.zero_()
        model.bias.copy_(torch.tensor([0.5, 1e-7]))

    def jax_loss(params, x, step):
        y = x @ params["kernel"] + params["bias"][None]
        y = jax.lax.optimization_barrier(y + 2.0**12) - 2.0**12  # rounds 1e-7 to 0 in float32
        return factor * jax.nn.relu(y).sum()

    def torch_loss(model, x, step):
        return model(to_torch(x.astype(torch_dtype or x.dtype))).relu().sum()

    return (
        JaxSide({"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros(2)}, jax_loss, optax.sgd(0.1)),
        TorchSide(model, torch_loss, torch.optim.SGD(model.parameters(), 0.1)),
    )


REPEATED = {
    "rounding": ({}, "gradient", r"agree in float64 \(.*\), so this is rounding in float32"),
    "defect": ({"factor": 1.5}, "loss", r"differ in float64 too \(loss 3e-01, gradient 5e-01\)"),
    "error": (
        {"torch_dtype": "float32"},
        "gradient",
        r"not repeated in float64: RuntimeError: mat",
    ),
}


@pytest.mark.parametrize(("options", "quantity", "words"), REPEATED.values(), ids=REPEATED)
def test_a_step_that_differs_is_repeated_in_float64(options, quantity, words):
    port, original = ends_in_relu(**options)
    found = compare_training(port, original, [np.ones((1, 3), "float32")])
    assert found.first is not None
    assert found.first.quantity == quantity
    assert re.search(words, found.first.detail)
    tensors = [x for p in original.model.parameters() for x in (p, p.grad)]
    assert all(x is not None and x.dtype == torch.float32 for x in tensors)
    assert original.model.get_parameter("bias")[1] < 0  # trained once, from 1e-7


def test_a_model_is_double_during_the_repetition_only():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    model(torch.ones(4, 3)).sum().backward()
    tensors = lambda: [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters())]
    before = [(x, x.clone()) for x in tensors()]

    def fail():
        model(torch.ones(4, 3, dtype=torch.float64)).square().sum().backward()
        raise ValueError("not now")

    with pytest.raises(ValueError, match="not now"), referee._double(model):
        fail()
    for new, (old, value) in zip(tensors(), before, strict=True):
        assert new is old
        assert new.dtype == value.dtype
        assert torch.equal(new, value)
