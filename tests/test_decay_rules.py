"""Decay rules for parameters without a framework; `test_rules.py` tests trees of each."""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

import pytest

from regshared.decay_rules import Parameter, Place, bools, kind_of_attribute, kind_of_class, rates
from tests.shared import suggested


class Leaf(NamedTuple):
    shape: tuple[int, ...]


def _parameter(*paths: str, kind="", certain=False, shape=(2, 3), frozen=False) -> Parameter:
    places = (Place(path, path.rpartition("/")[2], kind, certain) for path in paths)
    return Parameter(paths[0], tuple(places), Leaf(shape), frozen)


PARAMETERS = [_parameter(path) for path in ("a/kernel", "a/bias", "b/kernel", "b/bias")]
FROZEN = [parameter._replace(frozen=True) for parameter in PARAMETERS]
TIED = _parameter("head/w", "embed/w")
SIX = [_parameter(f"x{i}") for i in range(6)]

# The name of a parameter, its module, and the kind that the default rule infers.
RECIPES: list[tuple[str, dict[str, Any], str]] = [
    ("bias", {}, "bias"),
    ("in_proj_bias", {"kind": "norm"}, "bias"),
    ("b", {}, "bias"),
    ("b1", {}, "bias"),
    ("b_ih", {}, "bias"),
    ("beta", {}, "bias"),
    ("beta_x", {}, "bias"),
    ("offset", {}, "bias"),
    ("w", {"kind": "norm"}, "norm"),
    ("kernel", {"kind": "norm", "certain": True}, "norm"),
    ("kernel", {"kind": "norm"}, "kernel"),
    ("gamma", {}, "scale"),
    ("logit_scale", {"kind": "linear"}, "scale"),
    ("g", {}, "scale"),
    ("ln_g", {}, "scale"),
    ("slope", {"kind": "activation"}, "activation"),
    ("kernel", {"shape": (3,)}, "kernel"),
    ("kernel", {"kind": "embedding", "certain": True}, "kernel"),
    ("embedding", {}, "embedding"),
    ("cls_token", {}, "embedding"),
    ("w", {"kind": "embedding", "certain": True}, "embedding"),
    ("w", {"kind": "linear", "shape": (3,)}, "kernel"),
    ("w", {"kind": "linear", "certain": True}, "kernel"),
    ("w", {}, "kernel"),
    ("lambda_1", {}, "scale"),
    ("lambda_q1", {"kind": "attention", "shape": (3,)}, "scale"),
    ("A_log", {"shape": (4, 2)}, "scale"),
    ("temperature", {"shape": ()}, "scale"),
    ("alpha", {"shape": (1,)}, "scale"),
    ("gain", {"kind": "conv"}, "scale"),
    ("probe", {"kind": "attention"}, "embedding"),
    ("latents", {}, "embedding"),
    ("query", {}, "embedding"),
    ("query_proj", {}, "kernel"),
    ("latent_weight", {}, "kernel"),
    ("ls1", {"shape": (3,)}, "scale"),
    ("sinks", {"kind": "attention", "shape": (3,)}, "bias"),
]


@pytest.mark.parametrize(("name", "options", "expected"), RECIPES)
def test_the_kind_that_the_default_rule_infers(name, options, expected):
    rate = 0.5 if expected == "kernel" else 0.0
    assert rates([_parameter(name, **options)], 0.5, "default") == [(rate, expected)]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("B", {}),
        ("bar", {}),
        ("x", {"kind": "linear"}),
        ("w", {"shape": (3,)}),
        ("w", {"shape": (3,), "kind": "attention"}),  # a scale of its output, perhaps
        ("w", {"kind": "embedding"}),
        ("query", {"kind": "attention"}),  # a projection, or learned
    ],
)
def test_the_default_rule_raises_for_unknown_kinds(name, options):
    with pytest.raises(ValueError, match=f"got none for '{name}' .*\\('{name}', (True|False)\\)"):
        bools([_parameter(name, **options)], "default")


