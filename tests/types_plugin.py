"""Check every annotation of the packages at run time: `make test-types`.

Usage: `python -m pytest -p tests.types_plugin`. The packages import jaxtyping, and names that only
annotations need, under `if TYPE_CHECKING`, which is therefore true during their import. Their
dependencies are imported first, since some have circular imports there.

A test that passes a wrong argument is skipped if an annotation rejects the argument inside
`pytest.raises`. Tests without an exception have the marker `wrong_types`.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
import sys
import types
import typing
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from beartype import BeartypeConf, FrozenDict, beartype
from beartype.roar import BeartypeCallHintParamViolation
from jaxtyping import TypeCheckError, install_import_hook

DEPENDENCIES = [
    "chex",
    "equinox",
    "flax.linen",
    "flax.nnx",
    "haiku",
    "jax.experimental",
    "jax.export",
    "optax",
    "torch",
    "torch.func",
]
PACKAGES = ["regjax", "regshared", "regtorch"]


@functools.cache
def configuration() -> BeartypeConf:
    """Accept an int as a float, as static type checkers do, and more bools, ints and floats.

    The checks of arguments accept NumPy's scalars, and `jax.export` has symbolic sizes.
    """
    from jax.export import symbolic_shape  # conftest.py sets options of JAX before its import

    wider = {
        bool: bool | np.bool_,
        int: int | np.integer | type(symbolic_shape("n")[0]),
        float: float | int | np.floating,
        complex: complex | float | int,
    }
    return BeartypeConf(hint_overrides=FrozenDict(wider))


def check(checked: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function or class with a check of its annotations."""
    return beartype(checked, conf=configuration())


def is_of_argument(error: TypeCheckError) -> bool:
    """Return whether an annotation rejects an argument, and not a result."""
    # Arguments are checked again with the result, and of a container another random item is.
    again = isinstance(error.__cause__, BeartypeCallHintParamViolation)
    return again or "checking the parameters" in str(error)


class Raises(pytest.RaisesExc):
    """`pytest.raises` that skips the test if an annotation rejects an argument."""

    def matches(self, exception: BaseException | None) -> bool:
        """Return whether the exception is an expected one."""
        if isinstance(exception, TypeCheckError) and is_of_argument(exception):
            pytest.skip("an annotation refuses an argument that is wrong on purpose")
        return super().matches(exception)


def pytest_configure(config: pytest.Config) -> None:
    """Import every module of the packages with a check in each function and dataclass."""
    # The checks choose random items of containers, also inside Hypothesis's strategies.
    config.addinivalue_line("filterwarnings", "ignore:Do not use the `random` module")
    if loaded := {*PACKAGES} & {*sys.modules}:
        raise pytest.UsageError(f"{loaded} must not be imported before this plugin.")
    pytest.raises = Raises
    for name in DEPENDENCIES:
        importlib.import_module(name)
    typing.TYPE_CHECKING = True
    with install_import_hook(PACKAGES, f"{__name__}.check"):
        for name in PACKAGES:
            package = importlib.import_module(name)
            for module in pkgutil.walk_packages(package.__path__, f"{name}."):
                importlib.import_module(module.name)
    typing.TYPE_CHECKING = False
    for name in ("regjax", "regtorch"):  # the checks surround the lines of the packages
        sys.modules[f"{name}._random.events"]._LIBRARIES.add("jaxtyping")
    # They draw in the forward of converted models, whose other draws are an error.
    sys.modules["regtorch.keyed.generators"].random = types.SimpleNamespace(getstate=lambda: 0)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test that passes values that annotations exclude."""
    if item.get_closest_marker("wrong_types"):
        pytest.skip("an annotation refuses an argument that is wrong on purpose")
