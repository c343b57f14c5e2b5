"""The command lines of all programs of this repository, and their output.

A wrong option ends a program in one line, with exit code 2, before it starts to work. A folder is
checked before the work, and files are never partial.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import math
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

INTERRUPTED = 130  # 128 + SIGINT, as shells count


def run(main: Callable[[], int | None]) -> NoReturn:
    """Run a program and exit with its code.

    Without a traceback, exit with 130 if it is interrupted, and with 2 if it needs an extra.
    """
    try:
        code = main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = INTERRUPTED
    except ModuleNotFoundError as error:
        if not isinstance(error.__cause__, ModuleNotFoundError):  # not from `regshared.extras`
            raise
        print(f"error: {error}", file=sys.stderr)
        code = 2
    raise SystemExit(code)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, and that fails unless `--out` is writable.

    A program that works for minutes must not find out at the end that it cannot save its results.
    With `--list`, which writes nothing, the folder is not touched. Options are not abbreviated.

    Args:
        prog: The command, such as `python -m benchmarks.overhead`.
        description: The purpose in one line, then details and examples; a docstring, as a rule.
    """

    def __init__(self, prog: str, description: str | None) -> None:
        formatter = argparse.RawDescriptionHelpFormatter
        about = (description or "").strip()
        super().__init__(
            prog=prog, description=about, formatter_class=formatter, allow_abbrev=False
        )
        self._out_is_file = False

    def add_out(self, default: str, about: str) -> None:
        """Add the option `--out FOLDER`."""
        self.add_argument(
            "--out",
            type=folder,
            default=Path(default),
            metavar="FOLDER",
            help=f"folder for {about} (default: %(default)s)",
        )

    def add_out_file(self, about: str) -> None:
        """Add the option `--out FILE`, without a default."""
        self._out_is_file = True
        text = f"{about} to write (default: none)"
        self.add_argument("--out", type=folder, metavar="FILE", help=text)

    def add_quick(self, about: str) -> None:
        """Add the option `--quick`."""
        self.add_argument("--quick", action="store_true", help=about)

    def add_selection(self, kind: str, names: Callable[[], Iterable[str]]) -> None:
        """Add `--list` and `--only`, which select by name or its beginning.

        Args:
            kind: A noun, such as `check`.
            names: Returns all names; it is called only where a name is checked.
        """

        def convert(text: str) -> str:
            known = list(names())
            if not any(name.startswith(text) for name in known):
                raise argparse.ArgumentTypeError(
                    f"must begin the name of a {kind}; got {text!r}. Choose: {', '.join(known)}"
                )
            return text

        self.add_argument("--list", action="store_true", help=f"list the {kind}s and exit")
        text = f"names of {kind}s, or their beginnings (default: all)"
        self.add_argument("--only", nargs="+", type=convert, default=[], metavar="NAME", help=text)

    def error(self, message: str) -> NoReturn:
        """Exit with code 2, after one line."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")

    def read_args(self, args: Sequence[str] | None = None) -> argparse.Namespace:
        """Parse the options; do not touch the folder of `--out`.

        Raises:
            SystemExit: An option is wrong (2), or it is `--help` (0).
        """
        argv = _with_negative_values_attached(sys.argv[1:] if args is None else args)
        options, unknown = self.parse_known_args(argv)
        if unknown:
            name = unknown[0].partition("=")[0]
            known = [option for action in self._actions for option in action.option_strings]
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
            fix = f"Did you mean {near[0]}?" if near else "Run with --help for a list."
            self.error(f"argument {name}: must be an option of this program; got {name!r}. {fix}")
        return options

    # argparse overloads the method by the type of the namespace.
    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Parse the options, make the folder of `--out`, and check it by writing a file."""
        del namespace
        options = self.read_args(args)
        out = getattr(options, "out", None)
        if out is not None and not getattr(options, "list", False):
            if self._out_is_file and out.is_dir():
                self.error(f"argument --out: must be a file; got the folder {str(out)!r}")
            prepare(self, out.parent if self._out_is_file else out)
        return options


def _with_negative_values_attached(argv: Iterable[str]) -> list[str]:
    """Join `--rate -inf` to `--rate=-inf`, since argparse would parse the value as an option.

    No option begins with a digit: `-2x4` is a value too.
    """
    joined: list[str] = []
    for argument in argv:
        if joined and joined[-1].startswith("--") and "=" not in joined[-1] and _negative(argument):
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


def _negative(text: str) -> bool:
    return re.match(r"-(\.?\d|inf|nan)", text, re.IGNORECASE) is not None


def folder(text: str) -> Path:
    """Convert the value of an option to a path."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"must name a folder or a file; got {text!r}")
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


def one_of(choices: Iterable[str]) -> dict[str, Any]:
    """Return the keyword arguments of an option with a few choices."""
    known = tuple(choices)

    def convert(text: str) -> str:
        if text not in known:
            allowed = ", ".join(map(repr, known))
            raise argparse.ArgumentTypeError(f"must be one of {allowed}; got {text!r}")
        return text

    return {"type": convert, "metavar": f"{{{','.join(known)}}}"}


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