KINDS = {
    "LayerNorm": "norm",
    "BatchNorm_0": "norm",
    "ln_1": "norm",
    "rmsnorm": "norm",
    "WeightNorm": "",
    "spectral_norm": "",
    "PReLU": "activation",
    "conv": "conv",
    "Dense_0": "linear",
    "ConvLSTMCell": "recurrent",
    "self_attn": "attention",
    "wte": "embedding",
    "": "",
}


@pytest.mark.parametrize(("name", "kind"), KINDS.items())
def test_the_kind_of_a_module(name, kind):
    assert kind_of_attribute(name) == (kind, False)
    assert kind_of_class(type(name, (), {})) == (kind, kind != "embedding")


def test_the_kind_of_a_norm_in_a_longer_name():
    assert kind_of_attribute("norm_linear") == ("norm", False)
    assert kind_of_class(type("LayerNormLSTMCell", (), {})) == ("recurrent", True)


def test_the_kind_of_a_class_is_that_of_its_bases():
    embedding = type("Embedding", (), {})
    assert kind_of_class(embedding) == ("embedding", True)
    assert kind_of_class(type("MyEmbed", (embedding,), {})) == ("embedding", True)
    assert kind_of_class(type("Mine", (type("Linear", (), {}),), {})) == ("linear", True)
    # The class of a patch embedding may own the kernel of a convolution.
    assert kind_of_class(type("PatchEmbedding", (), {})) == ("embedding", False)


# The rate and the deciding rule of each of PARAMETERS at a weight decay of 0.5.
RULES: dict[str, tuple[Any, list[tuple[float, str]]]] = {
    "glob": ("kernel", [(0.5, "kernel"), (0.0, "**"), (0.5, "kernel"), (0.0, "**")]),
    "default": ("default", [(0.5, "kernel"), (0.0, "bias"), (0.5, "kernel"), (0.0, "bias")]),
    "function": (
        lambda path, leaf, kind: path == "a/bias",
        [(0.0, "<lambda>"), (0.5, "<lambda>"), (0.0, "<lambda>"), (0.0, "<lambda>")],
    ),
    "true": (lambda path, leaf, kind: True, [(0.5, "<lambda>")] * 4),
    "rates": (
        [("a/*", 0.25), ("b/bias", True), ("**", False)],
        [(0.25, "a/*"), (0.25, "a/*"), (0.0, "**"), (0.5, "b/bias")],
    ),
    "lists": (
        [["bias", True], ["**", "default"]],
        [(0.5, "kernel"), (0.5, "bias"), (0.5, "kernel"), (0.5, "bias")],
    ),
    "idle-end": ([("*", False), ("**", True)], [(0.0, "*")] * 4),
    "nothing": ([("**", False)], [(0.0, "**")] * 4),
    "mixed": (
        [("bias", lambda path, leaf, kind: 2.0), ("**", "default")],
        [(0.5, "kernel"), (2.0, "<lambda>"), (0.5, "kernel"), (2.0, "<lambda>")],
    ),
}


@pytest.mark.parametrize(("rule", "expected"), RULES.values(), ids=RULES)
def test_rates(rule, expected):
    assert rates(PARAMETERS, 0.5, rule) == expected
    assert rates(FROZEN, 0.5, rule) == [(0.0, "frozen")] * 4
    half = [*PARAMETERS[:2], *FROZEN[2:]]
    assert rates(half, 0.5, rule) == [*expected[:2], (0.0, "frozen"), (0.0, "frozen")]


def test_empty_parameters_with_pairs():
    assert rates([], 0.5, "kernel") == bools([], "kernel") == []


def test_bools():
    assert bools(PARAMETERS, "kernel") == [True, False, True, False]
    with pytest.raises(
        TypeError, match=r"True or False for a mask; got the rate 0\.5 from a/\* for 'a/kernel'"
    ):
        bools(PARAMETERS, [("a/*", 0.5), ("**", False)])
    with pytest.raises(TypeError, match="weight_decay must be a real number"):
        rates(PARAMETERS, True, "kernel")


