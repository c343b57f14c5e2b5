"""Each page of the lesson runs, its claims hold, and each step is there in both frameworks.

The English pages are executed. The Chinese ones have the same code, except for the labels of plots,
so it is compared instead.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import pytest
import torch
from markdown_it import MarkdownIt
from markdown_it.token import Token
from matplotlib import pyplot as plt

from tests import reading

LESSON = Path(__file__).parent.parent / "docs" / "lesson"
PAGES = sorted(LESSON.glob("[0-9]_*.md"))
CHINESE = LESSON.with_name("lesson_zh")
# The foreign names that the cell of a framework must not contain.
FOREIGN = {"JAX": r"\b(torch|regtorch|nn\.functional)\b", "PyTorch": r"\b(jax|jnp|regjax|optax)\b"}
# Seconds on one core: about 7 and 9, the others 11 to 16.
QUICK = {"2_steep_functions", "5_training_and_evaluation"}
# The cell after TEXT in a Chinese page, which has no counterpart.
FONT_CELL = """:tags: [remove-cell]

from matplotlib import font_manager

# These fonts have the Chinese characters of TEXT, which Matplotlib's own font lacks.
for weight in ("regular", "bold"):
    font_manager.fontManager.addfont(f"labels-{weight}.otf")
plt.rcParams["font.family"] = ["DejaVu Sans", "Lesson Labels"]
"""
ALT = re.compile(r"(?<=alt: )\".+\"")  # the text in place of a plot, for those who cannot see it
TERMS = {"损失": "loss", "交叉熵": "cross-entropy"}  # in formulas


class Cell(NamedTuple):
    """A code cell of a page."""

    code: str  # preceded by as many empty lines as in the page, so that tracebacks show the page
    framework: str  # the name in the bold paragraph right above the cell, or empty


def cells(text: str) -> Iterator[Cell]:
    """Yields the code cells of a notebook in MyST Markdown."""
    tokens = [token for token in MarkdownIt().parse(text) if token.type in ("inline", "fence")]
    for above, fence in pairwise(tokens):
        if fence.type == "fence" and fence.info.startswith("{code-cell}"):
            labels = [name for name in FOREIGN if above.content == f"**{name}**"]
            assert fence.map
            yield Cell("\n" * (fence.map[0] + 1) + code_of(fence), "".join(labels))


def code_of(fence: Token) -> str:
    """Return the code of a cell, without its options, which are lines that begin with a colon."""
    return re.sub(r"^:.*$", "", fence.content, flags=re.MULTILINE)


def parse(text: str) -> list[Token]:
    """Return the blocks of a page, without its front matter and the cell of the Chinese fonts."""
    text = re.sub(r"\A---\n.*?^---\n", "", text, flags=re.MULTILINE | re.DOTALL)
    return [token for token in MarkdownIt().parse(text) if token.content != FONT_CELL]


def split_labels(code: str) -> tuple[dict[str, str], str]:
    """Return the labels in TEXT, and the code without them and without comments."""
    tree = ast.parse(code)
    labels, body = {}, []
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "TEXT":
            labels = ast.literal_eval(node.value)
        else:
            body.append(node)
    return labels, ast.unparse(ast.Module(body, []))


def facts(token: Token) -> list[object]:
    """Return the facts about a block that a translation keeps."""
    if token.type == "inline":
        assert token.children is not None
        plain = " ".join(child.content for child in token.children if child.type == "text")
        links = [str(child.attrs["href"]) for child in token.children if child.type == "link_open"]
        code = [c.content.replace("\n", " ") for c in token.children if c.type == "code_inline"]
        emphasized = re.findall(r"\*+(.+?)\*+", token.content)
        formulas = [words for words in emphasized if re.search(r"[=²\u2212]|^.( .)*$", words)]
        numbers = re.findall(r"(?<![A-Za-z])\d[\d.,]*(?<=\d)", plain.replace(",", ""))
        links = [re.sub(r"\.\./lesson(_zh)?/", "../translation/", link) for link in links]
        stray = re.findall(r"[*`]", plain)  # marks that Markdown does not recognize
        return [Counter(found) for found in (links, code, formulas, numbers, stray)]
    if token.info.startswith("{code-cell}"):
        labels, code = split_labels(code_of(token))
        options = re.findall(r"^:.*$", ALT.sub("alt", token.content), re.MULTILINE)
        return [token.info, options, sorted(labels), code]
    words = re.split(r"(\w+)", token.content.replace("docs/lesson_zh", "docs/lesson"))
    return [token.info, "".join(TERMS.get(word, word) for word in words)]


def digest(text: str) -> str:
    """Return a digest of the prose and the labels of a page, which ignores line breaks."""
    words = []
    for token in parse(text):
        is_code = token.info.startswith("{code-cell}")
        labels, _ = split_labels(code_of(token)) if is_code else ({}, "")
        words += (
            token.content.split()
            if not is_code
            else [*labels.values(), *ALT.findall(token.content)]
        )
    return hashlib.sha256(" ".join(words).encode()).hexdigest()[:12]


@pytest.fixture
def as_a_reader(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The settings of a fresh interpreter in the folder of the pages, without a display."""
    monkeypatch.chdir(LESSON)
    with ExitStack() as stack:
        stack.enter_context(reading.as_a_reader())
        stack.enter_context(mpl.rc_context())
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        stack.callback(plt.close, "all")
        plt.switch_backend("Agg")
        yield


