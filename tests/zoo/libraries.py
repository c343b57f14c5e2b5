"""Load the packages of the extra `zoo`, offline."""

from __future__ import annotations

import importlib
import os
import warnings
from importlib.util import find_spec

from examples.torchvision_operators import declare_missing

NAMES = ("timm", "torchvision", "transformers")
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "USE_TF": "0",
}


def missing() -> list[str]:
    """Return the names of the packages that are not installed, without importing any."""
    return [name for name in NAMES if find_spec(name) is None]


def load() -> None:
    """Import the packages. No model is ever downloaded.

    Raises:
        ImportError: If one is not installed.
    """
    os.environ.update(OFFLINE)
    declare_missing()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in NAMES:
            importlib.import_module(name)
