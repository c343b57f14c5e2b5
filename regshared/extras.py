"""The packages that an extra installs: a helpful error if one is missing."""

from __future__ import annotations

from types import TracebackType


class needs:  # noqa: N801  # reads as a word: `with needs(...)`
    """A block of imports that fails with the command that installs the missing package.

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