@pytest.mark.usefixtures("as_a_reader")
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=page.stem, marks=() if page.stem in QUICK else pytest.mark.slow)
        for page in PAGES
    ],
)
@pytest.mark.sample(1)
def test_a_page_runs(page):
    namespace = {"__name__": page.stem}
    for cell in cells(page.read_text()):
        exec(compile(cell.code, page, "exec"), namespace)


def untranslated(english: str, chinese: str) -> str:
    """Describe the first difference between a page and its translation, if there is one."""
    pages = [
        [(t.type, t.tag, t.level, facts(t)) for t in parse(text)] for text in (english, chinese)
    ]
    for pair in zip_longest(*pages):
        if pair[0] != pair[1]:
            return f"the facts of a block differ: {pair}"
    if f"\ntranslated_from: {digest(english)}\n" not in chinese:
        return f"translate the changes in English, then set translated_from to {digest(english)}"
    return ""


@pytest.mark.parametrize("page", [LESSON / "index.md", *PAGES], ids=lambda page: page.stem)
def test_the_chinese_page_is_in_step(page):
    english, chinese = page.read_text("utf-8"), (CHINESE / page.name).read_text("utf-8")
    assert f"\n[中文](../lesson_zh/{page.name})\n" in english
    assert f"\n[English](../lesson/{page.name})\n" in chinese
    assert ("[hide-input]" in chinese) == ("\n  code_prompt_show: 显示代码\n" in chinese)
    assert untranslated(english, chinese) == ""


@pytest.mark.parametrize(
    ("folder", "old", "new"),
    [
        (LESSON, "the same smaller network", "the same network"),
        (LESSON, '"validation cross-entropy"', '"cross-entropy"'),
        (LESSON, "steps: lower with", "steps: higher with"),
        (CHINESE, "## 要点", "### 要点"),
        (CHINESE, "## 要点\n", ""),
        (CHINESE, "- 它只在训练时起作用。\n", ""),
        (CHINESE, "**掩码**", "**掩码 **"),
        (CHINESE, "丢弃率为 0.3 的", "丢弃率为 0.4 的"),
        (CHINESE, "(../api/regjax.md)", "(../api/regtorch.md)"),
        (CHINESE, "除以 *1 \u2212 rate*", "除以 *1 + rate*"),
        (CHINESE, "`site_key` 根据", "`split` 根据"),
        (CHINESE, "keep_prob = 1 - rate", "keep_prob = rate"),
        (CHINESE, "[hide-input]", "[remove-input]"),
        (CHINESE, '    "same": "相同的 key",\n', ""),
        (CHINESE, "**PyTorch**\n", ""),
    ],
)
def test_an_edit_of_one_page_is_detected(folder, old, new):
    pages = {path: (path / "4_dropout.md").read_text("utf-8") for path in (LESSON, CHINESE)}
    assert old in pages[folder]
    pages[folder] = pages[folder].replace(old, new, 1)
    assert untranslated(*pages.values())


