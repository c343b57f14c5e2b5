from __future__ import annotations

import pytest

from regshared.globs import matches


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [
        ("encoder/*/kernel", "encoder/0/kernel", True),
        ("encoder/*/kernel", "encoder/0/dense/kernel", False),
        ("encoder/**/kernel", "encoder/0/dense/kernel", True),
        ("encoder/**/kernel", "encoder/kernel", True),
        ("encoder/**", "decoder/kernel", False),
        ("encoder/**", "my/encoder/kernel", False),
        ("**/encoder/**", "my/encoder/kernel", True),
        ("kernel", "a/b/kernel", True),
        ("ker*", "kernel", True),
        ("kernel", "a/kernel/b", False),
        ("KERNEL", "a/kernel", False),
        ("layer_[01]/*", "layer_1/w", True),
        ("layer_?/w", "layer_12/w", False),
        ("a.*.weight", "a/0/weight", True),
        ("a/*/weight", "a.0.weight", True),
        ("a/*", "a.0.weight", False),
        ("**", "", True),
        ("*", "", False),
        ("**", "a/b", True),
    ],
)
def test_globs(pattern, path, expected):
    assert matches(pattern, path) is expected
