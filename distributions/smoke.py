"""A test of installed distributions, which `python -m distributions` runs in their environments.

It needs nothing but the distributions: imports, versions, masks that must never change, and errors
for packages that an extra installs.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from typing import Any

# From parity_tests/test_golden.py: sampler, seed, keep probability, shape, digest.
MASKS = (
    ("bernoulli", 1, 0.9, (33, 65), "99872cf147cd36aa"),
    ("packed_bernoulli", 1, 0.9, (128, 33), "f01a0eabb91e1e80"),
)
# Modules that need an extra, and the extra, by the package that is installed.
EXTRAS = {
    "regjax": {
        "regjax.linen": "flax",
        "regjax.nnx": "flax",
        "regjax.equinox": "equinox",
        "parity_tests.harness": "torch",
    },
    "regtorch": {},
}
FRAMEWORKS = {"regjax": "jax", "regtorch": "torch"}


def digest(mask: Any) -> str:
    """Return the digest of a mask, as `numpy.packbits` packs it, without NumPy."""
    bits = "".join("01"[bool(bit)] for bit in mask.reshape(-1).tolist())
    whole = bits.ljust(-(-len(bits) // 8) * 8, "0")
    packed = bytes(int(whole[i : i + 8], 2) for i in range(0, len(whole), 8))
    return hashlib.sha256(packed).hexdigest()[:16]


def check(package: str, version: str) -> None:
    """Check one package.

    Raises:
        AssertionError: It is not the installed one, has another version, or draws other masks.
    """
    library = importlib.import_module(package)
    assert library.__file__ is not None
    assert library.__file__.startswith(sys.prefix), library.__file__
    assert library.__version__ == version, library.__version__
    key = importlib.import_module("jax").random.key if package == "regjax" else library.key
    for sampler, seed, keep_prob, shape, expected in MASKS:
        found = digest(getattr(library, sampler)(key(seed), keep_prob, shape))
        assert found == expected, (sampler, found)


def check_extra(module: str, extra: str) -> None:
    """Check that a module that needs an extra names it.

    Raises:
        AssertionError: The import succeeds, or its error does not have the command.
    """
    message = "no error"
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        message = str(error)
    assert f"pip install 'regjax[{extra}]'" in message, (module, message)


def smoke(packages: Sequence[str], version: str, *, foreign: bool = False) -> None:
    """Check packages, and that the others are not installed.

    Args:
        packages: The installed ones of `FRAMEWORKS`.
        version: Their version.
        foreign: Whether the frameworks of the others may be installed.
    """
    for package in packages:
        check(package, version)
        both = len(packages) == len(FRAMEWORKS)
        for module, extra in EXTRAS[package].items():
            if extra == "torch" and both:
                importlib.import_module(module)
            else:
                check_extra(module, extra)
    for package, framework in FRAMEWORKS.items():
        if package not in packages:
            assert importlib.util.find_spec(package) is None, package
            assert foreign or importlib.util.find_spec(framework) is None, framework
