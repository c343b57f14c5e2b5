"""Modules and transforms of blocks, words, sequences and weights, and PyTorch's equivalents."""

from __future__ import annotations

import functools
import shutil

import pytest
import torch
from torch import nn

import regtorch

KEY = regtorch.key(4)
MAPS = torch.linspace(-2.0, 3.0, 4 * 4 * 8 * 8).reshape(4, 4, 8, 8)
IDS = torch.arange(32).reshape(4, 8) % 11
VECTORS = torch.linspace(-2.0, 3.0, 4 * 8 * 6).reshape(4, 8, 6)

block = functools.partial(regtorch.drop_block, block_size=3)
word = lambda x, rate, **options: regtorch.embedding_dropout(x, IDS, rate, **options)
FAMILY = {
    "drop_block": (block, MAPS),
    "embedding_dropout": (word, VECTORS),
    "variational_dropout": (regtorch.variational_dropout, VECTORS),
    "drop_connect": (regtorch.drop_connect, VECTORS),
}
each = pytest.mark.parametrize(("drop", "x"), FAMILY.values(), ids=FAMILY)
LAYERS = {
    "DropBlock1d": ((2, 3, 9), {"block_size": 3}, "rate=0.5, block_size=3"),
    "DropBlock2d": ((2, 3, 9, 8), {"block_size": 3}, "rate=0.5, block_size=3"),
    "DropBlock3d": ((2, 3, 4, 5, 6), {"block_size": 2}, "rate=0.5, block_size=2"),
    "VariationalDropout": ((4, 8, 6), {"time_axis": 0}, "rate=0.5, time_axis=0"),
}
FUNCTIONS = {"VariationalDropout": regtorch.variational_dropout}
each_layer = pytest.mark.parametrize("name", LAYERS)


@each
@pytest.mark.parametrize("rate", [0.3, torch.tensor(0.3)], ids=["number", "tensor"])
def test_nothing_but_keys_and_words_is_saved_for_the_backward_pass(drop, x, rate):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        drop(x.clone().requires_grad_(), rate, key=KEY)
    assert saved
    assert all(tensor.numel() <= 2 or tensor.shape == IDS.shape for tensor in saved)


