"""Progress in the terminal, the picture of the losses, and the file of results."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from parity_tests import output, pictures

if TYPE_CHECKING:
    from jaxtyping import Array, PyTree
    from matplotlib.figure import Figure

    from examples.sharded_lm.train import History

PICTURE, RESULTS = "losses.png", "results.json"
_SMOOTHED = 20  # steps


class Report:
    """A context that shows the progress of a run; silent in all processes but the first.

    If the output is not a terminal, it prints the lines of the evaluations without a bar.

    Args:
        steps: The number of steps of the whole run.
        tokens: The number of tokens of a step.
    """

    def __init__(self, steps: int, tokens: int) -> None:
        self._is_first = jax.process_index() == 0
        self._console = Console(soft_wrap=True, highlight=False, quiet=not self._is_first)
        self._tokens = tokens
        self._started: tuple[int, float] | None = None
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[speed]} tokens/s"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not (self._is_first and self._console.is_terminal),
        )
        self._task = self._progress.add_task("", total=steps, speed="")
        self.speed = ""

    def __enter__(self) -> Report:
        """Show the bar."""
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Remove the bar."""
        self._progress.stop()

    def step(self, done: int) -> None:
        """Move the bar, and measure the speed since the first step after an evaluation."""
        now = time.perf_counter()
        if self._started is None:
            self._started = done, now
        first, start = self._started
        if done > first:
            self.speed = f"{(done - first) * self._tokens / (now - start):,.0f}"
        self._progress.update(self._task, completed=done, speed=self.speed)

    def evaluation(self, done: int, train: float, validation: float) -> None:
        """Print a line of losses."""
        self.print(
            f"step {done:5}  training loss {train:.3f}  validation loss {validation:.3f}  "
            f"{self.speed} tokens/s"
        )
        self._started = None

    def print(self, line: str) -> None:
        """Print a line."""
        self._console.print(line, markup=False)


@pictures.styled
def draw(history: History) -> Figure:
    """Draw the losses over the steps, those of training averaged."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(pictures.WIDTH, 4))
    axes = figure.subplots()
    losses = np.asarray(history.losses)
    window = min(_SMOOTHED, len(losses))
    smooth = np.convolve(losses, np.full(window, 1 / window), mode="valid")
    steps = np.arange(window, len(losses) + 1)
    axes.plot(steps, smooth, label=f"training, with dropout (mean of {window} steps)")
    axes.plot(*zip(*history.validation, strict=True), marker="o", markersize=3, label="validation")
    axes.set(xlabel="step", ylabel="cross-entropy of a byte (nats)")
    axes.legend()
    return figure


def digest(params: PyTree[Array]) -> str:
    """Return the SHA-256 of all parameters, which may be sharded over processes."""
    whole = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
        whole.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        whole.update(array.tobytes())
    return whole.hexdigest()


def write(folder: Path, history: History, results: dict[str, Any]) -> None:
    """Write the picture and the results.

    Raises:
        OSError: A file cannot be written.
    """
    pictures.save(draw(history), folder / PICTURE)
    output.write_atomically(folder / RESULTS, json.dumps(results, indent=1) + "\n")
