"""The how-to pages: every block runs in the order of its page, and every output shown is real.

A page consists of blocks in one namespace:

    ```python        a program; what it prints is the `text` block that follows it
    ```pycon         a doctest; white space may differ
    ```diff          lines of the last `python` block that change; the changed block runs
    ```sh            commands of programs of the project; their options are checked
    ```ebnf          a grammar, which is not tested
    <!-- hidden      a program that readers do not see: the claims of the text, as assertions; PAGE
                     is the source of the page, for its tables
"""

from __future__ import annotations

import contextlib
import doctest
import importlib
import io
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import pytest
from markdown_it import MarkdownIt

from tests import reading

DOCS = Path(__file__).parent.parent / "docs"
PAGES = [*sorted((DOCS / "howto").glob("*.md")), DOCS / "decay_rules.md"]
RECIPES = [page for page in PAGES if page.stem != "index"]
# About ten seconds of one core each.
SLOW = {
    "certify_a_port",
    "check_a_train_step",
    "compare_two_runs",
    "port_a_pytorch_model",
    "swap_the_import",
}
# tests/zoo runs these pages, which import timm and transformers.
IN_ZOO = ("port_a_huggingface_model", "port_a_timm_model")
KINDS = ("python", "pycon", "diff", "sh", "text", "hidden", "ebnf")


class Block(NamedTuple):
    """A code block of a page."""

    kind: str  # one of KINDS
    text: str
    line: int


def blocks(page: str) -> Iterator[Block]:
    """Yield the code blocks of a page; one of an unknown kind would not be tested."""
    for token in MarkdownIt().parse(page):
        line = token.map[0] + 1 if token.map else 0
        if token.type == "fence" and not token.info.startswith("{"):
            yield Block(token.info, token.content, line)
        elif token.type == "html_block" and token.content.startswith("<!-- hidden"):
            code = re.sub(r"^<!-- hidden\n|-->\s*$", "", token.content)
            yield Block("hidden", code, line)
        else:
            assert token.type not in ("code_block", "html_block"), f"line {line}: unknown block"


def changed(program: str, diff: str) -> str:
    """Apply a diff without line numbers: each run of `-` lines becomes the `+` lines after it."""
    hunks = re.findall(r"((?:^-.*\n)+)((?:^\+.*\n)+)", diff, re.MULTILINE)
    assert "".join(old + new for old, new in hunks) == diff
    for hunk in hunks:
        old, new = (re.sub(r"^[-+]", "", part, flags=re.MULTILINE) for part in hunk)
        places = re.findall(f"^{re.escape(old)}", program, re.MULTILINE)
        assert len(places) == 1, f"must occur once: {old}"
        program = program.replace(old, new)
    return program


def run_page(name: str, page: str) -> dict[str, Any]:
    """Run the blocks of a page, compare the outputs, and return the namespace."""
    names: dict[str, Any] = {"__name__": name, "PAGE": page}
    program = printed = ""
    for kind, text, line in blocks(page):
        try:
            if kind != "text":
                assert not printed, f"not shown: {printed}"
            if kind == "python":
                program, printed = text, run_program(text, names)
            elif kind == "diff":
                program = changed(program, text)
                printed = run_program(program, names)
            elif kind == "hidden":
                exec(compile(text, "hidden", "exec"), names)
            elif kind == "pycon":
                run_doctest(text, names)
            elif kind == "text":
                assert without_rounding(printed) == without_rounding(text)
                printed = ""
            elif kind == "sh":
                run_commands(text)
            elif kind != "ebnf":
                raise AssertionError(f"kind must be one of {KINDS}; got {kind!r}")
        except Exception as error:
            error.add_note(f"in the {kind} block at {name}.md:{line}")
            raise
    assert not printed, f"not shown: {printed}"
    return names


def without_rounding(output: str) -> str:
    """Hide deviations in float32 and the steps of the largest ones: they depend on the CPU."""
    rounding = r"(0\.00e\+00|\d\.\d\de-(0[6-9]|1\d)) \| \d+"
    return re.sub(rounding, "rounding", output).strip("\n")