def test_a_comment_and_a_line_break_are_no_edits():
    english, chinese = "# Title\n\nTwo words", "---\ntranslated_from: %s\n---\n# 标题\n\n两个词"
    chinese %= digest(english.replace(" words", "\nwords"))
    cell = "\n\n```{code-cell} python3\nx = 1%s\n```\n"
    assert untranslated(english + cell % "", chinese + cell % "  # 注释") == ""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_plot_has_an_alternative_text(page):
    for token in parse(page.read_text("utf-8")):
        assert ("plt.subplots(" in token.content) == bool(ALT.search(token.content))


def test_the_chinese_pages_have_the_same_names():
    names = [{path.name for path in folder.glob("*.md")} for folder in (LESSON, CHINESE)]
    assert names[0] == names[1]


@pytest.mark.usefixtures("as_a_reader")
def test_the_chinese_labels_can_be_drawn(monkeypatch, caplog):
    """Each page with labels loads the fonts, which have every character in both weights."""
    monkeypatch.chdir(CHINESE)
    for page in PAGES:
        codes = [cell.code for cell in cells((CHINESE / page.name).read_text("utf-8"))]
        labels, _ = split_labels(codes[0])
        assert labels or "plt" not in codes[0]
        if labels:
            exec(codes[1], {"plt": plt})
            figure = plt.figure()
            for weight in ("normal", "bold"):
                figure.text(0, 0, "".join(labels.values()), weight=weight)
            figure.canvas.draw()  # warns of a character that no font has
    assert not caplog.records  # warns of a weight that no font has


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_each_step_is_there_in_both_frameworks(page):
    steps = [cell for cell in cells(page.read_text()) if cell.framework]
    assert [step.framework for step in steps] == list(FOREIGN) * (len(steps) // 2)
    assert len(steps) >= 4
    for step in steps:
        assert not re.search(FOREIGN[step.framework], step.code)


def test_the_cells_of_a_page_are_found():
    """The test of the test."""
    text = "# Title\n\n**JAX**\n\n```{code-cell} python3\n:tags: [remove-cell]\n\nx = 1\n```\n\n"
    text += "```python\nignored\n```\n\n```{code-cell} python3\nx = 2\n```\n"
    assert list(cells(text)) == [Cell("\n" * 7 + "x = 1\n", "JAX"), Cell("\n" * 15 + "x = 2\n", "")]


def test_a_chinese_page_of_a_site_has_its_language_and_its_words_in_the_index(
    tmp_path, monkeypatch
):
    sphinx = pytest.importorskip("sphinx.application")
    monkeypatch.syspath_prepend(LESSON.parent / "_extensions")
    pages = {
        "index": "Title\n=====\n\nweight decay\n",
        "lesson_zh/a": "权重\n====\n\nL2与权重衰减。\n",
    }
    for name, text in pages.items():
        path = tmp_path / f"{name}.rst"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f":orphan:\n\n{text}", "utf-8")
    settings = {"extensions": ["chinese"], "html_theme": "basic", "language": "en"}
    folders = (tmp_path, None, tmp_path / "html", tmp_path / "doctrees", "html", settings)
    sphinx.Sphinx(*folders, status=None, warning=None).build()
    html = {name: (tmp_path / "html" / f"{name}.html").read_text("utf-8") for name in pages}
    assert [re.findall(r'<html.*? lang="(.*?)"', text) for text in html.values()] == [
        ["en"],
        ["zh-CN"],
    ]
    script = (tmp_path / "html" / "searchindex.js").read_text("utf-8")
    index = json.loads(script[script.index("{") : script.rindex("}") + 1])
    chinese = [word for word in index["terms"] if not word.isascii()]
    assert sorted(chinese) == sorted([*"与减衰", "与权", "重衰", "衰减"])
    assert sorted(index["titleterms"]) == sorted(["titl", *"权重", "权重"])
    assert {"weight", "decay", "l2"} <= index["terms"].keys()
