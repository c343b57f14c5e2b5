"""Settings of every test run, applied before the first import of JAX."""

import gc
import os
import shutil
import sys
import tempfile
from collections.abc import Generator, Iterable, Iterator, Sequence

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
# The tensors of the tests are small: several threads of torch would mostly wait for each other.
# `test_instruction_sets.py` runs two.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# The plugin of `make test-types` requires beartype.
collect_ignore = ["tests/types_plugin.py"]

# The library must not depend on implicit promotion of dtypes or ranks.
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"


def pytest_configure(config: pytest.Config) -> None:
    """Share compiled programs among the modules, processes and programs of this run, and no other.

    Most are compiled many times otherwise: see `_clear_compiled_programs`.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:  # that of the first process, or the user's
        return
    folder = os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="regjax-tests-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None]:
    """Skip a test for which XLA cannot compile float16, as under `--xla_cpu_max_isa=SSE4_2`."""
    try:
        yield
    except Exception as error:
        if type(error).__name__ != "JaxRuntimeError":
            raise
        from parity_tests.instructions import float16_error

        if (known := float16_error()) and str(error).startswith(known):
            pytest.skip(f"XLA compiles no float16 for this instruction set: {error}")
        raise


@pytest.fixture(scope="session")
def contracts() -> bool:
    """Return whether XLA contracts a product and a sum, which it does if the CPU has FMA."""
    from parity_tests.instructions import xla_fuses

    return xla_fuses()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--cases", type=int, default=0, help="run at most this many cases of each test (0: all)"
    )
    parser.addoption(
        "--sampled", action="store_true", help="run n cases of each test with the marker sample(n)"
    )


_ALL = pytest.mark.sample().mark


def _cases(items: Iterable[pytest.Item]) -> list[list[pytest.Item]]:
    """Return the cases of each test."""
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    return list(cases.values())


def _spaced(cases: Sequence[pytest.Item], count: int) -> set[pytest.Item]:
    """Return evenly spaced cases, since tables group similar ones."""
    gaps = max(count - 1, 1)
    return {cases[i * (len(cases) - 1) // gaps] for i in range(min(count, len(cases)))}


@pytest.hookimpl(trylast=True)  # after the selection by `-m`
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept: set[pytest.Item] = set()
    for cases in _cases(items):
        sample = cases[0].get_closest_marker("sample") if config.getoption("--sampled") else None
        limits = [limit for limit in (config.getoption("--cases"), *(sample or _ALL).args) if limit]
        kept |= _spaced(cases, min(limits, default=len(cases)))
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


# Traces are millions of small objects that stay alive. With the default thresholds, the garbage
# collector takes 5 to 10 % of the time of a run to scan them.
gc.set_threshold(50_000, 20, 20)


@pytest.fixture(autouse=True, scope="module")
def _clear_compiled_programs() -> Iterator[None]:
    """Clear the compiled programs of each module, which add up to gigabytes."""
    yield
    if jax := sys.modules.get("jax"):
        jax.clear_caches()
