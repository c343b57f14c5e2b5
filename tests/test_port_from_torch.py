"""Conversion of a PyTorch run to JAX: the steps agree, and planted defects are reported."""

from __future__ import annotations

import pytest

from examples.port_from_torch import __main__ as program


def run(tmp_path, *options: str) -> int:
    return program.main(["--steps", "25", "--out", str(tmp_path), *options])


def test_the_port_agrees(tmp_path, capsys):
    assert run(tmp_path) == 0
    out = capsys.readouterr().out
    assert "JAX and PyTorch agree." in out
    assert "| parameter | 25 |" in out
    assert (tmp_path / "port_from_torch.png").exists()


@pytest.mark.parametrize(
    ("mistake", "where"),
    [
        ("key", "in the mask '4': its key is that of step 26 in JAX and of 25 in PyTorch"),
        ("rate", "in the mask '4': rate 0.51 in JAX and 0.5 in PyTorch"),
        ("bias", "in the update '"),
        ("state", "in the state 'exp_avg"),
    ],
)
@pytest.mark.sample(2)
def test_a_mistake_is_reported_at_the_first_step(tmp_path, capsys, mistake, where):
    assert run(tmp_path, "--mistake", mistake) == 1
    assert f"diverge at step 26, {where}" in capsys.readouterr().out
