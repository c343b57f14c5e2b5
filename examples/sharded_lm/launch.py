"""Processes that train together, and a supervisor that ends them together.

JAX aborts a process, with a C++ stack trace, when another process of its job is lost or when the
coordinator does not answer. Each process is therefore the child of a supervisor, which ends all of
its children when one fails, and prints the reason in one line. A child ends when its supervisor
does, even if that was killed: two jobs must not write to the same folder.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, NoReturn

from examples.sharded_lm.settings import InputError, RunError

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None

_LOCK = ".lock"
_CONNECTED = "connected to the coordinator"
_CHILD = "from examples.sharded_lm.launch import child; child()"
_GRACE = 1.0  # seconds in which other processes may report the cause of the first failure
_RETRY = 0.2
# In errors of collectives and of the coordination service.
_LOST = ("Gloo", "NCCL", "coordination service", "CoordinationService", "heartbeat")
_RESUME = "Run the command again with --resume."


def supervise(argv: Sequence[str], ids: Sequence[int], count: int, coordinator: str) -> int:
    """Run some of the processes of a job and return the exit code.

    Args:
        argv: The options of the program.
        ids: The numbers of the processes to run here.
        count: The number of processes of the job.
        coordinator: The address of process 0, `host:port`.
    """
    children: dict[int, tuple[subprocess.Popen[bytes], IO[bytes]]] = {}
    ended: queue.Queue[tuple[int, int]] = queue.Queue()
    try:
        for number in ids:
            children[number] = _start(argv, number, count, coordinator, is_first=number == ids[0])

            def wait(number: int = number) -> None:
                ended.put((number, children[number][0].wait()))

            threading.Thread(target=wait, daemon=True).start()
        for _ in ids:
            number, code = ended.get()
            if code:
                failed = {number: code, **_more(ended)}
                for process, _ in children.values():
                    process.kill()
                texts = {i: _read(children[i][1]) for i in failed}
                code, text = explain(failed, texts, count, coordinator)
                print(text, file=sys.stderr)
                return code
        return 0
    finally:
        for process, log in children.values():
            process.kill()
            process.communicate()  # closes its stdin
            log.close()


@contextlib.contextmanager
def only_job(folder: Path) -> Iterator[None]:
    """Hold a folder for this job; the system lets it go when the process ends, even if killed.

    Raises:
        InputError: Another job holds it.
    """
    with (folder / _LOCK).open("w") as lock:
        if fcntl:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(
                    f"argument --out: must be a folder of one job; got '{folder}', in which "
                    "another job trains. Wait for its end, or pass another folder"
                ) from None
        yield


def free_address() -> str:
    """Return a loopback address with a port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def check_coordinator(address: str, timeout: float) -> None:
    """Wait until the coordinator accepts connections.

    Raises:
        InputError: It does not within `timeout` seconds.
    """
    host, _, port = address.rpartition(":")
    end = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=timeout).close()
            return
        except OSError as error:
            if time.monotonic() + _RETRY > end:
                raise InputError(
                    f"argument --coordinator: must answer within {timeout:g} s; got "
                    f"{address!r} ({error.strerror or error}). Start process 0 there."
                ) from None
            time.sleep(_RETRY)


def connect(coordinator: str, count: int, number: int, timeout: int) -> None:
    """Join the job; JAX aborts the process if it fails."""
    import jax

    jax.distributed.initialize(
        coordinator,
        count,
        number,
        initialization_timeout=timeout,
        heartbeat_timeout_seconds=timeout,
        shutdown_timeout_seconds=timeout,
    )
    print(_CONNECTED, file=sys.stderr, flush=True)


def child() -> NoReturn:
    """Run one process of a job. Its stdin is a pipe that ends with the supervisor."""
    from examples.sharded_lm.cli import work

    # Libraries in C++ print to file descriptor 1; the output is for the progress alone.
    sys.stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    threading.Thread(target=_end_with_supervisor, daemon=True).start()
    try:
        work(sys.argv[1:])
    except Exception as error:
        _fail(error)
    raise SystemExit(0)


def explain(
    failed: dict[int, int], logs: dict[int, str], count: int, coordinator: str
) -> tuple[int, str]:
    """Return the exit code and the message for processes that failed.

    Args:
        failed: The exit codes by process; negative if a signal ended it, as `subprocess` reports.
        logs: What they wrote to stderr.
        count: The number of processes of the job.
        coordinator: The address of process 0.
    """
    # An error of its own, the most specific cause, ends a process with code 1 or 2.
    for number, code in failed.items():
        lines = [line for line in logs[number].splitlines() if line.startswith("error: ")]
        if code > 0 and lines and "was lost" not in lines[-1]:
            return code, lines[-1]
    for number, code in failed.items():
        if code < 0 and code != -signal.SIGABRT:
            name = signal.Signals(-code).name
            return 1, f"error: process {number} of {count} was ended by {name}. {_RESUME}"
    number, code = next(iter(failed.items()))
    log = logs[number]
    if code == -signal.SIGABRT and _CONNECTED not in log:
        return 1, (
            f"error: {count} processes must connect to the coordinator {coordinator} in time; "
            f"process {number} got no answer, or not from all. Start all with the same "
            "--coordinator and --processes."
        )
    if "was lost" in log or any(word in log for word in _LOST):
        return 1, f"error: another process of the job was lost by process {number}. {_RESUME}"
    return 1, f"{log}error: process {number} of {count} failed with exit code {code}"


def _start(
    argv: Sequence[str], number: int, count: int, coordinator: str, *, is_first: bool
) -> tuple[subprocess.Popen[bytes], IO[bytes]]:
    place = ["--coordinator", coordinator, "--processes", count, "--process-id", number]
    log = tempfile.TemporaryFile()  # noqa: SIM115  # the caller closes it
    process = subprocess.Popen(
        [sys.executable, "-c", _CHILD, *argv, *map(str, place)],
        stdin=subprocess.PIPE,
        stdout=None if is_first else subprocess.DEVNULL,
        stderr=log,
    )
    return process, log


def _more(ended: queue.Queue[tuple[int, int]]) -> dict[int, int]:
    """Return the codes of processes that fail soon after the first."""
    failed = {}
    end = time.monotonic() + _GRACE
    while (left := end - time.monotonic()) > 0:
        try:
            number, code = ended.get(timeout=left)
        except queue.Empty:
            break
        failed |= {number: code} if code else {}
    return failed


def _read(log: IO[bytes]) -> str:
    log.seek(0)
    return log.read().decode(errors="replace")


def _end_with_supervisor() -> None:
    os.read(0, 1)  # sys.stdin has a lock, which the interpreter needs at its end
    os._exit(1)


def _fail(error: Exception) -> NoReturn:
    """Exit at once: an orderly exit would wait for the other processes."""
    if isinstance(error, RunError):
        print(f"error: {error}", file=sys.stderr)
    elif any(word in str(error) for word in _LOST):
        print(f"error: another process of the job was lost ({error})", file=sys.stderr)
    else:
        import traceback

        traceback.print_exc()
    exit_at_once(2 if isinstance(error, InputError) else 1)


def exit_at_once(code: int) -> NoReturn:
    """Exit without waiting for threads and other processes."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