def run_program(text: str, names: dict[str, Any]) -> str:
    """Return what a program prints; its lines are those of a file train.py in reports."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(text, "train.py", "exec"), names)
        jax.effects_barrier()
    return out.getvalue()


def run_doctest(text: str, names: dict[str, Any]) -> None:
    """Run a doctest in the namespace of the page."""
    test = doctest.DocTestParser().get_doctest(text, {}, "page", None, None)
    assert test.examples
    test.globs = names
    report = io.StringIO()
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE, verbose=False)
    failed = runner.run(test, out=report.write, clear_globs=False).failed
    assert not failed, report.getvalue()


def run_commands(text: str) -> None:
    """Parse the options of each command, without running the program."""
    for command in text.splitlines():
        words = shlex.split(command, comments=True)
        assert words[:2] == ["python", "-m"]
        module = importlib.import_module(words[2])
        if hasattr(module, "__path__"):
            module = importlib.import_module(f"{words[2]}.__main__")
        options = words[3:]
        if options[:1] == ["certify"]:
            module, options = importlib.import_module(f"{words[2]}.certify.program"), options[1:]
        module._parser().parse_args(options)


@pytest.fixture
def as_a_reader(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """The settings of a fresh interpreter in an empty folder."""
    monkeypatch.chdir(tmp_path)
    with reading.as_a_reader():
        yield


@pytest.mark.usefixtures("as_a_reader")
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=page.stem, marks=pytest.mark.slow if page.stem in SLOW else ())
        for page in PAGES
        if page.stem not in IN_ZOO
    ],
)
def test_a_page_runs(page):
    run_page(page.stem, page.read_text())


@pytest.mark.parametrize("page", RECIPES, ids=lambda page: page.stem)
def test_a_page_begins_with_the_problem_and_the_answer(page):
    """A title, one sentence that states the problem, and a snippet; no code is too wide."""
    shown = [block.text for block in blocks(page.read_text()) if block.kind != "hidden"]
    assert max(len(line) for text in shown for line in text.splitlines()) <= 100
    kinds = [token.type for token in MarkdownIt().parse(page.read_text())]
    assert kinds[0] == "heading_open"
    assert kinds[3] == "paragraph_open"
    assert "fence" in kinds[6:13]


@pytest.mark.parametrize("page", RECIPES, ids=lambda page: page.stem)
def test_a_page_is_listed_and_refers_to_others(page):
    index = (DOCS / "howto" / "index.md").read_text()
    assert f"\n{page.stem}\n" in index or page.stem == "decay_rules"
    links = re.findall(r"\]\(([\w/.]+\.md)[)#]", page.read_text())
    targets = {(page.parent / link).resolve() for link in links}
    assert targets & set(PAGES)
    assert all(target.is_file() for target in targets)


def test_a_page_that_is_right_passes():
    """The test of the test."""
    text = (
        "```python\nx = 1\nprint(x)\n```\n\n```text\n1\n```\n\n<!-- hidden\nassert x == 1\n-->\n\n"
    )
    text += "```pycon\n>>> x\n1\n```\n\n```diff\n-x = 1\n+x = 2\n```\n\n```text\n2\n```\n"
    text += "```python\nprint('1.00e-07 | 3')\n```\n```text\n2.00e-08 | 4\n```\n"
    text += "```sh\npython -m parity_tests --list\n```\n"
    assert [block.kind for block in blocks(text)] == [
        *("python", "text", "hidden", "pycon", "diff", "text", "python", "text", "sh")
    ]
    assert run_page("page", text)["x"] == 2


@pytest.mark.parametrize(
    "text",
    [
        "```python\nprint(1)\n```\n```text\n2\n```\n",
        "```python\nprint(1)\n```\nNo output.\n```python\n```\n",
        "```python\nprint(1)\n```\n",
        "```text\n1\n```\n",
        "```python\nprint('1.00e-07 | 3')\n```\n```text\n1.00e-05 | 3\n```\n",
        "```pycon\n>>> 1\n2\n```\n",
        "```pycon\n1\n```\n",
        "```pycon\n>>> int('a')\nTraceback (most recent call last):\nValueError: b\n```\n",
        "<!-- hidden\nassert False\n-->\n",
        "<!-- other\n-->\n",
        "```py\n```\n",
        "    indented\n",
        "```python\nx = 1\n```\n```diff\n-x = 2\n+x = 3\n```\n",
        "```python\nx = 1\nx = 1\n```\n```diff\n-x = 1\n+x = 3\n```\n",
        "```python\nx = 1\n```\n```diff\n x = 1\n```\n",
        "```sh\nls\n```\n",
    ],
)
def test_a_page_that_is_wrong_fails(text):
    with pytest.raises(AssertionError):
        run_page("page", text)
