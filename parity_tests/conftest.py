"""What the tests need wherever they are run from, also out of an installed package."""

from __future__ import annotations

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Names the marker of slow tests where no pyproject.toml does."""
    config.addinivalue_line("markers", "slow: takes more than about ten seconds")
