"""The sharded language model as a user runs it: killed, resumed, on several processes."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from examples.sharded_lm import launch

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
SIZE = "--width 32 --depth 1 --heads 4 --context 16 --batch 16 --warmup 10"
BOUND = 300  # seconds within which a failed job must end, on a busy machine


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """Return variables that make processes share their compiled programs.

    The settings of `conftest.py` are left out: Flax's norms need promotion in float64.
    """
    own = "XLA_FLAGS", "JAX_NUMPY_DTYPE_PROMOTION", "JAX_NUMPY_RANK_PROMOTION"
    return {
        **{name: value for name, value in os.environ.items() if name not in own},
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def command(out: Path, options: str) -> list[str]:
    return [sys.executable, "-m", "examples.sharded_lm", *f"{SIZE} {options} --out {out}".split()]


def run(environment: dict[str, str], out: Path, options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(out, options),
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1200,
    )


@contextlib.contextmanager
def started(
    environment: dict[str, str], out: Path, options: str
) -> Iterator[subprocess.Popen[str]]:
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command(out, options), cwd=ROOT, env=environment, **pipes) as process:
        try:
            yield process
        finally:
            process.kill()


def results(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())


def ends_before(process: subprocess.Popen[str], happened: Callable[[], bool]) -> bool:
    """Wait until something happened; return whether the process ended first."""
    while not happened():
        try:
            process.wait(timeout=0.002)
        except subprocess.TimeoutExpired:
            continue
        return True
    return False


def after(seconds: float, process: subprocess.Popen[str]) -> None:
    """Let a process run for a time."""
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return


def complete(folder: Path) -> set[str]:
    return {path.stem for path in folder.glob("[0-9]*.json")}


def being_written(folder: Path) -> bool:
    return any(folder.glob("*orbax-checkpoint-tmp*/*"))


def without_manifest(folder: Path) -> bool:
    written = {path.name for path in folder.glob("[0-9]*") if path.name.isdecimal()}
    return bool(written - complete(folder))


def test_a_run_killed_twenty_times_ends_bit_identical(environment, tmp_path):
    """Killed while it starts, trains, writes arrays, and before it writes a manifest."""
    options = "--steps 150 --save-every 3 --evaluate-every 50"
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = run(environment, whole, options)
    assert done.returncode == 0, done.stderr
    draw = random.Random(0)
    folder = killed / "checkpoints"
    kinds = ["starting"] * 2 + ["training"] * 10 + ["writing"] * 5 + ["unfinished"] * 3
    draw.shuffle(kinds)
    for number, kind in enumerate(kinds):
        before = complete(folder)
        with started(environment, killed, f"{options} --resume") as process:
            if kind == "starting":
                after(draw.uniform(0, 2), process)
            else:
                # At least one new checkpoint, so that the run gets on.
                assert not ends_before(process, lambda before=before: complete(folder) - before)
                moment = being_written if kind == "writing" else without_manifest
                if kind == "training":
                    after(draw.uniform(0, 0.5), process)
                else:
                    assert not ends_before(process, lambda moment=moment: moment(folder))
            process.kill()
        print(number, kind, max(complete(folder), default="none"), being_written(folder))
    done = run(environment, killed, f"{options} --resume")
    assert done.returncode == 0, done.stderr
    for name in ("parameters", "losses", "validation"):
        assert results(killed)[name] == results(whole)[name], name


def test_a_lost_worker_ends_the_job_and_another_mesh_resumes_it(environment, tmp_path):
    job = "--save-every 5 --evaluate-every 5 --resume"
    place = "--devices 4 --mesh 2x2 --spawn 2"
    with started(environment, tmp_path, f"--steps 100000 {job} {place}") as process:
        assert not ends_before(process, lambda: bool(complete(tmp_path / "checkpoints")))
        workers = pids_of(process.pid)
        assert len(workers) == 2
        os.kill(workers[1], 9)
        assert process.wait(timeout=BOUND) == 1
        error = process.stderr.read()
    assert re.fullmatch(r"error: process \d of 2 was ended by SIGKILL\. .* --resume\.\n", error)
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    last = int(max(complete(tmp_path / "checkpoints")))
    done = run(environment, tmp_path, f"--steps {last + 5} {job} --devices 8 --mesh 1x2x4")
    assert done.returncode == 0, done.stderr
    assert len(results(tmp_path)["losses"]) == last + 5


def pids_of(parent: int) -> list[int]:
    """Return the children of a process, in the order of their start."""
    text = Path(f"/proc/{parent}/task/{parent}/children").read_text()
    return sorted(map(int, text.split()))


def test_workers_end_with_a_killed_supervisor(environment, tmp_path):
    with started(environment, tmp_path, "--steps 100000 --devices 2 --spawn 2") as process:
        assert not ends_before(process, lambda: len(pids_of(process.pid)) == 2)
        workers = pids_of(process.pid)
        process.kill()
        process.wait()
        for pid in workers:
            with contextlib.suppress(ProcessLookupError):  # it has ended
                descriptor = os.pidfd_open(pid)  # readable when the process ends
                assert select.select([descriptor], [], [], BOUND)[0]
                os.close(descriptor)


def test_a_job_without_its_other_process_is_one_line(environment, tmp_path):
    place = f"--coordinator {launch.free_address()} --processes 2 --process-id 0 --timeout 2"
    done = run(environment, tmp_path, place)
    assert done.returncode == 1
    assert re.fullmatch(r"error: 2 processes must connect to the coordinator .*\n", done.stderr)


def test_wrong_checkpoints_and_devices_are_one_line(environment, tmp_path):
    options = "--steps 4 --save-every 2 --resume"
    assert run(environment, tmp_path, options).returncode == 0
    for wrong, message in (
        (f"{options} --seed 1", "must be of this model and recipe, with seed 1; got seed 0."),
        (f"{options} --mesh 2x4", "must have 1 devices, as many as there are; got 2x4x1 = 8."),
    ):
        done = run(environment, tmp_path, wrong)
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert message in done.stderr
    largest = max(tmp_path.glob("checkpoints/00000004/**/*"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-10])
    done = run(environment, tmp_path, options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("warning: the checkpoint of step 4 is corrupt") == 1


def test_a_folder_that_cannot_be_written_ends_the_run(environment, tmp_path):
    (tmp_path / "checkpoints").touch()
    done = run(environment, tmp_path, "--steps 2")
    assert done.returncode == 1
    assert done.stderr.startswith("error: the checkpoint of step 2 could not be written to ")
    assert done.stderr.count("\n") == 1


def test_an_interrupted_checkpoint_is_one_line(environment, tmp_path):
    folder = tmp_path / "checkpoints"
    with started(environment, tmp_path, "--steps 100000 --save-every 2") as process:
        assert not ends_before(process, lambda: complete(folder) and being_written(folder))
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == "interrupted\n"
        assert process.wait(timeout=BOUND) == 130


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    path = tmp_path / "disk"
    path.mkdir()
    options = ["-t", "tmpfs", "-o", "size=700k", "tmpfs", str(path)]
    if subprocess.run(["mount", *options], capture_output=True).returncode:
        pytest.skip("mounting a file system needs a privilege")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def test_a_full_disk_is_one_line_and_the_earlier_checkpoints_load(environment, small_disk):
    options = "--steps 40 --save-every 2 --keep 100 --evaluate-every 40"
    done = run(environment, small_disk, options)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    found = re.search(r"no space left on device\. The checkpoint of step (\d+) is", done.stderr)
    last = int(found.group(1))
    # Whether the picture fits is not certain.
    done = run(environment, small_disk, f"{options} --steps {last} --resume")
    assert "parameters: SHA-256" in done.stdout
    assert "Traceback" not in done.stderr


def test_the_equality_program_agrees(environment, tmp_path):
    quick = [sys.executable, "-m", "examples.sharded_lm.equality", "--quick", "--out", tmp_path]
    done = subprocess.run(quick, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("all agree\n")
