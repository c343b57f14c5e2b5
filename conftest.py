"""Settings of every test run, made before JAX is first imported."""

import os
import sys
from collections.abc import Iterator

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
# Nothing may lean on silent promotion: neither of dtypes nor of ranks.
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"


@pytest.fixture(autouse=True, scope="module")
def _let_go_of_programs() -> Iterator[None]:
    """What a module has compiled is of no use to the next, and adds up to gigabytes."""
    yield
    if jax := sys.modules.get("jax"):
        jax.clear_caches()
