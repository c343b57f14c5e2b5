"""Decay rules on the layers of torch.nn, and parameter groups for torch.optim."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import regtorch
from regtorch import decay_groups, decay_mask, decay_rates, decay_table


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 1))


def decaying(module: nn.Module) -> set[str]:
    return {name for name, decays in decay_mask(module).items() if decays}


class PartsNorm(nn.Module):
    """A norm with its parameters in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ParameterList([torch.ones(2, 2)])


def _normed_twice() -> nn.Module:
    layer = parametrizations.weight_norm(nn.Linear(2, 3))
    return nn.utils.parametrize.register_parametrization(layer, "weight", nn.Identity())


# A module, and the parameters that decay.
LAYERS = {
    "linear": (nn.Linear(2, 3), {"weight"}),
    "bilinear": (nn.Bilinear(2, 3, 4), {"weight"}),
    "conv": (nn.Conv2d(2, 3, 1), {"weight"}),
    "conv-transpose": (nn.ConvTranspose1d(2, 3, 1), {"weight"}),
    "embedding": (nn.Embedding(2, 3), set()),
    "bag": (nn.EmbeddingBag(2, 3), set()),
    "layer-norm": (nn.LayerNorm((2, 3)), set()),  # a scale of two dimensions
    "batch-norm": (nn.BatchNorm2d(3), set()),
    "sync-norm": (nn.SyncBatchNorm(3), set()),
    "instance-norm": (nn.InstanceNorm1d(3, affine=True), set()),
    "group-norm": (nn.GroupNorm(1, 3), set()),
    "rms-norm": (nn.RMSNorm(3), set()),
    "prelu": (nn.PReLU(), set()),
    "attention": (
        nn.MultiheadAttention(4, 2, add_bias_kv=True),
        {"in_proj_weight", "out_proj.weight"},
    ),
    "attention-apart": (
        nn.MultiheadAttention(4, 2, kdim=3, vdim=3),
        {"q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"},
    ),
    "lstm": (
        nn.LSTM(2, 3, num_layers=2, proj_size=2),
        {f"weight_{part}_l{layer}" for part in ("ih", "hh", "hr") for layer in (0, 1)},
    ),
    "gru-cell": (nn.GRUCell(2, 3), {"weight_ih", "weight_hh"}),
    "encoder": (
        nn.TransformerEncoderLayer(4, 2, 8),
        {
            "linear1.weight",
            "linear2.weight",
            "self_attn.in_proj_weight",
            "self_attn.out_proj.weight",
        },
    ),
    # The magnitude of a normalized weight is a scale.
    "weight-norm": (
        parametrizations.weight_norm(nn.Linear(2, 3)),
        {"parametrizations.weight.original1"},
    ),
    "weight-norm-and-more": (_normed_twice(), {"parametrizations.weight.original1"}),
    "parts-of-a-norm": (PartsNorm(), set()),
    "spectral-norm": (
        nn.Sequential(parametrizations.spectral_norm(nn.Linear(2, 3))),
        {"0.parametrizations.weight.original"},
    ),
    "lists-and-dicts": (
        nn.ModuleDict(
            {
                "weights": nn.ParameterList([torch.ones(2, 2), torch.ones(2, 2)]),
                "named": nn.ParameterDict({"kernel": torch.ones(2, 2), "bias": torch.ones(2)}),
            }
        ),
        {"weights.0", "weights.1", "named.kernel"},
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_kernels_of_layers_decay_and_nothing_else(name):
    module, expected = LAYERS[name]
    assert decaying(module) == expected
    assert list(decay_mask(module)) == [name for name, _ in module.named_parameters()]
    nested = nn.ModuleDict({"some": nn.ModuleList([module])})
    assert decaying(nested) == {f"some.0.{name}" for name in expected}


class LlamaRMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))


class Affine(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape))


class TokenEmbedding(Affine):
    pass


class LayerNormGRUCell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight_ih = nn.Parameter(torch.ones(2, 3))


class MyConv(nn.Conv1d):
    pass


def test_classes_of_ones_own():
    assert decaying(nn.Sequential(LlamaRMSNorm(), LayerNormGRUCell(), MyConv(2, 2, 1))) == {
        "1.weight_ih",
        "2.weight",
    }
    assert decay_table(LlamaRMSNorm()).rows[0].kind == "norm"
    # The name determines the kind if the class does not.
    assert decaying(nn.ModuleDict({"norm1": Affine(3), "x": Affine(3, 2)})) == {"x.weight"}
    # A linear layer may have any name.
    assert decaying(nn.ModuleDict({"embed": nn.Linear(2, 3)})) == {"embed.weight"}


