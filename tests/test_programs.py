"""Every program has help, and rejects wrong options in one line before it starts to work.

A program is a module with a block for `__main__`; the tests find them.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from parity_tests import output
from regshared.extras import needs

ROOT = Path(__file__).parent.parent
FOLDERS = ("benchmarks", "distributions", "docs", "examples", "parity_tests", "tests")
# `--help` of the others imports a framework.
LIGHT = (
    "benchmarks.attention_kernel",
    "benchmarks.device_check",
    "benchmarks.gpu_kernels",
    "benchmarks.gpu_model",
    "benchmarks.scale",
    "benchmarks.tpu_model",
    "distributions.__main__",
    "examples.overfit.__main__",
    "examples.port_from_huggingface",
    "examples.port_from_timm",
    "examples.port_from_torch.__main__",
    "examples.recurrent_dropout.__main__",
    "examples.sharded_lm.__main__",
    "examples.sharded_lm.equality",
    "examples.torch_ddp",
    "examples.uncertainty.__main__",
    "tests.mutants",
    "tests.sweep.__main__",
)


def is_program(source: str) -> bool:
    """Return whether a module has a block for `__main__`."""
    tests = [ast.unparse(n.test) for n in ast.parse(source).body if isinstance(n, ast.If)]
    return "__name__ == '__main__'" in tests


def programs() -> list[str]:
    paths = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    return [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in paths
        if is_program(path.read_text())
    ]


PROGRAMS = programs()


def command(program: str) -> str:
    if program.startswith("docs."):  # a folder of pages, not a package
        return f"python {program.replace('.', '/')}.py"
    return f"python -m {program.removesuffix('.__main__')}"


def run(program: str, *options: str) -> int:
    """Return the exit code of a program that must end while it reads its options."""
    with pytest.raises(SystemExit) as exited:
        importlib.import_module(program).main(list(options))
    return exited.value.code


def parser_of(program: str, monkeypatch) -> argparse.ArgumentParser:
    """Return the parser of a program, which is stopped before it reads its options."""
    found = []

    def stop(parser: argparse.ArgumentParser, *_: object):
        found.append(parser)
        raise SystemExit(0)

    with monkeypatch.context() as patch:
        patch.setattr(output.Parser, "read_args", stop)
        run(program)
    return found[0]


def taking_a_value(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Return the actions with a value; argparse reports only the first of those it requires."""
    actions = [action for action in parser._actions if action.nargs != 0]
    required = [action for action in actions if action.required and not action.option_strings]
    return [action for action in actions if action not in required[1:]]


def test_programs_are_found():
    assert len(PROGRAMS) > 15
    assert {"examples.overfit.__main__", "benchmarks.quantile", "tests.sweep.__main__"} <= set(
        PROGRAMS
    )
    assert is_program("if __name__ == '__main__':\n    main()")
    assert not is_program("def main(): ...")


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_has_usage_purpose_and_an_example(capsys, program):
    assert run(program, "--help") == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: {command(program)} [-h]")
    purpose = text.split("\n\n")[1].splitlines()[0]
    assert re.fullmatch(r"[A-Z].{20,}[.,:;]", purpose)
    assert re.search(rf"^ *{command(program)}( |$)", text, re.MULTILINE)
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_option_has_a_description_with_its_default(monkeypatch, program):
    parser = parser_of(program, monkeypatch)
    for action in parser._actions:
        assert action.help, action
    for action in taking_a_value(parser):
        assert action.required or "(default: " in action.help, action.option_strings
        assert action.type or action.dest == "tag", action.option_strings


@pytest.mark.parametrize("program", PROGRAMS)
def test_an_unknown_option_is_rejected(capsys, monkeypatch, program):
    required = [a for a in parser_of(program, monkeypatch)._actions if a.required]
    rest = [__file__ for _ in required]  # any file
    for options in (["--no-such-option"], ["--no-such-option=3"]):
        assert run(program, *options, *rest) == 2
        line = capsys.readouterr().err
        assert line.count("\n") == 1
        assert "argument --no-such-option: must be an option of this program; got" in line
        assert line.endswith("Run with --help for a list.\n")


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_wrong_value_is_rejected_by_name(capsys, monkeypatch, tmp_path, program):
    """Numbers out of range, wrong choices, names of nothing, and folders that are files."""
    (tmp_path / "file").touch()
    wrong = {"out": [str(tmp_path / "file" / "deeper" / "still"), ""]}
    for action in taking_a_value(parser_of(program, monkeypatch)):
        option = (action.option_strings or [action.metavar or action.dest])[0]
        for value in wrong.get(action.dest, ["nonesuch", "nan", "-1"]):
            options = [*action.option_strings[:1], value]
            if not action.option_strings and value.startswith("-"):
                continue
            assert run(program, *options) == 2
            line = capsys.readouterr().err
            assert line.count("\n") == 1
            assert line.startswith(f"{command(program)}: error: argument {option}: must ")
            assert "; got " in line
            assert (value if action.metavar != "FILE" else str(Path(value).parent)) in line


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_missing_value_is_rejected(capsys, monkeypatch, program):
    for action in taking_a_value(parser_of(program, monkeypatch)):
        if action.option_strings:
            assert run(program, action.option_strings[0]) == 2
            assert f"argument {action.option_strings[0]}: expected" in capsys.readouterr().err


def test_a_typo_is_recognized(capsys):
    assert run("examples.overfit.__main__", "--step", "3") == 2
    assert "got '--step'. Did you mean --steps?" in capsys.readouterr().err
    assert run("examples.overfit.__main__", "--bogus") == 2  # two letters of --out are no typo
    assert "got '--bogus'. Run with --help for a list." in capsys.readouterr().err


def test_an_interrupt_has_no_traceback(capsys):
    def main():
        raise KeyboardInterrupt

    for function, code in ((main, output.INTERRUPTED), (lambda: 1, 1), (lambda: None, None)):
        with pytest.raises(SystemExit) as exited:
            output.run(function)
        assert exited.value.code == code
    assert capsys.readouterr().err == "interrupted\n"


def test_a_missing_extra_is_one_line(capsys):
    def main():
        with needs("this program", extra="zoo", package="missing"):
            importlib.import_module("missing")

    with pytest.raises(SystemExit) as exited:
        output.run(main)
    assert exited.value.code == 2
    advice = "this program needs missing. Install it: pip install 'regjax[zoo]'"
    assert capsys.readouterr().err == f"error: {advice}\n"
    with pytest.raises(ModuleNotFoundError, match="No module named 'missing'"):
        output.run(lambda: importlib.import_module("missing"))


def test_help_of_light_programs_imports_no_framework():
    code = "\n".join(
        [
            "import importlib, sys",
            f"for name in {LIGHT}:",
            "    importlib.import_module(name)",
            "print({'jax', 'torch', 'sklearn', 'matplotlib'} & sys.modules.keys())",
        ]
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


def test_every_program_starts_through_the_shared_code():
    for program in PROGRAMS:
        source = (ROOT / (program.replace(".", "/") + ".py")).read_text()
        assert re.search(r"^ +(output\.)?run\(main\)$", source, re.MULTILINE), program