def test_tied_parameters():
    for pattern in ("head/*", "embed/*"):
        assert bools([TIED], [(pattern, True), ("**", False)]) == [True]
    assert bools([TIED], lambda path, leaf, kind: True) == [True]
    # An output layer that is tied to an embedding is an embedding.
    places = (Place("head/w", "w", "linear", True), Place("embed/w", "w", "embedding", True))
    for order in (places, places[::-1]):
        assert rates([TIED._replace(places=order)], 0.5, "default") == [(0.0, "embedding")]
    with pytest.raises(
        ValueError,
        match=r"got \[True, False\] from <lambda> for 'head/w' and 'embed/w', which are tied",
    ):
        bools([TIED], lambda path, leaf, kind: path == "head/w")


MANY = [
    *(_parameter(f"layers/{i}/mixing", shape=(3, 4)) for i in range(12)),
    _parameter("layers/0/kernel"),
    _parameter("blocks/0/x", kind="linear", shape=(3,)),
    _parameter("blocks/1/x", "blocks/1/kernel", shape=(2, 3)),  # known by another name
    _parameter("start", shape=(1, 5, 3)),
]


def test_all_unknown_parameters_are_in_one_error_with_a_rule_to_paste():
    with pytest.raises(
        ValueError, match=r"none for 'layers/\*/mixing' \[3, 4\] \(12 parameters\), 'bl"
    ) as error:
        rates(MANY, 0.5, "default")
    rule = suggested(error)
    # A glob for all blocks would match a parameter that the rule knows.
    assert rule == [
        ("layers/*/mixing", True),
        ("blocks/0/x", False),
        ("start", False),
        ("**", "default"),
    ]
    found = [rate for rate, _ in rates(MANY, 0.5, rule)]
    assert found == [0.5] * 13 + [0.0, 0.5, 0.0]


def test_the_rule_to_paste_keeps_the_pairs_of_the_user():
    with pytest.raises(ValueError, match="does not know") as error:
        rates(MANY, 0.5, [("start", 0.25), ("**", "default")])
    rule = suggested(error)
    assert rule[2:] == [("start", 0.25), ("**", "default")]
    assert rates(MANY, 0.5, rule)[-1] == (0.25, "start")
    with pytest.raises(ValueError, match=r"rule=.*\('start', <lambda>\), \('\*\*', 'default'\)\]"):
        rates(MANY, 0.5, [("start", lambda path, leaf, kind: 1.0), ("**", "default")])


def _of_class(library: str, path: str, shape=(3,)) -> Parameter:
    owner = type("MyNorm", (type("LayerNorm", (), {"__module__": library}),), {})
    place = Place(path, path.rpartition("/")[2], "norm", True, owner)
    return Parameter(path, (place,), Leaf(shape), frozen=False)


# Parameters, and whether they decay by transformers' choice and by timm's.
CHOICES = [
    (_parameter("embeddings/word/weight"), True, True),
    (_parameter("layer/0/q_proj/bias", shape=(3,)), False, False),
    (_parameter("attention/bias", shape=(2, 3)), False, False),
    (_parameter("bias", shape=(2, 3)), False, True),
    (_parameter("relative_position_bias_table"), False, True),
    (_parameter("encoder/layer_norm/weight"), False, True),
    (_parameter("norm/weight", shape=(3,)), False, False),
    (_parameter("Norm/scale", shape=(4, 3)), False, True),
    (_parameter("encoder/RMSNorm_0/scale", shape=(4, 3)), False, True),
    (_parameter("layernorm1/w"), False, True),
    (_parameter("norm1/weight", shape=(3,)), True, False),
    (_parameter("h/0/ln_1/scale", shape=(3,)), False, False),
    (_parameter("layers/0/layer_norm1/scale", shape=(3,)), False, False),
    (_parameter("normal/weight"), True, True),
    (_parameter("subnorm/weight"), True, True),
    (_parameter("bn1/weight", kind="norm", certain=True, shape=(3,)), True, False),
    (_parameter("temperature", shape=()), True, False),
    (_of_class("torch.nn.modules.normalization", "ln/weight"), False, False),
    (_of_class("flax.nnx.nn.normalization", "ln/scale", (4, 3)), False, True),
    (_of_class("nanogpt", "ln/weight"), True, False),
    (_of_class("torch.nn.modules.normalization", "weight"), True, False),
    (_parameter("pos_embed")._replace(listed=True), True, False),
    # The first name of a tied parameter decides.
    (_parameter("a/w", "norm/w"), True, True),
]


