"""Each page of the lesson runs, its claims hold, and each step is there in both frameworks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import jax
import matplotlib as mpl
import pytest
import torch
from markdown_it import MarkdownIt
from matplotlib import pyplot as plt

LESSON = Path(__file__).parent.parent / "docs" / "lesson"
PAGES = sorted(LESSON.glob("[0-9]_*.md"))
# The foreign names that the cell of a framework must not contain.
FOREIGN = {"JAX": r"\b(torch|regtorch|nn\.functional)\b", "PyTorch": r"\b(jax|jnp|regjax|optax)\b"}
# Seconds on one core: about 7 and 9, the others 11 to 16.
QUICK = {"2_steep_functions", "5_training_and_evaluation"}


class Cell(NamedTuple):
    """A code cell of a page."""

    code: str  # preceded by as many empty lines as in the page, so that tracebacks show the page
    framework: str  # the name in the bold paragraph right above the cell, or empty


def cells(text: str) -> Iterator[Cell]:
    """Yields the code cells of a notebook in MyST Markdown."""
    tokens = [token for token in MarkdownIt().parse(text) if token.type in ("inline", "fence")]
    for above, fence in pairwise(tokens):
        if fence.type == "fence" and fence.info.startswith("{code-cell}"):
            # A line that begins with a colon is an option of the directive.
            code = re.sub(r"^:.*$", "", fence.content, flags=re.MULTILINE)
            labels = [name for name in FOREIGN if above.content == f"**{name}**"]
            assert fence.map
            yield Cell("\n" * (fence.map[0] + 1) + code, "".join(labels))


@pytest.fixture
def as_a_reader(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The settings of a fresh interpreter in the folder of the pages, without a display."""
    monkeypatch.chdir(LESSON)
    with ExitStack() as stack:
        stack.enter_context(jax.numpy_dtype_promotion("standard"))
        stack.enter_context(jax.numpy_rank_promotion("allow"))
        stack.enter_context(torch.random.fork_rng())
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
def test_a_page_runs(page):
    namespace = {"__name__": page.stem}
    for cell in cells(page.read_text()):
        exec(compile(cell.code, page, "exec"), namespace)


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
