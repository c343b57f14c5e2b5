"""Only the key is stored for the backward pass on TPUs, by XLA's compiler.

The steps are compiled for a chip that need not be present, and not run. libtpu reads its settings
on load and stays loaded, so another process compiles, once for all tests.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.modelled import BATCH, LAYERS, WIDTH
from benchmarks.tpu_model import LIBTPU

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="libtpu, the compiler for TPUs, is not installed: pip install libtpu",
    ),
]

PROGRAM = """
import json

import jax
import jax.numpy as jnp

import regjax
from benchmarks import modelled, perceptron, tpu_model


def storing(x, key):
    return jnp.where(jax.random.bernoulli(key, 0.9, x.shape), x / 0.9, 0)


def packed(x, key):
    return regjax.dropout(x, 0.1, key=key, sampler=regjax.packed_bernoulli)


dropouts = {
    "none": perceptron.none,
    "exact": lambda x, key: regjax.dropout(x, 0.1, key=key),
    "packed": packed,
    "storing": storing,
    "guarded": jax.checkpoint(storing, prevent_cse=True),
}
asked = [("unrolled", name, 8) for name in dropouts if name != "storing"]
asked += [("scanned", name, 8) for name in dropouts if name != "guarded"]
asked += [("scanned", name, 16) for name in ("none", "packed")]
devices = tpu_model.devices("v5e:2x2")
print(json.dumps([
    [*one, modelled.step_bytes(devices, one[0], dropouts[one[1]], one[2])] for one in asked
]))
"""
ELEMENTS = BATCH * WIDTH  # the activations of one layer


@pytest.fixture(scope="module")
def temporary(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str, int], int]:
    """Return the bytes of a training step, by form of the layers, dropout, and depth."""
    logs = str(tmp_path_factory.mktemp("libtpu"))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=Path(__file__).parents[2],
        env={**os.environ, **LIBTPU, "TPU_LOG_DIR": logs},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout.splitlines()[-1])
    return {(form, name, layers): count for form, name, layers, count in answers}


@pytest.mark.parametrize("form", ["unrolled", "scanned"])
def test_exact_masks_take_no_memory(temporary, form):
    within = 1.01 * temporary[form, "none", LAYERS]
    assert temporary[form, "exact", LAYERS] <= within


@pytest.mark.parametrize(("form", "planted"), [("unrolled", "guarded"), ("scanned", "storing")])
def test_a_stored_mask_is_seen(temporary, form, planted):
    """Test of the test: a mask that a scan keeps, and barriers that keep XLA from fusing it.

    Each has an effect in one form only: unrolled, XLA draws the mask again by itself, and in a scan
    the barriers have no effect.
    """
    within = 1.01 * temporary[form, "none", LAYERS]
    assert temporary[form, planted, LAYERS] > 1.1 * within


def test_packed_masks_keep_the_operands_of_the_unrolled_layers_but_no_mask(temporary):
    """XLA:TPU does not expand words inside a matrix product.

    Each product except the last, which the loss squares, therefore reads the output of dropout
    from memory, where it is kept in bfloat16 for the backward pass, with words of one bit per
    element. A mask would add one byte per element.
    """
    extra = temporary["unrolled", "packed", LAYERS] - temporary["unrolled", "none", LAYERS]
    operands, words = 2 * (LAYERS - 1) * ELEMENTS, LAYERS * ELEMENTS // 8
    assert extra <= 1.01 * (operands + words)


def test_packed_masks_take_no_memory_in_a_scan_however_many_layers_it_has(temporary):
    """The difference is at most the input of the product of one layer."""
    for layers in (LAYERS, 2 * LAYERS):
        extra = temporary["scanned", "packed", layers] - temporary["scanned", "none", layers]
        assert extra <= 2 * ELEMENTS