@pytest.mark.parametrize(("parameter", "huggingface", "timm"), CHOICES)
def test_the_choices_of_libraries(parameter, huggingface, timm):
    for rule, expected in (("huggingface", huggingface), ("timm", timm)):
        assert bools([parameter], rule) == [expected]
        assert bools([parameter], [("**", rule)]) == [expected]
        assert bools([parameter._replace(frozen=True)], rule) == [False]


def _says(answer):
    return lambda path, leaf, kind: answer


@pytest.mark.parametrize(
    ("rule", "error", "message"),
    [
        (3, TypeError, "rule must be 'default', 'huggingface', 'timm', a glob such as '**/kernel'"),
        ([], TypeError, "or a list of pairs (glob, bool or rate); got []"),
        ({"kernel": True}, TypeError, "got {'kernel': True}"),
        (["ab"], TypeError, "rule[0] must be a pair (glob, bool or rate); got 'ab'"),
        ([None], TypeError, "rule[0] must be a pair (glob, bool or rate); got None"),
        ([("a", 1, 2)], TypeError, "rule[0] must be a pair (glob, bool or rate); got ('a', "),
        (
            [(3, True)],
            TypeError,
            "rule[0] must be a pair (glob, bool or rate); got (3, True)",
        ),
        ([("**", True), ("*", "no")], TypeError, "rule[1], '*', must be a real number"),
        ([("**", -0.1)], ValueError, "rule[0], '**', must be finite and not negative"),
        (_says(None), TypeError, "rule <lambda> at 'a/kernel' must be a real number"),
        (_says(math.inf), ValueError, "rule <lambda> at 'a/kernel' must be finite"),
        (_says(False), ValueError, "got False from <lambda> for all of 'a/kernel' [2, 3], 'a/b"),
        (
            "weight",
            ValueError,
            "match a parameter with each glob; got 'weight', which matches none of 'a/kernel' [2, ",
        ),
        ([("a/*", True)], ValueError, "no pair for 'b/kernel' [2, 3], 'b/bias' [2, 3]. End it"),
        (
            [("a/*", True), ("b/*", True), ("kernel", False)],
            ValueError,
            "rule must use each of its globs; got 'kernel' after 'a/*', which decides all that it ",
        ),
    ],
)
def test_wrong_rules_are_rejected(rule, error, message):
    with pytest.raises(error, match=re.escape(message)):
        rates(PARAMETERS, 0.5, rule)


def test_a_tied_parameter_has_the_name_of_its_first_occurrence():
    with pytest.raises(ValueError, match=r"none for 'a/x' \[2, 3\]\..* rule=\[\('a/x', True\)"):
        bools([_parameter("a/x", "a/y")], "default")


@pytest.mark.parametrize(
    ("count", "end"), [(5, "'x3' [2, 3], 'x4' [2, 3]"), (6, "'x4' [2, 3], ... (6 in all)")]
)
def test_long_lists_are_truncated(count, end):
    with pytest.raises(ValueError, match=re.escape(end) + r"\.$"):
        bools(SIX[:count], "y")
