"""Each model of the zoo keeps the promises, and is as docs/zoo/zoo.json has it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.zoo import rows
from tests.zoo.models import CASES

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parents[2] / "docs" / "zoo"
RECORD = json.loads((FOLDER / "zoo.json").read_text())


@pytest.mark.filterwarnings("ignore")  # those of the libraries
@pytest.mark.parametrize("aspect", rows.ASPECTS)
@pytest.mark.parametrize("name", CASES)
def test_a_model_is_as_recorded(name, aspect):
    assert rows.ASPECTS[aspect](CASES[name]) == RECORD["models"][name][aspect]


def test_the_record_has_every_model_once_and_its_tables():
    assert list(RECORD["models"]) == list(CASES)
    for table in (rows.summary, rows.details, rows.differences, rows.flax_table):
        assert (FOLDER / f"{table.__name__}.md").read_text() == table(RECORD)
