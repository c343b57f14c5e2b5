"""Checkpoints that are complete and intact, or not used.

Orbax writes the arrays into a folder named after the step. A manifest beside it, written last and
atomically, completes the checkpoint: it has the SHA-256 of every file and of itself, the recipe and
the losses.
An older checkpoint is deleted only after a newer one is complete.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from examples.sharded_lm.settings import InputError, Recipe, RunError
from parity_tests.output import write_atomically

if TYPE_CHECKING:
    from examples.sharded_lm.data import Corpus

T = TypeVar("T")

_MANIFEST = ".json"
_DIGEST = "sha256"
_NONE = -1


def identity(recipe: Recipe, corpus: Corpus) -> dict[str, Any]:
    """Return the settings that a checkpoint must share with a run that continues from it."""
    return {**dataclasses.asdict(recipe), "text": corpus.digest[:16]}


def save(
    folder: Path, step: int, state: Any, about: Mapping[str, Any], losses: Any, keep: int
) -> None:
    """Write a checkpoint, then delete all but the last `keep`.

    Args:
        folder: The folder of the checkpoints.
        step: The step, which names the checkpoint.
        state: A pytree of arrays.
        about: The `identity` of the run.
        losses: Other results, as JSON.
        keep: The number of checkpoints to keep.

    Raises:
        RunError: The checkpoint cannot be written; the earlier ones are intact.
    """
    target = _path(folder, step)
    try:
        with _without_log(), ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(target, state, force=True)
        if jax.process_index() == 0:
            manifest = {"identity": about, "losses": losses, "files": _digests(target)}
            signed = {**manifest, _DIGEST: _digest_of(manifest)}
            write_atomically(target.with_suffix(_MANIFEST), json.dumps(signed))
    # Orbax and TensorStore raise several types, of which some are no OSError when a disk is full.
    except Exception as error:
        if jax.process_index() == 0:
            remove_unfinished(folder)
        raise RunError(
            f"the checkpoint of step {step} could not be written to {folder}: {_reason(error)}. "
            f"{_intact(folder)} Continue with --resume."
        ) from error
    if jax.process_index() == 0:
        for old in steps(folder)[:-keep]:
            _path(folder, old).with_suffix(_MANIFEST).unlink()
            shutil.rmtree(_path(folder, old), ignore_errors=True)


def restore(
    folder: Path, about: Mapping[str, Any], target: T, warn: Callable[[str], None]
) -> tuple[T, Any] | None:
    """Return the state and the losses of the last intact checkpoint, or None if there is none.

    Args:
        folder: The folder of the checkpoints.
        about: The `identity` of the run.
        target: The state as `jax.ShapeDtypeStruct`s with shardings. The mesh may differ from that
            of the run that wrote the checkpoint.
        warn: Called with a line for each checkpoint that is skipped.

    Raises:
        InputError: The checkpoint is of another recipe.
        RunError: All checkpoints are corrupt.
    """
    step = _NONE
    if jax.process_index() == 0:
        step = _choose(folder, warn)
        remove_unfinished(folder)
    step = int(multihost_utils.broadcast_one_to_all(np.int32(step)))
    if step == _NONE:
        return None
    path = _path(folder, step)
    manifest = json.loads(path.with_suffix(_MANIFEST).read_text())
    _check_identity(path, manifest["identity"], about)
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, target), manifest["losses"]


def steps(folder: Path) -> list[int]:
    """Return the steps of the complete checkpoints, in order."""
    manifests = (path for path in folder.glob(f"*{_MANIFEST}") if path.is_file())
    return sorted(int(path.stem) for path in manifests if path.stem.isdecimal())


def remove_unfinished(folder: Path) -> None:
    """Remove what an interrupted run was writing."""
    for path in folder.glob("[0-9]*"):
        if path.is_dir() and not path.with_suffix(_MANIFEST).exists():
            shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _without_log() -> Iterator[None]:
    """Keep Orbax from logging, with traces of its threads, the error that it raises anyway.

    After an error, its threads may still call an event loop that is closed: the run ends then.
    """
    logger = logging.getLogger("absl")
    before, logger.disabled = logger.disabled, True
    hook = sys.unraisablehook

    def unless_closed(raised: Any) -> None:
        if str(raised.exc_value) != "Event loop is closed":
            hook(raised)

    sys.unraisablehook = unless_closed
    try:
        yield
        sys.unraisablehook = hook
    finally:
        logger.disabled = before


def _choose(folder: Path, warn: Callable[[str], None]) -> int:
    """Return the step of the last intact checkpoint, and rename the corrupt ones after it."""
    corrupt: dict[int, str] = {}
    for step in reversed(steps(folder)):
        if not (damage := _damage(_path(folder, step))):
            break
        corrupt[step] = damage
    else:
        if corrupt:
            found = ", ".join(map(str, sorted(corrupt)))
            raise RunError(
                f"{folder} must hold an intact checkpoint; got corrupt ones of steps {found} "
                f"({next(iter(corrupt.values()))}). Train from the start with another --out."
            )
        return _NONE
    for bad, damage in corrupt.items():
        path = _path(folder, bad)
        warn(f"warning: the checkpoint of step {bad} is corrupt ({damage}); using step {step}")
        if path.exists():
            path.rename(path.with_name(f"corrupt-{path.name}"))
        path.with_suffix(_MANIFEST).unlink()
    return step


def _damage(path: Path) -> str:
    """Return how a checkpoint differs from its manifest; empty if it does not."""
    try:
        manifest = json.loads(path.with_suffix(_MANIFEST).read_text())
        digest = manifest.pop(_DIGEST)
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{path.name}{_MANIFEST} is not a manifest"
    if digest != _digest_of(manifest):
        return f"{path.name}{_MANIFEST} has changed"
    expected, found = manifest["files"], _digests(path)
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            return f"{name} is missing"
        if found[name] != expected.get(name):
            return f"{name} has changed"
    return ""


def _digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file in a folder."""
    digests = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            digests[path.relative_to(folder).as_posix()] = digest
    return digests


def _digest_of(manifest: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a manifest, whether written or read."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _check_identity(path: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    different = [name for name in expected if found.get(name) != expected[name]]
    if different:
        there = ", ".join(f"{name} {found.get(name)}" for name in different)
        here = ", ".join(f"{name} {expected[name]}" for name in different)
        raise InputError(
            f"checkpoint {path} must be of this model and recipe, with {here}; got {there}. Pass "
            "the options of the earlier run, or another --out."
        )


def _path(folder: Path, step: int) -> Path:
    return folder.absolute() / f"{step:08}"


def _intact(folder: Path) -> str:
    found = steps(folder)
    return f"The checkpoint of step {found[-1]} is intact." if found else "There is no earlier one."


def _reason(error: BaseException) -> str:
    """Return the reason in a few words."""
    text = str(error)
    if "No space left" in text:
        return "no space left on device"
    if "barrier" in text:
        return "another process of the job was lost"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