@pytest.mark.parametrize("module", [Affine(3), Affine(), TokenEmbedding(5, 3)])
def test_unknown_parameters_are_refused_with_a_rule_that_works(module):
    message = (
        r"got none for 'x/weight' .* pass rule=\[\('x/weight', False\), \('\*\*', 'default'\)\]"
    )
    with pytest.raises(ValueError, match=message):
        decay_mask(nn.ModuleDict({"x": module}))
    rule = [("x/weight", False), ("**", "default")]
    assert decay_mask(nn.ModuleDict({"x": module}), rule) == {"x.weight": False}


class Exempting(nn.Module):
    """A model as in timm, with a norm of PyTorch and embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.pos_embed, self.rel = (nn.Parameter(torch.ones(1, 2, 3)) for _ in range(2))
        self.ln = type("Norm", (nn.LayerNorm,), {})((2, 3))
        self.head = nn.Linear(3, 2)

    def no_weight_decay(self) -> set[str]:
        return {"pos_*", "other"}


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("default", {"head.weight", "rel"}),
        ("huggingface", {"head.weight", "pos_embed", "rel"}),
        ("timm", {"head.weight", "ln.weight", "rel"}),
    ],
)
def test_the_choices_of_libraries(rule, expected):
    pairs = [("rel", True), ("**", rule)]
    mask = decay_mask(Exempting(), pairs)
    assert {name for name, decays in mask.items() if decays} == expected
    if rule != "default":  # which does not know `rel`
        assert decay_mask(Exempting(), rule) == mask


class Tied(nn.Module):
    def __init__(self, head_first: bool) -> None:
        super().__init__()
        if head_first:
            self.head = nn.Linear(3, 5, bias=False)
            self.embed = nn.Embedding(5, 3)
        else:
            self.embed = nn.Embedding(5, 3)
            self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight


@pytest.mark.parametrize("head_first", [True, False])
def test_tied_weights_are_one_parameter(head_first):
    module = Tied(head_first)
    name = "head.weight" if head_first else "embed.weight"
    assert decay_mask(module) == {name: False}
    # A glob may match either name.
    for pattern in ("head/weight", "embed/weight"):
        assert decay_rates(module, 1.0, [(pattern, 0.5), ("**", "default")]) == {name: 0.5}
    assert len(decay_table(module)) == 1
    ((_, tensor),) = decay_groups(module, 0.1)[0]["params"]
    assert tensor is module.head.weight
    with pytest.raises(ValueError, match=r"got .* for '.*' and '.*', which are tied"):
        decay_mask(module, lambda path, leaf, kind: kind == "linear")


def test_tied_linear_layers_decay():
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    module[1].weight = module[0].weight
    assert decaying(module) == {"0.weight"}


def test_frozen_parameters_are_left_out():
    module = model()
    module[0].requires_grad_(False)
    assert decaying(module) == {"2.weight"}
    assert [row.rule for row in decay_table(module)][:2] == ["frozen", "frozen"]
    groups = decay_groups(module, 0.1)
    names = {name for group in groups for name, _ in group["params"]}
    assert names == {"1.weight", "1.bias", "2.weight", "2.bias"}
    # A rule matches frozen parameters, too.
    assert decay_rates(module, 0.1, [("0/*", True), ("**", False)])["0.weight"] == 0.0
    assert decay_mask(nn.Sequential(Affine(3).requires_grad_(False))) == {"0.weight": False}
    with pytest.raises(
        ValueError, match=r"must have a parameter that requires a gradient.*requires_grad_"
    ):
        decay_groups(module.requires_grad_(False), 0.1)


def test_first_pair_wins_and_dots_are_slashes():
    special, general = ("0.*", 0.5), ("**/weight", 0.25)
    rates = decay_rates(model(), 1.0, [special, general, ("**", False)])
    assert list(rates.values()) == [0.5, 0.5, 0.25, 0.0, 0.25, 0.0]
    rates = decay_rates(model(), 1.0, [general, special, ("**", False)])
    assert list(rates.values()) == [0.25, 0.5, 0.25, 0.0, 0.25, 0.0]


def test_function_sees_path_tensor_and_kind():
    seen = []

    def rule(path, tensor, kind):
        seen.append((path, tuple(tensor.shape), kind))
        return kind == "norm"

    mask = decay_mask(model(), rule)
    assert [name for name, decays in mask.items() if decays] == ["1.weight", "1.bias"]
    assert seen[:3] == [
        ("0/weight", (3, 2), "linear"),
        ("0/bias", (3,), "linear"),
        ("1/weight", (3,), "norm"),
    ]


@pytest.mark.parametrize(
    ("rule", "error", "message"),
    [
        (3, TypeError, "rule must be 'default', 'huggingface', .* got 3"),
        ({"weight": True}, TypeError, "rule must be .* got {'weight': True}"),
        (["weight"], TypeError, r"rule\[0\] must be a pair .* got 'weight'"),
        ([("*", "no")], TypeError, r"rule\[0\], '\*', must be a real number.*'no'"),
        ([("**", -0.1)], ValueError, r"rule\[0\], '\*\*', must be finite and not negative.*-0.1"),
        ([("**", float("nan"))], ValueError, r"rule\[0\].*nan\. Pass True, False or a rate"),
        (lambda path, leaf, kind: None, TypeError, r"rule <lambda> at '0\.weight' must"),
        (lambda path, leaf, kind: False, ValueError, r"got False from <lambda> for all of '0/wei"),
        ("decoder/**", ValueError, r"'decoder/\*\*', which matches none of '0/weight' \[3, 2\]"),
        ([("weight", True)], ValueError, "no pair for '0/bias'"),
        ([("**", True), ("bias", False)], ValueError, r"'bias' after '\*\*', which decides all"),
    ],
)
def test_bad_rules_are_refused(rule, error, message):
    for function in (decay_rates, decay_table, decay_groups):
        with pytest.raises(error, match=message):
            function(model(), 0.1, rule)
    with pytest.raises(error, match=message):
        decay_mask(model(), rule)


def test_rates_that_nobody_gives():
    assert list(decay_rates(nn.Linear(2, 3)).values()) == [1.0, 0.0]
    assert [row.weight_decay for row in decay_table(nn.Linear(2, 3))] == [1.0, 0.0]


def test_bad_arguments_are_refused():
    with pytest.raises(TypeError, match=r"rate 0\.5 from weight for '0.weight'"):
        decay_mask(model(), [("weight", 0.5), ("**", False)])
    with pytest.raises(TypeError, match=r"module must be a torch\.nn\.Module"):
        decay_mask(model().parameters())
    with pytest.raises(ValueError, match="weight_decay must be finite"):
        decay_groups(model(), -1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the warning of lazy modules
        lazy = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(ValueError, match=r"must have .* got '0\.weight' of a lazy module"):
        decay_mask(lazy)


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adam])
def test_groups_go_into_optimizers(make):
    module = nn.Sequential(
        *(layer for layer, _ in LAYERS.values() if layer is not LAYERS["bag"][0])
    )
    rule = [("0/**", 0.5), ("**", "default")]
    optimizer = make(decay_groups(module, 0.1, rule), lr=0.1)
    rates = {
        name: group["weight_decay"]
        for group in optimizer.param_groups
        for name in group["param_names"]
    }
    assert rates == decay_rates(module, 0.1, rule)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.1, 0.0]
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(map(id, module.parameters()))


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD])
def test_only_what_decays_moves_without_gradients(make):
    module = model()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(1.0)
            parameter.grad = torch.zeros_like(parameter)
    make(decay_groups(module, 0.5), lr=0.1).step()
    moved = {name for name, p in module.named_parameters() if bool((p != 1.0).any())}
    assert moved == {"0.weight", "2.weight"}
    # torch skips a parameter without a gradient.
    module[0].weight.grad = None
    before = module[0].weight.detach().clone()
    make(decay_groups(module, 0.5), lr=0.1).step()
    assert torch.equal(module[0].weight, before)


def test_mask_goes_into_penalties_and_decays():
    module = model()
    expected = module[0].weight.square().sum() + module[2].weight.square().sum()
    assert regtorch.l2_penalty(module, 1.0, mask=decay_mask(module)).item() == pytest.approx(
        expected.item()
    )
    optimizer = torch.optim.SGD(module.named_parameters(), lr=0.1)
    handle = regtorch.optim.add_l1_decay(optimizer, 0.1, mask=decay_mask(module))
    handle.remove()


def test_table_as_data_and_text():
    table = decay_table(model(), 0.1)
    assert table.rows[0] == ("0.weight", (3, 2), "float32", 6, "linear", "kernel", 0.1)
    assert table.decaying == (2, 9)
    assert table.exempt == (4, 10)
    assert len(table) == len(list(table)) == 6
    head, *rows, last = str(table).split("\n")
    assert {len(line) for line in (head, *rows)} == {len(head)}
    assert last == "decay: 2 of 6 leaves, 9 of 19 parameters"
    head, ruler, *rows, _, last = table.to_markdown().split("\n")
    assert all(row.count("|") == head.count("|") for row in (ruler, *rows))
    assert decay_table(model().bfloat16()).rows[0].dtype == "bfloat16"
    assert decay_table(nn.Linear(2, 3, device="meta")).rows[0].shape == (3, 2)
