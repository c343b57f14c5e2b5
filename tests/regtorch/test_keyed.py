"""`regtorch.keyed`: existing models draw from explicit keys, and are otherwise unchanged.

The file covers one function, `convert`, for PyTorch's layers; `test_keyed_draws.py` covers
functions, `test_keyed_errors.py` what cannot be keyed, and `test_keyed_checkpoints.py` checkpoints.
"""

from __future__ import annotations

import copy
import functools
import pickle
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import regtorch
from regtorch import keyed
from regtorch._random.keys import site_words
from regtorch.keyed import dropouts
from regtorch.keyed.calls import states_of
from regtorch.keyed.replacements import REPLACEMENTS, Replacement

ROOT = regtorch.key(7)
X = torch.linspace(-2.0, 3.0, 24).reshape(3, 8)


class Shared(nn.Module):
    """A model with a dropout in two places, one in a dict, and one that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Dropout(0.5)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), self.first)])
        self.named = nn.ModuleDict({"alpha": nn.AlphaDropout(0.5)})

    def forward(self, x):
        return self.named["alpha"](self.blocks[0](self.first(x)))


def at(name: str, step: int = 0) -> torch.Tensor:
    return regtorch.site_key(ROOT, step, name)


def keyed_model(model: nn.Module, step: int = 0) -> nn.Module:
    keyed.set_key(keyed.convert(model), ROOT, step)
    return model


FAMILY = {
    nn.Dropout: (X, regtorch.dropout),
    nn.Dropout1d: (torch.ones(3, 8, 2), regtorch.feature_dropout),
    nn.Dropout2d: (torch.ones(3, 8, 2, 2), regtorch.feature_dropout),
    nn.Dropout3d: (torch.ones(3, 8, 2, 2, 2), regtorch.feature_dropout),
    nn.AlphaDropout: (X, regtorch.alpha_dropout),
    nn.FeatureAlphaDropout: (torch.ones(3, 8, 2), regtorch.feature_alpha_dropout),
}


@pytest.mark.parametrize(("kind", "x", "function"), [(k, *v) for k, v in FAMILY.items()])
def test_every_layer_of_the_family_draws_from_its_site(kind, x, function):
    model = keyed_model(nn.Sequential(nn.Identity(), kind(0.3)), step=5)
    assert torch.equal(model(x), function(x, 0.3, key=at("1", 5)))
    assert model.eval()(x) is x
    assert isinstance(model[1], kind)


def test_an_inplace_layer_writes_to_its_input():
    x = X.clone()
    y = keyed_model(nn.Sequential(nn.Dropout(0.5, inplace=True)))(x)
    assert y is x
    assert torch.equal(x, regtorch.dropout(X, 0.5, key=at("0")))


def test_a_shared_module_has_its_first_name_and_each_call_its_own_key():
    model = keyed_model(Shared(), step=2)
    assert keyed.sites(model) == ["first", "named.alpha"]
    x = regtorch.dropout(X, 0.5, key=at("first", 2))
    x = regtorch.dropout(model.blocks[0][0](x), 0.5, key=at("first#1", 2))
    expected = regtorch.alpha_dropout(x, 0.5, key=at("named.alpha", 2))
    assert torch.equal(model(X), expected)
    assert not torch.equal(model(X), expected)  # first#2, first#3
    keyed.set_key(model, ROOT, 2)
    assert torch.equal(model(X), expected)
    keyed.set_key(model, ROOT, torch.tensor(3))
    assert not torch.equal(model(X), expected)


def test_a_dropout_may_be_the_whole_model():
    layer = keyed_model(nn.Dropout(0.5))
    assert keyed.sites(layer) == [""]
    assert torch.equal(layer(X), regtorch.dropout(X, 0.5, key=at("")))


@pytest.mark.parametrize("step", [0, 1, 2**32 + 5, 2**64 - 1])
@pytest.mark.parametrize("root", [(0, 0), (0, 7), (2**32 - 1, 2**31)])
def test_keys_from_integers_are_keys_from_tensors(root, step):
    for site in ("", "a", "encoder.layers.0.dropout#12"):
        tensor = torch.tensor(root, dtype=torch.uint32)
        words = list(site_words(root, step, site))
        assert regtorch.site_key(tensor, step, site).tolist() == words
        # If the value of a tensor is not available, its words remain tensors.
        mapped = torch.func.vmap(
            lambda key, step=step, site=site: regtorch.site_key(key, step, site)
        )
        assert mapped(tensor[None])[0].tolist() == words


def test_training_without_a_key_names_set_key_and_the_site():
    model = keyed.convert(Shared())
    with pytest.raises(ValueError, match=r"site 'first' must have a key .*keyed\.set_key"):
        model(X)
    model.eval()(X)


def test_set_key_refuses_what_is_not_converted_and_what_is_no_key():
    model = keyed.convert(nn.Sequential(nn.Dropout(0.5)))
    model.append(nn.Dropout(0.5))
    with pytest.raises(ValueError, match=r"module '1' must be converted; got a Dropout.*convert"):
        keyed.set_key(model, ROOT, 0)
    model = keyed.convert(model)
    with pytest.raises(ValueError, match="step must lie in"):
        keyed.set_key(model, ROOT, -1)
    with pytest.raises(TypeError, match="root must be a key"):
        keyed.set_key(model, 0, 0)


def test_convert_keeps_parameters_state_and_objects_and_revert_puts_the_classes_back():
    model = nn.Sequential(
        Shared(), nn.TransformerEncoderLayer(8, 2, 16), nn.LSTM(8, 4, 2, dropout=0.5)
    )
    modules, classes = list(model.modules()), [type(module) for module in model.modules()]
    state, printed = list(model.state_dict()), repr(model)
    attributes = [set(vars(module)) for module in modules]
    assert keyed.convert(model) is model
    assert list(model.state_dict()) == state
    names = keyed.sites(model)
    keyed.set_key(model, ROOT, 0)
    (state_of,) = states_of(model)
    keys = copy.deepcopy(state_of.keys)
    assert keyed.convert(model) is model  # a second call changes nothing, including keys
    assert keyed.sites(model) == names
    assert state_of.keys == keys
    assert [len(module._forward_pre_hooks.values()) for module in modules] == [1] * len(modules)
    assert keyed.revert(model) is model
    assert keyed.sites(model) == []
    assert all(new is old for new, old in zip(model.modules(), modules, strict=True))
    assert [type(module) for module in model.modules()] == classes
    assert repr(model) == printed
    assert [vars(module).keys() for module in modules] == attributes
    hooks = [h for m in modules for h in (m._forward_hooks, m._forward_pre_hooks)]
    assert all(type(each) is OrderedDict and not each for each in hooks)


@pytest.mark.parametrize(
    "again",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["copy", "pickle"],
)
def test_copies_draw_the_same_and_are_independent(again):
    model = keyed_model(nn.Sequential(Shared(), nn.LSTM(8, 4, 3, dropout=0.5)))
    twin = again(model)
    expected = model(X)[0]
    assert torch.equal(twin(X)[0], expected)
    keyed.set_key(twin, ROOT, 1)
    assert keyed.sites(twin) == keyed.sites(model)
    assert not torch.equal(twin(X)[0], expected)
    twin.load_state_dict(model.state_dict())
    assert twin[0].first is twin[0].blocks[0][1]


class Custom(nn.Dropout):
    def forward(self, input):  # noqa: A002 - torch.nn's name
        return super().forward(input) + 1


def test_a_subclass_draws_as_its_base_class_does():
    attention = type("MyAttention", (nn.MultiheadAttention,), {})(8, 2, dropout=0.5)
    model = keyed_model(nn.ModuleDict({"a": Custom(0.5), "b": attention}))
    assert keyed.sites(model) == ["a", "b"]
    assert torch.equal(model["a"](X), regtorch.dropout(X, 0.5, key=at("a")) + 1)
    assert type(model["a"]) is Custom
    state = torch.get_rng_state()
    model["b"](X, X, X)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_part_that_was_converted_under_another_name_is_refused():
    part = keyed.convert(nn.Sequential(nn.Dropout(0.5)))
    with pytest.raises(ValueError, match=r"module '1' must not be converted .* name ''.*revert"):
        keyed.convert(nn.Sequential(nn.Dropout(0.5), part))


def test_what_drops_nothing_has_no_site():
    model = nn.Sequential(nn.MultiheadAttention(8, 2), nn.LSTM(8, 8, 2), nn.Linear(8, 8))
    assert keyed.sites(keyed_model(model)) == []


def test_a_module_whose_name_is_that_of_a_draw_is_refused():
    model = nn.ModuleDict({"a": nn.Dropout(), "b": nn.Dropout(), "a:1": nn.Linear(1, 1)})
    with pytest.raises(ValueError, match=r"module 'a:1' must not have the name of a draw .*'a'"):
        keyed.convert(model)
    del model["a"]
    assert keyed.sites(keyed.convert(model)) == ["b"]


# Attention: the converted module equals PyTorch's, with every option.
ATTENTION = {
    "plain": {},
    "batch first": {"batch_first": True},
    "without bias": {"bias": False},
    "extra keys": {"add_bias_kv": True, "add_zero_attn": True, "batch_first": True},
    "other widths": {"kdim": 6, "vdim": 10},
}


@pytest.fixture
def no_dropout(monkeypatch):
    """Replace the dropout of converted models, to keep everything."""
    monkeypatch.setattr(dropouts, "dropout", lambda x, rate, **options: x)
    keep = Replacement(lambda draws, x, **options: x, in_evaluation=True)
    monkeypatch.setitem(REPLACEMENTS, nn.functional.dropout, keep)


@pytest.mark.parametrize("options", ATTENTION.values(), ids=ATTENTION)
@pytest.mark.parametrize("masks", ["none", "bool", "float", "heads"])
@pytest.mark.parametrize("weights", ["none", "mean", "all"])
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.usefixtures("no_dropout")
def test_attention_without_dropout_is_pytorch_s(options, masks, weights, batched):
    torch.manual_seed(0)
    plain = nn.MultiheadAttention(8, 2, dtype=torch.float64, **options)
    model = copy.deepcopy(plain)
    model.dropout = 0.5
    keyed_model(model)
    first = options.get("batch_first", False)
    batch, heads = (3 if batched else 1), 2
    sizes = zip((5, 6, 6), (8, options.get("kdim", 8), options.get("vdim", 8)), strict=True)
    q, k, v = (torch.randn(batch, length, width, dtype=torch.float64) for length, width in sizes)
    if not batched:
        q, k, v = q[0], k[0], v[0]
    elif not first:
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    call = {"need_weights": weights != "none", "average_attn_weights": weights != "all"}
    if masks == "float":
        call |= {"attn_mask": torch.randn(5, 6, dtype=torch.float64)}
    elif masks == "heads":
        call |= {"attn_mask": torch.randn(batch * heads, 5, 6, dtype=torch.float64)}
    elif masks == "bool":
        padding = torch.zeros(batch, 6, dtype=torch.bool)
        padding[0, -2:] = True
        call |= {
            "key_padding_mask": padding if batched else padding[0],
            "attn_mask": torch.ones(5, 6, dtype=torch.bool).triu(1),
        }
    expected, given = plain(q, k, v, **call), model(q, k, v, **call)
    torch.testing.assert_close(given[0], expected[0], rtol=1e-12, atol=1e-13)
    if weights == "none":
        assert given[1] is expected[1] is None
    else:
        torch.testing.assert_close(given[1], expected[1], rtol=1e-12, atol=1e-13)


def test_attention_drops_probabilities_of_batch_heads_queries_keys():
    model = keyed_model(nn.Sequential(nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)))
    attention, x = model[0], torch.randn(3, 5, 8)
    _, dropped = attention(x, x, x, average_attn_weights=False)
    _, whole = attention.eval()(x, x, x, average_attn_weights=False)
    torch.testing.assert_close(dropped, regtorch.dropout(whole, 0.5, key=at("0")))


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("form", ["batch first", "time first", "packed", "unbatched", "projected"])
@pytest.mark.usefixtures("no_dropout")
def test_recurrent_layers_run_one_by_one_as_in_pytorch(kind, bidirectional, form):
    torch.manual_seed(0)
    options = {"batch_first": form != "time first", "bidirectional": bidirectional}
    if form == "projected":
        if kind is not nn.LSTM:
            return
        options["proj_size"] = 2
    plain = kind(4, 5, 3, dropout=0.0, dtype=torch.float64, **options)
    model = copy.deepcopy(plain)
    model.dropout = 0.5
    keyed_model(model)
    assert keyed.sites(model) == ["0", "1"]
    x = torch.randn((6, 4) if form == "unbatched" else (3, 6, 4), dtype=torch.float64)
    if form == "packed":
        x = pack_padded_sequence(x, torch.tensor([4, 6, 2]), True, enforce_sorted=False)
    (y, state), (given, given_state) = plain(x), model(x)
    same_bits = functools.partial(torch.testing.assert_close, rtol=0, atol=0)
    # The order of PyTorch's sums may depend on the address of the state.
    same_to_rounding = functools.partial(torch.testing.assert_close, rtol=1e-12, atol=1e-14)
    for check in (same_bits, same_to_rounding):  # without and with an initial state
        check(getattr(given, "data", given), getattr(y, "data", y))
        check(given_state, state)
        (y, state), (given, given_state) = plain(x, state), model(x, state)
    weights = [
        functools.reduce(torch.add, (p.sum() for p in m.parameters())) for m in (plain, model)
    ]
    assert torch.equal(*weights)


def test_recurrent_layers_drop_between_layers():
    torch.manual_seed(0)
    lstm = nn.LSTM(4, 5, 2, dropout=0.5, batch_first=True)
    model = keyed_model(nn.ModuleDict({"rnn": lstm}), step=1)
    assert keyed.sites(model) == ["rnn.0"]
    x = torch.randn(3, 6, 4)
    lower, upper = nn.LSTM(4, 5, batch_first=True), nn.LSTM(5, 5, batch_first=True)
    for layer, module in enumerate((lower, upper)):
        suffix = f"_l{layer}"
        own = {n.replace(suffix, "_l0"): p for n, p in lstm.state_dict().items() if suffix in n}
        module.load_state_dict(own)
    expected, _ = upper(regtorch.dropout(lower(x)[0], 0.5, key=at("rnn.0", 1)))
    y, _ = lstm(x)
    assert torch.equal(y, expected)
    y.sum().backward()
    assert all(parameter.grad is not None for parameter in lstm.parameters())


def test_each_gap_between_recurrent_layers_has_its_own_key(monkeypatch):
    keys = []
    drop = lambda x, rate, *, key, sampler: keys.append(key.tolist()) or x
    monkeypatch.setattr(dropouts, "dropout", drop)
    keyed_model(nn.ModuleDict({"rnn": nn.GRU(8, 8, 3, dropout=0.5)}))["rnn"](X)
    assert keys == [at("rnn.0").tolist(), at("rnn.1").tolist()]


MODELS = {
    "encoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2),
        7 + 1,
    ),
    "transformer": (lambda: nn.Transformer(8, 2, 1, 1, 16, batch_first=True), 4 + 6),
    "gru": (lambda: nn.GRU(8, 8, 3, dropout=0.5), 2),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("grad", [False, True])
def test_evaluation_keeps_every_bit_and_training_never_asks_pytorch_s_generator(name, grad):
    make, count = MODELS[name]
    model = make()
    x = torch.randn(5, 3, 8)
    inputs = (x, x) if name == "transformer" else (x,)
    run = lambda: out[0] if isinstance(out := model(*inputs), tuple) else out
    with torch.set_grad_enabled(grad):
        model.eval()
        expected = run()
        keyed_model(model)
        assert torch.equal(run(), expected)
        assert len(keyed.sites(model)) == count
        model.train()
        state = torch.get_rng_state()
        first = run()
        assert torch.equal(torch.get_rng_state(), state)
        keyed.set_key(model, ROOT, 0)
        assert torch.equal(run(), first)
        assert not torch.equal(first, expected)


def test_a_frozen_encoder_layer_in_a_training_model_stays_one_fused_kernel(monkeypatch):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(nn.Dropout(0.5), nn.TransformerEncoder(layer, 2), nn.Dropout(0.5))
    model[1].eval()
    kernel, calls = torch._transformer_encoder_layer_fwd, []
    counted = lambda *args: calls.append(1) or kernel(*args)
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", counted)
    with torch.no_grad():
        y = keyed_model(model)(X[None])
        x = regtorch.dropout(X[None], 0.5, key=at("0"))
        assert torch.equal(y, regtorch.dropout(model[1](x), 0.5, key=at("2")))
    assert len(calls) == 4
    # An error leaves no mode suspended.
    with pytest.raises(RuntimeError, match="embed_dim"), torch.no_grad():
        model(X[None, :, :7])
    assert torch.overrides._get_current_function_mode_stack() == []
    keyed.set_key(model, ROOT, 0)
    with torch.no_grad():
        assert torch.equal(model(X[None]), y)


def test_hooks_stay():
    model = nn.Sequential(nn.Dropout(0.5))
    seen = []
    model[0].register_forward_hook(lambda *_: seen.append(1))
    keyed_model(model)(X)
    late = model.register_forward_hook(lambda *_: seen.append(2))
    model(X)
    assert seen == [1, 1, 2]
    assert len(model._forward_hooks) == 1
    keyed.revert(model)
    late.remove()
    model(X)
    assert seen == [1, 1, 2, 1]
    assert [len(m._forward_hooks) for m in model.modules()] == [0, 1]


def test_functional_call_and_grad():
    model = keyed_model(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)))
    parameters = dict(model.named_parameters())
    loss = lambda p: torch.func.functional_call(model, p, (X,)).sum()
    gradient = torch.func.grad(loss)(parameters)
    scale = regtorch.dropout(torch.ones(3, 8), 0.5, key=at("1"))
    torch.testing.assert_close(gradient["0.bias"], scale.sum(0))
