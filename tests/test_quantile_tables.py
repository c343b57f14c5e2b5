"""The tables of `normal` are those that `benchmarks.quantile` computes."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import quantile

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def source() -> str:
    return quantile.source()


def test_the_tables_are_current(source):
    assert (ROOT / "regshared/quantile_tables.py").read_text() == source
