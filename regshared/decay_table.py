"""The table of decaying parameters: rows to compute with and a text to read, in both packages."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from regshared.decay_rules import Parameter


class Total(NamedTuple):
    """A number of leaves, and the number of scalars in them."""

    leaves: int
    parameters: int


class DecayRow(NamedTuple):
    """One parameter of a `DecayTable`.

    Attributes:
        path: Its name.
        shape: Its shape.
        dtype: The name of its dtype.
        size: Its number of elements.
        kind: The kind of its module: linear, conv, embedding, norm, attention, recurrent,
            activation, or empty if unknown.
        rule: The deciding part of the rule: a pair's glob, a function's name, 'frozen', or the
            category of the default rule (bias, embedding, kernel, norm, ...).
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
    """The parameters that decay, and why: rows to compute with, and a text to read.

    Attributes:
        rows: One for each parameter, in the order of the model.

    Example:
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
        """The total of the parameters that decay."""
        return _total(row for row in self.rows if row.weight_decay)

    @property
    def exempt(self) -> Total:
        """The total of the parameters that do not decay."""
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
        """Return the table as Markdown, for a notebook or a report."""
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
    """Return the table of parameters with their rates and reasons."""
    rows = []
    for parameter, (rate, why) in zip(parameters, rates, strict=True):
        shape = tuple(parameter.leaf.shape)
        dtype = str(parameter.leaf.dtype).removeprefix("torch.")
        kind = parameter.places[0].kind
        rows.append(
            DecayRow(parameter.path, shape, dtype, math.prod(shape), kind, why, float(rate))
        )
    return DecayTable(tuple(rows))
