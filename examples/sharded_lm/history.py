"""The losses of a run."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class History:
    """The losses of a run, which checkpoints carry along.

    Attributes:
        losses: The training loss of each step, with dropout.
        validation: Steps and validation losses.
    """

    losses: list[float] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
