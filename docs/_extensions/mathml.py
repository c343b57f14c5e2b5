"""Formulas as MathML, which browsers render without scripts, fonts or network.

docutils translates them during the build. A command that it does not know stops the build.
"""

from __future__ import annotations

from typing import Any

from docutils import nodes
from docutils.utils.math import MathError, latex2mathml
from sphinx.errors import ExtensionError
from sphinx.writers.html5 import HTML5Translator


def to_mathml(formula: str, *, block: bool) -> str:
    """Return the MathML of a formula in LaTeX; an unknown command is an error."""
    try:
        return latex2mathml.tex2mathml(" ".join(formula.split()), as_block=block)
    except MathError as error:
        message = f"formula must be in docutils' LaTeX; got {formula!r}: {error}"
        raise ExtensionError(message) from error


def _visit_inline(translator: HTML5Translator, node: nodes.math) -> None:
    translator.body.append(to_mathml(node.astext(), block=False))
    raise nodes.SkipNode


def _visit_block(translator: HTML5Translator, node: nodes.math_block) -> None:
    mathml = to_mathml(node.astext(), block=True)
    translator.body.append(f'<div class="math-block">{mathml}</div>\n')
    raise nodes.SkipNode


def setup(app) -> dict[str, Any]:
    """Register the renderer; `html_math_renderer` chooses it."""
    app.add_html_math_renderer("mathml", (_visit_inline, None), (_visit_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
