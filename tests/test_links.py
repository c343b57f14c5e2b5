"""Links of the site: code that is a name, and nothing else, leads to an existing page of its own."""

from __future__ import annotations

import importlib
import re
import sys
import zlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
pytest.importorskip("sphinx")


@pytest.fixture(autouse=True, scope="module")
def _path():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(DOCS / "_extensions")
        patch.syspath_prepend(DOCS)
        yield
        for name in ("links", "mathml", "inventories"):
            sys.modules.pop(name, None)


def load(name: str):
    return importlib.import_module(name)
