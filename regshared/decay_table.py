"""What decays, as a table: rows to compute with and a text to read. The same in both wings."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from regshared.decay_rules import Parameter


class Total(NamedTuple):
    """How many leaves, and how many numbers there are in them."""

    leaves: int
    parameters: int


class DecayRow(NamedTuple):
    """One parameter of a `DecayTable`.

    Attributes:
        path: Its name.
        shape: Its shape.
        dtype: The name of its dtype.
        size: How many numbers it has.
        kind: Of its module: linear, conv, embedding, norm, attention, recurrent, activation, or
            empty where nothing tells.
        rule: What decided: the glob of a pair, the name of a function, 'frozen', or the reason that
            the default rule has (bias, embedding, kernel, norm, ...).
        weight_decay: Its coefficient.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    size: int
    kind: str
    rule: str
    weight_decay: float


@dataclass(frozen=True)
class DecayTable:
    """Which parameter decays, and why: rows to compute with, and a text to read.

    Attributes:
        rows: One for each parameter, in the order of the model.

    Examples:
        >>> row = DecayRow("kernel", (2, 3), "float32", 6, "linear", "kernel", 0.1)
        >>> table = DecayTable((row, row._replace(path="bias", weight_decay=0.0)))
        >>> len(table), table.decaying, table.exempt.leaves
        (2, Total(leaves=1, parameters=6), 1)
    """

    rows: tuple[DecayRow, ...]

    def __iter__(self) -> Iterator[DecayRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def decaying(self) -> Total:
        """How much decays."""
        return _total(row for row in self.rows if row.weight_decay)

    @property
    def exempt(self) -> Total:
        """How much does not."""
        return _total(row for row in self.rows if not row.weight_decay)

    def __str__(self) -> str:
        cells = _cells(self.rows)
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [
            "  ".join(
                cell.rjust(width) if title in _NUMBERS else cell.ljust(width)
                for title, cell, width in zip(DecayRow._fields, row, widths, strict=True)
            ).rstrip()
            for row in cells
        ]
        return "\n".join([*lines, self._summary()])

    def to_markdown(self) -> str:
        """Write the table for a notebook or a report."""
        head, *body = [f"| {' | '.join(row)} |" for row in _cells(self.rows, escape=True)]
        ruler = "|".join("---:" if title in _NUMBERS else "---" for title in DecayRow._fields)
        return "\n".join([head, f"|{ruler}|", *body, "", self._summary()])

    def _summary(self) -> str:
        some, everything = self.decaying, _total(self.rows)
        return (
            f"decay: {some.leaves} of {everything.leaves} leaves, "
            f"{some.parameters:,} of {everything.parameters:,} parameters"
        )


_NUMBERS = ("size", "weight_decay")


def _total(rows: Iterable[DecayRow]) -> Total:
    sizes = [row.size for row in rows]
    return Total(len(sizes), sum(sizes))


def _cells(rows: Iterable[DecayRow], *, escape: bool = False) -> list[tuple[str, ...]]:
    def text(title: str, value: Any) -> str:
        if title == "size":
            return f"{value:,}"
        if title == "weight_decay":
            return f"{value:g}" if value else "-"
        plain = str(value) or "-"
        return plain.replace("*", r"\*").replace("|", r"\|") if escape else plain

    return [
        DecayRow._fields,
        *(tuple(map(text, DecayRow._fields, row)) for row in rows),
    ]


def table_of(parameters: Sequence[Parameter], rates: Sequence[tuple[Any, str]]) -> DecayTable:
    """The table of parameters and of what was said of each: its rate, and why."""
    rows = []
    for parameter, (rate, why) in zip(parameters, rates, strict=True):
        shape = tuple(parameter.leaf.shape)
        dtype = str(parameter.leaf.dtype).removeprefix("torch.")
        kind = parameter.places[0].kind
        rows.append(
            DecayRow(parameter.path, shape, dtype, math.prod(shape), kind, why, float(rate))
        )
    return DecayTable(tuple(rows))
