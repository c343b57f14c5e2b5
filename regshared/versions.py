"""The versions that a bug report needs: `python -m regjax`, or `python -m regtorch`."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Iterable
from importlib import metadata

PACKAGES = (
    "regjax",
    "regtorch",
    "regshared",
    "jax",
    "jaxlib",
    "optax",
    "flax",
    "equinox",
    "dm-haiku",
    "torch",
    "numpy",
)


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Return the version of Python, and those of the distributions that are installed.

    Args:
        packages: Names of distributions.

    Example:
        >>> list(versions(["no-such-distribution"]))
        ['python']
    """
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def main(package: str) -> None:
    """Print the versions for a bug report, one a line.

    Args:
        package: The package whose `__main__` calls this function.
    """
    about = f"Print the versions that a bug report needs.\n\n    python -m {package}"
    argparse.ArgumentParser(
        prog=f"python -m {package}",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args()
    for name, version in versions().items():
        print(f"{name} {version}")
    print(f"platform {platform.platform()}")
