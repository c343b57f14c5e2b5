"""Modules and transforms of depth and noise, and rates that are assigned to a module."""

from __future__ import annotations

import shutil

import pytest
import torch

import regtorch
from regtorch._random.rounding import rounded

KEY = regtorch.key(4)
X = torch.linspace(-2.0, 3.0, 8 * 6 * 4).reshape(8, 6, 4)
FAMILY = {
    name: getattr(regtorch, name) for name in ("drop_path", "gaussian_dropout", "gaussian_noise")
}
LAYERS = {
    "DropPath": (regtorch.drop_path, {}, "rate=0.5"),
    "GaussianDropout": (regtorch.gaussian_dropout, {}, "rate=0.5"),
    "GaussianNoise": (regtorch.gaussian_noise, {}, "stddev=0.5"),
}
each = pytest.mark.parametrize("noise", FAMILY.values(), ids=FAMILY)
each_layer = pytest.mark.parametrize("name", LAYERS)
numbers = pytest.mark.parametrize("rate", [0.3, torch.tensor(0.3)], ids=["number", "tensor"])


@each
@numbers
def test_nothing_but_the_key_is_saved_for_the_backward_pass(noise, rate):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = noise(X.clone().requires_grad_(), rate, key=KEY)
    assert y.requires_grad
    # A tensor rate needs the scalar condition of its range, and the fill value.
    assert all(tensor.numel() <= 2 for tensor in saved)


@each
@numbers
def test_gradients_of_every_order_and_mode_agree_with_differences(noise, rate):
    x = X[:, :2].double().requires_grad_()
    f = lambda x: noise(x, rate, key=KEY)
    assert torch.autograd.gradcheck(f, x, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(f, x, fast_mode=True)


@each
def test_vmap_over_keys_draws_for_each(noise):
    keys = regtorch.split(KEY, 3)
    rows = torch.func.vmap(lambda key: noise(X, 0.3, key=key))(keys)
    assert torch.equal(rows, torch.stack([noise(X, 0.3, key=key) for key in keys]))


@each
def test_a_flag_may_be_a_tensor(noise):
    for deterministic in (torch.tensor(True), torch.tensor(False)):
        y = noise(X, 0.3, key=KEY, deterministic=deterministic)
        assert torch.equal(y, X if deterministic else noise(X, 0.3, key=KEY))


@each
def test_a_generator_gives_a_key_each_time(noise):
    generator, twin = (torch.Generator().manual_seed(0) for _ in range(2))
    first, second = (noise(X, 0.3, key=generator) for _ in range(2))
    assert not torch.equal(first, second)
    key = torch.randint(0, 2**32, (2,), generator=twin).to(torch.uint32)
    assert torch.equal(first, noise(X, 0.3, key=key))


@each_layer
def test_a_layer_is_its_function_in_training_and_nothing_in_evaluation(name):
    function, options, printed = LAYERS[name]
    layer = getattr(regtorch.nn, name)(0.5, **options)
    assert torch.equal(layer(X, key=KEY), function(X, 0.5, key=KEY))
    assert repr(layer) == f"{name}({printed})"
    assert not layer.state_dict()
    with pytest.raises(ValueError, match="key must be a random key in training"):
        layer(X)
    layer.generator = torch.Generator().manual_seed(0)
    assert not torch.equal(layer(X), layer(X))
    assert layer.eval()(X) is X


def test_a_path_has_a_mode_and_a_scale():
    layer = regtorch.nn.DropPath(0.5, mode="batch", scale_by_keep=False)
    assert repr(layer) == "DropPath(rate=0.5, mode='batch', scale_by_keep=False)"
    options = {"mode": "batch", "scale_by_keep": False}
    for seed in range(4):
        key = regtorch.key(seed)
        assert torch.equal(layer(X, key=key), regtorch.drop_path(X, 0.5, key=key, **options))
    assert regtorch.nn.DropPath()(X) is X  # timm's default: nothing is dropped


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: regtorch.nn.DropPath(0.1, mode="layer"), 'mode must be "row" or "batch"'),
        (lambda: regtorch.nn.DropPath(1.1), r"rate must lie in \[0, 1\]; got 1.1"),
        (lambda: regtorch.nn.GaussianDropout(1), "rate must be below 1"),
        (lambda: regtorch.nn.GaussianNoise(-1.0), "stddev must be finite and at least 0; got -1.0"),
    ],
)
def test_a_layer_is_checked_when_it_is_made(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", ["Dropout", "DropPath", "GaussianDropout", "AlphaDropout"])
def test_a_rate_may_be_assigned_at_any_step(name):
    schedule = regtorch.cosine_rate(0.0, 0.5, 10)
    layer, twin = (getattr(regtorch.nn, name)(0.3) for _ in range(2))
    for step in range(12):
        layer.rate = schedule(step)
        twin.rate = float(schedule(step))
        torch.testing.assert_close(layer(X, key=KEY), twin(X, key=KEY), rtol=1e-6, atol=1e-6)
    assert not layer.state_dict()
    layer.rate = torch.tensor(1.5)
    assert layer(X, key=KEY).isnan().all()


def test_noise_on_the_device_of_the_input_without_a_copy_of_the_table():
    """On the device "meta", a tensor on the CPU would be an error."""
    meta = torch.empty(3, 5, device="meta")
    for noise in FAMILY.values():
        y = noise(meta, 0.3, key=KEY.to("meta"))
        assert (y.device.type, y.shape) == ("meta", meta.shape)


def test_rounding_is_the_identity():
    x = torch.tensor([0.0, -0.0, 1.0, -1.0, 0.3, 3e38, torch.inf, -torch.inf])
    assert torch.equal(rounded(x), x)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize(
    ("name", "rate"), [("gaussian_dropout", 0.3), ("gaussian_noise", torch.tensor(0.3))]
)
def test_compiled_it_is_the_same_bit_for_bit(name, rate):
    x = X.clone().requires_grad_()
    f = lambda x, key, rate: FAMILY[name](x, rate, key=key)
    results = []
    for run in (f, torch.compile(f, fullgraph=True)):
        y = run(x, KEY, rate)
        results.append((y, *torch.autograd.grad(y, x, torch.ones_like(y))))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_step_is_not_compiled_again_when_the_rate_changes():
    schedule, compilations = regtorch.linear_rate(0.0, 0.5, 10), []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph.forward

    layer = torch.compile(lambda x, rate: regtorch.dropout(x, rate, key=KEY), backend=backend)
    for step in range(5):
        y = layer(X, schedule(step))
        assert torch.equal(y, regtorch.dropout(X, schedule(step), key=KEY))
    assert len(compilations) == 1
