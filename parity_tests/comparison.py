"""What came of comparing two training runs: a verdict, a table, a picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from parity_tests.compare import Tier
from parity_tests.output import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The order in which one thing causes the next within a step.
QUANTITIES = ("mask", "activation", "loss", "gradient", "parameter", "state")


@dataclasses.dataclass(frozen=True)
class Divergence:
    """Where two runs part.

    Attributes:
        step: counted from 1.
        quantity: one of `QUANTITIES`.
        name: the first site that differs, of a mask or an activation; else the tensor that is
            furthest off.
        deviation: by how much, in the tier's unit; infinite for a mask.
        detail: what differs, and what does not, in words.
    """

    step: int
    quantity: str
    name: str
    deviation: float
    detail: str = ""

    def __str__(self) -> str:
        """One sentence."""
        finite = "" if np.isinf(self.deviation) else f"deviation {self.deviation:.3e}"
        by = "; ".join(filter(None, (finite, self.detail)))
        return (
            f"JAX and PyTorch part at step {self.step}, in the {self.quantity} '{self.name}': {by}"
        )


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What was compared, and what came of it.

    Attributes:
        tier: how closely the sides had to agree.
        deviations: for each quantity, the largest deviation of each step.
        losses: of both sides at each step.
        first: where they part, or None.
        sites: how many masks of each site were compared.
        notes: what could not be compared, in words.
        start: how many steps were taken before the first that is compared.
    """

    tier: Tier
    deviations: Mapping[str, Sequence[float]]
    losses: Sequence[tuple[float, float]]
    first: Divergence | None
    sites: Mapping[str, int] = dataclasses.field(default_factory=dict)
    notes: Sequence[str] = ()
    start: int = 0

    @property
    def agrees(self) -> bool:
        """Whether the sides agreed in everything at every step."""
        return self.first is None

    def raise_if_different(self) -> None:
        """Raises AssertionError that says where the sides part."""
        if self.first is not None:
            raise AssertionError(f"{self.first} (tier: {self.tier})")

    def table(self) -> str:
        """Markdown: the largest deviation of each quantity, and at which step."""
        lines = [
            "| quantity | steps | largest deviation | at step |",
            "| --- | ---: | ---: | ---: |",
        ]
        for quantity, values in self.deviations.items():
            if values:
                worst = int(np.argmax(values))
                lines.append(
                    f"| {quantity} | {len(values)} | {values[worst]:.2e}"
                    f" | {self.start + worst + 1} |"
                )
        return "\n".join(lines) + "\n"

    def plot(self, path: str | Path) -> None:
        """Draws losses of both sides, and the deviations over the steps with the tier's bound."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            self.figure().savefig(temporary, format=path.suffix[1:] or None, dpi=110)

    def figure(self) -> Figure:
        """What `plot` saves."""
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator

        figure = Figure(figsize=(11, 4), layout="constrained")
        left, right = figure.subplots(1, 2)
        steps = range(self.start + 1, self.start + 1 + len(self.losses))
        marker = "o" if len(steps) == 1 else ""  # of one point there is no line
        left.plot(steps, [ours for ours, _ in self.losses], label="JAX", marker=marker)
        left.plot(
            steps, [theirs for _, theirs in self.losses], "--", label="PyTorch", marker=marker
        )
        left.set_ylabel("loss")
        for quantity, values in self.deviations.items():
            if values:
                # Equal bits have no place on a logarithmic axis: they lie below everything.
                heights = [max(value, 1e-18) for value in values]
                right.plot(steps, heights, label=quantity, marker=marker)
        if self.tier.tolerance:
            right.axhline(self.tier.tolerance, color="#333333", linestyle=":", label="bound")
        right.set_yscale("log")
        right.set_ylabel("largest deviation of JAX and PyTorch")
        for axes in (left, right):
            axes.set_xlabel("step")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(frameon=False)
        return figure

    def __str__(self) -> str:
        """The verdict and the table."""
        verdict = "JAX and PyTorch agree." if self.first is None else f"{self.first}."
        masks = sum(self.sites.values())
        compared = f"{masks} masks at {len(self.sites)} sites compared: {', '.join(self.sites)}."
        lines = [verdict, *([compared] if masks else []), *self.notes]
        return "\n".join(lines) + f"\n\n{self.table()}"
