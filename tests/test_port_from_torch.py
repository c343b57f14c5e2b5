"""The example of a port: the same run in both frameworks, and mistakes that are found."""

from __future__ import annotations

import pytest

from examples import port_from_torch


def run(tmp_path, *options: str) -> int:
    return port_from_torch.main(["--steps", "25", "--out", str(tmp_path), *options])


def test_the_port_is_the_same(tmp_path, capsys):
    assert run(tmp_path) == 0
    out = capsys.readouterr().out
    assert "JAX and PyTorch agree." in out
    assert "| parameter | 25 |" in out
    assert (tmp_path / "port_from_torch.png").exists()


@pytest.mark.parametrize(
    ("mistake", "quantity"), [("key", "loss"), ("rate", "loss"), ("bias", "parameter")]
)
def test_a_mistake_is_found_at_the_first_step(tmp_path, capsys, mistake, quantity):
    assert run(tmp_path, "--mistake", mistake) == 1
    assert f"part at step 1, in the {quantity}" in capsys.readouterr().out
