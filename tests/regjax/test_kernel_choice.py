"""The implementation of attention that is chosen by default, on a CPU that says it is a TPU."""

import functools
import importlib.util
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import regjax
from regjax._dropout import kernel_choice
from regjax._dropout.pallas_attention import interpreted_tile
from regjax._random.packed import EXACT
from tests.regjax.test_flash import TILE, arrays, attention

KERNEL = "pallas_call"


@pytest.fixture
def tpu(monkeypatch):
    """One TPU, whose kernels run in the interpreter."""
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    kernel_choice._failure.cache_clear()
    with interpreted_tile(TILE):
        yield
    kernel_choice._failure.cache_clear()


@pytest.fixture
def untested(monkeypatch):
    """Kernels that are not tested on a small problem."""
    monkeypatch.setattr(kernel_choice, "_deviation", lambda *_: 0.0)


def program(*operands, **options):
    operands = operands or arrays()
    return str(jax.make_jaxpr(functools.partial(attention, **options))(*operands))


@pytest.mark.slow
def test_a_tpu_uses_the_kernels(tpu):
    operands = arrays()
    found = jax.jit(functools.partial(attention, dropout_rate=0.5))(*operands)
    assert KERNEL in program(dropout_rate=0.5)
    kernels = attention(*operands, dropout_rate=0.5, implementation="pallas")
    np.testing.assert_array_equal(found, kernels)


def test_no_other_platform_uses_them():
    assert KERNEL not in program(dropout_rate=0.5)


APPLIES = {
    "no dropout": {},
    "packed": {"dropout_rate": 0.1, "sampler": regjax.packed_bernoulli},
    "a mask": {"dropout_rate": 0.1, "mask": np.ones((1, 1, 64, 256), np.bool_)},
}
ELSEWHERE = {
    "said": {"implementation": "xla"},
    "blocks": {"block_size": 128},
    "bias": {"bias": np.ones((64, 256), np.float32)},
    "lengths": {"query_seq_lengths": np.ones(1, np.int32)},
    "window": {"local_window_size": 3},
    "residual": {"return_residual": True},
    "dtype": {"dtype": jnp.float16},
    "a function of one's own": {"sampler": lambda key, p, shape, **_: jnp.ones(shape, np.bool_)},
}


@pytest.mark.usefixtures("tpu", "untested")
@pytest.mark.parametrize(
    ("options", "uses"),
    [*((o, True) for o in APPLIES.values()), *((o, False) for o in ELSEWHERE.values())],
    ids=[*APPLIES, *ELSEWHERE],
)
def test_where_the_kernels_apply(options, uses):
    found = program(**{"dropout_rate": 0.5} | options)
    assert (KERNEL in found) == uses


@pytest.mark.usefixtures("tpu", "untested")
def test_neither_other_depths_nor_observers_use_them():
    assert KERNEL not in program(*arrays((1, 64, 2, 32)))
    with regjax.observing(lambda event: None):
        assert KERNEL not in program(dropout_rate=0.5)


@pytest.mark.usefixtures("tpu", "untested")
def test_arrays_elsewhere_do_not_use_them():
    with jax.default_device(jax.devices("cpu")[0]):
        assert KERNEL not in program(dropout_rate=0.5)
    # An array that is not traced tells where it is.
    np.testing.assert_array_equal(
        attention(*arrays(), dropout_rate=0.5),
        attention(*arrays(), dropout_rate=0.5, implementation="xla"),
    )


@pytest.mark.usefixtures("tpu", "untested")
def test_arrays_that_xla_may_divide_do_not_use_them(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    assert KERNEL not in program(dropout_rate=0.5)
    for kind, uses in (AxisType.Explicit, True), (AxisType.Auto, False):
        with jax.set_mesh(jax.make_mesh((2,), ("data",), (kind,))):
            assert (KERNEL in program(*arrays((2, 64, 2, 64)), dropout_rate=0.5)) == uses


def unlike_blocks(*_args, **_options):
    return 0.11


def unable(*_args, **_options):
    raise NotImplementedError("no such instruction\nat line 3")


@pytest.mark.usefixtures("tpu")
@pytest.mark.parametrize(
    ("solve", "words"),
    [
        (unlike_blocks, "deviate by 0.11"),
        (unable, "raise NotImplementedError: no such instruction. "),
    ],
)
def test_kernels_that_fail_on_the_device_are_not_used(monkeypatch, solve, words):
    monkeypatch.setattr(kernel_choice, "_deviation", solve)
    with pytest.warns(UserWarning, match=words):
        assert KERNEL not in program(dropout_rate=0.5)
    assert KERNEL not in program(dropout_rate=0.5)  # without another warning


@pytest.mark.slow
def test_another_mask_is_a_failure(monkeypatch):
    """The problem tells a kernel with the mask of another key, and one without a gradient."""

    def deviation() -> float:
        return kernel_choice._deviation(EXACT, None, 64, 64, "float32", TILE)

    assert deviation() < 1e-5
    run: Any = kernel_choice.kernel_attention
    defects = {
        "key": lambda *args: run(*args[:5], jax.random.key(9), *args[6:]),
        "gradient": lambda *args: jax.lax.stop_gradient(run(*args)),
        "NaN": lambda *args: run(*args) * np.float32("nan"),
    }
    for defect in defects.values():
        monkeypatch.setattr(kernel_choice, "kernel_attention", defect)
        assert deviation() > kernel_choice._TOLERANCE


AOT = """
import os
from benchmarks.tpu_model import LIBTPU, devices
os.environ.update(LIBTPU)
import jax
from jax.sharding import SingleDeviceSharding
from regjax._dropout.kernel_choice import problem
from regjax._random.packed import EXACT, PackedSampler, packed_bernoulli
one = SingleDeviceSharding(devices("v5e:2x2")[0])
packed = PackedSampler(packed_bernoulli)
for case in (packed, None, 128, 128, "bfloat16"), (EXACT, None, 256, 64, "float32"):
    for solve in problem(*case):
        jax.jit(solve, out_shardings=one).lower().compile()
"""


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu, the compiler for TPUs, is not installed: pip install libtpu",
)
def test_the_problem_compiles_for_a_tpu():
    subprocess.run([sys.executable, "-c", AOT], check=True, timeout=600)
