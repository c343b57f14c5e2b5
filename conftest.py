"""Settings of every test run, made before JAX is first imported."""

import gc
import os
import sys
from collections.abc import Generator, Iterator

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
# On tensors this small torch's threads mostly wait for each other: one is twice as fast.
# `test_instruction_sets.py` covers several.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A plugin that needs beartype: `make test-types`.
collect_ignore = ["tests/types_plugin.py"]

# Nothing may lean on silent promotion: neither of dtypes nor of ranks.
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None]:
    """Skips a test for which XLA cannot compile float16, as under `--xla_cpu_max_isa=SSE4_2`."""
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
    """Whether XLA contracts a product and a sum: it does where the CPU fuses the two."""
    import jax

    x = jax.numpy.float32(1 + 2**-12)
    return bool(jax.jit(lambda x: x * x - x)(x) != x * x - x)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--cases", type=int, default=0, help="run at most this many cases of each test (0: all)"
    )


@pytest.hookimpl(trylast=True)  # after `-m` has left out what it leaves out
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not (limit := config.getoption("--cases")):
        return
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    # Evenly spaced, the first and the last included: tables group similar cases.
    for test in cases.values():
        gaps = max(limit - 1, 1)
        chosen = {i * (len(test) - 1) // gaps for i in range(min(limit, len(test)))}
        test[:] = [item for i, item in enumerate(test) if i in chosen]
    kept = {item for test in cases.values() for item in test}
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


# Traces are millions of small objects that live on: to look at them all again and again takes
# 5 to 10 % of the time of a run.
gc.set_threshold(50_000, 20, 20)


@pytest.fixture(autouse=True, scope="module")
def _let_go_of_programs() -> Iterator[None]:
    """What a module has compiled is of no use to the next, and adds up to gigabytes."""
    yield
    if jax := sys.modules.get("jax"):
        jax.clear_caches()
