"""Configuration of the tests, independent of the folder that pytest runs in."""

from __future__ import annotations

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker of slow tests, for runs without pyproject.toml."""
    config.addinivalue_line("markers", "slow: takes more than about ten seconds")
