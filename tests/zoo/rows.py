"""What the zoo finds out about each model, and the tables of it in Markdown."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from tests.zoo import decays, draws, mapping
from tests.zoo.models import Case

Row = dict[str, Any]  # the findings of a model by aspect, as JSON has them


def draws_of(case: Case) -> Row:
    """Return the draws with a key and without one.

    Raises:
        AssertionError: A draw has neither a key nor an error.
    """
    found = draws.examine(case)
    if not found.refused:
        assert found.keyed == found.unmodified, f"{found.keyed} keys, {found.unmodified} draws"
        return found._asdict() | {"outside": list(found.outside)}
    reason = re.match(r"module '.*?' must draw from keys; got a (.*?)\. \w", found.refused)
    assert reason, found.refused
    return found._asdict() | {"outside": list(found.outside), "refused": reason[1]}


def params_of(case: Case) -> Row:
    """Return how many parameters are mapped, by their layers."""
    found = mapping.map_by_layer(case.build())
    return found._asdict() | {"reasons": list(found.reasons)}


def flax_of(case: Case) -> Row | None:
    """Return how many leaves of the model for Flax are filled, if transformers has one."""
    flax = mapping.flax_class(case)
    return None if flax is None else mapping.map_to_flax(case, case.build(), flax)._asdict()


def decays_of(case: Case) -> Row:
    """Return the decisions of the rules of decay."""
    return decays.compare(case)._asdict()


ASPECTS: dict[str, Callable[[Case], Row | None]] = {
    "draws": draws_of,
    "params": params_of,
    "flax": flax_of,
    "decays": decays_of,
}


def summary(record: Mapping[str, Any]) -> str:
    """Return the table of the totals."""
    rows = record["models"]
    libraries = ["torchvision", "timm", "transformers"]
    parts = [[row for name, row in rows.items() if name.startswith(lib)] for lib in libraries]
    versions = record["versions"]
    titles = [f"{library} {versions[library]}" for library in libraries]
    total = [*parts, list(rows.values())]
    lines = [
        ("configurations", lambda part: len(part)),
        ("that draw in training", lambda part: sum(map(_draws, _of(part, "draws")))),
        ("with a key for every draw", lambda part: sum(map(_keyed, _of(part, "draws")))),
        ("refused with an error", lambda part: _count(_of(part, "draws"), "refused")),
        ("draws that have a key", lambda part: _share(_of(part, "draws"), "keyed", "unmodified")),
        ("parameters mapped without a hint", _mapped),
        ("ports to Flax in transformers", lambda part: len(list(_of(part, "flax")))),
        ("their leaves filled", lambda part: _share(_of(part, "flax"), "filled", "leaves")),
        ("ports that need names", lambda part: _count(_of(part, "flax"), "names")),
        ("models with a name that the default rule does not know", _unknown),
        ("failures", lambda part: sum("error" in row for row in part)),
    ]
    body = [(title, *(count(part) for part in total)) for title, count in lines]
    others = ", ".join(f"{name} {versions[name]}" for name in versions if name not in libraries)
    where = f"{record['date']}, {record['cpu']}, {others}."
    return _table(("", *titles, "all"), body) + f"\n{where}\n"


def _of(part: Iterable[Row], aspect: str) -> Iterator[Row]:
    return (row[aspect] for row in part if row.get(aspect))


def _draws(row: Row) -> bool:
    return bool(row["unmodified"] or row["outside"])


def _keyed(row: Row) -> bool:
    return _draws(row) and not row["refused"]


def _count(rows: Iterable[Row], key: str) -> int:
    return sum(bool(row[key]) for row in rows)


def _share(rows: Iterable[Row], part: str, whole: str) -> str:
    chosen = list(rows)
    some, everything = (sum(row[key] for row in chosen) for key in (part, whole))
    return f"{some:,} of {everything:,}" if chosen else "-"


def _mapped(part: Sequence[Row]) -> str:
    found = list(_of(part, "params"))
    total = sum(row["parameters"] for row in found)
    return f"{total - sum(row['refused'] for row in found):,} of {total:,}"


def _unknown(part: Sequence[Row]) -> int:
    return _count(_of(part, "decays"), "unknown")


def details(record: Mapping[str, Any]) -> str:
    """Return the table of all models."""
    titles = (
        "model",
        "draws",
        "with a key",
        "parameters",
        "mapped",
        "tensors",
        "decay: default",
        "Trainer",
        "timm",
        "default unlike Trainer",
        "default unlike timm",
    )
    return _table(titles, [_cells(name, row) for name, row in record["models"].items()])


def _cells(name: str, row: Row) -> tuple[Any, ...]:
    if "error" in row:
        return (name, row["error"], *[""] * 9)
    drawn, params, decay = row["draws"], row["params"], row["decays"]
    outside = f" and {' and '.join(drawn['outside'])}" * bool(drawn["outside"])
    mapped = params["parameters"] - params["refused"]
    return (
        name,
        f"{drawn['unmodified']}{outside}",
        "refused" if drawn["refused"] else drawn["keyed"],
        f"{params['parameters']:,}",
        f"{100 * mapped / params['parameters']:.4g} %",
        decay["parameters"],
        decay["default"],
        decay["huggingface"],
        decay["timm"],
        _categories(decay["unlike_huggingface"]),
        _categories(decay["unlike_timm"]),
    )


def _categories(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items() if count) or "-"


def differences(record: Mapping[str, Any]) -> str:
    """Return the table of the decisions of the default rule that differ from the libraries'."""
    found = list(_of(record["models"].values(), "decays"))
    columns = []
    for key in ("unlike_huggingface", "unlike_timm"):
        tensors, models = Counter[str](), Counter[str]()
        for row in found:
            tensors.update(row[key])
            models.update(row[key].keys())
        columns.append((tensors, models))
    total = sum(row["parameters"] for row in found)
    names = sorted({name for tensors, _ in columns for name in tensors})
    body = [(name, *(f"{t[name]:,} in {m[name]}" for t, m in columns)) for name in names]
    sums = (f"{tensors.total():,} of {total:,}" for tensors, _ in columns)
    return _table(("category", "unlike the Trainer", "unlike timm"), [*body, ("all", *sums)])


def flax_table(record: Mapping[str, Any]) -> str:
    """Return the table of the models that transformers has for Flax."""
    titles = ("model", "leaves", "filled, equal bits", "names given", "elements left out", "decay")
    rows = {name: row["flax"] for name, row in record["models"].items() if row.get("flax")}
    body = [
        (name, *list(row.values())[:-1], _categories(row["decays_unlike"]))
        for name, row in rows.items()
    ]
    return _table(titles, body)


def _table(titles: Sequence[str], body: Iterable[Sequence[Any]]) -> str:
    ruler = "|".join(["---", *["---:"] * (len(titles) - 1)])
    lines = [" | ".join(map(str, row)) for row in [titles, *body]]
    head, *rest = [f"| {line} |" for line in lines]
    return "\n".join([head, f"|{ruler}|", *rest, ""])
