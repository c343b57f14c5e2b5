"""Settings of every test run, made before JAX is first imported."""

import functools
import os
import sys
from collections.abc import Generator, Iterator

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
# Nothing may lean on silent promotion: neither of dtypes nor of ranks.
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None]:
    """Skips a test for which XLA cannot compile float16, as under `--xla_cpu_max_isa=SSE4_2`."""
    try:
        yield
    except Exception as error:
        if type(error).__name__ == "JaxRuntimeError" and not _compiles_float16():
            pytest.skip(f"XLA compiles no float16 for this instruction set: {error}")
        raise


@functools.cache
def _compiles_float16() -> bool:
    import jax

    try:
        jax.jit(lambda x: x.astype("float16"))(jax.numpy.ones(8, "float32"))
    except jax.errors.JaxRuntimeError:
        return False
    return True


@pytest.fixture(autouse=True, scope="module")
def _let_go_of_programs() -> Iterator[None]:
    """What a module has compiled is of no use to the next, and adds up to gigabytes."""
    yield
    if jax := sys.modules.get("jax"):
        jax.clear_caches()
