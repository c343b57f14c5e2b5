"""A transformer of timm and its port to NNX train the same, and planted defects are found."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import torch

import regjax
import regjax.nnx
import regtorch
from examples import port_from_timm as program
from parity_tests.compare import FLOAT32, FLOAT64
from parity_tests.harness import compare_training
from regjax import interop
from regjax._decay.paths import named_leaves
from tests import reading, test_howto

pytestmark = pytest.mark.slow
STEPS = 5
BLOCKS = {  # the sites of each block; the first has no dropped paths
    0: ("attn", "attn.proj_drop", "mlp.drop1", "mlp.drop2"),
    1: ("attn", "attn.proj_drop", "drop_path1", "mlp.drop1", "mlp.drop2", "drop_path2"),
    2: ("attn", "attn.proj_drop", "drop_path1", "mlp.drop1", "mlp.drop2", "drop_path2"),
}
SITES = {
    "pos_drop",
    "head_drop",
    *(f"blocks.{i}.{s}" for i, sites in BLOCKS.items() for s in sites),
}


@pytest.fixture(autouse=True)
def _as_a_reader():
    """A model of Flax broadcasts and promotes, as a user's does."""
    with reading.as_a_reader():
        yield


def compare(mistake: str = "none", dtype: str = "float32"):
    from examples import timm_vit

    settings = timm_vit.Settings(STEPS, dtype, mistake)
    tier = FLOAT64 if dtype == "float64" else FLOAT32
    with jax.enable_x64(dtype == "float64"):
        original, scheduler = timm_vit.torch_side(settings)
        port, names = timm_vit.jax_side(settings, original, scheduler)
        return compare_training(port, original, timm_vit.batches(settings), names, tier=tier)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-12)])
def test_every_step_agrees_with_every_dropout_on(dtype, tolerance):
    found = compare(dtype=dtype)
    found.raise_if_different()
    assert set(found.sites) == SITES
    assert set(found.sites.values()) == {STEPS}
    assert found.mask_elements > 5e5 * STEPS
    assert found.different_mask_elements == 0
    for quantity in ("loss", "state", "update", "parameter", "average"):
        assert len(found.deviations[quantity]) == STEPS
    for quantity in ("loss", "parameter", "average"):
        assert max(found.deviations[quantity]) <= tolerance
    assert "blocks/1/attention/key/bias" in found.notes[-1]  # its true gradient is zero


@pytest.mark.parametrize(
    ("mistake", "quantity", "name", "detail"),
    [
        ("decay", "update", "blocks/1/up/bias", ""),
        ("rate", "update", "", ""),
        ("path", "mask", "blocks.2.drop_path1", "rate 0.21 in JAX and 0.2 in PyTorch"),
        ("swap", "activation", "blocks.1.attn", "masks agree"),
        ("site", "mask", "blocks.1.mlp.drop1", "JAX does not, but at 'blocks.1.mlp.drop'"),
        ("shared", "mask", "blocks.0.attn", "a mask of shape [1, 1, 17, 17] in JAX and [16, 3, 17"),
    ],
)
def test_a_mistake_is_found_at_the_first_step_by_name(mistake, quantity, name, detail):
    first = compare(mistake).first
    assert first is not None
    assert (first.step, first.quantity) == (1, quantity)
    assert name in (first.name, "")
    assert detail in first.detail


def test_the_port_decays_the_parameters_that_timm_decays():
    """A gradient of zeros moves only the parameters that decay."""
    from examples import timm_vit

    original, scheduler = timm_vit.torch_side(timm_vit.Settings(STEPS))
    model, recipe = original.model, original.optimizer
    decayed = {id(p) for g in recipe.param_groups if g["weight_decay"] for p in g["params"]}
    expected = {name for name, p in model.named_parameters() if id(p) in decayed}
    assert {"cls_token", "pos_embed", "blocks.0.attn.qkv.bias", "norm.weight"}.isdisjoint(expected)
    port, names = timm_vit.jax_side(timm_vit.Settings(STEPS), original, scheduler)
    params = timm_vit.nnx.to_pure_dict(timm_vit.nnx.state(port.state[0], timm_vit.nnx.Param))
    optimizer = interop.optimizer_from_torch(
        recipe, names, model=model, scheduler=scheduler, steps=STEPS
    )
    zeros = jax.tree.map(np.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    leaves = {path.removesuffix("/value"): leaf for path, leaf in names.items()}
    moved = {leaves[path].name for path, update in named_leaves(updates) if update.any()}
    assert moved == expected
    # In JAX the preset does not see what the model of timm lists.
    rule = [("class_token", False), ("positions", False), ("**", "timm")]
    mask = regjax.decay_mask(params, rule)
    assert {leaves[path].name for path, decays in named_leaves(mask) if decays} == expected


def test_a_dropped_path_of_each_kind_has_the_mask_of_timm():
    from flax import nnx
    from timm.layers import DropPath  # pyright: ignore[reportMissingImports]

    layers = (
        nnx.Dropout(0.2, broadcast_dims=(1, 2), deterministic=False),
        regjax.nnx.DropPath(0.2, deterministic=False),
    )
    original = regtorch.keyed.convert(DropPath(0.2))
    regtorch.keyed.set_key(original, regtorch.key(0), 7)
    expected = original(torch.ones(64, 3, 2)).numpy()
    assert 0 < (expected == 0).mean() < 0.5
    for layer in layers:
        bound = regjax.keyed.bind(layer, jax.random.key(0), 7)
        np.testing.assert_allclose(bound(np.ones((64, 3, 2), np.float32)), expected, rtol=1e-6)


def test_draws_of_attention_have_the_name_of_its_module():
    from examples import timm_vit

    model = timm_vit.torch_side(timm_vit.Settings(STEPS))[0].model
    regtorch.keyed.set_key(model, regtorch.key(0), 0)
    model(torch.ones(2, 1, timm_vit.SIZE, timm_vit.SIZE))
    names = regtorch.keyed.sites(model)
    assert set(names[: len(SITES)]) == SITES
    assert names[len(SITES) :] == [f"blocks.{i}.attn.attn_drop" for i in BLOCKS]


@pytest.mark.parametrize("name", test_howto.IN_ZOO)
def test_a_page_that_imports_timm_runs(monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    page = test_howto.DOCS / "howto" / f"{name}.md"
    test_howto.run_page(name, page.read_text())


def test_the_program_prints_the_comparison_and_draws_a_picture(tmp_path, capsys):
    assert program.main(["--quick", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "JAX and PyTorch agree." in out
    assert "elements compared, 0 differ" in out
    assert "| average | 10 |" in out
    assert (tmp_path / "port_from_timm.png").stat().st_size > 10_000
