from __future__ import annotations

import pytest

from tests import mutants


def test_every_file_of_the_table_exists(monkeypatch):
    mutants.check_files(mutants.explanations())
    monkeypatch.setitem(mutants.TESTS, "regjax/_random/keys.py", ["tests/regjax/test_gone.py"])
    with pytest.raises(FileNotFoundError, match="test_gone"):
        mutants.check_files(set())


def test_a_survivor_of_a_file_that_is_not_mutated_is_an_error():
    with pytest.raises(ValueError, match=r"got \['regjax/_gone.py'\]"):
        mutants.check_files({("regjax/_gone.py", "a", "b")})
