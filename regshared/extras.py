"""Errors for missing optional packages, which an extra of the distribution installs."""

from __future__ import annotations

from types import TracebackType


class needs:  # noqa: N801  # used as `with needs(...)`
    """Context for imports that need an extra: its error has the command that installs it.

    Args:
        who: The module that cannot be imported.
        extra: The extra of the distribution `regjax` that installs the package.
        package: The package that the block imports.

    Example:
        >>> with needs("regjax.linen", extra="flax", package="flux"):
        ...     import flux
        Traceback (most recent call last):
        ModuleNotFoundError: regjax.linen needs flux. Install it: pip install 'regjax[flax]'
    """

    def __init__(self, who: str, *, extra: str, package: str) -> None:
        self._who, self._extra, self._package = who, extra, package

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # An installed package that lacks one of its own dependencies raises its own error.
        if isinstance(error, ModuleNotFoundError) and error.name == self._package:
            fix = f"Install it: pip install 'regjax[{self._extra}]'"
            raise ModuleNotFoundError(
                f"{self._who} needs {self._package}. {fix}", name=error.name
            ) from error
