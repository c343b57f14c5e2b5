"""Decay rules on the trees of layers of each library."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import regjax
from regjax import decay_mask, decay_rates, decay_table
from regjax._decay.paths import named_leaves
from regshared.globs import words
from tests.regjax.decaying_models import KEY, MODELS, Scanned
from tests.shared import suggested

LAYER = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}
NORM = {"scale": jnp.ones(3), "bias": jnp.ones(3)}
PARAMS = {"encoder": [{"dense": LAYER, "norm": NORM}] * 2, "head": LAYER}


def decaying(params: Any, mask: Any) -> set[str]:
    names = [name for name, _ in named_leaves(params)]
    return {name for name, decays in zip(names, jax.tree.leaves(mask), strict=True) if decays}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.sample(2)
def test_kernels_of_real_layers_decay_and_nothing_else(name):
    build, expected, parameters = MODELS[name]
    params = build()
    mask = decay_mask(params)
    assert jax.tree.structure(mask) == jax.tree.structure(params)
    assert all(type(leaf) is bool for leaf in jax.tree.leaves(mask))
    assert decaying(params, mask) == expected
    table = decay_table(params)
    assert len(table) == parameters
    assert {row.path for row in table if row.weight_decay} == {
        path.removesuffix("/value") if name.startswith("nnx") else path for path in expected
    }


@pytest.mark.parametrize(
    "params",
    [
        # Layers of linen.scan and eqx.filter_vmap, and manually stacked ones.
        jax.eval_shape(Scanned().init, KEY, jnp.zeros((2, 4)))["params"],
        eqx.filter_vmap(lambda k: [eqx.nn.Linear(2, 3, key=k), eqx.nn.LayerNorm(3)])(
            jax.random.split(KEY, 4)
        ),
        jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), {"dense": LAYER, "norm": NORM}),
    ],
    ids=["linen", "equinox", "dict"],
)
def test_stacked_layers(params):
    decays = decaying(params, decay_mask(params))
    assert len(decays) == 1
    assert {"kernel", "weight"} & set(words(min(decays)))
    # Planted: a rule by ndim treats biases and scales of stacked layers as kernels.
    by_dimensions = decaying(params, decay_mask(params, lambda path, leaf, kind: leaf.ndim > 1))
    assert any("bias" in name for name in by_dimensions)
    assert len(by_dimensions) == 4


def test_plain_containers():
    class Pair(NamedTuple):
        kernel: Any
        bias: Any

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class RMSNorm:
        weight: Any
        extra: Any = None

    kernels = (jnp.ones((2, 2)), jnp.ones((2, 2)))
    params = {"a": [Pair(jnp.ones((2, 3)), None)], "b": RMSNorm(jnp.ones(3)), "kernels": kernels}
    assert decaying(params, decay_mask(params)) == {"a/0/kernel", "kernels/0", "kernels/1"}
    assert decay_table(params).rows[1].kind == "norm"
    assert decay_mask({}) == {}
    assert decay_mask({"a": None}, "kernel") == {"a": None}


@pytest.mark.parametrize(
    ("path", "shape", "expected"),
    [
        ("norm1/weight", (3,), "norm"),
        ("encoder/ln_attn/w", (4, 3), "norm"),
        ("input_layernorm/weight", (3,), "norm"),
        ("ln_f/g", (3,), "norm"),
        ("norm/kernel", (3, 3), "kernel"),
        ("W1", (2, 3), "kernel"),
        ("b1", (3,), "bias"),
        ("w", (2, 3), "kernel"),
        ("fc/w", (3,), "kernel"),
        ("layers.0.norm.weight", (3,), "norm"),
        ("layers.0.fc.weight", (3, 3), "kernel"),
        ("embed/kernel", (3, 3), "kernel"),
        ("wte/embedding", (3, 3), "embedding"),
        ("cls_token", (1, 1, 3), "embedding"),
        ("attention/relative_position_bias_table", (9, 2), "bias"),
        ("logit_scale", (), "scale"),
        ("layer_scale/gamma", (3,), "scale"),
        ("text_projection", (3, 3), "kernel"),
        ("self_attn/in_proj_bias", (9,), "bias"),
        ("dense/lora_b", (2, 3), "kernel"),
        ("a/b/beta", (3,), "bias"),
    ],
)
def test_default_rule_by_name(path, shape, expected):
    params: Any = jnp.ones(shape)
    for part in reversed(path.split("/")):
        params = {part: params}
    (row,) = decay_table(params)
    assert (row.path, row.rule, bool(row.weight_decay)) == (path, expected, expected == "kernel")


@pytest.mark.parametrize(
    ("params", "path"),
    [
        ({"head": {"threshold": jnp.ones(())}, "kernel": jnp.ones((2, 2))}, "head/threshold"),
        ({"embed": {"w": jnp.ones((2, 2))}}, "embed/w"),
        ({"embedding": {"weight": jnp.ones((2, 2))}}, "embedding/weight"),
        ({"affine": {"weight": jnp.ones(3)}}, "affine/weight"),
        ({"lora": {"A": jnp.ones((2, 2)), "kernel": jnp.ones(2)}}, "lora/A"),
        ({"lora": {"B": jnp.ones((2, 2)), "kernel": jnp.ones(2)}}, "lora/B"),
        ([jnp.ones((2, 2))], "0"),
        (jnp.ones((2, 2)), ""),
    ],
)
def test_unknown_parameters_are_refused_with_a_rule_that_works(params, path):
    with pytest.raises(ValueError, match=r"'default' does not know; got none for") as error:
        decay_mask(params)
    table = {row.path: row for row in decay_table(params, 1.0, suggested(error))}
    is_matrix = len(table[path].shape) == 2 and not path.startswith("embed")
    assert bool(table[path].weight_decay) == is_matrix
    assert set(table[path].rule) & set("*0") or table[path].rule == path


def test_equinox_class_tells_what_a_name_does_not():
    class MyEmbedding(eqx.nn.Embedding):
        pass

    class PatchEmbedding(eqx.Module):
        weight: Any

    assert decay_table({"x": MyEmbedding(2, 2, key=KEY)}).rows[0].rule == "embedding"
    with pytest.raises(ValueError, match="got none for 'x/weight'"):
        decay_mask({"x": PatchEmbedding(jnp.ones((2, 2)))})


def test_first_pair_wins():
    special, general = ("encoder/0/**", 0.5), ("**/dense/kernel", 0.25)
    rates = decay_rates(PARAMS, 1.0, [special, general, ("**", False)])
    assert rates["encoder"][0]["dense"] == {"kernel": 0.5, "bias": 0.5}
    assert rates["encoder"][1]["dense"] == {"kernel": 0.25, "bias": 0.0}
    rates = decay_rates(PARAMS, 1.0, [general, special, ("**", False)])
    assert rates["encoder"][0]["dense"] == {"kernel": 0.25, "bias": 0.5}


def test_function_sees_path_leaf_and_kind():
    seen = []

    def rule(path, leaf, kind):
        seen.append((path, leaf.shape, kind))
        return kind == "norm"

    mask = decay_mask({"Dense_0": LAYER, "LayerNorm_0": NORM}, rule)
    assert mask["LayerNorm_0"] == {"bias": True, "scale": True}
    assert seen[1:3] == [("Dense_0/kernel", (2, 3), "linear"), ("LayerNorm_0/bias", (3,), "norm")]
    assert decay_table(PARAMS, 0.1, [("head/*", lambda *_: 0.5), ("**", rule)]).rows[-1][-1] == 0.5


@pytest.mark.parametrize(
    ("rule", "error", "message"),
    [
        (3, TypeError, "rule must be 'default', 'huggingface', .* got 3"),
        ([], TypeError, r"rule must be .* got \[\]"),
        ({"kernel": True}, TypeError, "rule must be .* got {'kernel': True}"),
        (["kernel"], TypeError, r"rule\[0\] must be a pair .* got 'kernel'"),
        ([("kernel", 1, 2)], TypeError, r"rule\[0\] must be a pair"),
        ([(3, True)], TypeError, r"rule\[0\] must be a pair"),
        ([("**", True), ("*", "no")], TypeError, r"rule\[1\], '\*', must be a real number.*'no'"),
        ([("**", None)], TypeError, r"rule\[0\], '\*\*', must be a real number"),
        ([("**", -0.1)], ValueError, r"rule\[0\], '\*\*', must be finite and not negative.*-0.1"),
        ([("**", float("nan"))], ValueError, r"rule\[0\].*nan\. Pass True, False or a rate"),
        (lambda path, leaf, kind: None, TypeError, "rule <lambda> at 'encoder/0/dense/bias' must"),
        (
            lambda path, leaf, kind: float("inf"),
            ValueError,
            "at 'encoder/0/dense/bias' must be fin",
        ),
        (lambda path, leaf, kind: False, ValueError, "got False from <lambda> for all of 'encoder"),
        ("decoder/**", ValueError, r"'decoder/\*\*', which matches none of 'encoder/0/dense/bias'"),
        ("params/**", ValueError, r"\[3\], 'encoder/0/dense/kernel' \[2, 3\], .* \(10 in all\)"),
        ([("kernel", True), ("weight", 0.1), ("**", False)], ValueError, "'weight', which match"),
        ([("kernel", True), ("bias", False)], ValueError, "no pair for 'encoder/0/norm/scale'"),
        ([("**", True), ("bias", False)], ValueError, r"'bias' after '\*\*', which decides all"),
        ([("head/*", 0.1), ("head/kernel", 1.0), ("**", False)], ValueError, r"after 'head/\*'"),
    ],
)
def test_bad_rules_are_refused(rule, error, message):
    for function in (decay_rates, decay_table):
        with pytest.raises(error, match=message):
            function(PARAMS, 0.1, rule)
    with pytest.raises(error, match=message):
        decay_mask(PARAMS, rule)


def test_a_mask_says_no_rates():
    with pytest.raises(TypeError, match=r"rate 0\.5 from kernel for 'encoder/0/dense/kernel'"):
        decay_mask(PARAMS, [("kernel", 0.5), ("**", False)])
    with pytest.raises(ValueError, match="weight_decay must be finite"):
        decay_rates(PARAMS, -1.0)
    with pytest.raises(TypeError, match="weight_decay must be a real number"):
        decay_table(PARAMS, True)


def test_frozen_parameters_do_not_decay():
    mask = decay_mask(PARAMS, frozen=("encoder/0/**", "head/bias"))
    assert decaying(PARAMS, mask) == {"encoder/1/dense/kernel", "head/kernel"}
    table = decay_table(PARAMS, frozen="encoder/**")
    assert {row.rule for row in table.rows[:-2]} == {"frozen"}
    # A rule matches frozen parameters, too.
    params = {"temperature": jnp.ones(()), "kernel": jnp.ones((2, 2))}
    assert not decay_mask(params, frozen="temperature")["temperature"]
    rates = decay_rates(PARAMS, 0.1, [("head/**", 0.5), ("**", True)], frozen="head/*")
    assert rates["head"] == {"kernel": 0.0, "bias": 0.0}
    with pytest.raises(
        ValueError, match=r"frozen must .* got 'backbone/\*\*', which matches none of 'enc"
    ):
        decay_mask(PARAMS, frozen="backbone/**")


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_frozen_parameters_stay_as_torch_leaves_them(name):
    optimizer = getattr(regjax.optim, name)(
        0.1, weight_decay=0.1, mask=lambda params: decay_mask(params, frozen="encoder/**")
    )
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    updates, _ = optimizer.update(zeros, optimizer.init(PARAMS), PARAMS)
    moved = {name for name, update in named_leaves(updates) if np.any(np.asarray(update))}
    assert moved == {"head/kernel"}


@pytest.mark.parametrize("make", [optax.adamw, regjax.optim.adamw])
@pytest.mark.parametrize("name", ["linen-params", "equinox-filtered", "nnx-state", "haiku"])
@pytest.mark.sample(2)
def test_mask_goes_into_optimizers(make, name):
    params = MODELS[name][0]()
    zeros, ones = (jax.tree.map(like, params) for like in (jnp.zeros_like, jnp.ones_like))
    masks = (decay_mask, decay_mask(params))
    optimizers = [make(0.1, weight_decay=0.5, mask=mask) for mask in masks]
    step = jax.jit(lambda g, w: [each.update(g, each.init(w), w)[0] for each in optimizers])
    # optax itself promotes dtypes in its bias correction.
    with jax.numpy_dtype_promotion("standard"):
        runs = step(zeros, ones)
    for updates in runs:
        moved = {name for name, update in named_leaves(updates) if np.any(np.asarray(update))}
        assert moved == MODELS[name][1]


def test_mask_goes_into_penalties_and_nnx_optimizers():
    ones = jax.tree.map(jnp.ones_like, PARAMS)
    assert float(regjax.l2_penalty(ones, 1.0, mask=decay_mask)) == 3 * 6
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    model.bias[...] = jnp.ones(3)
    before = jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))
    optimizer = nnx.Optimizer(model, regjax.optim.adamw(0.1, mask=decay_mask), wrt=nnx.Param)
    optimizer.update(model, jax.tree.map(jnp.zeros_like, before))
    after = nnx.state(model, nnx.Param)
    changed = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), before, after)
    assert decaying(changed, changed) == {"kernel/value"}


def test_names_shapes_and_dtypes_suffice():
    shapes = jax.eval_shape(lambda: PARAMS)
    assert decay_mask(shapes) == decay_mask(PARAMS)
    assert decay_table(shapes) == decay_table(PARAMS)
    traced = []
    jax.jit(lambda params: traced.append(decay_mask(params)))(PARAMS)
    assert traced == [decay_mask(PARAMS)]


def test_what_is_no_parameter_is_false_and_not_asked_about():
    params = {
        "count": jnp.zeros((), jnp.int32),
        "key": KEY,
        "f": jnp.tanh,
        "p": 0.5,
        "kernel": LAYER,
    }
    mask = decay_mask(params, [("**", True)])
    assert {name for name, value in mask.items() if value is False} == {"count", "key", "f", "p"}
    assert mask["kernel"] == {"kernel": True, "bias": True}
    with pytest.raises(ValueError, match="'count', which matches none of 'kernel/bias'"):
        decay_mask(params, "count")
    variables = {"params": LAYER, "batch_stats": {"kernel": jnp.ones((2, 2))}}
    assert decay_mask(variables, "kernel")["batch_stats"] == {"kernel": False}
    # A name other than `params` is not a collection of Flax, and the rule applies.
    assert decay_mask({"params": LAYER, "critic": LAYER})["critic"]["kernel"]
    # Neither is one of these names at another level.
    assert decay_mask({"net": {"params": LAYER, "cache": LAYER}})["net"]["cache"]["kernel"]
    assert decay_mask({"cache": LAYER})["cache"]["kernel"]


def test_partitioned_linen_parameters():
    init = linen.with_partitioning(linen.initializers.ones, (None, None))
    params = linen.Dense(3, kernel_init=init).init(KEY, jnp.ones((1, 2)))
    assert [row.path for row in decay_table(params)] == ["params/bias", "params/kernel"]
    assert jax.tree.leaves(decay_mask(params, "params/kernel")) == [False, True]


def test_rates_decay_each_leaf_by_its_own():
    rule = [("head/kernel", 0.5), ("encoder/0/**", 0.25), ("**", "default")]
    link = regjax.optim.add_decay_by_leaf(decay_rates(PARAMS, 0.1, rule))
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    ones = jax.tree.map(jnp.ones_like, PARAMS)
    updates, _ = link.update(zeros, link.init(ones), ones)
    found = {name: float(update.max()) for name, update in named_leaves(updates)}
    expected = {row.path: row.weight_decay for row in decay_table(PARAMS, 0.1, rule)}
    assert found == pytest.approx(expected)
    assert sorted(set(expected.values())) == [0.0, 0.1, 0.25, 0.5]


def test_rates_that_nobody_gives():
    assert decay_rates(LAYER) == {"kernel": 1.0, "bias": 0.0}
    assert [row.weight_decay for row in decay_table(LAYER)] == [0.0, 1.0]
    assert decay_rates({"count": jnp.int32(0), **LAYER}, 0.1, [("**", True)])["count"] == 0.0


def test_what_is_no_tree_of_parameters_is_refused():
    for params, found in ((jnp.int32(0), r"int32\[\]"), ("x", "'x'"), (3, "3")):
        with pytest.raises(TypeError, match=f"^params must be a pytree of parameters; got {found}"):
            decay_mask(params)
    assert decay_mask(jnp.ones((2, 2)), [("**", True)]) is True
    assert decay_mask({}, frozen="x") == {}


def test_traced_rate():
    rates = jax.jit(lambda wd: decay_rates(LAYER, wd))(0.5)
    assert rates == {"kernel": 0.5, "bias": 0.0}


def test_table_as_data():
    table = decay_table(PARAMS, 0.1)
    row = table.rows[1]
    assert row == ("encoder/0/dense/kernel", (2, 3), "float32", 6, "linear", "kernel", 0.1)
    assert len(table) == len(list(table)) == 10
    assert table.decaying == (3, 18)
    assert table.exempt == (7, 21)
    assert sum(table.decaying) + sum(table.exempt) == 10 + sum(
        x.size for x in jax.tree.leaves(PARAMS)
    )


def test_table_lines_up():
    head, *rows, last = str(decay_table(PARAMS | {"kernel": jnp.ones((10, 1000))}, 1e-2)).split(
        "\n"
    )
    for title in ("path", "shape", "dtype", "kind", "rule"):
        start = head.index(title)
        assert all(row[start - 1] == " " != row[start] for row in rows if start)
    assert {len(line) for line in (head, *rows)} == {len(head)}
    assert "10,000" in rows[-1]
    assert last == "decay: 4 of 11 leaves, 10,018 of 10,039 parameters"


def test_table_in_markdown():
    head, ruler, *rows, _, last = decay_table(LAYER, 0.1, "**/kernel").to_markdown().split("\n")
    assert head == "| path | shape | dtype | size | kind | rule | weight_decay |"
    assert ruler == "|---|---|---|---:|---|---|---:|"
    assert rows[1] == r"| kernel | (2, 3) | float32 | 6 | - | \*\*/kernel | 0.1 |"
    assert all(row.count("|") == head.count("|") for row in rows)
    assert last.startswith("decay: 1 of 2 leaves")
