"""The hook of conftest.py that skips the tests of float16 where XLA cannot compile it."""

from __future__ import annotations

from pathlib import Path

import jax
import pytest

from parity_tests import instructions

CONFTEST = str(Path(__file__).parent.parent / "conftest.py")
KNOWN = "INTERNAL: Failed to materialize symbols: "
COMPILES = ""


@pytest.mark.parametrize(
    ("known", "error", "expected"),
    [
        (KNOWN, jax.errors.JaxRuntimeError(KNOWN + "{ fusion }"), pytest.skip.Exception),
        (KNOWN, jax.errors.JaxRuntimeError("INTERNAL: other"), jax.errors.JaxRuntimeError),
        (KNOWN, ValueError(KNOWN), ValueError),
        (COMPILES, jax.errors.JaxRuntimeError(KNOWN), jax.errors.JaxRuntimeError),
    ],
)
def test_only_the_error_of_float16_is_skipped(pytestconfig, monkeypatch, known, error, expected):
    monkeypatch.setattr(instructions, "float16_error", lambda: known)
    conftest = pytestconfig.pluginmanager.get_plugin(CONFTEST)
    call = conftest.pytest_runtest_call(None)
    next(call)
    with pytest.raises((Exception, pytest.skip.Exception)) as raised:
        call.throw(error)
    assert raised.type is expected