@each
def test_gradients_of_every_order_and_mode_agree_with_differences(drop, x):
    x = x[..., :2].double().requires_grad_()
    f = lambda x: drop(x, 0.3, key=KEY, **({"block_size": 2} if drop is block else {}))
    assert torch.autograd.gradcheck(f, x, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(f, x, fast_mode=True)


@each
def test_vmap_over_keys_draws_a_mask_each(drop, x):
    keys = regtorch.split(KEY, 3)
    rows = torch.func.vmap(lambda key: drop(x, 0.3, key=key))(keys)
    assert torch.equal(rows, torch.stack([drop(x, 0.3, key=key) for key in keys]))


@each_layer
def test_a_layer_is_its_function_in_training_and_nothing_in_evaluation(name):
    shape, options, printed = LAYERS[name]
    layer, x = getattr(regtorch.nn, name)(0.5, **options), torch.ones(shape)
    function = FUNCTIONS.get(name, regtorch.drop_block)
    assert torch.equal(layer(x, key=KEY), function(x, 0.5, key=KEY, **options))
    assert repr(layer) == f"{name}({printed})"
    assert not layer.state_dict()
    with pytest.raises(ValueError, match="key must be a random key in training"):
        layer(x)
    layer.generator = torch.Generator().manual_seed(0)
    assert not torch.equal(layer(x), layer(x))
    assert layer.eval()(x) is x


@pytest.mark.parametrize("name", [name for name in LAYERS if "Block" in name])
def test_a_block_layer_knows_how_many_dimensions_it_is_for(name):
    shape, options, _ = LAYERS[name]
    layer = getattr(regtorch.nn, name)(0.5, **options)
    with pytest.raises(ValueError, match=rf"x must be {len(shape)}-D for {name}"):
        layer(torch.ones(*shape, 1), key=KEY)
    shared = getattr(regtorch.nn, name)(0.5, **options, share_channels=True)
    y = shared(torch.ones(shape), key=KEY)
    assert torch.equal(y, y[:, :1].expand_as(y))
    assert "share_channels=True" in repr(shared)
    with pytest.raises(ValueError, match="block_size must be at least 1; got 0"):
        getattr(regtorch.nn, name)(0.5, 0)


def test_the_layer_of_words_takes_the_ids():
    layer = regtorch.nn.EmbeddingDropout(0.5)
    y = layer(VECTORS, IDS, key=KEY)
    assert torch.equal(y, regtorch.embedding_dropout(VECTORS, IDS, 0.5, key=KEY))
    with pytest.raises(ValueError, match="key must be a random key in training"):
        layer(VECTORS, IDS)
    assert layer.eval()(VECTORS, IDS) is VECTORS
    assert repr(layer) == "EmbeddingDropout(rate=0.5)"


def test_a_wrapped_module_keeps_its_parameters_and_its_evaluation():
    layer = regtorch.nn.DropConnect(nn.LSTM(6, 5, num_layers=2), 0.5, rule="weight_hh_*")
    assert layer.names == ("weight_hh_l0", "weight_hh_l1")
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    assert set(before) == {f"module.{name}" for name, _ in layer.module.named_parameters()}
    y, _ = layer(VECTORS, key=KEY)
    again, _ = layer(VECTORS, key=KEY)
    other, _ = layer(VECTORS, key=regtorch.key(5))
    assert torch.equal(y, again)
    assert not torch.equal(y, other)
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())
    with pytest.raises(ValueError, match="key must be a random key in training"):
        layer(VECTORS)
    assert torch.equal(layer.eval()(VECTORS)[0], layer.module(VECTORS)[0])


def test_a_generator_is_asked_once_for_all_weights():
    layer = regtorch.nn.DropConnect(nn.LSTM(6, 5), 0.5, generator=torch.Generator().manual_seed(0))
    assert layer.names == ("weight_ih_l0", "weight_hh_l0")
    twin = torch.Generator().manual_seed(0)
    key = torch.randint(0, 2**32, (2,), generator=twin).to(torch.uint32)
    assert torch.equal(layer(VECTORS)[0], layer(VECTORS, key=key)[0])


def test_integers_stay_and_what_is_no_tensor_is_refused():
    weights = {"weight": torch.ones(4, 4), "steps": torch.arange(3)}
    dropped = regtorch.drop_connect(weights, 0.5, key=KEY)
    assert dropped["steps"] is weights["steps"]
    assert (dropped["weight"] == 0).any()
    with pytest.raises(TypeError, match=r"got .* at 'layer'"):
        regtorch.drop_connect({"layer": weights}, 0.5, key=KEY)


def test_what_cannot_be_dropped_is_refused():
    with pytest.raises(ValueError, match="matches none of"):
        regtorch.nn.DropConnect(nn.Linear(2, 3), 0.5, rule="weight_hh_*")
    frozen = nn.Linear(2, 3).requires_grad_(False)
    with pytest.raises(
        ValueError, match=r"module must have a parameter that rule 'default' selects"
    ):
        regtorch.nn.DropConnect(frozen, 0.5)
    with pytest.raises(ValueError, match=r"rate must lie in \[0, 1\]; got 2"):
        regtorch.nn.DropConnect(nn.Linear(2, 3), 2)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
@each
def test_compiled_it_is_the_same_bit_for_bit(drop, x):
    x = x.clone().requires_grad_()
    f = lambda x, key: drop(x, 0.3, key=key)
    results = []
    for run in (f, torch.compile(f, fullgraph=True)):
        y = run(x, KEY)
        results.append((y, *torch.autograd.grad(y, x, torch.ones_like(y))))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
