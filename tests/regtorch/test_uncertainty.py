"""Monte Carlo dropout of PyTorch models: only dropout is on, and the model is restored."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import regtorch
from regtorch import keyed
from regtorch.keyed.calls import states_of

KEY = regtorch.key(0)
X = torch.linspace(-2.0, 3.0, 48).reshape(6, 8)


def mc(predict, *inputs, key=KEY, outputs="values", samples=6, **options):
    return regtorch.mc_dropout(
        predict, *inputs, key=key, outputs=outputs, samples=samples, **options
    )


def pass_key(index: int, name: str) -> torch.Tensor:
    return regtorch.site_key(regtorch.site_key(KEY, index, "mc_dropout"), 0, name)


class Block(nn.Module):
    """A model with norms and a dropout of each library, one of which is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8, momentum=0.5)
        self.first = nn.Dropout(0.5)
        self.inner = nn.Sequential(nn.LayerNorm(8), nn.InstanceNorm1d(6, track_running_stats=True))
        self.second = regtorch.nn.Dropout(0.3)

    def forward(self, x):
        x = self.inner(self.first(self.norm(x))[None])[0]
        return self.second(self.second(x))


def expected(model: Block, index: int) -> torch.Tensor:
    """Compute a pass manually: the model in evaluation with explicit dropouts."""
    x = regtorch.dropout(model.norm(X), 0.5, key=pass_key(index, "first"))
    x = model.inner(x[None])[0]
    x = regtorch.dropout(x, 0.3, key=pass_key(index, "second"))
    return regtorch.dropout(x, 0.3, key=pass_key(index, "second#1"))


@pytest.mark.parametrize("training", [True, False])
def test_a_model_in_any_mode(training):
    model = keyed.convert(Block())
    model.norm(2 * X + 1)  # its own averages
    if not training:
        model.eval().inner.train()
    by_hand = copy.deepcopy(model).eval()
    by_hand = [expected(by_hand, index) for index in range(6)]
    keyed.set_key(model, regtorch.key(5), 3)
    state = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    y = mc(model, X, keep_samples=True)
    assert torch.equal(y.samples, torch.stack(by_hand))
    assert not y.mean.requires_grad
    # The model is restored.
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    (state,) = states_of(model)
    assert (state.keys.root, state.keys.step, state.keys.counts) == ((0, 5), 3, {})
    assert len(model.second._forward_pre_hooks) == 0


def test_an_error_leaves_nothing_behind_either():
    model = keyed.convert(Block())
    with pytest.raises(RuntimeError):
        mc(model, torch.ones(6, 7))
    assert all(module.training for module in model.modules())
    assert len(model.second._forward_pre_hooks) == 0
    assert states_of(model)[0].keys.root is None


KINDS = {
    "attention": lambda: nn.MultiheadAttention(8, 2, 0.5),
    "recurrent": lambda: nn.LSTM(8, 4, 2, dropout=0.5),
    "encoder": lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.5, batch_first=True),
    "alpha": lambda: nn.AlphaDropout(0.5),
    "channels": lambda: nn.Dropout1d(0.5),
    "regtorch": lambda: regtorch.nn.AlphaDropout(0.5),
    "regtorch, around another": lambda: regtorch.nn.DropConnect(nn.Linear(8, 8), 0.5),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_that_drops_does_so(kind):
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.norm = KINDS[kind](), nn.BatchNorm1d(6)

        def forward(self, x):
            x = self.norm(x[None])
            x = self.layer(x, x, x) if kind == "attention" else self.layer(x)
            return x[0] if isinstance(x, tuple) else x

    # As a whole model and, in the context, as part of a function.
    model = keyed.convert(Model()).eval()
    assert mc(model, X).std.any()
    with regtorch.dropout_only(model):
        assert not model.norm.training

        def predict(x, *, key):
            keyed.set_key(model, key, 0)
            return model(x)

        if not kind.startswith("regtorch"):
            assert torch.equal(mc(predict, X).std, mc(model, X).std)


def test_the_encoder_layer_would_pass_by_its_dropouts():
    """Test of the previous test: in evaluation the layer is one kernel without dropout."""
    layer = keyed.convert(KINDS["encoder"]()).eval()
    for module in layer.modules():
        module.training = isinstance(module, nn.Dropout | nn.MultiheadAttention)

    def predict(x, *, key):
        keyed.set_key(layer, key, 0)
        return layer(x[None])

    with pytest.raises(ValueError, match=r"^predict must depend on its key"):
        mc(predict, X)


def test_an_encoder_with_padding_drops():
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.5, batch_first=True)
    model = keyed.convert(nn.TransformerEncoder(layer, 2))
    padding = torch.tensor([[False] * 4 + [True] * 2])
    y = mc(lambda x, *, key: encode(model, x, padding, key), X[None])
    assert y.std[0, :4].all()


def encode(model, x, padding, key):
    with regtorch.dropout_only(model):
        keyed.set_key(model, key, 0)
        return model(x, src_key_padding_mask=padding)


def unconverted():
    return nn.Sequential(nn.Linear(8, 4), nn.Dropout(0.5))


@pytest.mark.parametrize(
    ("predict", "message"),
    [
        (unconverted(), r"module '1' must be converted; got a Dropout"),
        (nn.Linear(8, 4), "must have a layer that drops"),
        (
            keyed.convert(nn.Sequential(nn.Dropout(0.5, inplace=True))),
            "must not write into its inputs",
        ),
    ],
)
def test_a_model_that_cannot_be_right_is_refused(predict, message):
    with pytest.raises(ValueError, match=message):
        mc(predict, X.clone())


@pytest.mark.parametrize("rate", [0.0, 0.5])
@pytest.mark.parametrize("samples", [1, 4])
def test_equal_passes_are_refused(rate, samples):
    model = keyed.convert(nn.Sequential(nn.Linear(8, 4), nn.Dropout(rate)))
    if rate:
        assert bool(mc(model, X, samples=samples).std.any()) == (samples > 1)
        return
    with pytest.raises(ValueError, match=r"^predict must depend on its key"):
        mc(model, X, samples=samples)


def test_passes_that_are_equal_by_chance_are_a_warning():
    """Their keys differ; at this rate all 8 elements are kept except with probability 1e-6."""
    with pytest.warns(UserWarning, match="although their keys differ"):
        mc(lambda x, *, key: regtorch.dropout(x, 1e-7, key=key), X[:1], samples=2)


def test_in_inference_mode():
    model = keyed.convert(unconverted())
    with torch.inference_mode():
        assert torch.equal(mc(model, X * 1).mean, mc(model, X * 1).mean)
    assert torch.equal(mc(model, X).mean, mc(model, X).mean)


def test_a_module_that_drops_by_a_function_does_so_once_it_has_drawn():
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(8)

        def forward(self, x):
            return nn.functional.dropout(self.norm(x), 0.5, self.training)

    model = keyed.convert(Functional())
    keyed.set_key(model, KEY, 0)
    model(X)
    average = model.norm.running_mean.clone()
    y = mc(model, X, keep_samples=True)
    expected = regtorch.dropout(model.eval().norm(X), 0.5, key=pass_key(0, ""))
    assert torch.equal(y.samples[0], expected)
    assert torch.equal(model.norm.running_mean, average)
    (state,) = states_of(model)
    assert (state.keys.root, state.keys.step, state.keys.counts) == ((0, 0), 0, {"": 1})
