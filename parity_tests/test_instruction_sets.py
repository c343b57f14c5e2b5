"""Promises of equal bits: traced rates, and cheap promises under other instruction sets."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax import lax

import regjax._random.rounding
import regtorch._random.rounding
from parity_tests import instruction_sets, instructions, promises
from parity_tests.instruction_sets import CORE, COVERING, EVERY, LEVELS, Setting, broken, page
from parity_tests.promises import PROMISES, many_rates


@functools.cache
def host() -> str:
    return instruction_sets.host_level()


# `make test-isa` runs every setting.
@pytest.mark.parametrize(
    "setting", [CORE[0], pytest.param(CORE[1], marks=pytest.mark.slow)], ids=str
)
def test_core_promises_under_other_instruction_sets(setting):
    if reason := setting.missing(host()):
        pytest.skip(f"this CPU {reason}")
    found = instruction_sets.check(setting, is_core=True)
    assert set(found) == {promise.name for promise in PROMISES if promise.is_core}
    assert broken(setting, found) == []


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_traced_rates_have_the_same_bits(dtype):
    promise = promises.Promise("traced rates", "", lambda: many_rates(60, [dtype]))
    assert promise.broken() == []


def test_rates_and_inputs_that_are_products_have_the_same_bits():
    names = ["dropout", "alpha_dropout", "gaussian_dropout", "drop_block"]
    assert promises.Promise("compiled", "", lambda: promises.compiled(names)).broken() == []


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_square_roots_are_correctly_rounded(dtype):
    rng = np.random.default_rng(0)
    x = np.r_[2.0 ** rng.uniform(-60, 60, 20_000), rng.uniform(0, 8, 20_000), 0, 1, 4, np.inf]
    x = x.astype(dtype)
    with jax.enable_x64(dtype == np.float64):
        in_jax = np.asarray(jax.jit(regjax._random.rounding.exact_sqrt)(x))
    np.testing.assert_array_equal(in_jax, np.sqrt(x))
    in_torch = regtorch._random.rounding.exact_sqrt(torch.tensor(x))
    np.testing.assert_array_equal(in_torch.numpy(), np.sqrt(x))


@pytest.mark.parametrize("ulps", [-1, 1])
def test_a_root_off_by_one_is_mended(monkeypatch, ulps):
    x = np.random.default_rng(0).uniform(0.01, 8, 20_000).astype(np.float32)

    def shifted(x):
        return lax.bitcast_convert_type(
            lax.bitcast_convert_type(jnp.sqrt(x), np.int32) + np.int32(ulps), np.float32
        )

    monkeypatch.setattr(regjax._random.rounding.lax, "sqrt", shifted)
    in_jax = jax.jit(lambda x: regjax._random.rounding.exact_sqrt(x))(x)
    np.testing.assert_array_equal(np.asarray(in_jax), np.sqrt(x))


def test_a_broken_promise_is_found(monkeypatch):
    monkeypatch.setattr(
        "regtorch._dropout.gaussian.exact_sqrt", lambda x: x.sqrt().nextafter(x.new_tensor(9))
    )
    promise = promises.Promise("traced rates", "", lambda: many_rates(3, [np.float32]))
    assert [line.split(":")[0] for line in promise.broken()] == [
        "gaussian_dropout, float32, traced"
    ]


def test_a_promise_that_compares_nothing_is_broken():
    assert promises.Promise("empty", "", lambda: iter(())).broken() == ["nothing was compared"]


def test_float16_is_promised_where_it_compiles(monkeypatch):
    skipped = lambda: {p.name for p in PROMISES if not p.package and not p.can_be_checked()}
    monkeypatch.setattr(promises, "float16_error", lambda: "")
    assert skipped() == set()
    monkeypatch.setattr(promises, "float16_error", lambda: "INTERNAL: ")
    assert skipped() == {"family, float16", "torch_random, float16"}


def test_levels_that_are_not_in_force_are_an_error():
    used = instructions.levels()
    instructions.require(used)
    for name, level in used.items():
        other = LEVELS[LEVELS.index(level) - 1]
        with pytest.raises(RuntimeError, match=f"^{name} must use {other}; got {level}. "):
            instructions.require(used | {name: other})


@pytest.mark.parametrize(
    "variable", ["ATEN_CPU_CAPABILITY", pytest.param("XLA_FLAGS", marks=pytest.mark.slow)]
)
def test_a_setting_without_effect_is_an_error(monkeypatch, variable):
    setting = CORE[0]
    if host() == setting.torch:
        pytest.skip("this CPU has one level only")
    rest = {name: value for name, value in setting.environment().items() if name != variable}
    monkeypatch.setattr(Setting, "environment", lambda _: rest)
    framework = "torch" if variable.startswith("ATEN") else "xla"
    with pytest.raises(RuntimeError, match=f"{framework} must use default; got {host()}"):
        instruction_sets.check(setting, is_core=True)


def test_some_promises_are_made_with_avx2_only():
    found = {promise.name: ["1 of 2 elements"] for promise in PROMISES if promise.needs_avx2}
    assert found
    assert broken(Setting("default", "avx2", "avx2", 1), found) == []
    assert len(broken(Setting("avx2", "default", "avx2", 1), found)) == len(found)


def test_settings_cover_every_pair_of_levels():
    for pair in (("torch", "xla"), ("torch", "onednn"), ("xla", "onednn")):
        assert len({tuple(getattr(setting, name) for name in pair) for setting in COVERING}) == 9
    assert {setting.threads for setting in COVERING} == {1, 2}
    assert len(set(EVERY)) == 54
    assert set(COVERING) | set(CORE) <= set(EVERY)


def test_settings_that_the_cpu_has_not_are_skipped():
    wide = Setting("avx2", "avx512", "default", 1)
    assert wide.missing("avx512") == ""
    assert wide.missing("avx2") == wide.missing("default") == "needs avx512"


def test_the_page_marks_what_is_broken_and_what_is_not_promised():
    unequal, equal = Setting("default", "avx2", "avx2", 1), Setting("avx2", "avx2", "avx2", 2)
    fused = next(promise.name for promise in PROMISES if promise.needs_fma)
    found: dict[str, list[str] | None] = {promise.name: [] for promise in PROMISES}
    found[fused] = ["w: 1 of 2 elements"]
    rows = {
        line.split(" | ")[0].removeprefix("| "): line.split(" | ")[2:]
        for line in page({unequal: found, equal: found, COVERING[-1]: "needs avx512"}).splitlines()
        if line.startswith("| ")
    }
    assert rows[fused] == ["(1)", "1 !", "- |"]
    assert rows[PROMISES[0].name] == ["=", "=", "- |"]
