"""The table that compares regjax with other libraries: every cell is what its probe finds."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import pytest

import regjax
from benchmarks import comparison
from benchmarks.comparison import LIBRARIES, PROPERTIES, RECORD, STATED, is_installed, version
from benchmarks.probes.offers import KINDS

RECORDED = json.loads(RECORD.read_text())
CELLS = RECORDED["cells"]
# Keras takes seconds to import, and timm is in no extra.
SLOW = ("Keras", "timm")


def is_slow(name: str, library: str) -> bool:
    return library in SLOW or "optimizers" in name


PROBED = [
    pytest.param(name, library, marks=[pytest.mark.slow] * is_slow(name, library))
    for library in LIBRARIES
    for name in PROPERTIES
    if callable(PROPERTIES[name].get(library))
]


def false_cells(name: str, library: str, cells: dict[str, dict[str, str]]) -> list[str]:
    """Return the cell of a row and a column if its probe finds something else."""
    found = comparison.measured(name, library)
    return [] if found == cells[name][library] else [f"{cells[name][library]}, not {found}"]


def skip_other_versions(library: str) -> None:
    """Skip the cells of a library in another version than the recorded one."""
    if not is_installed(library):
        pytest.skip(f"{library} is not installed")
    column = RECORDED["columns"][library]
    same = (version(library), comparison.jax.__version__) == (column["version"], column["jax"])
    if library != "regjax" and not same:
        pytest.skip(f"recorded with {library} {column['version']} and JAX {column['jax']}")


@pytest.mark.parametrize(("name", "library"), PROBED)
@pytest.mark.sample(22)
def test_a_cell_is_what_its_probe_finds(name, library):
    skip_other_versions(library)
    assert false_cells(name, library, CELLS) == []


@pytest.mark.parametrize(
    ("name", "library", "cell"),
    [
        ("traced rate", "Flax", "yes"),
        ("a dropped NaN is 0", "PyTorch", "yes"),
        ("no mask stored for the backward pass", "regjax", "no"),
        ("PyTorch's optimizers with decay", "Optax", "3 of 12"),
    ],
)
def test_a_false_cell_is_detected(name, library, cell):
    skip_other_versions(library)
    planted = {name: {**CELLS[name], library: cell}}
    assert false_cells(name, library, planted) != []


def test_a_shared_mask_counts_for_each_kind_that_it_provides():
    """Haiku's dropout with one mask for all axes but the first is `regjax.drop_path`."""
    x, key = jnp.ones((32, 4, 4)), jax.random.key(0)
    haiku = pytest.importorskip("haiku")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        shared = haiku.dropout(key, 0.3, x, broadcast_dims=(1, 2))
    assert (shared == regjax.drop_path(x, 0.3, key=key)).all()
    branches, timesteps = KINDS["whole branches"], KINDS["one mask for all timesteps"]
    assert branches.items() >= timesteps.items() - {("regjax", timesteps["regjax"])}


def test_the_record_is_whole():
    assert list(CELLS) == list(PROPERTIES)
    assert all(list(row) == list(LIBRARIES) for row in CELLS.values())
    assert RECORDED["columns"].keys() == LIBRARIES.keys()
    for name, row in PROPERTIES.items():
        stated = {lib: row.get(lib, "-") for lib in LIBRARIES if not callable(row.get(lib))}
        assert stated.items() <= CELLS[name].items()
    assert RECORD.with_suffix(".md").read_text() == comparison.table(CELLS)


def test_some_rows_favor_others():
    """The table is not a list of the strengths of regjax."""
    assert sum(row["regjax"] in ("no", "not run yet", "2") for row in CELLS.values()) >= 5
    assert set(STATED) <= set(PROPERTIES)


def test_a_missing_library_keeps_its_cells(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(comparison, "is_installed", lambda library: False)
    assert comparison.main(["--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "comparison.json").read_text()) == RECORDED
    assert "timm: not installed, kept" in capsys.readouterr().out
