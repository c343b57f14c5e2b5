"""Every program with `--out` rejects a folder that it cannot write before it starts to work."""

from __future__ import annotations

import errno
import importlib
import os
import tempfile
from pathlib import Path

import pytest

from parity_tests.output import Parser, replacing, write_atomically

PROGRAMS = (
    "parity_tests.__main__",
    "parity_tests.exactness",
    "examples.overfit.cli",
    "examples.uncertainty.cli",
    "examples.port_from_torch.__main__",
    *(
        f"benchmarks.{name}"
        for name in (
            "attention",
            "attention_kernel",
            "comparison",
            "device_check",
            "dropout_speed",
            "gpu_kernels",
            "gpu_model",
            "optimizers",
            "overhead",
            "scale",
            "shared_masks",
            "summary",
            "torch_speed",
            "torch_random_speed",
            "tpu_model",
            "transformer_step",
        )
    ),
)


def rejected(capsys, program: str, folder: str) -> str:
    """Return the last line that a program prints about its folder."""
    with pytest.raises(SystemExit) as exited:
        importlib.import_module(program).main(["--out", folder])
    assert exited.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("below", ["", "deeper/still"])
@pytest.mark.parametrize("program", PROGRAMS)
def test_a_file_is_not_a_folder(capsys, tmp_path, program, below):
    (tmp_path / "file").touch()
    folder = str(tmp_path / "file" / below)
    line = rejected(capsys, program, folder)
    assert f"--out: must be a folder that can be written; got {folder!r}" in line


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_folder_needs_a_name(capsys, program):
    assert "--out: must name a folder or a file; got ''" in rejected(capsys, program, "")


@pytest.mark.parametrize("program", PROGRAMS[:5])
def test_a_full_disk_is_reported_before_the_work(capsys, monkeypatch, tmp_path, program):
    """So is a folder without permission: an existing folder may not be writable."""

    def full(**where):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    assert "No space left on device" in rejected(capsys, program, str(tmp_path))


@pytest.mark.parametrize("program", ["parity_tests.__main__", "parity_tests.exactness"])
def test_a_list_writes_nothing(capsys, monkeypatch, tmp_path, program):
    monkeypatch.chdir(tmp_path)
    assert importlib.import_module(program).main(["--list"]) == 0
    assert not list(tmp_path.iterdir())


def test_a_missing_folder_is_made_with_its_parents(tmp_path):
    parser = Parser("program", None)
    parser.add_out("outputs", "files")
    folder = tmp_path / "deep" / "er"
    assert parser.parse_args(["--out", str(folder)]).out == folder
    assert folder.is_dir()
    assert not list(folder.iterdir())


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path):
    path = tmp_path / "file"
    write_atomically(path, "é\n")
    assert path.read_text(encoding="utf-8") == "é\n"

    def interrupted():
        with replacing(path) as temporary:
            temporary.write_text("half")
            assert path.read_text(encoding="utf-8") == "é\n"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text(encoding="utf-8") == "é\n"
    assert list(tmp_path.iterdir()) == [path]
