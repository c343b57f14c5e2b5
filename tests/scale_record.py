"""A run of `benchmarks.scale` with known laws, for the tests of its tables and its picture."""

from __future__ import annotations

from typing import Any

from benchmarks import race

# By title: the axis, the sizes, the candidates, and the exponent of the time of a call.
PROGRAMS = {
    "dropout of one array": ("elements", (2**10, 2**20, 2**30), ("dropout", "dropout, packed"), 1),
    "network, unrolled layers": ("sites", (1, 2, 5, 10, 20, 50, 100, 200, 500), ("dropout",), 1),
    "update by AdamW": ("leaves", (1, 100, 10_000), ("decay", "decay by mask", "L2 penalty"), 1),
    "dropout of a sharded array": ("devices", (1, 2, 4, 8), ("dropout",), 0),
}
GRIDS = {
    "cpu": {"CPU:1": 1, "CPU:8": 8},
    "tpu": {"v5e:2x2": 4, "v5e:16x16": 256},
    "gpu": {"H100:1x1x8": 8, "H100:1x64x8": 512},
}
COSTS = {"without": 80.0, "decay": 81.0, "dropout": 99.0}


def content() -> dict[str, Any]:
    """Return a run in which each candidate takes twice the time of the one before."""
    parts: dict[str, Any] = {}
    for title, (axis, sizes, names, exponent) in PROGRAMS.items():
        parts[axis] = _part([_sample(axis, title, at, names, exponent) for at in sizes])
    for name, grids in GRIDS.items():
        steps = [_step(grid, count, kind) for grid, count in grids.items() for kind in COSTS]
        parts[name] = _part(steps)
    return parts


def _part(samples: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "date": "2026-01-02",
        "load": [0.5, 11.5],
        "environment": {**race.environment(), "cpu": "Example CPU 9000", "cores": 128},
        "samples": samples,
    }


def _sample(axis: str, title: str, at: int, own: tuple[str, ...], exponent: int) -> dict[str, Any]:
    names = ("without", *own)
    times = {
        name: [(1e-6 * at**exponent) * 2**place * (1 + turn) for turn in range(3)]
        for place, name in enumerate(names)
    }
    figures = {"trace": times, "compile": times, "seconds": {} if at == 2**30 else times}
    sizes = {"bytes": dict.fromkeys(names, 4 * at)}
    return {"axis": axis, "title": title, "at": at, **figures, **sizes}


def _step(grid: str, devices: int, variant: str) -> dict[str, Any]:
    return {
        "grid": grid,
        "devices": devices,
        "variant": variant,
        "cost": 0.0 if grid.startswith("CPU") else COSTS[variant],
        "argument": 2_000_000,
        "temporary": 3_000_000 + 500_000 * (variant == "dropout"),
        "collectives": {"all-reduce": [7, 1_000_000]} if devices > 1 else {},
    }
