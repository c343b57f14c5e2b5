"""The example of DistributedDataParallel: several ranks have the masks and losses of one."""

from __future__ import annotations

import importlib

import pytest
import torch

from examples import torch_ddp


@pytest.mark.slow
def test_ranks_agree_with_one(capfd):
    assert torch_ddp.main(["--ranks", "3"]) == 0
    out = capfd.readouterr().out
    assert "masks: identical, 20480 bits" in out
    assert f"loss after {torch_ddp.STEPS} steps: " in out


def test_different_masks_are_a_failure(monkeypatch, capfd):
    def spawn(train, args, nprocs):
        count, folder = args
        masks = torch.ones(16, 20, 64, dtype=torch.bool)
        masks[0, 0, 0] = count == 1
        torch.save((torch.ones(20), masks), f"{folder}/results of {count}")

    # The package has a function of this name in place of the module.
    monkeypatch.setattr(importlib.import_module("torch.multiprocessing.spawn"), "spawn", spawn)
    assert torch_ddp.main([]) == 1
    assert "masks: different" in capfd.readouterr().out
