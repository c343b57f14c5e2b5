"""Checks of a training step: the same bugs give the same report in both frameworks."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch

from parity_tests.frameworks import FRAMEWORKS, JAX, Framework
from parity_tests.tables import both_frameworks

X = np.linspace(-1.0, 1.0, 8 * 16, dtype=np.float32).reshape(8, 16)
Step = Callable[..., Any]


def model(framework: Framework, w: Any, keys: Any, *, rate: Any = 0.5, **options: Any) -> Any:
    h = framework.array(X) @ w
    for _ in range(2):
        h = framework.library.dropout(h, rate, key=keys["layer"], **options)  # layer
    h = framework.library.feature_dropout(h, 0.25, key=keys["last"], **options)  # last
    return (h**2).sum()


def trainer(framework: Framework, keys_of: Callable[..., Any], **options: Any) -> Step:
    """Return a step of gradient descent that carries its weights, jitted in JAX."""

    def train_step(w: Any, step: Any) -> Any:
        keys = keys_of(framework, step)
        loss = lambda w: model(framework, w, keys, **options)
        return w - 0.1 * framework.vjp(loss, w, framework.array(np.array(1.0, np.float32)))[1]

    return jax.jit(train_step) if framework is JAX else train_step


def keys_of(
    framework: Framework,
    step: Any,
    *,
    names: tuple[str, str] = ("layer", "last"),
    stays: bool = False,
) -> dict[str, Any]:
    at = 0 if stays else step
    made = (framework.library.site_key(framework.key(7), at, name) for name in names)
    return dict(zip(("layer", "last"), made, strict=True))


def constant(framework: Framework, step: Any) -> dict[str, Any]:
    return dict.fromkeys(("layer", "last"), framework.key(7))


def healthy(framework: Framework, w: Any) -> Any:
    return model(framework, w, dict.fromkeys(("layer", "last")), deterministic=True)


def forgetful(framework: Framework, w: Any) -> Any:
    return model(framework, w, keys_of(framework, 9))


stuck = functools.partial(keys_of, stays=True)
shared = functools.partial(keys_of, names=("one", "one"))
# The keys of the step, the options of the model, those of the check, and the expected problems.
CASES: dict[str, tuple[Any, ...]] = {
    "loop over layers": (keys_of, {}, {}, ["REPEATED_MASK"]),
    "allowed": (keys_of, {}, {"allow": ["layer"]}, []),
    "stuck": (stuck, {}, {}, ["SAME_MASK"] * 2 + ["REPEATED_MASK"]),
    "shared": (shared, {}, {}, ["REPEATED_MASK", "SHARED_KEY"]),
    "constant": (
        constant,
        {},
        {},
        ["SAME_MASK"] * 2 + ["REPEATED_MASK", "SHARED_KEY"],
    ),
    "never active": (keys_of, {"deterministic": True}, {}, ["NEVER_ACTIVE"]),
    "expected": (
        keys_of,
        {"rate": 0.0},
        {"expect": ["layer", "last"]},
        ["NEVER_ACTIVE"],
    ),
    "another rate": (
        keys_of,
        {},
        {"expect": {"la*": 0.5}, "allow": ["layer"]},
        ["OTHER_RATE"],
    ),
    "evaluation": (keys_of, {}, {"allow": ["layer"], "evaluate": healthy}, []),
    "active in evaluation": (
        keys_of,
        {},
        {"allow": ["layer"], "evaluate": forgetful},
        ["ACTIVE_IN_EVALUATION"],
    ),
}


def check(framework: Framework, keys_of: Any, options: Any, how: dict[str, Any]) -> Any:
    if "evaluate" in how:
        how = {**how, "evaluate": functools.partial(how["evaluate"], framework)}
    w = framework.array(np.eye(16, dtype=np.float32))
    return framework.library.check_dropout(trainer(framework, keys_of, **options), w, **how)


def without_advice(report: Any) -> str:
    return str(dataclasses.replace(report, advice=dict.fromkeys(report.advice, "…")))


@pytest.mark.parametrize(("keys_of", "options", "how", "expected"), CASES.values(), ids=CASES)
@pytest.mark.sample(3)
def test_both_frameworks_report_the_same(keys_of, options, how, expected):
    in_jax, in_torch = (check(framework, keys_of, options, how) for framework in FRAMEWORKS)
    assert [finding.problem.name for finding in in_jax.findings] == expected
    assert in_jax.rows == in_torch.rows
    for here, there in zip(in_jax.findings, in_torch.findings, strict=True):
        assert here.problem.value == there.problem.value
        assert here[1:] == there[1:]
    assert without_advice(in_jax) == without_advice(in_torch)


def test_the_printed_report():
    in_jax = check(JAX, *CASES["stuck"][:3])
    first, last = (
        f"test_guards.py:{number}"
        for number, text in enumerate(Path(__file__).read_text().splitlines(), 1)
        if text.endswith(("  # layer", "  # last"))
    )
    assert without_advice(in_jax) == "\n".join([
        "site   where              function         shape    rate  draws  evaluation",
        f"layer  {first}  dropout          (8, 16)  0.5   2 + 2  -",
        f"last   {last}  feature_dropout  (8, 16)  0.25  1 + 1  -",
        "",
        "same mask in two steps",
        f"  layer ({first}): the key of 'layer' at step 0 drew in steps 0 and 1",
        f"  last ({last}): the key of 'last' at step 0 drew in steps 0 and 1",
        "  -> …",
        "",
        "same mask again within a step",
        f"  layer ({first}): the key of 'layer' at step 0 drew 2 times in a step",
        "  -> …",
    ])  # fmt: skip


@both_frameworks
def test_every_problem_has_advice(framework: Framework):
    assert set(framework.library._guards.ADVICE) == set(framework.library.DropoutProblem)


@both_frameworks
def test_a_constant_or_total_mask_is_reported(framework: Framework):
    shape = X.shape
    masks = {
        "IGNORED_KEY": np.random.default_rng(0).random(shape) < 0.5,
        "ALL_OR_NOTHING": np.zeros(shape, bool),
    }
    for problem, mask in masks.items():
        sampler = lambda *_, mask=mask, **__: framework.array(mask)

        def step(number, sampler=sampler):
            key = framework.library.site_key(framework.key(7), number, "it")
            framework.library.dropout(framework.array(X), 0.5, key=key, sampler=sampler)

        (finding,) = framework.library.check_dropout(step).findings
        assert finding.problem.name == problem
        # 128 fair bits have given values with probability 2**-128.
        assert finding.chance == 2.0**-128


@both_frameworks
def test_a_rate_out_of_range_is_reported(framework: Framework):
    def step(number):
        key = framework.library.site_key(framework.key(7), number, "it")
        framework.traced(lambda rate: framework.library.dropout(framework.array(X), rate, key=key))(
            np.float32(np.nan)
        )

    (finding,) = framework.library.check_dropout(step).findings
    assert (finding.problem.name, finding.detail) == ("INVALID_RATE", "rate nan gives NaN")


@both_frameworks
def test_a_guard_in_a_training_loop(framework: Framework):
    guard = framework.library.DropoutGuard()
    root, x = framework.key(7), framework.array(X)

    def run(number):
        return framework.library.dropout(x, 0.5, key=framework.library.site_key(root, number, "it"))

    def broken():
        with guard.training():
            run(0)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        broken()
    with pytest.raises(
        ValueError, match=r"must observe two training steps .* got 0\. .* guard.training\(\)"
    ):
        guard.report()
    for number in range(3):
        with guard.training():
            run(number)
        run(number)  # not recorded between the blocks
    with guard.evaluation():
        framework.library.dropout(x, 0.5, deterministic=True)
    (row,) = guard.report().rows
    assert (row.draws, row.evaluation) == ((1, 1, 1), 0)
    with guard.training():
        run(1)
    (finding,) = guard.report().findings
    assert finding.detail == "the key of 'it' at step 1 drew in steps 1 and 3"


@both_frameworks
def test_wrong_arguments_are_rejected(framework: Framework):
    lib, x = framework.library, framework.array(X)

    def step(*carry_and_number):
        key = lib.site_key(framework.key(7), carry_and_number[-1], "it")
        lib.dropout(x, 0.5, key=key)
        return carry_and_number[:-1]

    with pytest.raises(
        TypeError, match=r"expect must be a list of globs; got 'it'\. Pass \['it'\]"
    ):
        lib.check_dropout(step, expect="it")
    with pytest.raises(ValueError, match=r"allow must .* got 'that', which matches none of it \("):
        lib.check_dropout(step, allow=["that"])
    for wrong, carry, got in [
        (step, (x,), "a tuple of 1"),
        (lambda a, number: None, (x,), "NoneType"),
        (lambda a, b, number: a, (x, x), type(x).__name__),
        (lambda a, b, number: (a, b, a), (x, x), "a tuple of 3"),
    ]:
        with pytest.raises(ValueError, match=rf"train_step must return .* got {got}\."):
            lib.check_dropout(wrong, *carry)
    lib.check_dropout(step, x, x).raise_if_wrong()


def test_observers_receive_the_rows_of_a_torch_vmap():
    """Observation does not change `torch.func.vmap` over keys."""
    jax_keys = jax.random.split(JAX.key(7), 8)
    drawn: list[Any] = []
    library = FRAMEWORKS[1].library
    with library.observing(drawn.append):
        y = torch.func.vmap(lambda x, key: library.dropout(x, 0.5, key=key))(
            torch.from_numpy(X), library.split(library.key(7), 8)
        )
    expected = jax.vmap(lambda x, key: JAX.library.dropout(x, 0.5, key=key))(X, jax_keys)
    np.testing.assert_array_equal(y.numpy(), expected)
    np.testing.assert_array_equal(np.stack([draw.mask for draw in drawn]), expected != 0)


def once(framework: Framework, number: Any, **options: Any) -> Any:
    key = framework.library.site_key(framework.key(7), number, "it")
    return framework.library.dropout(framework.array(X), 0.5, key=key, **options)


@both_frameworks
def test_the_check_uses_the_mask_that_is_applied(framework: Framework):
    """An impure sampler would return another mask in another call."""
    masks = np.random.default_rng(0)
    results, events = [], []

    def step(number: int) -> None:
        # A new function for each step; otherwise JAX would reuse the compiled mask.
        sampler = lambda key, keep_prob, shape, **_: framework.array(masks.random(shape) < 0.5)
        results.append(framework.numpy(once(framework, number, sampler=sampler)))

    with framework.library.observing(events.append):
        framework.library.check_dropout(step).raise_if_wrong()
        jax.effects_barrier()
    draws = [event for event in events if hasattr(event, "mask")]
    assert len(draws) == len(results) == 2
    for draw, y in zip(draws, results, strict=True):
        np.testing.assert_array_equal(y, np.where(framework.numpy(draw.mask), 2 * X, 0))


@both_frameworks
def test_guards_nest_but_blocks_of_one_guard_do_not(framework: Framework):
    outer, inner = framework.library.DropoutGuard(), []
    for number in range(2):
        with outer.training():
            once(framework, number)
            step = lambda step, n=number: once(framework, 2 + 2 * n + step)
            inner += framework.library.check_dropout(step).rows
    assert [row.draws for row in inner] == [(1, 1)] * 2
    assert [row.draws for row in outer.report().rows] == [(3, 3)]
    with (
        outer.training(),
        pytest.raises(RuntimeError, match="a block inside a block of the same guard"),
        outer.evaluation(),
    ):
        pass
    assert [row.draws for row in outer.report().rows] == [(3, 3, 0)]


@both_frameworks
def test_a_site_that_is_expected_at_rate_0_must_not_draw(framework: Framework):
    check = framework.library.check_dropout
    silent = lambda number: once(framework, number, deterministic=True)
    check(silent, expect={"it": 0.0}).raise_if_wrong()
    (finding,) = check(lambda number: once(framework, number), expect={"it": 0.0}).findings
    assert finding.detail == "its rate is 0.5, and 0 was expected"
