"""BERT of Hugging Face, trained in PyTorch and in Flax by `examples/port_from_huggingface.py`."""

from __future__ import annotations

import re

import jax
import pytest

import regtorch
from parity_tests import compare

pytestmark = pytest.mark.slow

STEPS = 4
EVERY_MASK = "masks: 790,528 elements compared, 0 differ"
SAME_GROUPS = "weight decay: 17 of 41 parameters in Trainer, the same in the port"


@pytest.fixture(autouse=True)
def _promotion():
    """Flax's own layer norm promotes float64 with float32."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def run(tmp_path, capsys, *options: str) -> tuple[int, str]:
    """Return the exit code of the example, and its output."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    from examples import port_from_huggingface

    code = port_from_huggingface.main(["--steps", str(STEPS), "--out", str(tmp_path), *options])
    assert not jax.config.read("jax_enable_x64")
    return code, capsys.readouterr().out


@pytest.mark.parametrize(
    ("attention", "site", "dtype"),
    [
        ("sdpa", "self", "float32"),
        ("eager", "self.dropout", "float32"),
        ("sdpa", "self", "float64"),
    ],
)
def test_every_step_agrees(tmp_path, capsys, attention, site, dtype):
    code, out = run(tmp_path, capsys, "--attention", attention, "--dtype", dtype)
    assert code == 0
    assert "JAX and PyTorch agree." in out
    assert "Compared 32 masks at 8 sites" in out
    assert f"bert.encoder.layer.1.attention.{site}, " in out
    assert EVERY_MASK in out
    assert SAME_GROUPS in out
    bound = {"float32": compare.FLOAT32, "float64": compare.FLOAT64}[dtype].tolerance
    for quantity in ("loss", "parameter"):
        assert re.search(rf"\| {quantity} \| {STEPS} \|.*\| {bound:.0e} \|", out), out
    assert (tmp_path / "port_from_huggingface.png").exists()


@pytest.mark.parametrize(
    ("mistake", "step", "place"),
    [
        ("decay", 3, "the update 'bert/encoder/layer/0/output/dense/bias'"),
        ("warmup", 1, "the update 'classifier/kernel'"),
        ("rate", 1, "the mask 'bert.encoder.layer.0.attention.self': rate 0.11 in JAX and 0.1"),
        ("site", 1, "the mask 'bert.embeddings.dropout': PyTorch draws a mask here"),
        ("clip", 1, "the state 'exp_avg"),
    ],
)
def test_a_mistake_is_found(tmp_path, capsys, mistake, step, place):
    code, out = run(tmp_path, capsys, "--mistake", mistake, "--dtype", "float64")
    assert code == 1
    assert f"diverge at step {step}, in {place}" in out
    assert (SAME_GROUPS in out) == (mistake != "decay")


def test_the_groups_of_trainer_are_those_of_the_preset():
    pytest.importorskip("transformers", reason="transformers is not installed")
    from examples import huggingface_bert as example

    side, _ = example.torch_side(example.Settings())
    assert side.optimizer is not None
    preset = regtorch.decay_groups(side.model, example.WEIGHT_DECAY, "huggingface")
    expected = {id(p): group["weight_decay"] for group in preset for _, p in group["params"]}
    trained = {
        id(p): group["weight_decay"]
        for group in side.optimizer.param_groups
        for p in group["params"]
    }
    assert trained == expected
    assert set(trained.values()) == {example.WEIGHT_DECAY, 0.0}
