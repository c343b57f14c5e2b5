"""The result of comparing two training runs: a conclusion, a table, a plot."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from parity_tests import pictures
from parity_tests.compare import Tier

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# In causal order within a step.
QUANTITIES = (
    "mask",
    "generator",
    "activation",
    "buffer",
    "loss",
    "gradient",
    "state",
    "update",
    "parameter",
    "average",
)
# Those with a bound; any difference of masks or of generators counts, and activations only locate
# one of the loss.
HELD = QUANTITIES[3:]


@dataclasses.dataclass(frozen=True)
class Divergence:
    """The step at which two runs diverge.

    Attributes:
        step: Counted from 1.
        quantity: One of `QUANTITIES`.
        name: The first site that differs for a mask or an activation, else the tensor with the
            largest deviation.
        deviation: In the tier's unit; infinite for a mask or a generator.
        detail: The quantities that differ and that agree, in words.
    """

    step: int
    quantity: str
    name: str
    deviation: float
    detail: str = ""

    def __str__(self) -> str:
        """Return one sentence."""
        finite = "" if np.isinf(self.deviation) else f"deviation {self.deviation:.3e}"
        why = "; ".join(filter(None, (finite, self.detail)))
        place = f"the {self.quantity} '{self.name}'"
        return f"JAX and PyTorch diverge at step {self.step}, in {place}: {why}"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The compared quantities, and the result.

    Attributes:
        tier: How closely the sides had to agree.
        deviations: For each quantity, the largest deviation of each step.
        losses: The losses of both sides at each step.
        first: The first divergence, or None.
        sites: The number of compared masks of each site.
        notes: The quantities that were not compared, with reasons, and the parameters that are
            noise.
        start: The number of steps before the first compared one.
        bounds: The largest deviation of each quantity that passes; the tier's if it has none.
        mask_elements: The number of compared elements of masks.
        different_mask_elements: The number of those that differ.
    """

    tier: Tier
    deviations: Mapping[str, Sequence[float]]
    losses: Sequence[tuple[float, float]]
    first: Divergence | None
    sites: Mapping[str, int] = dataclasses.field(default_factory=dict)
    notes: Sequence[str] = ()
    start: int = 0
    bounds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    mask_elements: int = 0
    different_mask_elements: int = 0

    @property
    def agrees(self) -> bool:
        """Return whether the sides agreed in everything at every step."""
        return self.first is None

    def raise_if_different(self) -> None:
        """Raise an AssertionError with the first divergence, if there is one."""
        if self.first is not None:
            raise AssertionError(f"{self.first} (tier: {self.tier})")

    def table(self) -> str:
        """Return the largest deviation of each quantity, and its step, in Markdown."""
        lines = [
            "| quantity | steps | largest deviation | at step | bound |",
            "| --- | ---: | ---: | ---: | ---: |",
        ]
        for quantity, values in self.deviations.items():
            if values:
                worst = int(np.argmax(values))
                bound = f"{self.bounds[quantity]:.0e}" if quantity in self.bounds else ""
                lines.append(
                    f"| {quantity} | {len(values)} | {values[worst]:.2e}"
                    f" | {self.start + worst + 1} | {bound} |"
                )
        return "\n".join(lines) + "\n"

    def plot(self, path: str | Path) -> None:
        """Save a plot of the losses of both sides, and of the deviations with the tier's bound."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        pictures.save(self.figure(), path)

    @pictures.styled
    def figure(self) -> Figure:
        """Return the figure that `plot` saves."""
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator

        figure = Figure(figsize=(pictures.WIDTH, 6.4))
        above, below = figure.subplots(2, 1, sharex=True)
        steps = range(self.start + 1, self.start + 1 + len(self.losses))
        marker = "o" if len(steps) == 1 else ""  # a single point draws no line
        for name, style, losses in zip(
            ("JAX", "PyTorch"), ("-", "--"), zip(*self.losses, strict=True), strict=False
        ):
            above.plot(steps, losses, style, label=name, marker=marker)
        above.set_ylabel("loss")
        above.set_title("Loss of each framework")
        palette = pictures.palette()
        looks = itertools.product(("-", "--"), palette[:6])  # more quantities than colors
        for quantity, values in self.deviations.items():
            if values:
                label = "\n".join(filter(None, (quantity, *pictures.gaps(values).split(", "))))
                # Without a difference there is no line to tell apart.
                style, color = next(looks) if any(values) else ("", palette.ink)
                pictures.plot_differences(
                    below, steps, values, label=label, linestyle=style, color=color
                )
        bounds = self._shown_bounds()
        values = itertools.chain.from_iterable(self.deviations.values())
        if bounds and not any(0 < value < float("inf") for value in values):
            # Without a point, there is no scale.
            below.set_ylim(min(bounds) / 10, max(bounds) * 10)
        for style, (bound, quantities) in zip(
            itertools.cycle((":", "-.")), bounds.items(), strict=False
        ):
            label = f"bound of {quantities}" if quantities else "bound"
            below.axhline(bound, color=palette.ink, linestyle=style, label=label)
        below.set_ylabel(f"largest deviation,\n{self._unit()}")
        below.set_xlabel("step")
        below.xaxis.set_major_locator(MaxNLocator(integer=True))
        below.set_title("Deviation of JAX from PyTorch")
        for axes in (above, below):
            axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
        return figure

    def _shown_bounds(self) -> dict[float, str]:
        """Return the finite bounds, with the quantities of each, one a line."""
        if not self.bounds:
            return {self.tier.tolerance: ""} if self.tier.tolerance else {}
        found: dict[float, list[str]] = {}
        for quantity, bound in self.bounds.items():
            if self.deviations.get(quantity) and 0 < bound < float("inf"):
                found.setdefault(bound, []).append(quantity)
        return {bound: ",\n".join(quantities) for bound, quantities in found.items()}

    def _unit(self) -> str:
        return "1 if any bit differs" if self.tier.tolerance is None else "relative to the size"

    def __str__(self) -> str:
        """Return the conclusion and the table."""
        conclusion = "JAX and PyTorch agree." if self.first is None else f"{self.first}."
        masks, places = sum(self.sites.values()), len(self.sites)
        counts = f"{masks} mask{'s' * (masks > 1)} at {places} site{'s' * (places > 1)}"
        compared = f"Compared {counts}: {', '.join(self.sites)}."
        lines = [conclusion, *([compared] if masks else []), *self.notes]
        return "\n".join(lines) + f"\n\n{self.table()}"
