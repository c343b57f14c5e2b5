"""The matrix of supported versions: `make test-versions`, or `nox -s NAME` for one session.

Each session has its own environment under `.nox`. nox passes arguments after `--` to pytest:
`nox -s floor -- --cases 2` runs at most two cases of each test. A session whose Python is not
installed is skipped.

PyTorch releases for Linux on PyPI contain CUDA libraries of several gigabytes. The sessions on
Python 3.12 and newer therefore exclude PyTorch and run `tests/regjax`, unless REGJAX_WITH_TORCH
is set. Set PIP_EXTRA_INDEX_URL to install a CPU build.
"""

from __future__ import annotations

import os

import nox

nox.options.default_venv_backend = "venv"
nox.options.error_on_missing_interpreters = False
nox.options.sessions = ["floor", "between", "locked", "newest"]

# The lower bounds of pyproject.toml, exactly; `tests/test_versions.py` compares the two.
FLOOR = [
    "chex==0.1.90",
    "dm-haiku==0.0.16",
    "equinox==0.13.2",
    "flax==0.12.6",
    "jax==0.8.1",
    "jaxlib==0.8.1",
    "numpy<2.4",
    "optax==0.2.6",
]
TORCH = "torch==2.13.0"
PACKAGES = ["chex", "dm-haiku", "equinox", "flax", "jax", "optax"]
# The packages of the extra `zoo`, with the torchvision of that PyTorch.
ZOO = ["timm==1.0.31", "torchvision==0.28.0", "transformers==4.57.6"]
TOOLS = [
    "hypothesis",
    "markdown-it-py",
    "matplotlib",
    "pytest",
    "pytest-xdist",
    "rich",
    "scikit-learn",
]
SHARED = ["--numprocesses", "auto", "--maxprocesses", "8", "--dist", "worksteal"]


@nox.session(python=["3.11"])
def floor(session: nox.Session) -> None:
    """Test the lower bounds of pyproject.toml."""
    run(session, FLOOR, with_torch=True)


@nox.session(python=["3.11"])
@nox.parametrize("jax", ["0.9.2"])
def between(session: nox.Session, jax: str) -> None:
    """Test a JAX between both ends, with the newest packages that support it."""
    run(session, [*PACKAGES, f"jax=={jax}", f"jaxlib=={jax}"], with_torch=True)


@nox.session(python=["3.11", "3.12", "3.13"])
def locked(session: nox.Session) -> None:
    """Test the versions of constraints.txt, which `make test` installs."""
    with_torch = session.python == "3.11" or "REGJAX_WITH_TORCH" in os.environ
    run(session, PACKAGES, "-c", "constraints.txt", with_torch=with_torch)


@nox.session(python=["3.12", "3.13", "3.14"])
def newest(session: nox.Session) -> None:
    """Test the newest releases of everything but PyTorch; JAX 0.11 and newer need Python 3.12."""
    run(session, PACKAGES, "--upgrade", with_torch="REGJAX_WITH_TORCH" in os.environ)


@nox.session
def zoo(session: nox.Session) -> None:
    """Test models of transformers, timm and torchvision (`make test-zoo`)."""
    session.install("-c", "constraints.txt", *ZOO, "-e", ".[test,zoo]")
    session.run("python", "-m", "pip", "check")
    session.run("python", "-m", "pip", "freeze", "--exclude-editable")
    # With this variable, a missing package is a failure, not a skip.
    session.env["REGJAX_ZOO"] = "required"
    session.run("python", "-m", "pytest", *SHARED, "tests/zoo", *session.posargs)


def run(session: nox.Session, requirements: list[str], *options: str, with_torch: bool) -> None:
    """Install exactly these requirements and the package without its own, and run the tests."""
    torch = [TORCH] if with_torch else []
    session.install(*options, *requirements, *torch, *TOOLS)
    session.install("--no-deps", "-e", ".")
    session.run("python", "-m", "pip", "check")
    session.run("python", "-m", "pip", "freeze", "--exclude-editable")
    # Without PyTorch, run the tests of regjax, except those of conversions from PyTorch.
    tests = [] if with_torch else ["tests/regjax", "--ignore", "tests/regjax/test_interop.py"]
    session.run("python", "-m", "pytest", *SHARED, "-m", "not slow", *tests, *session.posargs)
