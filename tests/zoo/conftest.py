"""Tests of models of transformers, timm and torchvision, which `make test-zoo` installs.

Where a package is missing, these tests are skipped; in the session `zoo` of noxfile.py, they fail.
Modules here import the packages inside functions: collection must work without them.
"""

from __future__ import annotations

import os

import pytest

from tests.zoo import libraries


@pytest.fixture(autouse=True, scope="session")
def _libraries() -> None:
    if names := libraries.missing():
        reason = f"{', '.join(names)} not installed. Run `make test-zoo`, or install the extra zoo."
        (pytest.fail if "REGJAX_ZOO" in os.environ else pytest.skip)(reason)
    libraries.load()
