"""The versions that a bug report needs: `python -m regjax`, or `python -m regtorch`."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Iterable, Mapping
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


def shared_packages(owners: Mapping[str, Iterable[str]] | None = None) -> list[str]:
    """Return an error for each package of this project that two distributions have installed.

    If one of them is uninstalled, the package is gone for both.

    Args:
        owners: The distributions by import package; None for those of the environment.

    Example:
        >>> print(*shared_packages({"regtorch": ["regjax", "regtorch"], "jax": ["jax"]}))
        regtorch must belong to one distribution; got regjax, regtorch. Uninstall all, and install
        one.
    """
    found = metadata.packages_distributions() if owners is None else owners
    return [
        f"{package} must belong to one distribution; got {', '.join(names)}. "
        "Uninstall all, and install one."
        for package in ("regjax", "regtorch", "regshared", "parity_tests")
        if len(names := sorted(set(found.get(package, ())))) > 1
    ]


def main(package: str) -> int:
    """Print the versions for a bug report, one a line.

    Args:
        package: The package whose `__main__` calls this function.

    Returns:
        The exit code: 1 if two distributions have installed the same package, otherwise 0.
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
    errors = shared_packages()
    print(*errors, sep="\n", end="\n" * bool(errors))
    return int(bool(errors))
