"""Progress in the terminal: a bar over all runs, and a line for each finished run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from examples.overfit.settings import FRAMEWORK_LABELS

if TYPE_CHECKING:
    from types import TracebackType

    from examples.overfit.curves import Curve
    from examples.overfit.recipes import Recipe


class RunProgress:
    """A context that shows the progress of all runs on stderr.

    If stderr is not a terminal, it prints the lines without a bar.
    """

    def __init__(self, runs: int, steps: int) -> None:
        self._runs = runs
        self._finished = 0
        self._steps = steps
        self._console = Console(stderr=True, soft_wrap=True, highlight=False)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task("loading", total=runs * steps)

    def __enter__(self) -> RunProgress:
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

    def show(self, recipe: Recipe, framework: str, step: int) -> None:
        """Move the bar to a step of the current run."""
        self._progress.update(
            self._task,
            description=f"{recipe.label} in {FRAMEWORK_LABELS[framework]}",
            completed=self._finished * self._steps + step,
        )

    def finish(self, curve: Curve) -> None:
        """Print a line about a finished run."""
        self._finished += 1
        self._console.print(
            f"{self._finished:2}/{self._runs}  {curve.recipe.label} in "
            f"{FRAMEWORK_LABELS[curve.framework]}: validation loss "
            f"{curve.validation_loss[curve.best]:.3f} at step {curve.steps[curve.best]}, "
            f"{curve.validation_loss[-1]:.3f} at the end ({curve.seconds:.1f} s)",
            markup=False,
        )
