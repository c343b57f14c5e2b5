"""Errors of the two programs that are certified: no difference is found, but no result either."""

from __future__ import annotations

import traceback
from pathlib import Path


class InputError(Exception):
    """A program that cannot be certified as it is; the message has one line."""


class ProgramError(InputError):
    """An error that a program raises.

    Args:
        path: The file of the program.
        error: The error.
        fix: What to do about it, as a sentence; empty if that is unknown.
    """

    def __init__(self, path: Path, error: BaseException, fix: str = "") -> None:
        first = str(error).partition("\n")[0]
        got = f"{type(error).__name__}: {first}".rstrip(": ")
        super().__init__(f"{path} must run without an error; got {got}{fix and '. '}{fix}")
        self._path, self._error = path, error

    def traceback(self) -> str:
        """Return the traceback from the first line of the program on."""
        frame = self._error.__traceback__
        while frame and Path(frame.tb_frame.f_code.co_filename) != self._path:
            frame = frame.tb_next
        shown = self._error.with_traceback(frame or self._error.__traceback__)
        return "".join(traceback.format_exception(shown))
