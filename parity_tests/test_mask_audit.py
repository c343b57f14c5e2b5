"""The search for masks that are copies of one another, in both packages and in their guards.

An audit of independent masks finds something with a probability of at most 1e-9, and the seeds are
fixed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from parity_tests.frameworks import FRAMEWORKS, JAX, TORCH, Framework
from parity_tests.tables import both_frameworks

ROWS, COLUMNS = SHAPE = (32, 128)
SIZE = ROWS * COLUMNS
STREAM = np.random.default_rng(0).random(8 * SIZE)


def mask(first: int = 0, stride: int = 1, rate: float = 0.5) -> np.ndarray:
    """Return a mask of numbers of the one stream."""
    return (STREAM[first : first + stride * SIZE : stride] >= rate).reshape(SHAPE)


ROW = np.repeat(mask()[:1], ROWS, axis=0)
PART = mask(SIZE).flatten()
PART[2000:2080] = mask().flat[300:380]
# The masks by labels, their rates, and the relation that is found.
FAULTS: dict[str, tuple[dict[Any, np.ndarray], Any, str]] = {
    "shifted by 1": ({"a": mask(), "b": mask(1)}, 0.5, "b is a copy of a, shifted by 1"),
    "shifted by 4": ({"a": mask(), "b": mask(4)}, 0.5, "b is a copy of a, shifted by 4"),
    "shifted back": ({"a": mask(4), "b": mask()}, 0.5, "b is a copy of a, shifted by 4"),
    "shifted by a row": (
        {"a": mask(), "b": mask(128)},
        0.5,
        "b is a copy of a, shifted by 128",
    ),
    "shifted at a low rate": (
        {"a": mask(rate=0.1), "b": mask(4, rate=0.1)},
        0.1,
        "b is a copy of a, shifted by 4",
    ),
    "every 2nd element": (
        {"a": STREAM[: 2 * SIZE] >= 0.5, "b": mask(stride=2)},
        0.5,
        "b is a copy of every 2nd element of a (",
    ),
    "every 32nd element of an earlier mask": (
        {"a": STREAM[:16384] >= 0.5, "b": STREAM[5:16384:32] >= 0.5},
        0.5,
        "b is a copy of every 32nd element of a, from element 5",
    ),
    "one row": ({"a": ROW, "b": mask(SIZE)}, 0.5, "a is a copy of itself, shifted by 128"),
    "one row at a low rate": (
        {"a": np.repeat(mask(rate=0.1)[:1], ROWS, axis=0)},
        0.1,
        "a is a copy of itself, shifted by 128",
    ),
    "one plane of a large mask": (
        {"a": np.repeat(mask()[None], 8, axis=0).repeat(4, axis=2)},
        0.5,
        "a is a copy of itself",
    ),
    "two sites": ({("a", 0): mask(), ("b", 0): mask()}, 0.5, "('b', 0) is a copy of ('a', 0)"),
    "two steps": ({("a", 0): mask(), ("a", 1): mask()}, 0.5, "('a', 1) is a copy of ('a', 0)"),
    "two devices": (
        {("a", 0, device): mask(first) for device, first in enumerate((SIZE, 0, 0))},
        0.5,
        "('a', 0, 2) is a copy of ('a', 0, 1)",
    ),
    "a complement": ({"a": mask(), "b": ~mask()}, 0.5, "b is the complement of a"),
    "a shifted complement": (
        {"a": mask(), "b": ~mask(4)},
        0.5,
        "b is the complement of a, shifted by 4",
    ),
    "transposed": ({"a": mask(), "b": mask().T.copy()}, 0.5, "b is a copy of the transpose of a"),
    "a part": (
        {"a": mask(), "b": PART.reshape(SHAPE)},
        0.5,
        "b is a copy of a, shifted by 1700",
    ),
    "nested": (
        {"a": mask(rate=0.5), "b": mask(rate=0.2)},
        {"a": 0.5, "b": 0.2},
        "b keeps every element that a keeps",
    ),
    "nested the other way": (
        {"a": mask(rate=0.2), "b": mask(rate=0.5)},
        {"a": 0.2, "b": 0.5},
        "b keeps only elements that a keeps",
    ),
    "antithetic": (
        {"a": mask(rate=0.5), "b": (STREAM[:SIZE] < 0.8).reshape(SHAPE)},
        {"a": 0.5, "b": 0.2},
        "b keeps every element that a drops",
    ),
    "disjoint": (
        {"a": mask(rate=0.5), "b": (STREAM[:SIZE] < 0.3).reshape(SHAPE)},
        {"a": 0.5, "b": 0.7},
        "b keeps only elements that a drops",
    ),
}


@pytest.mark.parametrize(("masks", "rates", "expected"), FAULTS.values(), ids=FAULTS)
def test_a_planted_fault_is_found(masks, rates, expected):
    found = [
        framework.library.audit_masks({k: framework.array(m) for k, m in masks.items()}, rates)
        for framework in FRAMEWORKS
    ]
    assert found[0] == found[1]
    (relation,) = found[0]
    assert str(relation).startswith(expected)
    assert relation.chance < 1e-9


def clean(seed: int) -> list[Any]:
    rng, rates = np.random.default_rng(seed), {0: 0.5, 1: 0.1, 2: 0.3, 3: 0.5, 4: 0.9}
    masks = {label: rng.random((16, 64)) >= rate for label, rate in rates.items()}
    return JAX.library.audit_masks(masks, rates)


def test_independent_masks_give_no_alarm():
    assert not any(map(clean, range(50)))


@pytest.mark.slow
def test_a_thousand_runs_give_no_alarm():
    assert not any(map(clean, range(1000, 2000)))


@pytest.mark.parametrize(("length", "is_found"), [(61, True), (60, False)])
def test_the_shortest_copy_that_is_found(length, is_found):
    """The bound is 61 bits in two flat masks of 4096 elements; fewer could be an accident."""
    one, other = mask().flatten(), mask(SIZE).flatten()
    other[1001 : 1001 + length] = one[333 : 333 + length]
    for end in (1000, 1001 + length):  # so that the copy is no longer
        other[end] = not one[end - 1001 + 333]
    found = JAX.library.audit_masks({"a": one, "b": other}, 0.5)
    assert [relation.length for relation in found] == [length] * is_found


@both_frameworks
def test_forward_and_backward_must_be_equal(framework: Framework):
    masks = {"forward": mask(), "backward": mask(), "other": mask(SIZE)}
    audit = lambda: framework.library.audit_masks(
        {label: framework.array(each) for label, each in masks.items()},
        0.5,
        equal=[("forward", "backward")],
    )
    assert not audit()
    masks["backward"] = masks["backward"].copy()
    masks["backward"][3, 5] ^= True
    (relation,) = audit()
    assert str(relation) == "backward differs from forward (1 element)"


@both_frameworks
def test_wrong_arguments_are_rejected(framework: Framework):
    audit, it = framework.library.audit_masks, framework.array(mask())
    for masks, rates, equal, kind, message in [
        ({"a": framework.array(np.ones(3))}, 0.5, (), TypeError, r"masks\['a'\] must be a boolean"),
        ({"a": it}, 0.0, (), ValueError, r"rates must lie in \(0, 1\); got 0\.0\. A mask"),
        ({"a": it}, "0.5", (), TypeError, "rates must be a real number; got '0.5'"),
        ({"a": it}, {"a": 1.0}, (), ValueError, r"rates\['a'\] must lie in \[0, 1\); got 1\.0"),
        ({"a": it}, {"b": 0.5}, (), ValueError, "rates must have a rate for each .* for 'a'"),
        ({"a": it}, 0.5, [("a", "b")], ValueError, "equal must name masks; got 'b'"),
        ({"a": it, "b": it[1:]}, 0.5, [("a", "b")], ValueError, "equal must pair masks of one"),
    ]:
        with pytest.raises(kind, match=message):
            audit(masks, rates, equal=equal)


def sampler_of(framework: Framework, masks: Iterator[np.ndarray]) -> Any:
    # A new function, since JAX would reuse the compiled mask of another one.
    return lambda key, keep_prob, shape, **_: framework.array(next(masks))


GUARDED: dict[str, tuple[list[np.ndarray], str]] = {
    "shifted": (
        [mask(), mask(4)],
        "the mask in step 1 is a copy of that in step 0, shifted by 4",
    ),
    "a complement": (
        [mask(), ~mask()],
        "the mask in step 1 is the complement of that in step 0",
    ),
    "one row": ([ROW, mask(SIZE)], "the mask in step 0 is a copy of itself, shifted by 128"),
}


@both_frameworks
@pytest.mark.parametrize(("masks", "expected"), GUARDED.values(), ids=GUARDED)
def test_a_guard_finds_copies(framework: Framework, masks, expected):
    lib, pending = framework.library, iter(masks)

    def step(number):
        key = lib.site_key(framework.key(7), number, "it")
        sampler = sampler_of(framework, pending)
        lib.dropout(framework.array(np.ones(SHAPE, np.float32)), 0.5, key=key, sampler=sampler)

    (finding,) = lib.check_dropout(step).findings
    assert finding.problem.name == "COPIED_MASK"
    assert expected in finding.detail


@both_frameworks
def test_a_guard_compares_what_is_drawn_again(framework: Framework):
    lib, values = framework.library, framework.array(np.ones(SHAPE, np.float32))
    for second, expected in ((mask(), []), (mask(SIZE), ["REMADE_MASK"])):
        pending = iter([mask(), second, mask(2 * SIZE), mask(2 * SIZE)])

        def step(number, pending=pending):
            key = lib.site_key(framework.key(7), number, "it")
            for _ in range(2):
                lib.dropout(values, 0.5, key=key, sampler=sampler_of(framework, pending))

        findings = lib.check_dropout(step).findings
        assert [finding.problem.name for finding in findings] == expected


def test_a_checkpoint_of_torch_that_draws_another_mask_is_found():
    lib = TORCH.library
    for impure in (False, True):
        masks = iter([mask(number * SIZE) for number in range(4)])
        sampler = sampler_of(TORCH, masks) if impure else lib.bernoulli

        def step(number, sampler=sampler):
            key = lib.site_key(lib.key(7), number, "it")
            x = torch.ones(SHAPE, requires_grad=True)
            run = lambda x: lib.dropout(x, 0.5, key=key, sampler=sampler).square()
            checkpoint(run, x, use_reentrant=False).sum().backward()

        findings = lib.check_dropout(step).findings
        assert [finding.problem.name for finding in findings] == ["REMADE_MASK"] * impure
