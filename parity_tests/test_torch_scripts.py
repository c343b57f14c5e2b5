"""Ten unchanged PyTorch scripts, reproduced by jitted steps in JAX that have only the seed."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from parity_tests import torch_scripts
from parity_tests.test_torch_random_init import differing, state_is_torchs
from parity_tests.torch_script_ports import PORTS, run
from parity_tests.torch_scripts import IMAGES, LABELS, SCRIPTS, SEQUENCES, TOKENS, VECTORS
from regjax import torch_random

INPUTS = {
    **dict.fromkeys(SCRIPTS, VECTORS),
    **dict.fromkeys(("cnn", "channels_last"), IMAGES),
    **dict.fromkeys(("transformer", "sdpa"), SEQUENCES),
    "lstm": TOKENS,
}
FAST = ("channels_last", "sdpa")
DROPOUT: Any = torch_random.dropout


@pytest.fixture(autouse=True)
def _forked():
    with torch.random.fork_rng(devices=[]):
        yield


def first_difference(name, seed, port):
    """Return the first thing that differs, or an empty string."""
    initial, losses, final = SCRIPTS[name](seed)
    steps = run(port, seed, INPUTS[name], LABELS)
    params = next(steps)
    if list(params) != list(initial) or any(differing(params[n], initial[n]) for n in initial):
        return "initial parameters"
    found = list(steps)
    for number, (expected, (loss, _, _)) in enumerate(zip(losses, found, strict=True)):
        if differing(loss, torch.tensor(expected), port.tolerance):
            return f"loss of step {number}"
    _, params, g = found[-1]
    if any(differing(params[n], final[n], port.tolerance) for n in final):
        return "final parameters"
    return "" if state_is_torchs(g) else "next draw"


@pytest.mark.parametrize(
    ("name", "seeds"),
    [(name, (0,)) for name in FAST]
    + [pytest.param(name, (0, 1, 2), marks=pytest.mark.slow) for name in SCRIPTS],
)
def test_a_script_is_reproduced_from_its_seed(name, seeds):
    for seed in seeds:
        assert first_difference(name, seed, PORTS[name]) == ""


def test_every_script_has_a_port():
    assert list(PORTS) == list(SCRIPTS)
    assert "regjax" not in vars(torch_scripts)


def _of_other_rate(x, rate, g, **options):
    return DROPOUT(x, rate + 1e-3, g, **options)


def _row_major(x, rate, g, *, memory_order=None):
    return DROPOUT(x, rate, g)


def _heads_first(x, rate, g, *, memory_order=None):
    return DROPOUT(x, rate, g, memory_order=(1, 0, 2, 3) if x.ndim == 4 else memory_order)


def _without_draw(x, rate, g, **options):
    return DROPOUT(x, rate, g, **options)[0], g


def _drawn_again(x, rate, g, **options):
    return DROPOUT(x, rate, DROPOUT(x, rate, g, **options)[1], **options)


def _batch_first_layers(x, rate, g, *, memory_order=None):
    is_between_layers = x.ndim == 3 and rate == 0.3
    return DROPOUT(x, rate, g, memory_order=(1, 0, 2) if is_between_layers else memory_order)


def _in_reverse():
    """Let the second of two dropouts of one shape draw before the first."""
    start = []

    def dropout(x, rate, g):
        if not start:
            start.append(g)
            return _drawn_again(x, rate, g)
        return DROPOUT(x, rate, start.pop())[0], g

    return dropout


PLANTED = {
    "another rate": ("mlp", _of_other_rate, "loss of step 0"),
    "row-major": ("channels_last", _row_major, "loss of step 0"),
    "row-major attention output": ("transformer", _row_major, "loss of step 0"),
    "mask of the heads first": ("sdpa", _heads_first, "loss of step 0"),
    "batch-first masks between layers": ("lstm", _batch_first_layers, "loss of step 0"),
    "a mask used twice": ("sdpa", _without_draw, "loss of step 0"),
    "drawn again by a checkpoint": ("checkpointing", _drawn_again, "loss of step 0"),
    "two draws in reverse": ("nested", _in_reverse(), "loss of step 0"),
    "another rate in bfloat16": ("bfloat16", lambda x, rate, g: DROPOUT(x, rate + 0.05, g), "loss"),
}


@pytest.mark.parametrize(
    "defect",
    [n if n == "row-major" else pytest.param(n, marks=pytest.mark.slow) for n in PLANTED],
)
def test_a_defect_is_found(monkeypatch, defect):
    name, dropout, expected = PLANTED[defect]
    monkeypatch.setattr(torch_random, "dropout", dropout)
    assert first_difference(name, 0, dataclasses.replace(PORTS[name])).startswith(expected)


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        (
            "mlp",
            {"structure": dict(reversed(PORTS["mlp"].structure.items()))},
            "initial parameters",
        ),
        pytest.param("nested", {"evaluations": 0}, "loss of step 3", marks=pytest.mark.slow),
    ],
)
def test_a_draw_out_of_order_outside_of_the_step_is_found(name, changes, expected):
    assert first_difference(name, 0, dataclasses.replace(PORTS[name], **changes)) == expected
