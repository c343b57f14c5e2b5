"""Output of programs: a folder that is checked before the work, and files that are never partial.

Every command line of this repository with an option `--out` uses this file.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


class Parser(argparse.ArgumentParser):
    """A parser that fails unless the folder of `--out` is writable.

    A program that works for minutes must not find out at the end that it cannot save its results.
    With `--list`, which writes nothing, the folder is not touched.
    """

    def __init__(self, prog: str, description: str | None) -> None:
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(prog=prog, description=description, formatter_class=formatter)

    def add_out(self, default: str, about: str) -> None:
        """Add the option `--out`."""
        self.add_argument(
            "--out",
            type=folder,
            default=Path(default),
            metavar="FOLDER",
            help=f"folder for {about} (default: %(default)s)",
        )

    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        """Parse the options, make the folder, and check it by writing a file."""
        options = super().parse_args(*args, **kwargs)
        if not getattr(options, "list", False):
            prepare(self, options.out)
        return options


def folder(text: str) -> Path:
    """Convert the value of an option to the path of a folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"must name a folder; got {text!r}")
    return Path(text)


def integer(low: int, high: float = math.inf) -> Callable[[str], int]:
    """Return a function that converts the value of an option to an integer from low to high."""
    allowed = f"from {low} to {high}" if high < math.inf else f"of at least {low}"

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be an integer {allowed}; got {text!r}")
        return value

    return convert


def number(allowed: str, accept: Callable[[float], bool]) -> Callable[[str], float]:
    """Return a function that converts the value of an option to an accepted number."""

    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not accept(value):  # no comparison accepts NaN
            raise argparse.ArgumentTypeError(f"must be a number {allowed}; got {text!r}")
        return value

    return convert


def prepare(parser: argparse.ArgumentParser, path: Path) -> None:
    """Make a folder and its parents, or exit as for any other wrong option.

    Raises:
        SystemExit: The folder cannot be made or written; the message names `--out`.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        # Permissions are not enough: the disk may be full, or mounted read-only.
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(b"x")
    except OSError as error:
        parser.error(
            f"argument --out: must be a folder that can be written; got {str(path)!r} "
            f"({error.strerror})"
        )


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to `path`; without an error it then replaces `path`.

    A reader never sees a partial file, and an error leaves the file of an earlier run unchanged.

    Raises:
        OSError: The file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, text: str) -> None:
    """Write a text file that a reader never sees partially written.

    Raises:
        OSError: The file cannot be written.
    """
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
