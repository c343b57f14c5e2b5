"""The text of Python's standard library, and batches of it that are a function of the step."""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from examples.sharded_lm.settings import Recipe, RunError

_HELD_OUT = 10  # every tenth file is for validation
# Each purpose has its own stream, so that a change of one does not affect the others.
_TRAINING, _VALIDATION = range(2)


class Batch(NamedTuple):
    """A batch in micro-batches: arrays whose first axis is the micro-batch.

    Attributes:
        tokens: Of shape (micro-batches, examples, context + 1); the last `context` tokens of an
            example are the targets of the first `context`.
        rows: Of shape (micro-batches, examples), the position of each example in the batch. The
            dropout of an example depends on it and not on the micro-batch or device.
    """

    tokens: np.ndarray
    rows: np.ndarray


@dataclass(frozen=True)
class Corpus:
    """Bytes of source text.

    Attributes:
        train: The bytes to train on.
        validation: The bytes of files that are not trained on.
        digest: The SHA-256 of both, which differs between versions of Python.
    """

    train: np.ndarray
    validation: np.ndarray
    digest: str


def read_corpus(folder: Path | None = None) -> Corpus:
    """Read the modules of the standard library, sorted by name.

    Raises:
        RunError: There are too few, as in an installation without sources.
    """
    folder = folder or Path(sysconfig.get_paths()["stdlib"])
    texts = [path.read_bytes() for path in sorted(folder.glob("*.py"))]
    held_out = texts[::_HELD_OUT]
    train = [text for i, text in enumerate(texts) if i % _HELD_OUT]
    if sum(map(len, held_out)) < 10_000:
        raise RunError(f"the standard library must be installed as source text; got {folder}.")
    parts = [np.frombuffer(b"".join(part), np.uint8) for part in (train, held_out)]
    return Corpus(*parts, hashlib.sha256(b"".join([*train, *held_out])).hexdigest())


def training_batch(corpus: Corpus, recipe: Recipe, step: int, micro_batches: int) -> Batch:
    """Return the batch of a step, a pure function: a resumed run needs no saved position."""
    stream = np.random.default_rng([recipe.seed, _TRAINING, step])
    return _batch(corpus.train, recipe, stream, micro_batches)


def validation_batches(corpus: Corpus, recipe: Recipe, count: int) -> list[Batch]:
    """Return the batches of every evaluation."""
    streams = [np.random.default_rng([recipe.seed, _VALIDATION, i]) for i in range(count)]
    return [_batch(corpus.validation, recipe, stream, 1) for stream in streams]


def _batch(
    text: np.ndarray, recipe: Recipe, stream: np.random.Generator, micro_batches: int
) -> Batch:
    starts = stream.integers(0, len(text) - recipe.context, recipe.batch)
    tokens = text[starts[:, None] + np.arange(recipe.context + 1)[None, :]].astype(np.int32)
    rows = np.arange(recipe.batch, dtype=np.int32).reshape(micro_batches, -1)
    return Batch(tokens.reshape(micro_batches, -1, recipe.context + 1), rows)
